"""Clients that open connections and say nothing, or little, or slowly, or do not read: each is ended, others served."""

import asyncio
import contextlib
import subprocess
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx
import pytest
from server_fakes import MODEL, FakeClient, app_for, small_tokenizer
from waiting import within

from tpdist.server import body
from tpdist.server.connections import MANY_PIECES, Connections, Limits
from tpdist.server.http import HttpServer
from tpdist.server.tokenizer import Tokenizer

DEADLINE_S = 20
SOON = Limits(head_s=0.2, body_s=0.2, stall_s=0.2)
"""What is tested ends soon; what is not tested in a case takes no time."""
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@contextlib.asynccontextmanager
async def serving(tokenizer: Tokenizer, limits: Limits, fake: FakeClient | None = None, **options: Any) -> Any:
    fake = fake or FakeClient(lambda request: [50, 51])
    server = HttpServer(app_for(fake, tokenizer), port=0, limits=limits, **options)
    await server.start()
    try:
        yield server
    finally:
        await server.stop(timeout_s=1)


Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@contextlib.asynccontextmanager
async def connected(server: HttpServer, sent: bytes = b"") -> AsyncIterator[Connection]:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(sent)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def rest_of(reader: asyncio.StreamReader) -> bytes:
    """What still comes before the server closes, or resets, the connection."""
    got = b""
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65536):
            got += data
    return got


async def is_alive(server: HttpServer) -> bool:
    async with httpx.AsyncClient(trust_env=False, verify=False) as client:
        return (await client.get(f"{server.url}/livez")).status_code == 200


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(within(DEADLINE_S, main()))


# -- deadlines --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sent", [b"", b"G", b"GET /livez HTTP/1.1\r\nHost: x\r\nX-Slow: "])
def test_a_head_that_does_not_come_ends_the_connection(tokenizer: Tokenizer, sent: bytes) -> None:
    async def main() -> None:
        async with serving(tokenizer, SOON) as server, connected(server, sent) as (reader, _):
            assert await rest_of(reader) == b""
            assert await is_alive(server)

    run(main)


def test_a_head_that_comes_byte_by_byte_gains_no_time(tokenizer: Tokenizer) -> None:
    async def main() -> None:
        async with serving(tokenizer, SOON) as server, connected(server) as (reader, writer):
            ended = asyncio.create_task(rest_of(reader))
            while not ended.done():
                writer.write(b"x")
                await asyncio.wait({ended}, timeout=0.01)
            assert await ended == b""

    run(main)


@pytest.mark.parametrize("framing", [b"Content-Length: 1000\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n5\r\n"])
def test_a_body_that_does_not_come_is_told_so(tokenizer: Tokenizer, framing: bytes) -> None:
    async def main() -> None:
        async with serving(tokenizer, SOON) as server, connected(server, HEAD + framing + b"{") as (reader, _):
            answer = await rest_of(reader)
            assert answer.startswith(b"HTTP/1.1 408 ")
            assert b'"the body did not come within 0.2 s"' in answer
            assert await is_alive(server)

    run(main)


def test_a_body_that_goes_on_after_its_refusal_does_not_keep_the_connection(tokenizer: Tokenizer) -> None:
    async def main() -> None:
        head = b"POST /nowhere HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n"
        async with serving(tokenizer, SOON) as server, connected(server, head) as (reader, _):
            assert (await rest_of(reader)).startswith(b"HTTP/1.1 404 ")

    run(main)


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_may_take_longer_than_every_deadline(tokenizer: Tokenizer, stream: bool) -> None:
    async def main() -> None:
        fake = FakeClient(lambda request: [50, 51], hang_after=1)
        content = b'{"model": "%s", "prompt": "x", "stream": %s}' % (MODEL.encode(), str(stream).lower().encode())
        request = HEAD + b"Content-Length: %d\r\n\r\n" % len(content) + content
        async with serving(tokenizer, SOON, fake) as server, connected(server, request) as (reader, writer):
            await fake.hanging.wait()
            async with connected(server) as (other, _):
                # Its deadline begins later than any of the request's and has passed.
                assert await rest_of(other) == b""
            assert fake.aborted == []
            assert not reader.at_eof()
            writer.transport.abort()
            while not fake.aborted:
                await asyncio.sleep(0.01)

    run(main)


