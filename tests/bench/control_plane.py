"""What the control plane of a head costs with many nodes, one process for the head and four for simulated agents.

    python tests/bench/control_plane.py [--runs 3] [--nodes 16,64,256,1024] [--curve]

The agents are real to the head: two TCP connections each, in the real messages, and one rank each, which the real
planner places. Claims: seconds until all nodes have their ranks, from the first that registers; the head's CPU while
nothing happens but heartbeats, all of whose ranks advance; the time from a rank's exit and from a closed connection to
the last node's order to end the epoch, in heartbeats; from a node's last word to the same, in seconds; the head's most
memory; bytes that all nodes receive in a second. Each with its limit, and the ratio to that, which 1 may not exceed.
"""

import asyncio
import json
import secrets
import sys
from argparse import Namespace
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from measuring import parser

PROCESSES = Path(__file__).with_name("control_processes.py")
NUM_PROCESSES = 4
ANSWER_S = 180.0
SETTLE_HEARTBEATS = 3
LINE_BYTES = 1 << 20


@dataclass(frozen=True)
class Claim:
    """One thing that is measured. `limit` is None for what is only told."""

    name: str
    unit: str
    limit: float | None = None


ASSIGNED = Claim("first Register to the last Assign", "s", 3.0)
READY = Claim("first Register to the last rank ready", "s")
SERVED = Claim("first Register to the last node that knows it", "s")
IDLE_CPU = Claim("CPU of the head while idle", "% of a core", 10.0)
IDLE_BYTES = Claim("received by all nodes while idle", "MB/s")
EXIT = Claim("a rank's exit to the last EndEpoch", "heartbeats", 2.0)
AGAIN = Claim("the same to the last Assign of the next epoch", "s", 3.0)
CLOSED = Claim("a closed connection to the last EndEpoch", "heartbeats", 2.0)
SILENT = Claim("silence to the last EndEpoch, less node_lost_s", "heartbeats", 2.0)
MEMORY = Claim("most memory of the head", "MB", 300.0)
STARTUP_CPU = Claim("CPU of the head until all know it is ready", "s")
STARTUP_BYTES = Claim("received by all nodes until then", "MB")


def main() -> None:
    arguments = options()
    sizes = [int(size) for size in arguments.nodes.split(",")]
    found: dict[int, list[dict[Claim, float]]] = {size: [] for size in sizes}
    for run in range(arguments.runs):
        for size in sizes if run % 2 == 0 else reversed(sizes):
            print(f"run {run + 1} of {arguments.runs}: {size} nodes", file=sys.stderr, flush=True)
            found[size].append(asyncio.run(measure(size, arguments)))
    show(found, as_json=arguments.json)


def options() -> Namespace:
    made = parser(__doc__ or "", runs=3)
    made.add_argument("--nodes", default="16,64,256,1024", metavar="N,N", help="sizes (default: 16,64,256,1024)")
    made.add_argument("--curve", action="store_true", help="encrypted, as between machines")
    made.add_argument("--window-s", type=float, default=10.0, metavar="S", help="of heartbeats only (default: 10)")
    made.add_argument("--heartbeat-interval-s", type=float, default=1.0, metavar="S", help="(default: 1)")
    made.add_argument("--node-lost-s", type=float, default=10.0, metavar="S", help="(default: 10)")
    made.add_argument("--profile", metavar="FILE", help="of the head, by cProfile")
    return made.parse_args()


# -- processes --------------------------------------------------------------------------------------------------------


