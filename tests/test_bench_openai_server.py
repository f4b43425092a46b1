"""Answers of OpenAI servers of all kinds, over real HTTP: what is counted, and what is a failure."""

import asyncio
import json
import socket
import ssl
from collections.abc import Iterator
from typing import Any

import pytest
from openai_fakes import OpenAIFake, chunk, events, openai_fake, usage

from tpdist.bench.http import Address, HttpError, requesting
from tpdist.bench.load import Answer
from tpdist.bench.openai_server import Found, OpenAIServer, find_model
from tpdist.bench.prompts import Prompt
from tpdist.errors import JoinError, RequestError, SettingsError

LIMIT_S = 20.0


@pytest.fixture
def fake() -> Iterator[OpenAIFake]:
    with openai_fake() as server:
        yield server


def ask(fake: OpenAIFake, prompt: Prompt = (1, 2), *, max_tokens: int = 3) -> tuple[Answer, list[int]]:
    """The answer, and how many tokens came each time."""
    counts: list[int] = []

    async def run() -> Answer:
        server = OpenAIServer(Address.parse(fake.url), model="big", api_key=fake.key)
        async with asyncio.timeout(LIMIT_S):
            return await server.answer(prompt, max_tokens=max_tokens, on_tokens=counts.append)

    return asyncio.run(run()), counts


def find(url: str, *, model: str | None = None, api_key: str | None = None, timeout_s: float = LIMIT_S) -> Found:
    return asyncio.run(find_model(url, model=model, api_key=api_key, timeout_s=timeout_s))


@pytest.mark.parametrize("chunked", [False, True])
def test_a_stream_is_counted_by_its_token_ids(fake: OpenAIFake, chunked: bool) -> None:
    fake.chunked = chunked
    fake.streams = [events(chunk(token_ids=[4]), chunk("", [5, 6]), chunk("", [], "length"), usage(99, cached=2))]
    assert ask(fake) == (Answer(num_tokens=3, num_cached_tokens=2), [1, 2])


def test_without_token_ids_the_usage_decides_over_the_chunks(fake: OpenAIFake) -> None:
    fake.streams = [events(chunk("ab"), chunk(""), chunk("cd", finish_reason="length"), usage(7))]
    assert ask(fake) == (Answer(num_tokens=7), [1, 1])


def test_without_ids_and_usage_the_chunks_are_counted(fake: OpenAIFake) -> None:
    fake.streams = [events(chunk("a"), chunk("b", finish_reason="length"), done=False)]
    assert ask(fake) == (Answer(num_tokens=2), [1, 1])


def test_the_request_bans_the_end_of_sequence_and_asks_for_ids_and_usage(fake: OpenAIFake) -> None:
    ask(fake, (7, 8, 9), max_tokens=5)
    ask(fake, "text")
    first, second = fake.asked
    assert first["prompt"] == [7, 8, 9]
    assert second["prompt"] == "text"
    assert (first["model"], first["max_tokens"], first["min_tokens"], first["ignore_eos"]) == ("big", 5, 5, True)
    assert first["stream_options"] == {"include_usage": True}
    assert fake.paths == ["/v1/completions"] * 2


@pytest.mark.parametrize(
    ("stream", "told"),
    [
        (429, "HTTP 429: told so"),
        (503, "HTTP 503: told so"),
        (events(chunk("a"), {"error": {"message": "rank 1 was lost"}}), "rank 1 was lost"),
        (events({"error": "just text"}), "just text"),
        (events({"object": "error", "message": "older vLLM"}), "older vLLM"),
        (events(["not an object"]), "not an object"),
        (b"data: {broken\n\n", "no JSON: {broken"),
        (events(chunk("a"), chunk("b"), done=False), "broke off after 2 tokens"),
        (b"", "broke off after 0 tokens"),
    ],
)
def test_what_is_no_whole_answer_is_a_failure_that_says_why(fake: OpenAIFake, stream: Any, told: str) -> None:
    fake.streams = [stream]
    with pytest.raises(RequestError, match=told):
        ask(fake)


def test_a_server_that_does_not_stream_is_a_failure(fake: OpenAIFake) -> None:
    fake.content_type = "application/json"
    with pytest.raises(RequestError, match="sent application/json"):
        ask(fake)