def test_a_client_that_does_not_read_its_answers_is_ended(tokenizer: Tokenizer) -> None:
    async def main() -> None:
        async with serving(tokenizer, SOON) as server, connected(server) as (reader, writer):
            reader._transport.pause_reading()  # type: ignore[attr-defined]
            with contextlib.suppress(ConnectionError):
                while True:
                    writer.write(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 100)
                    await writer.drain()
            assert await is_alive(server)

    run(main)


def test_a_connection_serves_many_requests(tokenizer: Tokenizer) -> None:
    async def main() -> None:
        async with serving(tokenizer, Limits(max_connections=1)) as server, connected(server) as (reader, writer):
            for _ in range(3):
                writer.write(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n" * 2)
                for _ in range(2):
                    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 OK\r\n")
                    await reader.readuntil(b"}")

    run(main)


# -- number -----------------------------------------------------------------------------------------------------------


def test_a_new_connection_takes_the_place_of_the_one_that_was_idle_for_longest(tokenizer: Tokenizer) -> None:
    async def main() -> None:
        async with contextlib.AsyncExitStack() as held:
            server = await held.enter_async_context(serving(tokenizer, Limits(max_connections=20)))
            silent = [await held.enter_async_context(connected(server, HEAD)) for _ in range(20)]
            for reader, _ in silent:
                asking = connected(server, b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
                answer, _ = await held.enter_async_context(asking)
                assert await answer.readline() == b"HTTP/1.1 200 OK\r\n"
                assert await rest_of(reader) == b""

    run(main)


def test_when_all_are_being_answered_a_new_one_is_told_to_come_again(tokenizer: Tokenizer) -> None:
    async def main() -> None:
        fake = FakeClient(lambda request: [50, 51], hang_after=0)
        content = b'{"model": "%s", "prompt": "x"}' % MODEL.encode()
        request = HEAD + b"Content-Length: %d\r\n\r\n" % len(content) + content
        async with serving(tokenizer, Limits(max_connections=1), fake) as server, connected(server, request):
            await fake.hanging.wait()
            async with connected(server) as (reader, _):
                answer = await rest_of(reader)
                assert answer.startswith(b"HTTP/1.1 503 ")
                assert b'"type":"service_unavailable"' in answer
            assert fake.aborted == []

    run(main)


def test_places_are_given_back() -> None:
    connections = Connections(Limits(max_connections=3))
    ended = []
    for number in range(10):
        slot = connections.enter()
        assert slot is not None
        slot.wait(lambda number=number: ended.append(number))
    assert ended == list(range(7))
    assert len(connections) == 3
    slot.work()
    assert [connections.enter(), connections.enter()].count(None) == 0
    assert len(connections) == 3
    assert connections.enter() is None
    slot.leave()
    assert connections.enter() is not None


def test_a_tls_handshake_that_does_not_come_takes_no_place_for_long(tokenizer: Tokenizer, tmp_path: Path) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subject = ["-subj", "/CN=localhost", "-keyout", str(key), "-out", str(certificate)]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *subject]
    subprocess.run(command, check=True, capture_output=True, timeout=60)

    async def main() -> None:
        tls = {"ssl_certfile": certificate, "ssl_keyfile": key}
        async with serving(tokenizer, Limits(max_connections=1, head_s=0.5), **tls) as server:
            async with connected(server) as (silent, _):
                assert await is_alive(server)
                assert await rest_of(silent) == b""
            async with connected(server, b"GET / HTTP/1.1\r\n\r\n") as (plain, _):
                await rest_of(plain)
            async with connected(server) as (late, _):
                assert await rest_of(late) == b""
            assert await is_alive(server)

    run(main)


# -- bodies and heads -------------------------------------------------------------------------------------------------


def test_a_body_in_very_many_pieces_is_refused(tokenizer: Tokenizer) -> None:
    async def main() -> None:
        head = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
        async with serving(tokenizer, Limits()) as server:
            async with connected(server, head + b"1\r\n \r\n" * (MANY_PIECES + 1)) as (reader, _):
                assert (await rest_of(reader)).startswith(b"HTTP/1.1 400 ")
            async with connected(server, head + b"1\r\n \r\n" * MANY_PIECES + b"0\r\n\r\n") as (reader, _):
                assert b"not valid JSON" in await reader.readuntil(b"}}")
            async with connected(server, head + (b"100\r\n" + b" " * 256 + b"\r\n") * 5000 + b"0\r\n\r\n") as (
                reader,
                _,
            ):
                assert b"not valid JSON" in await reader.readuntil(b"}}")

    run(main)


def test_many_pieces_after_an_answer_has_begun_end_the_connection(tokenizer: Tokenizer) -> None:
    async def main() -> None:
        head = b"POST /nowhere HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        async with serving(tokenizer, Limits()) as server, connected(server, head) as (reader, writer):
            await reader.readuntil(b"}}")
            writer.write(b"1\r\n \r\n" * (MANY_PIECES + 1))
            await rest_of(reader)
            assert await is_alive(server)

    run(main)


def test_large_bodies_share_a_room_and_small_ones_need_none(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(body.BodyRoom.__init__, "__defaults__", (100_000,))
    large, small = (b'{"model": "%s", "prompt": "x"}' % (b" " * size) for size in (160_000, 1_000))

    async def main() -> None:
        head = HEAD + b"Content-Length: %d\r\n\r\n" % len(large)
        async with serving(tokenizer, Limits()) as server, httpx.AsyncClient(trust_env=False) as client:
            headers = {"Content-Type": "application/json"}

            async def status(content: bytes) -> int:
                url = f"{server.url}/v1/completions"
                return (await client.post(url, content=content, headers=headers)).status_code

            async with connected(server, head + large[:150_000]):
                while await status(large) != 503:
                    await asyncio.sleep(0.01)
                assert await status(small) == 404
            while await status(large) == 503:
                await asyncio.sleep(0.01)
            assert await status(large) == 404

    run(main)


@pytest.mark.parametrize(
    "request_text",
    [
        b"GET /livez HTTP/1.1\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: x\r\nContent-Length: 9" + b"9" * 30 + b"\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 70_000 + b"\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: x\r\n" + b"X: y\r\n" * 20_000 + b"\r\n",
        b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: x\r\nX : y\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: x\r\nX: a\x00b\r\n\r\n",
        b"GET /livez\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ],
    ids=range(13),
)
def test_a_request_that_is_none_is_refused_and_its_connection_ended(tokenizer: Tokenizer, request_text: bytes) -> None:
    async def main() -> None:
        async with serving(tokenizer, SOON) as server, connected(server, request_text) as (reader, _):
            answer = await rest_of(reader)
            assert answer == b"" or answer.startswith(b"HTTP/1.1 400 ")
            assert await is_alive(server)

    run(main)


@pytest.mark.parametrize(
    "target",
    [
        b"/livez/../v1/models",
        b"/livez/",
        b"//livez",
        b"/livez;x",
        b"/livez%00",
        b"/livez%2f..%2fv1/models",
        b"/LIVEZ",
        b"/v1/models?x=/livez",
        b"/v1/models#/livez",
        b"/%76%31/models",
        b"/v1//models",
        b"http://x/livez",
        b"*",
        b"/livez\xc0\xaf",
    ],
)
def test_no_path_leads_around_the_key(tokenizer: Tokenizer, target: bytes) -> None:
    async def main() -> None:
        app = app_for(FakeClient(lambda request: [50]), tokenizer, api_keys=["secret"])
        server = HttpServer(app, port=0, limits=SOON)
        await server.start()
        tricks = b"X-Forwarded-For: 127.0.0.1\r\nX-Original-URL: /livez\r\nX-Rewrite-URL: /livez\r\n"
        request = b"GET " + target + b" HTTP/1.1\r\nHost: x\r\n" + tricks + b"Connection: close\r\n\r\n"
        async with connected(server, request) as (reader, _):
            assert (await rest_of(reader))[:12] in (b"HTTP/1.1 401", b"HTTP/1.1 400")
        await server.stop()

    run(main)


@pytest.mark.parametrize("header", ["Forwarded", "X-Forwarded-For", "X-Real-IP", "Via", "Origin"])
def test_a_proxy_or_a_page_on_this_machine_is_not_its_user(tokenizer: Tokenizer, header: str) -> None:
    async def main() -> None:
        fake = FakeClient(lambda request: [50])
        async with serving(tokenizer, SOON, fake) as server, httpx.AsyncClient(trust_env=False) as client:
            url = f"{server.url}/v1/cluster/drain"
            assert (await client.post(url, headers={header: "127.0.0.1"})).status_code == 403

    run(main)