class Process:
    """One of control_processes.py, which answers one command at a time."""

    def __init__(self, name: str, process: asyncio.subprocess.Process) -> None:
        self._name = name
        self._process = process

    async def ask(self, do: str, **values: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": do, **values}).encode() + b"\n")
        async with asyncio.timeout(ANSWER_S):
            line = await self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self._name} ended instead of answering `{do}`")
        answer: dict[str, Any] = json.loads(line)
        return answer

    async def close(self) -> None:
        """It ends when nobody can ask it any more."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            async with asyncio.timeout(ANSWER_S):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()


@asynccontextmanager
async def process(role: str, profile: str | None = None) -> AsyncIterator[Process]:
    options = ["-m", "cProfile", "-o", profile] if profile else []
    pipes = {"stdin": asyncio.subprocess.PIPE, "stdout": asyncio.subprocess.PIPE, "limit": LINE_BYTES}
    started = Process(
        role, await asyncio.create_subprocess_exec(sys.executable, *options, str(PROCESSES), role, **pipes)
    )
    try:
        yield started
    finally:
        await started.close()


class Cluster:
    """A head and the processes of its nodes, which share the places between them."""

    def __init__(self, head: Process, groups: Sequence[Process], size: int, arguments: Namespace) -> None:
        self._head = head
        self._groups = groups
        self._size = size
        self._arguments = arguments

    async def start(self) -> None:
        seed = secrets.token_hex(32) if self._arguments.curve else None
        timing = {"heartbeat_interval_s": self._arguments.heartbeat_interval_s, "seed": seed}
        head = await self._head.ask("start", num_nodes=self._size, node_lost_s=self._arguments.node_lost_s, **timing)
        await self._all("start", address=head["address"], **timing)

    async def join(self) -> float:
        """All nodes go; returns when the first did."""
        keys = [None, *range(self._size - 1)]
        count = len(self._groups)
        joins = (group.ask("join", keys=keys[index::count]) for index, group in enumerate(self._groups))
        return float(min(answer["at"] for answer in await asyncio.gather(*joins)))

    async def until(self, moment: str) -> float:
        """When the last node came to a moment."""
        return float(max(answer["last"] for answer in await self._all("wait", moment=moment)))

    async def lose(self, how: str) -> float:
        """Of the last node; returns when."""
        await self._all("expect")
        return float((await self._of_last("lose", how=how))["at"])

    async def begin_again(self, *, restarted: bool) -> None:
        """The lost node comes again, and the cluster becomes ready."""
        if restarted:
            await self._of_last("again")
        await self.until("ready")

    async def usage(self) -> dict[str, Any]:
        return await self._head.ask("usage")

    async def received_bytes(self) -> int:
        return sum(sum(answer["num_bytes"].values()) for answer in await self._all("counts"))

    async def settle(self) -> None:
        """Until what came of the last event is over."""
        await asyncio.sleep(SETTLE_HEARTBEATS * self._arguments.heartbeat_interval_s)

    async def _all(self, do: str, **values: Any) -> list[dict[str, Any]]:
        return await asyncio.gather(*(group.ask(do, **values) for group in self._groups))

    async def _of_last(self, do: str, **values: Any) -> dict[str, Any]:
        key = self._size - 2
        return await self._groups[(key + 1) % len(self._groups)].ask(do, key=key, **values)


# -- measures ---------------------------------------------------------------------------------------------------------


async def measure(size: int, arguments: Namespace) -> dict[Claim, float]:
    """One life of a cluster: it starts, idles, and loses a rank and two nodes."""
    async with process("head", arguments.profile) as head, all_groups() as groups:
        cluster = Cluster(head, groups, size, arguments)
        await cluster.start()
        found = await startup(cluster)
        await cluster.settle()
        found |= await idleness(cluster, arguments.window_s)
        found |= await losses(cluster, arguments)
        found[MEMORY] = (await cluster.usage())["peak_bytes"] / 1e6
    return found


@asynccontextmanager
async def all_groups() -> AsyncIterator[list[Process]]:
    async with process("nodes") as one, process("nodes") as two, process("nodes") as three, process("nodes") as four:
        yield [one, two, three, four]


async def startup(cluster: Cluster) -> dict[Claim, float]:
    before = await cluster.usage()
    started = await cluster.join()
    found = {
        ASSIGNED: await cluster.until("assigned") - started,
        READY: await cluster.until("ready") - started,
        SERVED: await cluster.until("served") - started,
    }
    found[STARTUP_CPU] = (await cluster.usage())["cpu_s"] - before["cpu_s"]
    found[STARTUP_BYTES] = await cluster.received_bytes() / 1e6
    return found


async def idleness(cluster: Cluster, window_s: float) -> dict[Claim, float]:
    before, bytes_before = await cluster.usage(), await cluster.received_bytes()
    await asyncio.sleep(window_s)
    after, bytes_after = await cluster.usage(), await cluster.received_bytes()
    return {
        IDLE_CPU: 100 * (after["cpu_s"] - before["cpu_s"]) / window_s,
        IDLE_BYTES: (bytes_after - bytes_before) / 1e6 / window_s,
    }


async def losses(cluster: Cluster, arguments: Namespace) -> dict[Claim, float]:
    beat_s = arguments.heartbeat_interval_s
    found: dict[Claim, float] = {}
    lost_at = await cluster.lose("rank")
    found[EXIT] = (await cluster.until("ended") - lost_at) / beat_s
    found[AGAIN] = await cluster.until("assigned") - lost_at
    await cluster.begin_again(restarted=False)
    await cluster.settle()
    lost_at = await cluster.lose("close")
    found[CLOSED] = (await cluster.until("ended") - lost_at) / beat_s
    await cluster.begin_again(restarted=True)
    await cluster.settle()
    lost_at = await cluster.lose("silent")
    found[SILENT] = (await cluster.until("ended") - lost_at - arguments.node_lost_s) / beat_s
    await cluster.begin_again(restarted=False)
    return found


# -- figures ----------------------------------------------------------------------------------------------------------


def show(found: dict[int, list[dict[Claim, float]]], *, as_json: bool) -> None:
    """Medians with the least and the greatest value, the limit, and the ratio of the median to it."""
    figures = [figure(size, claim, [run[claim] for run in runs]) for size, runs in found.items() for claim in runs[0]]
    if as_json:
        print(json.dumps({"figures": figures}))
        return
    print(f"{'nodes':>5}  {'':<48} {'median':>8} {'least':>8} {'most':>8} {'limit':>6} {'ratio':>6}")
    for each in figures:
        limit, ratio = ("-", "-") if each["limit"] is None else (f"{each['limit']:g}", f"{each['ratio']:.2f}")
        values = " ".join(f"{value:8.3g}" for value in (each["median"], min(each["values"]), max(each["values"])))
        print(f"{each['nodes']:>5}  {each['name']:<48} {values} {limit:>6} {ratio:>6}  {each['unit']}")


def figure(size: int, claim: Claim, values: list[float]) -> dict[str, Any]:
    middle = median(values)
    ratio = None if claim.limit is None else middle / claim.limit
    return {"nodes": size, **asdict(claim), "values": values, "median": middle, "ratio": ratio}


if __name__ == "__main__":
    main()
