"""Doctors that meet over loopback: the head's and workers', those that stay away, and those that are refused."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
from clusters import register_of
from examinations import cluster_of, findings_of
from waiting import within

from tpdist.control.channel import AsyncDealer, AsyncRouter, Codec
from tpdist.control.codec import MalformedFrameError
from tpdist.control.messages import Preflight, Wait
from tpdist.errors import JoinError
from tpdist.preflight import consult
from tpdist.preflight.consult import HeadSilentError, Practice, RemoteColleague, Visit
from tpdist.preflight.orders import Station
from tpdist.preflight.words import Diagnosis, Failed, Findings, Listen, Port, pack, unpack

DEADLINE_S = 20.0
DIAGNOSIS = Diagnosis(examination=cluster_of(1), lines=())
FINDINGS = findings_of(explicit={"seed": 7})


@contextlib.asynccontextmanager
async def practice(num_workers: int) -> AsyncIterator[tuple[Practice, str]]:
    router = AsyncRouter(name="test", codec=Codec())
    address = router.bind("tcp://127.0.0.1:*")
    made = Practice(router, num_workers)
    receiving = asyncio.create_task(made.open())
    try:
        yield made, address
    finally:
        receiving.cancel()
        await asyncio.gather(receiving, return_exceptions=True)
        router.close()


async def pay_visit(address: str, worker_id: int = 0, *, instance: str = "w", timeout_s: float = 10.0) -> Diagnosis:
    async def findings() -> Findings:
        return FINDINGS

    register = register_of(worker_id, instance=instance)
    dealer = AsyncDealer(address=address, identity=instance.encode(), codec=Codec())
    station = Station(environ={})
    try:
        return await Visit(dealer, register, station).pay(findings(), timeout_s=timeout_s)
    finally:
        await station.close()
        dealer.close()


def run(work: Any) -> Any:
    return asyncio.run(within(DEADLINE_S, work))


def test_a_worker_tells_what_it_found_does_what_it_is_asked_and_hears_the_diagnosis() -> None:
    async def meet() -> None:
        async with practice(1) as (head, address):
            visit = asyncio.create_task(pay_visit(address))
            ((key, register, findings),) = await head.gather(timeout_s=10)
            assert (key, register.hostname, findings) == (0, "host-worker 0", FINDINGS)
            listen = Listen(host="127.0.0.1", token=bytes(16))
            assert isinstance(await RemoteColleague(head, 0).ask(listen, timeout_s=10), Port)
            await head.tell(DIAGNOSIS)
            assert await visit == DIAGNOSIS

    run(meet())


def test_gathering_ends_without_those_who_do_not_come() -> None:
    async def meet() -> None:
        async with practice(2) as (head, address):
            visit = asyncio.create_task(pay_visit(address, 1))
            came = await head.gather(timeout_s=3.0)
            assert [key for key, _, _ in came] == [1]
            await head.tell(DIAGNOSIS)
            await visit

    run(meet())


def test_a_worker_without_a_place_is_refused_with_the_variables() -> None:
    async def meet() -> None:
        async with practice(1) as (_, address):
            with pytest.raises(JoinError, match="MISTRALRS_MN_HEAD_NUM_WORKERS=1"):
                await pay_visit(address, 3)

    run(meet())


def test_a_second_worker_with_the_same_id_is_refused() -> None:
    async def meet() -> None:
        async with practice(1) as (head, address):
            first = asyncio.create_task(pay_visit(address, 0, instance="first"))
            assert await head.gather(timeout_s=10)
            with pytest.raises(JoinError, match="is taken by host-worker 0"):
                await pay_visit(address, 0, instance="second")
            await head.tell(DIAGNOSIS)
            await first

    run(meet())


def test_a_head_that_does_not_answer_is_given_up() -> None:
    with pytest.raises(HeadSilentError, match="did not answer") as caught:
        run(pay_visit("tcp://127.0.0.1:9", timeout_s=0.2))
    assert not caught.value.heard


def test_a_head_that_goes_away_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consult, "SILENCE_S", 0.3)
    monkeypatch.setattr(consult, "BEAT_S", 60.0)

    async def meet() -> None:
        async with practice(1) as (_, address):
            await pay_visit(address)

    with pytest.raises(HeadSilentError, match="fell silent") as caught:
        run(meet())
    assert caught.value.heard


def test_a_worker_that_does_not_answer_in_time_is_a_failed_answer() -> None:
    async def meet() -> object:
        async with practice(1) as (head, address):
            dealer = AsyncDealer(address=address, identity=b"w", codec=Codec())
            await dealer.send(pack(consult.Hello(register=register_of(0, instance="w"))))
            await dealer.receive()
            listen = Listen(host="127.0.0.1", token=bytes(16))
            answer = await head.ask(0, listen, timeout_s=0.2)
            dealer.close()
            return answer

    assert run(meet()) == Failed(problem="the node did not answer within 0.2 s")


def test_a_node_that_wants_to_serve_is_told_that_this_is_a_doctor() -> None:
    async def meet() -> object:
        async with practice(1) as (_, address):
            dealer = AsyncDealer(address=address, identity=b"w", codec=Codec())
            await dealer.send(register_of(0))
            envelope = await dealer.receive()
            dealer.close()
            return envelope.body

    answer = run(meet())
    assert isinstance(answer, Wait)
    assert "tpdist doctor" in answer.reason


@pytest.mark.parametrize("word", [b"", b"\xc1", b"\x81\xa4type\xa7Unknown"])
def test_bytes_that_are_no_word_are_malformed(word: bytes) -> None:
    with pytest.raises(MalformedFrameError):
        unpack(Preflight(word=word))


def test_a_malformed_word_does_not_stop_the_head() -> None:
    async def meet() -> None:
        async with practice(1) as (head, address):
            dealer = AsyncDealer(address=address, identity=b"x", codec=Codec())
            await dealer.send(Preflight(word=b"nonsense"))
            visit = asyncio.create_task(pay_visit(address))
            assert await head.gather(timeout_s=10)
            await head.tell(DIAGNOSIS)
            await visit
            dealer.close()

    run(meet())
