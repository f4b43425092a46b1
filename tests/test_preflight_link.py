"""A link that is measured over loopback, and what is said of one that is not there."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

import pytest
from waiting import within

from tpdist.control.listening import listening_socket
from tpdist.preflight import link
from tpdist.preflight.link import LinkError, answer_peers, measure, try_connection, watch_way

DEADLINE_S = 30.0
TOKEN = bytes(range(link.TOKEN_BYTES))
HOST = "127.0.0.1"


@contextlib.asynccontextmanager
async def answering(token: bytes = TOKEN) -> AsyncIterator[int]:
    """A node that answers peers; yields its port."""
    with listening_socket(HOST) as listener:
        task = asyncio.create_task(answer_peers(listener, token))
        yield listener.getsockname()[1]
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def measured(token: bytes) -> link.LinkFigures:
    async with answering() as port:
        return await asyncio.to_thread(measure, HOST, port, token)


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "STREAM_S", 0.05)
    monkeypatch.setattr(link, "NUM_PINGS", 20)


def test_latency_bandwidth_and_skew_of_loopback() -> None:
    figures = asyncio.run(within(DEADLINE_S, measured(TOKEN)))
    assert 0 < figures.latency_s < 1
    assert figures.bandwidth > 0
    assert abs(figures.skew_s) < 1


def test_a_stranger_without_the_token_is_hung_up_on() -> None:
    with pytest.raises(LinkError, match=r"hung up|connection broke"):
        asyncio.run(within(DEADLINE_S, measured(bytes(link.TOKEN_BYTES))))


def test_a_peer_that_goes_away_does_not_stop_the_answers_to_others() -> None:
    async def go_away_and_come_back() -> link.LinkFigures:
        async with answering() as port:
            for _ in range(3):
                socket.create_connection((HOST, port)).close()
            return await asyncio.to_thread(measure, HOST, port, TOKEN)

    assert asyncio.run(within(DEADLINE_S, go_away_and_come_back())).bandwidth > 0


def test_a_port_on_which_nobody_listens_is_refused() -> None:
    with socket.socket() as bound:
        bound.bind((HOST, 0))
        port = bound.getsockname()[1]
        assert "refused" in try_connection(HOST, port)
        with pytest.raises(LinkError, match="refused"):
            measure(HOST, port, TOKEN)


def test_a_way_is_tried_until_it_is_open_or_there_is_no_more_time() -> None:
    async def watch() -> tuple[str, str]:
        until, over = asyncio.Event(), asyncio.Event()
        over.set()
        with socket.socket() as bound:
            bound.bind((HOST, 0))
            port = bound.getsockname()[1]
            watching = asyncio.create_task(watch_way(HOST, port, every_s=0.01, until=until))
            given_up = await watch_way(HOST, port, every_s=60, until=over)
            bound.listen()
            return given_up, await watching

    given_up, opened = asyncio.run(within(DEADLINE_S, watch()))
    assert "refused" in given_up
    assert opened == ""


def test_a_peer_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "IO_S", 0.1)
    with socket.create_server((HOST, 0)) as silent, pytest.raises(LinkError, match=r"no answer within 0.1 s"):
        measure(HOST, silent.getsockname()[1], TOKEN)


def test_a_port_that_listens_is_reachable() -> None:
    with socket.create_server((HOST, 0)) as server:
        assert try_connection(HOST, server.getsockname()[1]) == ""
