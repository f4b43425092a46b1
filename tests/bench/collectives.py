"""Microseconds per all-reduce of ranks on this machine: through shared memory, and over gloo.

    python tests/bench/collectives.py [--ranks 2] [--runs 5] [--json]

Both are measured in the same processes, in alternation; the times are medians over the runs, and the ratio is gloo's
time over that of shared memory, its median and its range. Each rank uses one thread.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from tpdist.parallel.group import RankGroup
from tpdist.parallel.process_group import connect, disconnect
from tpdist.parallel.store import Store, create_store, sub_store

SIZES_BYTES = (4 * 1024, 64 * 1024, 1024**2, 8 * 1024**2)
TARGET_S = 0.1
FEWEST_ROUNDS = 5
MOST_ROUNDS = 2000
TIMEOUT_S = 60.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="processes on this machine (default: 2)")
    parser.add_argument("--runs", type=int, default=5, help="alternations (default: 5)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    arguments = parser.parse_args()
    rows = [summary(size, runs) for size, runs in measure(arguments.ranks, arguments.runs, arguments.dtype).items()]
    if arguments.json:
        print(json.dumps({"ranks": arguments.ranks, "dtype": arguments.dtype, "all_reduce": rows}))
        return
    print(f"all_reduce of {arguments.dtype} over {arguments.ranks} ranks, {arguments.runs} alternations")
    print(f"{'bytes':>10} {'shared us':>10} {'gloo us':>10} {'ratio':>7}   range")
    for row in rows:
        print(
            f"{row['bytes']:>10} {row['shared_us']:>10.1f} {row['gloo_us']:>10.1f} {row['ratio']:>7.1f}   "
            f"{row['ratio_min']:.1f}-{row['ratio_max']:.1f}"
        )


def summary(num_bytes: int, runs: Sequence[tuple[float, float]]) -> dict[str, float]:
    """runs: (shared, gloo) seconds of each alternation."""
    ratios = [gloo / shared for shared, gloo in runs]
    return {
        "bytes": num_bytes,
        "shared_us": 1e6 * statistics.median(shared for shared, _ in runs),
        "gloo_us": 1e6 * statistics.median(gloo for _, gloo in runs),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }


def measure(num_ranks: int, num_runs: int, dtype: str) -> dict[int, list[tuple[float, float]]]:
    """Start the ranks, and return what rank 0 measured: (shared, gloo) seconds by size, for each run."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    server = create_store(
        host="127.0.0.1", port=0, world_size=num_ranks, is_master=True, listen_fd=None, timeout_s=TIMEOUT_S
    )
    ranks = [
        context.Process(target=run_rank, args=(rank, num_ranks, server.port, num_runs, dtype, sender), daemon=True)
        for rank in range(num_ranks)
    ]
    for rank in ranks:
        rank.start()
    sender.close()
    try:
        measured: dict[int, list[tuple[float, float]]] = receiver.recv()
    except EOFError as error:
        raise SystemExit("the ranks ended without a result") from error
    finally:
        for rank in ranks:
            rank.join(TIMEOUT_S)
            rank.kill()
    return measured


def run_rank(rank: int, num_ranks: int, port: int, num_runs: int, dtype: str, sender: Any) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    store = create_store(
        host="127.0.0.1", port=port, world_size=num_ranks, is_master=False, listen_fd=None, timeout_s=TIMEOUT_S
    )
    shared = join(rank, num_ranks, sub_store(store, "shared"), host_id=None)
    # Memory of one host needs no connection.
    disconnect()
    gloo = join(rank, num_ranks, sub_store(store, "gloo"), host_id="")
    measured = {}
    for size in SIZES_BYTES:
        x = torch.zeros(size // getattr(torch, dtype).itemsize, dtype=getattr(torch, dtype))
        rounds = {group: count_rounds(group, x) for group in (shared, gloo)}
        measured[size] = [(seconds(shared, x, rounds[shared]), seconds(gloo, x, rounds[gloo])) for _ in range(num_runs)]
    if rank == 0:
        sender.send(measured)
    sender.close()
    disconnect()


def join(rank: int, num_ranks: int, store: Store, *, host_id: str | None) -> RankGroup:
    return connect(
        rank=rank,
        world_size=num_ranks,
        tp_size=num_ranks,
        backend="gloo",
        store=store,
        timeout_s=TIMEOUT_S,
        host_id=host_id,
    )


def seconds(group: RankGroup, x: torch.Tensor, rounds: int) -> float:
    """Per all-reduce, over `rounds`."""
    group.all_reduce(x)
    started = time.perf_counter()
    for _ in range(rounds):
        group.all_reduce(x)
    return (time.perf_counter() - started) / rounds


def count_rounds(group: RankGroup, x: torch.Tensor) -> int:
    """As many as take about TARGET_S; rank 0's guess for all."""
    guess = TARGET_S / seconds(group, x, FEWEST_ROUNDS)
    rounds = torch.tensor([min(max(round(guess), FEWEST_ROUNDS), MOST_ROUNDS)])
    return int(group.broadcast(rounds).item())


if __name__ == "__main__":
    main()
