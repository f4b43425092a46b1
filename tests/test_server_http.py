"""A real server on a free port: the official client, disconnects, many streams, start and stop."""

import asyncio
import contextlib
import socket
import subprocess
from collections.abc import AsyncGenerator, Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI
from server_fakes import MODEL, FakeClient, app_for, small_tokenizer
from waiting import within

from tpdist.errors import SettingsError
from tpdist.server.http import HttpServer, bind, check_certificate
from tpdist.server.tokenizer import Tokenizer

TEXT = "hello \U0001f600 world"
DEADLINE_S = 20


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@contextlib.asynccontextmanager
async def serving(app: FastAPI, **options: Any) -> AsyncGenerator[HttpServer, None]:
    server = HttpServer(app, port=0, **options)
    await server.start()
    try:
        yield server
    finally:
        await server.stop(timeout_s=1)


def openai_client(server: HttpServer, key: str = "none") -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=DEADLINE_S)


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(within(DEADLINE_S, main()))


def scripted(tokenizer: Tokenizer, **options: Any) -> FakeClient:
    return FakeClient(lambda request: tokenizer.encode(TEXT, add_special_tokens=False), **options)


def test_the_official_client_gets_its_answers(tokenizer: Tokenizer) -> None:
    async def main() -> None:
        async with serving(app_for(scripted(tokenizer), tokenizer)) as server, openai_client(server) as client:
            assert [model.id for model in (await client.models.list()).data] == [MODEL, "alias"]
            whole = await client.completions.create(model=MODEL, prompt=["a", "b"], n=2, max_tokens=50)
            assert [choice.text for choice in whole.choices] == [TEXT] * 4
            chat = await client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "hi"}])
            assert chat.choices[0].message.content == TEXT
            assert chat.choices[0].finish_reason == "stop"

    run(main)


def test_the_official_client_reads_streams(tokenizer: Tokenizer) -> None:
    async def main() -> None:
        async with serving(app_for(scripted(tokenizer), tokenizer)) as server, openai_client(server) as client:
            stream = await client.completions.create(model=MODEL, prompt="a", max_tokens=50, stream=True)
            assert "".join([chunk.choices[0].text async for chunk in stream]) == TEXT
            chat = await client.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": "hi"}],
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"return_token_ids": True, "top_k": 5},
            )
            chunks = [chunk async for chunk in chat]
            assert chunks[0].choices[0].delta.role == "assistant"
            assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == TEXT
            assert chunks[-1].usage is not None
            assert chunks[-1].usage.completion_tokens == len(tokenizer.encode(TEXT, add_special_tokens=False)) + 1

    run(main)


def test_the_official_client_raises_its_own_errors(tokenizer: Tokenizer) -> None:
    async def main() -> None:
        app = app_for(scripted(tokenizer, fail_after=2), tokenizer, api_keys=["secret"])
        async with serving(app) as server, openai_client(server, "secret") as client:
            with pytest.raises(openai.AuthenticationError):
                await openai_client(server, "wrong").models.list()
            with pytest.raises(openai.NotFoundError):
                await client.completions.create(model="other", prompt="x")
            with pytest.raises(openai.BadRequestError) as caught:
                await client.completions.create(model=MODEL, prompt="x", suffix="y")
            assert caught.value.param == "suffix"
            with pytest.raises(openai.InternalServerError) as lost:
                await client.completions.create(model=MODEL, prompt="x")
            assert lost.value.status_code == 503
            stream = await client.completions.create(model=MODEL, prompt="x", stream=True)
            with pytest.raises(openai.APIError, match="rank 1 was lost"):
                [chunk async for chunk in stream]

    run(main)


@pytest.mark.parametrize(("stream", "hang_after"), [(False, 2), (True, 0), (True, 2)])
def test_a_client_that_disconnects_aborts_its_request(tokenizer: Tokenizer, stream: bool, hang_after: int) -> None:
    async def main() -> None:
        fake = scripted(tokenizer, hang_after=hang_after)
        async with serving(app_for(fake, tokenizer)) as server, httpx.AsyncClient() as client:
            body = {"model": MODEL, "prompt": ["a", "b"], "stream": stream}
            request = asyncio.create_task(client.post(f"{server.url}/v1/completions", json=body))
            await fake.hanging.wait()
            assert fake.aborted == []
            request.cancel()
            while len(fake.aborted) < 2:
                await asyncio.sleep(0.01)

    run(main)


def test_sixty_four_streams_run_side_by_side(tokenizer: Tokenizer) -> None:
    async def main() -> None:
        async with serving(app_for(scripted(tokenizer), tokenizer)) as server, openai_client(server) as client:

            async def read() -> str:
                stream = await client.completions.create(model=MODEL, prompt="a", max_tokens=50, stream=True)
                return "".join([chunk.choices[0].text async for chunk in stream])

            assert await asyncio.gather(*(read() for _ in range(64))) == [TEXT] * 64

    run(main)


