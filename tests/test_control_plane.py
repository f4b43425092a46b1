"""Coordinator and agents against each other in one event loop: real sockets, invented ranks and a scripted engine."""

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterable, Sequence
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest
from clusters import fingerprint_of, register_of, rules_of
from waiting import within

from tpdist.control import agent
from tpdist.control.agent import NodeAgent, Outcome
from tpdist.control.channel import AsyncDealer, AsyncRouter, Codec
from tpdist.control.coordinator import Coordinator
from tpdist.control.head_link import Joining
from tpdist.control.messages import (
    ENGINE_IDENTITY,
    HEARTBEAT_SUFFIX,
    Abort,
    Assign,
    ClusterState,
    Connect,
    DrainRequest,
    EngineStats,
    Fingerprint,
    Generate,
    Goodbye,
    Heartbeat,
    Listening,
    Message,
    RankGone,
    RankProgress,
    RankUpdate,
    Rejoin,
    RequestFailed,
    StepOutputs,
    TokenOutput,
    Welcome,
)
from tpdist.control.state import Key, name_of
from tpdist.control.supervisor import Supervisor
from tpdist.errors import CheckpointError, RequestError
from tpdist.sampling_params import SamplingParams

DEADLINE_S = 25.0
BEAT_S = 0.1
STATS = EngineStats(num_requests_running=1)


class FakeSupervisor:
    """Ranks that are ready at once. `lost` and `delay_s` are how they misbehave when told to end."""

    def __init__(self, report: Callable[[Message], Any], *, silent: bool = False) -> None:
        self._report = report
        self.silent = silent
        self.assigns: list[Assign] = []
        self.connects: list[Connect] = []
        self.num_stops = 0
        self.num_epochs_ended = 0
        self.broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def start(self, assign: Assign) -> None:
        self.assigns.append(assign)
        if self.silent:
            return
        if assign.first_rank == 0:
            await self._report(Listening(store_port=1, plan_port=2))
        for rank in range(assign.first_rank, assign.first_rank + assign.local_world_size):
            await self._report(RankUpdate(rank=rank, pid=1, device="cpu", phase="ready", kv_blocks=32))

    async def connect(self, connect: Connect) -> None:
        self.connects.append(connect)

    def progress(self) -> tuple[RankProgress, ...]:
        return ()

    async def end_epoch(self, *, grace_s: float = 0) -> None:
        self.num_epochs_ended += 1

    async def close(self, *, grace_s: float = 0) -> None:
        self.num_stops += 1


class FakeEngine:
    """Rank 0 as the head's agent sees it. `requests` and `aborted` are what it was asked for."""

    def __init__(self, address: str, *, epoch: int = 1) -> None:
        self._dealer = AsyncDealer(address=address, identity=ENGINE_IDENTITY, codec=Codec(epoch=epoch))
        self.requests: asyncio.Queue[Generate] = asyncio.Queue()
        self.aborted: asyncio.Queue[str] = asyncio.Queue()
        self.connected = asyncio.Event()
        self._task = asyncio.create_task(self._receive())

    async def _receive(self) -> None:
        await self._dealer.send(Heartbeat(instance="engine"))
        while True:
            body = (await self._dealer.receive()).body
            match body:
                case Generate():
                    self.requests.put_nowait(body)
                case Abort(request_id=request_id):
                    self.aborted.put_nowait(request_id)
                case Heartbeat():
                    self.connected.set()

    async def answer(self, request: Generate, *tokens: int, finish: str | None = None) -> None:
        outputs = (TokenOutput(request.request_id, tokens, finish),)
        await self._dealer.send(StepOutputs(step=1, outputs=outputs, stats=STATS))

    async def send(self, body: Message) -> None:
        await self._dealer.send(body)

    def close(self) -> None:
        self._task.cancel()
        self._dealer.close()


class Node:
    """One agent with its invented ranks."""

    def __init__(self, address: str, key: Key, *, instance: str | None = None, **options: Any) -> None:
        self.instance = instance or name_of(key)
        silent = options.pop("silent", False)
        changes = options.pop("register", {})
        fingerprint = options.pop("fingerprint", None) or self._fingerprint
        joining: dict[str, Any] = {
            "head": address,
            "keys": None,
            "register": lambda instance: register_of(key, instance=instance, **changes),
            "register_timeout_s": 10,
            "heartbeat_interval_s": BEAT_S,
            "node_lost_s": 1.5,
            "comes_back": False,
        }
        self.agent = NodeAgent(Joining(**{**joining, **options}), fingerprint=fingerprint)
        self.ranks = FakeSupervisor(self.agent.report, silent=silent)
        self.task = asyncio.create_task(self.agent.run(cast(Supervisor, self.ranks)))

    async def _fingerprint(self) -> Fingerprint:
        return fingerprint_of(self.instance)

    async def die(self) -> None:
        """As kill -9 would have it: nobody hears a word."""
        self.agent.close()
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)

    async def outcome(self) -> Outcome:
        return await within(DEADLINE_S / 2, self.task)


