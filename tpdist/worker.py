"""One rank as a process of its own: `python -m tpdist.worker`, started and watched by its agent.

It takes its orders from the agent's ipc socket, tells the agent why it ends, and never outlives it.
"""

import argparse
import logging
import os
import signal
from typing import NoReturn

import torch

from tpdist import log
from tpdist.control.channel import Codec, Dealer, PeerGoneError, close_blocking_sockets
from tpdist.control.messages import RankGone, RankHello, RankStart
from tpdist.errors import LostError, PlanError, TpdistError
from tpdist.meeting import MakeStore, RankStopped, expect, make_store
from tpdist.parallel.group import PeerLostError
from tpdist.parent import follow_parent
from tpdist.rank import Rank

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 60.0


def main() -> int:
    """Entry of `python -m tpdist.worker`; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tpdist.worker", description=__doc__)
    parser.add_argument("--agent", required=True, help="address of the agent's ipc socket")
    parser.add_argument("--local-rank", type=int, required=True)
    parser.add_argument("--parent-pid", type=int, required=True, help="the agent; this process ends with it")
    arguments = parser.parse_args()
    follow_parent(arguments.parent_pid, signal.SIGKILL)
    ignore_signals()
    link = open_link(arguments.agent, arguments.local_rank)
    return run_rank(link, expect(link, RankStart, timeout_s=START_TIMEOUT_S), make_store=make_store)


def ignore_signals() -> None:
    """Ranks end when their agent says so: Ctrl-C on a terminal reaches the whole process group, ranks too."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def open_link(address: str, local_rank: int) -> Dealer:
    """Connect to this node's agent and say hello."""
    link = Dealer(address=address, identity=f"local-{local_rank}".encode(), codec=Codec())
    link.send(RankHello(local_rank=local_rank, pid=os.getpid()))
    return link


def run_rank(link: Dealer, start: RankStart, *, make_store: MakeStore) -> int:
    """Run one rank to its end, tell the agent how it ended, and return the exit code."""
    node = f"worker-{start.assign.node_index - 1}" if start.assign.node_index else "head"
    where = {"node": node, "rank": start.rank, "epoch": start.assign.epoch}
    log.configure(level=start.log_level, log_format=start.log_format, **where)
    link.codec.epoch = start.assign.epoch
    try:
        Rank(link, start, make_store=make_store).run()
    except RankStopped:
        return 0
    except Exception as error:
        gone = describe(start.rank, error)
        is_bug = gone.exit_code == TpdistError.exit_code
        logger.error("%s", gone.cause, exc_info=is_bug)
        link.send(gone)
        return gone.exit_code
    return 0


def describe(rank: int, error: Exception) -> RankGone:
    """What an exception that ends a rank means for the cluster."""
    match error:
        case PeerLostError() | PeerGoneError():
            return RankGone(rank=rank, exit_code=LostError.exit_code, cause=str(error), secondary=True)
        case TpdistError():
            return RankGone(rank=rank, exit_code=error.exit_code, cause=str(error))
        case torch.OutOfMemoryError() | MemoryError():
            cause = f"out of memory: {error}; use more ranks, a smaller --kv-cache-memory-bytes or --max-model-len"
            return RankGone(rank=rank, exit_code=PlanError.exit_code, cause=cause)
        case _:
            cause = f"internal error: {type(error).__name__}: {error}"
            return RankGone(rank=rank, exit_code=TpdistError.exit_code, cause=cause)


def end(exit_code: int) -> NoReturn:
    """Leave at once, after the last words have been sent: destructors of a broken process group may wait for ever."""
    close_blocking_sockets()
    logging.shutdown()
    os._exit(exit_code)


if __name__ == "__main__":
    end(main())
