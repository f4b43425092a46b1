"""A head with 64 simulated nodes in one event loop: all are dealt ranks, losses reach all, and nothing piles up."""

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import msgspec
import pytest
from clusters import Head, rules_of, update_of
from waiting import within

from tpdist.control.channel import AsyncRouter, Codec
from tpdist.control.coordinator import Coordinator
from tpdist.control.messages import ClusterNews, ClusterState, EngineStats, Heartbeat, RankProgress
from tpdist.control.state import Key, name_of
from tpdist.control.view import news_of, view, with_news

NUM_NODES = 64
DEADLINE_S = 60.0
BEAT_S = 0.2
KEYS: tuple[Key, ...] = (None, *range(NUM_NODES - 1))
LAST = KEYS[-1]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    monkeypatch.syspath_prepend(str(Path(__file__).with_name("bench")))
    return import_module


@asynccontextmanager
async def cluster(bench: Callable[[str], Any]) -> AsyncIterator[Any]:
    """The nodes, all ready, of a head on a loopback port that plans as `tpdist serve` does."""
    processes, simulated = bench("control_processes"), bench("simulated_nodes")
    start = {"num_nodes": NUM_NODES, "heartbeat_interval_s": BEAT_S, "node_lost_s": 10.0}
    router, engine = AsyncRouter(name="control", codec=Codec()), AsyncRouter(name="engine", codec=Codec())
    head = asyncio.create_task(Coordinator(router=router, engine=engine, rules=processes.rules_of(start)).run())
    address = router.bind("tcp://127.0.0.1:*")
    nodes = simulated.SimulatedNodes(address=address, keys=None, heartbeat_interval_s=BEAT_S)
    try:
        nodes.join(list(KEYS))
        for moment in ("assigned", "ready", "served"):
            await nodes.counts.reached[moment].wait()
        yield nodes
    finally:
        nodes.close()
        head.cancel()
        await asyncio.gather(head, return_exceptions=True)
        router.close()
        engine.close()


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(within(DEADLINE_S, work))


def test_all_nodes_are_dealt_ranks_and_know_that_the_cluster_is_ready(bench: Callable[[str], Any]) -> None:
    async def main() -> None:
        async with cluster(bench) as nodes:
            assert nodes.failed == ""
            assert nodes.counts.num_messages["Assign"] == NUM_NODES

    run(main())


def test_a_lost_rank_ends_the_epoch_on_all_nodes_and_the_next_begins(bench: Callable[[str], Any]) -> None:
    async def main() -> None:
        async with cluster(bench) as nodes:
            nodes.lose(LAST, "rank")
            for moment in ("ended", "assigned", "ready", "served"):
                await nodes.counts.reached[moment].wait()
            assert nodes.counts.num_messages["EndEpoch"] == NUM_NODES
            assert nodes.counts.num_messages["Assign"] == 2 * NUM_NODES

    run(main())


def test_a_closed_connection_ends_the_epoch_on_the_other_nodes(bench: Callable[[str], Any]) -> None:
    async def main() -> None:
        async with cluster(bench) as nodes:
            nodes.lose(LAST, "close")
            await nodes.counts.reached["ended"].wait()
            assert nodes.counts.num_messages["EndEpoch"] == NUM_NODES - 1
            nodes.replace(LAST)
            await nodes.counts.reached["ready"].wait()

    run(main())


def test_a_view_that_is_too_large_for_all_at_once_comes_to_all_after_the_news(
    bench: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tpdist.control.publishing.AT_ONCE_BYTES", 100_000)

    async def main() -> None:
        async with cluster(bench) as nodes:
            assert nodes.counts.num_messages["ClusterNews"] >= NUM_NODES
            await nodes.counts.reached["shown"].wait()

    run(main())


def test_news_are_all_of_a_view_but_what_grows_with_the_cluster() -> None:
    names = {*ClusterState.__struct_fields__} - {*ClusterNews.__struct_fields__}
    assert names == {"nodes", "plan", "standbys"}


def test_an_earlier_view_with_the_news_is_the_view_but_for_nodes_and_plan() -> None:
    head = Head(rules_of(1))
    head.start()
    earlier = view(head.state, head.now, stats=EngineStats())
    head.update("ready", kv_blocks=32)
    later = view(head.state, head.now, stats=EngineStats(num_requests_running=1), retried=2)
    assert earlier.state == "starting"
    assert with_news(earlier, news_of(later)) == msgspec.structs.replace(later, nodes=earlier.nodes, plan=earlier.plan)


def test_the_state_of_the_head_does_not_grow_with_heartbeats() -> None:
    head = Head(rules_of(NUM_NODES - 1))
    head.start()
    for rank, key in enumerate(KEYS):
        head.hear(name_of(key), update_of(rank, "ready", kv_blocks=32))

    def beat(step: int) -> int:
        """The bytes of all that the state holds, after a heartbeat of each node."""
        head.now += 1
        for rank, key in enumerate(KEYS):
            progress = RankProgress(rank, step, step, "all_reduce", False, "R")
            assert not head.hear(name_of(key), Heartbeat(instance=name_of(key), ranks=(progress,)))
        assert not head.tick()
        return num_bytes(head.state, set())

    first = beat(1000)
    assert [beat(1000 + step) for step in range(1, 20)] == [first] * 19


def num_bytes(value: Any, counted: set[int]) -> int:
    """Of an object and what it refers to, each once; numbers count as one word, whatever they are."""
    if value is None or isinstance(value, bool | int | float | type) or callable(value) or id(value) in counted:
        return 8
    counted.add(id(value))
    names = (*getattr(value, "__struct_fields__", ()), *getattr(value, "__dict__", ()))
    parts = [getattr(value, name) for name in names]
    if isinstance(value, dict):
        parts += [*value.keys(), *value.values()]
    elif isinstance(value, tuple | list | set | frozenset):
        parts += value
    return sys.getsizeof(value) + sum(num_bytes(part, counted) for part in parts)
