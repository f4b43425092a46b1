"""The processes of control_plane.py: `python control_processes.py head|nodes`.

Reads commands from stdin, one JSON object a line, and answers each with one line on stdout; ends when stdin does.

    head    start    num_nodes, heartbeat_interval_s, node_lost_s, seed    the address that it listens on
            usage                                     seconds of CPU, the most bytes of memory, as of now
    nodes   start    address, heartbeat_interval_s, seed
            join     keys                             when the first of them went
            lose     key, how                         when: see SimulatedNodes.lose
            again    key                              a lost node is started again
            expect                                    what has come so far does not count
            wait     moment                           when the last node of this process came to it, and the first
            counts                                    messages and bytes that were received, by kind

Times are of the monotonic clock, which all processes of a machine have in common.
"""

import asyncio
import json
import logging
import resource
import sys
import uuid
from pathlib import Path
from typing import Any

from models import llama
from simulated_nodes import SimulatedNodes

from tpdist.control.channel import AsyncRouter, ClusterKeys, Codec
from tpdist.control.coordinator import Coordinator
from tpdist.control.layout import make_layout
from tpdist.control.state import Layout, NodeFacts, Rules
from tpdist.plan.decoder_weights import decoder_weights
from tpdist.settings import Settings

MOMENT_S = 120.0
CONFIG = llama(
    num_layers=128,
    hidden_size=1024,
    intermediate_size=4096,
    vocab_size=32000,
    max_position_embeddings=4096,
    head_dim=16,
)
SETTINGS = Settings.load({}, environ={}).shared()
Command = dict[str, Any]


def main() -> None:
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    asyncio.run({"head": serve_head, "nodes": serve_nodes}[sys.argv[1]]())


async def commands() -> asyncio.StreamReader:
    """Standard input, by lines."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    return reader


def answer(**values: Any) -> None:
    print(json.dumps(values), flush=True)


def keys_of(seed: str | None) -> ClusterKeys | None:
    return None if seed is None else ClusterKeys.from_seed(bytes.fromhex(seed))


# -- head -------------------------------------------------------------------------------------------------------------


async def serve_head() -> None:
    reader = await commands()
    start = json.loads(await reader.readline())
    router = AsyncRouter(name="control", codec=Codec(), keys=keys_of(start["seed"]))
    engine = AsyncRouter(name="engine", codec=Codec())
    engine.bind("tcp://127.0.0.1:*")
    coordinator = Coordinator(router=router, engine=engine, rules=rules_of(start))
    answer(address=router.bind("tcp://127.0.0.1:*"))
    works = [asyncio.create_task(coordinator.run()), asyncio.create_task(tell_usage(reader))]
    done, left = await asyncio.wait(works, return_when=asyncio.FIRST_COMPLETED)
    for work in left:
        work.cancel()
    await asyncio.gather(*left, return_exceptions=True)
    router.close()
    engine.close()
    if works[0] in done:
        raise SystemExit(f"the head ended: {works[0]}")


async def tell_usage(reader: asyncio.StreamReader) -> None:
    """Until nobody can ask any more."""
    while await reader.readline():
        used = resource.getrusage(resource.RUSAGE_SELF)
        answer(cpu_s=used.ru_utime + used.ru_stime, peak_bytes=peak_bytes())


def peak_bytes() -> int:
    """The most memory of this process; ru_maxrss would count what its parent had before it."""
    words = Path("/proc/self/status").read_text().split()
    return 1024 * int(words[words.index("VmHWM:") + 1])


def rules_of(start: Command) -> Rules:
    """As `tpdist serve` has them by default, but for what the benchmark says."""
    return Rules(
        cluster_id=uuid.uuid4().hex,
        num_workers=start["num_nodes"] - 1,
        global_world_size=None,
        settings=SETTINGS,
        plan=plan,
        register_timeout_s=600,
        fetch_timeout_s=600,
        load_timeout_s=1800,
        heartbeat_interval_s=start["heartbeat_interval_s"],
        node_lost_s=start["node_lost_s"],
        hang_timeout_s=60,
        shutdown_timeout_s=30,
        max_restarts=1000,
        retry_timeout_s=60,
    )


def plan(nodes: "list[NodeFacts]") -> Layout:
    """What the head of a real cluster plans: one rank for each of the nodes' GPUs."""
    return make_layout(
        nodes,
        config=CONFIG,
        weights=decoder_weights(CONFIG),
        settings=SETTINGS,
        explicit=(),
        one_process=None,
        checkpoint_dtype="bfloat16",
        global_world_size=None,
        store_port=0,
        load_timeout_s=1800,
        collective_timeout_s=70,
        local_interface=lambda address: "lo",
    )


# -- nodes ------------------------------------------------------------------------------------------------------------


async def serve_nodes() -> None:
    reader = await commands()
    nodes: SimulatedNodes | None = None
    while line := await reader.readline():
        command = json.loads(line)
        match command.pop("do"):
            case "start":
                nodes = SimulatedNodes(
                    address=command["address"],
                    keys=keys_of(command["seed"]),
                    heartbeat_interval_s=command["heartbeat_interval_s"],
                )
                answer()
            case "join":
                answer(at=nodes.join(command["keys"]))
            case "lose":
                answer(at=nodes.lose(command["key"], command["how"]))
            case "again":
                answer(at=nodes.replace(command["key"]))
            case "expect":
                answer(at=nodes.expect())
            case "wait":
                await until(nodes, command["moment"])
            case "counts":
                answer(num_bytes=nodes.counts.num_bytes, num_messages=nodes.counts.num_messages)
    if nodes is not None:
        nodes.close()


async def until(nodes: SimulatedNodes, moment: str) -> None:
    """Answer once all nodes of this process have come to a moment."""
    try:
        async with asyncio.timeout(MOMENT_S):
            await nodes.counts.reached[moment].wait()
    except TimeoutError:
        behind = len(nodes.counts.due[moment])
        raise SystemExit(f"{behind} nodes were not {moment} within {MOMENT_S:g} s {nodes.failed}") from None
    answer(first=nodes.counts.first_at[moment], last=nodes.counts.at[moment])


if __name__ == "__main__":
    main()
