"""A worker's doctor that does not hear its head to the end: what it found itself is told all the same."""

import asyncio
from typing import Any

import pytest
from examinations import findings_of
from waiting import within

from tpdist.control.channel import AsyncRouter, Codec
from tpdist.errors import JoinError
from tpdist.preflight import consult
from tpdist.preflight.consult import Practice, Visit
from tpdist.preflight.doctor import Doctor
from tpdist.preflight.orders import Station
from tpdist.preflight.words import Diagnosis, Findings, Line
from tpdist.settings import Settings

DEADLINE_S = 20.0
MN = "MISTRALRS_MN_"
FINDINGS = findings_of(explicit={"seed": 7})


@pytest.fixture(autouse=True)
def known_findings(monkeypatch: pytest.MonkeyPatch) -> None:
    async def findings(*names: object, **options: object) -> Findings:
        return FINDINGS

    monkeypatch.setattr(Station, "findings", findings)


def worker(port: int, *, timeout_s: float) -> Doctor:
    variables = {MN + "GLOBAL_WORLD_SIZE": "2", MN + "WORKER_ID": "0", MN + "WORKER_SERVER_ADDR": f"127.0.0.1:{port}"}
    settings = Settings.load({}, environ=variables)
    return Doctor(
        settings=settings,
        model=None,
        environ={},
        timeout_s=timeout_s,
        advise=lambda examination: (),
        say=lambda words: None,
    )


def run(work: Any) -> Any:
    return asyncio.run(within(DEADLINE_S, work))


def only_red(diagnosis: Diagnosis) -> Line:
    assert [node.findings for node in diagnosis.examination.nodes] == [FINDINGS]
    (line,) = [line for line in diagnosis.lines if line.state == "red"]
    assert diagnosis.exit_code == 5
    return line


def test_a_head_that_falls_silent_is_a_line_below_what_the_worker_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consult, "SILENCE_S", 0.5)
    monkeypatch.setattr(consult, "BEAT_S", 60.0)

    async def visit_a_head_that_says_one_word() -> Diagnosis:
        router = AsyncRouter(name="test", codec=Codec())
        port = int(router.bind("tcp://127.0.0.1:*").rpartition(":")[2])
        receiving = asyncio.create_task(Practice(router, 1).open())
        try:
            return await worker(port, timeout_s=10).run()
        finally:
            receiving.cancel()
            await asyncio.gather(receiving, return_exceptions=True)
            router.close()

    line = only_red(run(visit_a_head_that_says_one_word()))
    assert line.check == "way to head"
    assert "fell silent" in line.found


def test_a_connection_that_came_about_once_is_remembered_when_nobody_listens_any_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So it is with a head of another key: its doctor has ended when the worker's gives up."""
    pay = Visit.pay

    async def visit_somebody_who_leaves_first() -> Diagnosis:
        server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)

        async def pay_and_be_left(*names: Any, **options: Any) -> Diagnosis:
            try:
                return await pay(*names, **options)
            finally:
                server.close()

        monkeypatch.setattr(Visit, "pay", pay_and_be_left)
        return await worker(server.sockets[0].getsockname()[1], timeout_s=2).run()

    line = only_red(run(visit_somebody_who_leaves_first()))
    assert "comes about, but no doctor answered" in line.found
    assert "TPDIST_KEY_FILE" in line.next_step


def test_a_head_without_a_route_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_route(host: str, port: int) -> tuple[str, str]:
        raise JoinError(f"no route to the head {host}:{port}") from OSError(101, "Network is unreachable")

    monkeypatch.setattr("tpdist.introduction.addresses_towards", no_route)
    line = only_red(run(worker(9, timeout_s=1).run()))
    assert line.check == "route to head"
    assert line.found.endswith("has no route to 127.0.0.1: [Errno 101] Network is unreachable")
