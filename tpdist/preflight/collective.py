"""`python -m tpdist.preflight.collective`: one rank of a small all-reduce, over the groups that serving uses.

A process of its own: it imports torch, and a collective that hangs can only be killed.
"""

import signal
import statistics
import sys
import time

import msgspec
import torch

from tpdist.errors import LostError, TpdistError
from tpdist.parallel.group import RankGroup
from tpdist.parallel.process_group import connect, disconnect
from tpdist.parallel.store import create_store
from tpdist.parent import follow_parent
from tpdist.preflight.orders import RankOrder
from tpdist.preflight.words import ReduceFigures

SMALL, LARGE = 4096, 1024 * 1024
"""float32 numbers: 16 KiB are the hidden states of one token of a large model, 4 MiB those of a prompt."""
NUM_SMALL, NUM_LARGE = 20, 3


def run_rank(order: RankOrder) -> ReduceFigures:
    """Meet the other ranks, add up, and leave. Every rank must call it. Raises TpdistError."""
    device = torch.device("cuda", order.local_rank) if order.backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store = create_store(
        host=order.host,
        port=order.port,
        world_size=order.world_size,
        is_master=order.rank == 0,
        listen_fd=order.listen_fd,
        timeout_s=order.timeout_s,
    )
    group = connect(
        rank=order.rank,
        world_size=order.world_size,
        tp_size=order.world_size,
        backend=order.backend,
        store=store,
        timeout_s=order.timeout_s,
        device=device if order.backend == "nccl" else None,
        host_id="",
    )
    figures = ReduceFigures(
        small_s=_timed(group, SMALL, NUM_SMALL, device), large_s=_timed(group, LARGE, NUM_LARGE, device)
    )
    disconnect()
    return figures


def _timed(group: RankGroup, size: int, count: int, device: torch.device) -> float:
    """Median seconds of an all-reduce of `size` numbers, after one that is not counted. Raises LostError for a sum
    that is wrong."""
    seconds = []
    for _ in range(count + 1):
        x = torch.full((size,), float(group.rank + 1), device=device)
        started = time.perf_counter()
        total = group.all_reduce(x)
        low, high = total.min().item(), total.max().item()
        seconds.append(time.perf_counter() - started)
        expected = group.size * (group.size + 1) / 2
        if not low == high == expected:
            raise LostError(f"the sum over {group.size} ranks is {low:g} to {high:g} instead of {expected:g}")
    return statistics.median(seconds[1:])


def main() -> int:
    """Carry out the order in the first argument, and print the figures as JSON; or say on stderr what went wrong."""
    order = msgspec.json.decode(sys.argv[1], type=RankOrder)
    follow_parent(order.parent_pid, signal.SIGKILL)
    torch.set_num_threads(1)
    try:
        figures = run_rank(order)
    except (TpdistError, RuntimeError) as error:
        print(f"rank {order.rank}: {error}", file=sys.stderr)
        return LostError.exit_code
    sys.stdout.write(msgspec.json.encode(figures).decode() + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