def test_headers_wait_for_the_first_token(tokenizer: Tokenizer) -> None:
    async def main() -> None:
        fake = scripted(tokenizer, hang_after=0)
        async with serving(app_for(fake, tokenizer)) as server, httpx.AsyncClient() as client:
            body = {"model": MODEL, "prompt": "a", "stream": True}
            request = asyncio.create_task(client.post(f"{server.url}/v1/completions", json=body))
            await fake.hanging.wait()
            done, _ = await asyncio.wait({request}, timeout=0.1)
            assert not done
            request.cancel()

    run(main)


def test_stop_cuts_off_a_stream_that_does_not_end_and_aborts_it(tokenizer: Tokenizer) -> None:
    async def main() -> None:
        fake = scripted(tokenizer, hang_after=2)
        server = HttpServer(app_for(fake, tokenizer), port=0)
        await server.start()
        async with httpx.AsyncClient() as client:
            body = {"model": MODEL, "prompt": "a", "stream": True}
            request = asyncio.create_task(client.post(f"{server.url}/v1/completions", json=body))
            await fake.hanging.wait()
            await server.stop(timeout_s=1)
            await server.wait()
            while not fake.aborted:
                await asyncio.sleep(0.01)
            await asyncio.gather(request, return_exceptions=True)

    run(main)


def test_a_taken_port_is_named_before_anything_starts(tokenizer: Tokenizer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SettingsError, match=str(port)):
            HttpServer(app_for(scripted(tokenizer), tokenizer), port=port)


def test_a_port_that_another_took_after_it_was_bound_is_a_wrong_setting(tokenizer: Tokenizer) -> None:
    async def main() -> None:
        sock = bind("127.0.0.1", 0)
        port = sock.getsockname()[1]
        with bind("127.0.0.1", port) as quicker:
            quicker.listen()
            with pytest.raises(SettingsError, match=f"cannot listen on 127.0.0.1:{port}: .*; set --host and --port"):
                async with serving(app_for(scripted(tokenizer), tokenizer), sock=sock):
                    pass

    run(main)


@pytest.mark.parametrize("host", ["no-such-host.invalid", "192.0.2.1"])
def test_an_address_that_is_not_ours_is_a_wrong_setting(host: str) -> None:
    with pytest.raises(SettingsError, match=host):
        bind(host, 0)


def test_a_bound_socket_may_be_passed_in(tokenizer: Tokenizer) -> None:
    async def main() -> None:
        sock = bind("127.0.0.1", 0)
        async with serving(app_for(scripted(tokenizer), tokenizer), sock=sock) as server, httpx.AsyncClient() as client:
            assert server.port == sock.getsockname()[1]
            assert (await client.get(f"{server.url}/livez")).status_code == 200

    run(main)


def test_an_answer_to_head_has_no_body_and_the_connection_serves_on(tokenizer: Tokenizer) -> None:
    async def main() -> None:
        async with serving(app_for(scripted(tokenizer), tokenizer)) as server, httpx.AsyncClient() as client:
            for _ in range(2):
                head, got = await client.head(f"{server.url}/readyz"), await client.get(f"{server.url}/readyz")
                assert (head.status_code, head.content) == (200, b"")
                assert head.headers["content-length"] == got.headers["content-length"] == str(len(got.content))

    run(main)


def test_a_certificate_that_cannot_be_read_is_a_wrong_setting(tokenizer: Tokenizer, tmp_path: Path) -> None:
    for certificate in (tmp_path / "missing.pem", tmp_path / "empty.pem"):
        (tmp_path / "empty.pem").write_text("")
        with pytest.raises(SettingsError, match=certificate.name):
            HttpServer(app_for(scripted(tokenizer), tokenizer), port=0, ssl_certfile=certificate)


def test_a_private_key_with_a_passphrase_is_a_wrong_setting_and_asks_nobody(tmp_path: Path) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subject = ["-subj", "/CN=localhost", "-keyout", str(key), "-out", str(certificate)]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-passout", "pass:secret", "-days", "2", *subject]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    with pytest.raises(SettingsError, match=r"key.pem has a passphrase.*openssl pkey"):
        check_certificate(certificate, key)


def test_a_server_that_never_started_can_be_stopped(tokenizer: Tokenizer) -> None:
    async def main() -> None:
        server = HttpServer(app_for(scripted(tokenizer), tokenizer), port=0)
        await server.stop()
        bind("127.0.0.1", server.port).close()

    run(main)