class Cluster:
    """A head's coordinator at an ipc address, and what connects to it."""

    def __init__(self, folder: Path, *, num_workers: int, cluster_id: str = "cluster", **rules: Any) -> None:
        self.router = AsyncRouter(name="control", codec=Codec())
        self.address = self.router.bind(f"ipc://{folder}/control.sock")
        defaults = {"heartbeat_interval_s": BEAT_S, "node_lost_s": 1.5, "cluster_id": cluster_id, **rules}
        self.engine_router = AsyncRouter(name="engine", codec=Codec())
        self.engine_address = self.engine_router.bind(f"ipc://{folder}/engine.sock")
        self.coordinator = Coordinator(
            router=self.router, engine=self.engine_router, rules=rules_of(num_workers, **defaults)
        )
        self.task = asyncio.create_task(self.coordinator.run())
        self.nodes: list[Node] = []
        self.closing = contextlib.ExitStack()

    def join(self, key: Key, **options: Any) -> Node:
        node = Node(self.address, key, **options)
        self.nodes.append(node)
        return node

    async def engine(self, *, epoch: int = 1) -> FakeEngine:
        engine = FakeEngine(self.engine_address, epoch=epoch)
        self.closing.callback(engine.close)
        await engine.connected.wait()
        return engine

    async def outcome(self) -> tuple[int, str]:
        return await within(DEADLINE_S / 2, self.task)

    async def close(self) -> None:
        tasks: Sequence[asyncio.Task[Any]] = [self.task, *(node.task for node in self.nodes)]
        for task in tasks:
            task.cancel()
        _, stuck = await asyncio.wait(tasks, timeout=DEADLINE_S)
        self.closing.close()
        for node in self.nodes:
            node.agent.close()
        self.router.close()
        self.engine_router.close()
        assert not stuck, "a cancelled task goes on"


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(within(DEADLINE_S, work))


@asynccontextmanager
async def cluster_of(folder: Path, *, num_workers: int, **rules: Any) -> AsyncIterator[Cluster]:
    cluster = Cluster(folder, num_workers=num_workers, **rules)
    try:
        yield cluster
    finally:
        await cluster.close()


@asynccontextmanager
async def ready_cluster(folder: Path, *, num_workers: int = 1, **rules: Any) -> AsyncIterator[tuple[Any, ...]]:
    """(cluster, engine, head's node, worker 0's node, ...), all ready."""
    async with cluster_of(folder, num_workers=num_workers, **rules) as cluster:
        nodes = [cluster.join(key) for key in (None, *range(num_workers))]
        for node in nodes:
            await node.agent.wait_ready()
        yield (cluster, await cluster.engine(), *nodes)


def request_of(request_id: str) -> Generate:
    return Generate(request_id=request_id, prompt_token_ids=(1,), sampling=SamplingParams())


async def tokens_of(stream: AsyncGenerator[TokenOutput, None]) -> list[int]:
    return [token async for output in stream for token in output.token_ids]


# -- joining ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_first", [True, False])
def test_head_and_workers_become_ready_in_any_order(tmp_path: Path, head_first: bool) -> None:
    async def main() -> None:
        async with cluster_of(tmp_path, num_workers=2) as cluster:
            order: list[Key] = [None, 0, 1] if head_first else [1, 0, None]
            nodes = {key: cluster.join(key) for key in order}
            for node in nodes.values():
                await node.agent.wait_ready()
            assert [nodes[key].ranks.assigns[0].first_rank for key in (None, 0, 1)] == [0, 1, 2]
            assert all(node.ranks.connects == [Connect(store_port=1, plan_port=2)] for node in nodes.values())
            state = nodes[1].agent.state()
            assert [node.node_id for node in state.nodes] == ["head", "worker-0", "worker-1"]
            assert state.engine is not None

    run(main())