async def talk(answer: bytes) -> bytes:
    """The body that is read from a server which sends these bytes and closes."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    address = Address("127.0.0.1", port, False, "")
    async with server, asyncio.timeout(LIMIT_S), requesting(address, "/", headers={}) as http:
        return await http.body()


@pytest.mark.parametrize(
    ("answer", "body"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nab", b"ab"),
        (b"HTTP/1.0 200 OK\r\n\r\nuntil the end", b"until the end"),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\na", b"a"),
        (
            b"HTTP/1.1 200\r\ntransfer-encoding: Chunked\r\n\r\n2;name=x\r\nab\r\nA\r\n0123456789\r\n0\r\n\r\n",
            b"ab0123456789",
        ),
    ],
)
def test_bodies_of_all_kinds_are_read(answer: bytes, body: bytes) -> None:
    assert asyncio.run(talk(answer)) == body


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"SSH-2.0-OpenSSH_9\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nab",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\nab\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"a" * 100_000 + b"\r\n\r\n",
    ],
)
def test_what_is_no_http_or_breaks_off_is_an_error(answer: bytes) -> None:
    with pytest.raises(HttpError):
        asyncio.run(talk(answer))


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://a:1", Address("a", 1, False, "")),
        ("http://a", Address("a", 80, False, "")),
        ("https://a/base/", Address("a", 443, True, "/base")),
        ("http://[::1]:8000", Address("::1", 8000, False, "")),
    ],
)
def test_urls_are_read(url: str, address: Address) -> None:
    assert Address.parse(url) == address
    assert Address.parse(str(address)) == address


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://a", "http://", "http://a:port", "http://a:99999"])
def test_a_url_that_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(SettingsError, match="--url"):
        Address.parse(url)


@pytest.mark.parametrize("end", ["", "/", "/v1", "/v1/"])
def test_the_first_model_is_taken_unless_one_is_named(fake: OpenAIFake, end: str) -> None:
    assert find(fake.url + end).model == "big"
    assert find(fake.url + end, model="small").model == "small"
    assert fake.paths == ["/v1/models"] * 2


def test_a_model_that_the_server_does_not_have_is_named_with_those_it_has(fake: OpenAIFake) -> None:
    with pytest.raises(SettingsError, match="no model huge; it has big, small"):
        find(fake.url, model="huge")


@pytest.mark.parametrize(("key", "told"), [(None, "set --api-key-file"), ("wrong", "is not its key")])
def test_a_wrong_key_is_told_with_the_flag(fake: OpenAIFake, key: str | None, told: str) -> None:
    fake.key = "right"
    with pytest.raises(SettingsError, match=told):
        find(fake.url, api_key=key)
    assert find(fake.url, api_key="right").model == "big"


@pytest.mark.parametrize("models", ["text", {"data": []}, {"data": [{"name": "x"}]}, []])
def test_another_server_on_the_port_is_told(fake: OpenAIFake, models: Any) -> None:
    fake.models = json.loads(json.dumps(models))
    with pytest.raises(SettingsError, match="is this an OpenAI server"):
        find(fake.url)


def test_a_page_that_is_not_there_is_told(fake: OpenAIFake) -> None:
    fake.models_status = 404
    with pytest.raises(SettingsError, match="404"):
        find(fake.url)


def test_a_server_that_is_not_there_is_told() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        with pytest.raises(JoinError, match=f"cannot reach {url}"):
            find(url)


def test_a_server_that_does_not_answer_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(JoinError, match=r"within 0\.05 s"):
            find(url, timeout_s=0.05)


def test_a_connection_that_is_refused_is_a_failed_request() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        fake = OpenAIFake(url=f"http://127.0.0.1:{bound.getsockname()[1]}")
        with pytest.raises(RequestError, match="ConnectionRefusedError"):
            ask(fake)


def test_one_tls_context_serves_all_requests_of_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    make, made = ssl.create_default_context, []
    monkeypatch.setattr(ssl, "create_default_context", lambda: made.append(make()) or made[-1])

    async def run() -> None:
        listener = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
        async with listener, asyncio.timeout(LIMIT_S):
            port = listener.sockets[0].getsockname()[1]
            server = OpenAIServer(Address.parse(f"https://127.0.0.1:{port}"), model="big", api_key=None)
            for _ in range(3):
                with pytest.raises(RequestError):
                    await server.answer((1, 2), max_tokens=3, on_tokens=lambda count: None)

    asyncio.run(run())
    assert len(made) == 1