def test_a_worker_may_wait_for_its_head_to_start(tmp_path: Path) -> None:
    async def main() -> None:
        early = Node(f"ipc://{tmp_path}/control.sock", 0)
        await asyncio.sleep(0.3)
        async with cluster_of(tmp_path, num_workers=1) as cluster:
            cluster.nodes.append(early)
            cluster.join(None)
            await early.agent.wait_ready()

    run(main())


def test_a_worker_without_a_head_says_what_to_check(tmp_path: Path) -> None:
    async def main() -> None:
        node = Node(f"ipc://{tmp_path}/nobody.sock", 0, register_timeout_s=0.4)
        outcome = await node.outcome()
        node.agent.close()
        assert outcome.exit_code == 5
        for part in ("no head answered at ipc://", "MISTRALRS_MN_HEAD_PORT", "firewall", "TPDIST_KEY_FILE"):
            assert part in outcome.cause
        assert node.ranks.num_stops == 1

    run(main())


def test_a_head_whose_workers_do_not_come_names_them(tmp_path: Path) -> None:
    async def main() -> None:
        async with cluster_of(tmp_path, num_workers=2, register_timeout_s=0.4) as cluster:
            head = cluster.join(None)
            outcome = await head.outcome()
            assert outcome.exit_code == 5
            assert "worker 0: missing" in outcome.cause
            assert "TPDIST_REGISTER_TIMEOUT_S" in outcome.cause
            late = cluster.join(1)
            assert await late.outcome() == outcome

    run(main())


def test_nodes_that_disagree_all_end_with_the_table_and_start_no_rank(tmp_path: Path) -> None:
    async def other() -> Fingerprint:
        return fingerprint_of("worker 0", torch="2.12.0")

    async def main() -> None:
        async with cluster_of(tmp_path, num_workers=1) as cluster:
            nodes = [cluster.join(None), cluster.join(0, fingerprint=other)]
            for node in nodes:
                outcome = await node.outcome()
                assert outcome.exit_code == 5
                assert "worker 0=2.12.0" in outcome.cause
                assert node.ranks.assigns == []
            assert (await cluster.outcome())[0] == 5

    run(main())


def test_a_node_whose_model_is_damaged_ends_all_nodes_with_its_reason(tmp_path: Path) -> None:
    async def damaged() -> Fingerprint:
        raise CheckpointError("model-00001.safetensors ends early")

    async def main() -> None:
        async with cluster_of(tmp_path, num_workers=1) as cluster:
            nodes = [cluster.join(None), cluster.join(0, fingerprint=damaged)]
            for node in nodes:
                outcome = await node.outcome()
                assert outcome.exit_code == 4
                assert "model-00001.safetensors ends early" in outcome.cause

    run(main())


def test_a_bug_in_one_node_is_told_to_the_others(tmp_path: Path) -> None:
    async def broken() -> Fingerprint:
        raise ZeroDivisionError("a bug")

    async def main() -> None:
        async with cluster_of(tmp_path, num_workers=1) as cluster:
            head, worker = cluster.join(None), cluster.join(0, fingerprint=broken)
            outcome = await head.outcome()
            assert outcome.exit_code == 1
            assert "internal error: ZeroDivisionError: a bug" in outcome.cause
            assert (await worker.outcome()).exit_code == 1

    run(main())


def test_a_second_instance_waits_and_takes_over_when_the_first_dies(tmp_path: Path) -> None:
    async def main() -> None:
        async with cluster_of(tmp_path, num_workers=2) as cluster:
            cluster.join(None)
            first = cluster.join(0)
            await asyncio.sleep(0.3)
            second = cluster.join(0, instance="second")
            await asyncio.sleep(0.3)
            await first.die()
            cluster.nodes.remove(first)
            while not second.agent.state().nodes:
                await asyncio.sleep(0.02)
            cluster.join(1)
            await within(10, second.agent.wait_ready())

    run(main())


def test_a_silent_instance_that_was_replaced_is_told_so_when_it_wakes(tmp_path: Path) -> None:
    async def main() -> None:
        async with cluster_of(tmp_path, num_workers=2, node_lost_s=0.5) as cluster:
            cluster.join(None)
            sleeper = AsyncDealer(address=cluster.address, identity=b"sleeper", codec=Codec())
            cluster.closing.callback(sleeper.close)
            await sleeper.send(register_of(0, instance="sleeper"))
            assert isinstance((await sleeper.receive()).body, Welcome)
            await asyncio.sleep(1)
            second = cluster.join(0, instance="second")
            cluster.join(1)
            await second.agent.wait_ready()
            while not isinstance(body := (await sleeper.receive()).body, Rejoin):
                pass
            assert "took its place" in body.reason

    run(main())


# -- requests ---------------------------------------------------------------------------------------------------------


def test_tokens_go_back_to_the_node_that_asked(tmp_path: Path) -> None:
    async def main() -> None:
        async with ready_cluster(tmp_path) as (_, engine, head, worker):
            streams = [
                asyncio.create_task(tokens_of(node.agent.generate(request_of(node.instance))))
                for node in (head, worker)
            ]
            requests = [await engine.requests.get() for _ in streams]
            for request in requests:
                mine = 1 if request.request_id == "head" else 2
                await engine.answer(request, mine, mine)
                await engine.answer(request, mine, finish="length")
            assert await asyncio.gather(*streams) == [[1, 1, 1], [2, 2, 2]]
            while worker.agent.state().stats != STATS:
                await asyncio.sleep(0.02)

    run(main())


def test_a_request_that_the_engine_refuses_fails_with_its_reason(tmp_path: Path) -> None:
    async def main() -> None:
        async with ready_cluster(tmp_path) as (_, engine, _, worker):
            stream = asyncio.create_task(tokens_of(worker.agent.generate(request_of("r"))))
            await engine.requests.get()
            await engine.send(RequestFailed(request_id="r", status=400, message="too long", param="prompt"))
            with pytest.raises(RequestError, match="too long") as caught:
                await stream
            assert (caught.value.status, caught.value.param) == (400, "prompt")
            assert engine.aborted.empty()

    run(main())


def test_a_client_that_goes_away_frees_its_request(tmp_path: Path) -> None:
    async def main() -> None:
        async with ready_cluster(tmp_path) as (cluster, engine, _, worker):
            async with aclosing(worker.agent.generate(request_of("r"))) as stream:
                first = asyncio.create_task(anext(stream))
                await engine.answer(await engine.requests.get(), 7)
                assert (await first).token_ids == (7,)
            assert await engine.aborted.get() == "r"
            await cluster.coordinator.interrupt(DrainRequest(reason="over"))
            assert (await worker.outcome()) == Outcome(0, "over")

    run(main())


def test_a_finished_request_is_not_aborted(tmp_path: Path) -> None:
    async def main() -> None:
        async with ready_cluster(tmp_path) as (_, engine, head, _):
            stream = asyncio.create_task(tokens_of(head.agent.generate(request_of("r"))))
            await engine.answer(await engine.requests.get(), 7, finish="stop")
            assert await stream == [7]
            await asyncio.sleep(0.2)
            assert engine.aborted.empty()

    run(main())


def test_one_node_can_neither_abort_nor_take_over_the_request_of_another(tmp_path: Path) -> None:
    async def main() -> None:
        async with ready_cluster(tmp_path) as (_, engine, head, worker):
            stream = asyncio.create_task(tokens_of(head.agent.generate(request_of("r"))))
            request = await engine.requests.get()
            await worker.agent.report(Abort(request_id="r"))
            with pytest.raises(RequestError, match="already running") as caught:
                await tokens_of(worker.agent.generate(request_of("r")))
            assert caught.value.status == 400
            await engine.answer(request, 7, finish="stop")
            assert await stream == [7]
            assert engine.aborted.empty()

    run(main())


def test_a_stranger_is_not_served(tmp_path: Path) -> None:
    async def main() -> None:
        async with ready_cluster(tmp_path) as (cluster, engine, _, _):
            stranger = AsyncDealer(address=cluster.address, identity=b"stranger", codec=Codec())
            cluster.closing.callback(stranger.close)
            await stranger.send(request_of("r"))
            assert isinstance((await stranger.receive()).body, Rejoin)
            assert engine.requests.empty()

    run(main())


@pytest.mark.parametrize(
    "identity", [b"\xff\xfe", b"\xff" + HEARTBEAT_SUFFIX, HEARTBEAT_SUFFIX, b"nobody" + HEARTBEAT_SUFFIX]
)
def test_no_name_that_a_stranger_chooses_stops_the_head(tmp_path: Path, identity: bytes) -> None:
    async def main() -> None:
        async with ready_cluster(tmp_path) as (cluster, _, _, worker):
            stranger = AsyncDealer(address=cluster.address, identity=identity, codec=Codec(epoch=1))
            cluster.closing.callback(stranger.close)
            for body in (Heartbeat(instance="x"), register_of(0), Goodbye(instance="worker 0", exit_code=1, cause="")):
                await stranger.send(body)
            await asyncio.sleep(0.5)
            assert not cluster.task.done()
            assert worker.agent.state().state == "ready"

    run(main())


def test_other_words_over_a_member_s_connection_for_heartbeats_do_not_stop_the_head(tmp_path: Path) -> None:
    async def main() -> None:
        async with ready_cluster(tmp_path) as (cluster, _, head, worker):
            for body in (register_of(0), Listening(store_port=1, plan_port=2), Abort(request_id="r")):
                await worker.agent._link._heartbeats.send(body)
            await asyncio.sleep(0.5)
            assert not cluster.task.done()
            assert head.agent.state().state == "ready"

    run(main())


def test_what_an_engine_of_another_epoch_says_is_dropped(tmp_path: Path) -> None:
    async def main() -> None:
        async with ready_cluster(tmp_path) as (cluster, engine, head, _):
            stream = asyncio.create_task(tokens_of(head.agent.generate(request_of("r"))))
            request = await engine.requests.get()
            engine.close()
            cluster.closing.pop_all()
            old = FakeEngine(cluster.engine_address, epoch=7)
            cluster.closing.callback(old.close)
            await old.answer(request, 9, finish="stop")
            await asyncio.sleep(0.3)
            assert not stream.done()
            stream.cancel()

    run(main())


def test_requests_before_the_cluster_is_ready_are_refused(tmp_path: Path) -> None:
    async def main() -> None:
        async with cluster_of(tmp_path, num_workers=0) as cluster:
            node = cluster.join(None, silent=True)
            while node.agent.state().phase != "start":
                await asyncio.sleep(0.02)
            with pytest.raises(RequestError, match="the cluster is starting: phase start") as caught:
                await tokens_of(node.agent.generate(request_of("r")))
            assert caught.value.status == 503

    run(main())


# -- ends -------------------------------------------------------------------------------------------------------------


def test_a_dead_rank_ends_all_nodes_and_fails_what_runs(tmp_path: Path) -> None:
    async def main() -> None:
        async with ready_cluster(tmp_path) as (cluster, engine, head, worker):
            streams = [
                asyncio.create_task(tokens_of(node.agent.generate(request_of(node.instance))))
                for node in (head, worker)
            ]
            for _ in streams:
                await engine.answer(await engine.requests.get(), 5)
            await worker.agent.report(RankGone(rank=1, exit_code=6, cause="was killed by SIGKILL"))
            for stream in streams:
                with pytest.raises(RequestError, match=r"(?s)rank 1 on worker 0.*was killed by SIGKILL") as caught:
                    await stream
                assert caught.value.status == 503
            expected = (6, "rank 1 on worker 0 (host-worker 0, pid 1): was killed by SIGKILL")
            assert await head.outcome() == await worker.outcome() == Outcome(*expected)
            assert await cluster.outcome() == expected
            assert head.ranks.num_stops == worker.ranks.num_stops == 1
            for node in (head, worker):
                assert node.agent.state().state == "failed"
                with pytest.raises(RequestError, match="SIGKILL"):
                    await tokens_of(node.agent.generate(request_of("later")))

    run(main())


def test_a_head_that_falls_silent_ends_its_workers(tmp_path: Path) -> None:
    async def main() -> None:
        async with ready_cluster(tmp_path) as (cluster, engine, _, worker):
            stream = asyncio.create_task(tokens_of(worker.agent.generate(request_of("r"))))
            await engine.requests.get()
            cluster.task.cancel()
            outcome = await worker.outcome()
            assert outcome.exit_code == 6
            assert "has not been heard for" in outcome.cause
            assert "TPDIST_NODE_LOST_S=1.5" in outcome.cause
            with pytest.raises(RequestError, match="has not been heard"):
                await stream
            assert worker.ranks.num_stops == 1

    run(main())


def test_a_worker_that_may_not_come_back_ends_when_its_heads_connection_closes(tmp_path: Path) -> None:
    async def main() -> None:
        async with cluster_of(tmp_path, num_workers=1) as first:
            worker = first.join(0)
            while not worker.agent.state().nodes:
                await asyncio.sleep(0.02)
            first.nodes.clear()
        outcome = await worker.outcome()
        worker.agent.close()
        assert outcome.exit_code == 6
        assert "closed its connection" in outcome.cause

    run(main())


def test_a_worker_that_dies_is_noticed_and_named(tmp_path: Path) -> None:
    async def main() -> None:
        async with ready_cluster(tmp_path) as (cluster, _, head, worker):
            await worker.die()
            cluster.nodes.remove(worker)
            started = time.monotonic()
            outcome = await head.outcome()
            assert outcome.exit_code == 6
            assert "worker 0 (host-worker 0, pid 100)" in outcome.cause
            assert time.monotonic() - started < 4

    run(main())


def test_a_loop_that_stood_still_takes_nobody_for_lost(tmp_path: Path) -> None:
    async def main() -> None:
        async with ready_cluster(tmp_path) as (cluster, _, head, worker):
            time.sleep(3)
            await asyncio.sleep(1)
            assert not cluster.task.done()
            assert not head.task.done()
            assert not worker.task.done()

    run(main())


def test_requests_without_output_go_on_in_the_next_epoch_and_the_others_fail(tmp_path: Path) -> None:
    async def main() -> None:
        async with ready_cluster(tmp_path, max_restarts=3) as (cluster, engine, head, worker):
            started, waiting = (
                asyncio.create_task(tokens_of(head.agent.generate(request_of(name)))) for name in ("started", "waiting")
            )
            first, _ = [await engine.requests.get() for _ in range(2)]
            assert first.request_id == "started"
            await engine.answer(first, 5)
            while head.agent.state().stats != STATS:
                await asyncio.sleep(0.02)
            engine.close()
            cluster.closing.pop_all()
            head.ranks.silent = True
            await worker.agent.report(RankGone(rank=1, exit_code=6, cause="was killed by SIGKILL"))
            with pytest.raises(RequestError, match=r"lost a part of itself.*rank 1 on worker 0.*SIGKILL") as caught:
                await started
            assert caught.value.status == 503
            while head.agent.state().epoch < 2:
                await asyncio.sleep(0.02)
            second = await cluster.engine(epoch=2)
            await head.agent.report(RankUpdate(rank=0, pid=1, device="cpu", phase="ready", kv_blocks=32))
            again = await second.requests.get()
            assert again.request_id == "waiting"
            await second.answer(again, 8, finish="stop")
            assert await waiting == [8]
            assert worker.ranks.num_epochs_ended == head.ranks.num_epochs_ended == 1
            while worker.agent.state().retried != 1:
                await asyncio.sleep(0.02)

    run(main())


def test_clients_that_give_up_do_not_hide_an_engine_that_hangs(tmp_path: Path) -> None:
    """None of them waits for as long as a hang takes to be seen."""

    async def main() -> None:
        async with ready_cluster(tmp_path, num_workers=0, max_restarts=3, hang_timeout_s=1) as (_, _, head):
            asked = 0
            while head.agent.state().epoch < 2:
                stream = head.agent.generate(request_of(f"{asked}"))
                with contextlib.suppress(TimeoutError, RequestError):
                    async with asyncio.timeout(0.3):
                        await anext(stream)
                await stream.aclose()
                asked += 1
            assert "no rank has advanced for" in head.agent.state().restarts[0].cause

    run(main())


def test_an_engine_that_answers_an_abort_does_not_hang(tmp_path: Path) -> None:
    async def main() -> None:
        async with ready_cluster(tmp_path, num_workers=0, max_restarts=3, hang_timeout_s=0.5) as (_, engine, head):
            async with aclosing(head.agent.generate(request_of("r"))) as stream:
                answer = asyncio.ensure_future(anext(stream))
                await engine.answer(await engine.requests.get(), 7)
                await answer
            await engine.aborted.get()
            await engine.send(StepOutputs(step=2, outputs=(), stats=EngineStats()))
            await asyncio.sleep(1.5)
            assert (head.agent.state().state, head.agent.state().epoch) == ("ready", 1)

    run(main())


def test_a_request_that_waits_for_a_recovery_that_does_not_come_fails_in_time(tmp_path: Path) -> None:
    async def main() -> None:
        async with ready_cluster(tmp_path, max_restarts=3, retry_timeout_s=0.5) as (cluster, engine, head, worker):
            stream = asyncio.create_task(tokens_of(head.agent.generate(request_of("r"))))
            await engine.requests.get()
            await worker.die()
            cluster.nodes.remove(worker)
            with pytest.raises(RequestError, match=r"did not recover within 0\.5 s: worker 0 .* was lost") as caught:
                await stream
            assert caught.value.status == 503
            assert head.agent.state().state == "recovering"

    run(main())


def test_a_worker_that_loses_its_head_ends_its_ranks_and_joins_the_next_head(tmp_path: Path) -> None:
    async def main() -> None:
        async with cluster_of(tmp_path, num_workers=1) as first:
            first.join(None)
            worker = first.join(0, comes_back=True)
            await worker.agent.wait_ready()
            engine = await first.engine()
            stream = asyncio.create_task(tokens_of(worker.agent.generate(request_of("r"))))
            await engine.requests.get()
            first.nodes.remove(worker)
        with pytest.raises(RequestError, match="lost its head") as caught:
            await stream
        assert caught.value.status == 503
        assert worker.agent.state().state in ("recovering", "starting")
        async with cluster_of(tmp_path, num_workers=1, cluster_id="second life") as second:
            second.nodes.append(worker)
            second.join(None)
            await worker.agent.wait_ready()
            assert worker.ranks.num_epochs_ended == 1
            assert [assign.cluster_id for assign in worker.ranks.assigns] == ["cluster", "second life"]

    run(main())


def test_a_resolver_that_does_not_answer_does_not_stop_a_node_that_lost_its_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, answer = threading.Event(), threading.Event()

    def needs_ipv6(address: str) -> bool:
        asked.set()
        assert answer.wait(DEADLINE_S / 4), "nothing else ran while a name was looked up"
        return False

    monkeypatch.setattr(agent, "needs_ipv6", needs_ipv6)

    async def main() -> None:
        async with cluster_of(tmp_path, num_workers=1) as first:
            first.join(None)
            worker = first.join(0, comes_back=True)
            await worker.agent.wait_ready()
            first.nodes.remove(worker)
        while not asked.is_set():
            await asyncio.sleep(BEAT_S)
        answer.set()
        async with cluster_of(tmp_path, num_workers=1, cluster_id="second life") as second:
            second.nodes.append(worker)
            second.join(None)
            await worker.agent.wait_ready()

    run(main())


@pytest.mark.parametrize("told_by_head", [False, True])
def test_a_worker_that_was_to_end_does_not_look_for_a_lost_head(tmp_path: Path, told_by_head: bool) -> None:
    async def main() -> None:
        async with cluster_of(tmp_path, num_workers=1) as first:
            head = first.join(None)
            worker = first.join(0, comes_back=True)
            await worker.agent.wait_ready()
            engine = await first.engine()
            stream = asyncio.create_task(tokens_of(worker.agent.generate(request_of("r"))))
            await engine.requests.get()
            await (head if told_by_head else worker).agent.leave(DrainRequest(reason="SIGTERM"))
            await worker.agent.wait_until(lambda state: state.state == "draining")
            first.nodes.remove(worker)
        outcome = await worker.outcome()
        worker.agent.close()
        assert outcome.exit_code == 0
        assert outcome.cause.endswith("while this node was to end")
        with pytest.raises(RequestError):
            await stream

    run(main())


def test_a_worker_whose_head_does_not_come_back_says_so(tmp_path: Path) -> None:
    async def main() -> None:
        async with cluster_of(tmp_path, num_workers=1) as first:
            first.join(None)
            worker = first.join(0, comes_back=True, register_timeout_s=1)
            await worker.agent.wait_ready()
            first.nodes.remove(worker)
        outcome = await worker.outcome()
        worker.agent.close()
        assert outcome.exit_code == 6
        assert "closed its connection" in outcome.cause or "has not been heard" in outcome.cause
        assert "did not come back within 1 s (TPDIST_REGISTER_TIMEOUT_S waits longer)" in outcome.cause

    run(main())


def test_a_standby_serves_its_clients_and_takes_a_lost_place(tmp_path: Path) -> None:
    async def main() -> None:
        async with ready_cluster(tmp_path, max_restarts=3) as (cluster, engine, head, worker):
            spare = cluster.join(None, register={"standby": True}, standby=True)
            await spare.agent.wait_ready()
            stream = asyncio.create_task(tokens_of(spare.agent.generate(request_of("r"))))
            await engine.answer(await engine.requests.get(), 7, finish="stop")
            assert await stream == [7]
            await worker.die()
            cluster.nodes.remove(worker)
            while head.agent.state().epoch < 2 or head.agent.state().state != "ready":
                await asyncio.sleep(0.02)
            assert [assign.node_index for assign in spare.ranks.assigns] == [1]

    run(main())


def test_draining_finishes_what_runs_and_takes_nothing_new(tmp_path: Path) -> None:
    async def main() -> None:
        async with ready_cluster(tmp_path) as (cluster, engine, head, worker):
            stream = asyncio.create_task(tokens_of(head.agent.generate(request_of("r"))))
            request = await engine.requests.get()
            await worker.agent.drain(DrainRequest(reason="SIGTERM on worker 0"))
            while worker.agent.state().state != "draining":
                await asyncio.sleep(0.02)
            with pytest.raises(RequestError, match="the cluster is draining: SIGTERM on worker 0"):
                await tokens_of(worker.agent.generate(request_of("new")))
            assert not head.task.done()
            await engine.answer(request, 4, finish="length")
            assert await stream == [4]
            assert await head.outcome() == await worker.outcome() == Outcome(0, "SIGTERM on worker 0")
            assert await cluster.outcome() == (0, "SIGTERM on worker 0")

    run(main())


def test_draining_gives_up_after_its_timeout(tmp_path: Path) -> None:
    async def main() -> None:
        async with ready_cluster(tmp_path, shutdown_timeout_s=0.3) as (_, engine, head, _):
            stream = asyncio.create_task(tokens_of(head.agent.generate(request_of("r"))))
            await engine.requests.get()
            await head.agent.drain(DrainRequest(reason="SIGTERM"))
            with pytest.raises(RequestError, match="SIGTERM") as caught:
                await stream
            assert caught.value.status == 503
            assert await head.outcome() == Outcome(0, "SIGTERM")

    run(main())


def test_a_node_that_has_not_joined_ends_by_itself_when_asked(tmp_path: Path) -> None:
    async def main() -> None:
        node = Node(f"ipc://{tmp_path}/nobody.sock", 0)
        await asyncio.sleep(0.1)
        await node.agent.leave(DrainRequest(reason="SIGINT", immediate=True, exit_code=130))
        assert await node.outcome() == Outcome(130, "SIGINT")
        node.agent.close()

    run(main())


def test_a_node_without_a_place_cannot_end_the_cluster_and_leaves_alone(tmp_path: Path) -> None:
    async def main() -> None:
        async with ready_cluster(tmp_path, max_restarts=3) as (cluster, _, head, _):
            standby = cluster.join(None, instance="spare", register={"standby": True}, standby=True)
            second = cluster.join(0, instance="second")
            await within(DEADLINE_S / 2, standby.agent.wait_ready())
            await second.agent.wait_until(lambda state: "worker 0 is already here" in state.reason)
            for node in (standby, second):
                with pytest.raises(RequestError, match="this node has no place in the cluster") as caught:
                    await node.agent.drain(DrainRequest(reason="POST"))
                assert caught.value.status == 503
                await node.agent.leave(DrainRequest(reason="SIGTERM"))
                assert await node.outcome() == Outcome(0, "SIGTERM")
            assert head.agent.state().state == "ready"

    run(main())


def test_an_abandoned_node_ends_the_cluster_with_its_code(tmp_path: Path) -> None:
    async def main() -> None:
        async with ready_cluster(tmp_path) as (_, _, head, worker):
            worker.agent.abandon(130, "second signal")
            assert (await worker.outcome()).exit_code == 130
            assert (worker.agent.state().state, worker.agent.state().reason) == ("draining", "second signal")
            assert (await head.outcome()) == Outcome(130, "worker 0 (host-worker 0, pid 100) left: second signal")

    run(main())


def test_a_node_that_fails_by_itself_is_not_ready_while_it_ends(tmp_path: Path) -> None:
    async def main() -> None:
        async with ready_cluster(tmp_path) as (_, _, head, worker):
            worker.agent.abandon(4, "tokenizer.json is no JSON")
            assert await worker.outcome() == Outcome(4, "tokenizer.json is no JSON")
            assert (worker.agent.state().state, worker.agent.state().reason) == ("failed", "tokenizer.json is no JSON")
            assert (await head.outcome()).exit_code == 4

    run(main())


def test_many_registrations_at_once_are_told_together(tmp_path: Path) -> None:
    """Every node hears of changes, but the head does not send its whole view to all of them for each one."""

    async def main() -> None:
        num_workers, published = 30, 0
        async with cluster_of(tmp_path, num_workers=num_workers) as cluster:
            send_all = cluster.router.send_all

            async def count(identities: Iterable[bytes], body: Message) -> None:
                nonlocal published
                published += isinstance(body, ClusterState)
                await send_all(identities, body)

            cluster.router.send_all = count  # type: ignore[method-assign]
            for key in range(num_workers):
                peer = AsyncDealer(address=cluster.address, identity=f"{key}".encode(), codec=Codec())
                cluster.closing.callback(peer.close)
                await peer.send(register_of(key, instance=f"{key}"))
            while not isinstance(body := (await peer.receive()).body, ClusterState) or len(body.nodes) < num_workers:
                pass
            assert published <= num_workers / 2

    run(main())
