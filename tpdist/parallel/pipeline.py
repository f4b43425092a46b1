"""What goes from one pipeline stage to the next: the hidden states of each step, point to point.

The first rank of a stage sends to the first rank of the next, which passes them on to its tensor-parallel group, so
that a link between machines carries them once. Sends do not wait for the receiver: a stage goes on with its next step.
This module knows neither layers nor plans.

    x {stage s + 1} = broadcast( receive( x {stage s} ) )        num_tokens * hidden_size elements a step and link
"""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from tpdist.control.progress import WAITS, Watch
from tpdist.parallel.group import PeerLostError, RankGroup
from tpdist.parallel.store import first_line

MAX_TAG = 1 << 20


class Pipe(Protocol):
    """The two ends of one stage. Every rank of the stage must call the same, in the order of steps."""

    @property
    def is_first(self) -> bool:
        """Whether no stage comes before."""

    @property
    def is_last(self) -> bool:
        """Whether no stage comes after."""

    def receive(self, num_tokens: int, *, step: int) -> Tensor:
        """What the stage before sent for `step`: [num_tokens, hidden_size], replicated. Raises PeerLostError."""

    def send(self, x: Tensor, *, step: int) -> None:
        """Send x [num_tokens, hidden_size], replicated, to the next stage; on a CPU x must not be changed afterwards.
        Raises PeerLostError."""


class Alone:
    """A stage that is the whole model."""

    is_first = is_last = True

    def receive(self, num_tokens: int, *, step: int) -> Tensor:
        raise AssertionError("no stage comes before")

    def send(self, x: Tensor, *, step: int) -> None:
        raise AssertionError("no stage comes after")


class ProcessPipe:
    """Between processes, over torch.distributed. gloo goes through the host's memory, and NCCL from GPU to GPU.

    `group` is the stage's, of which this rank is the global `rank`. Up to `max_in_flight` steps may be on their way to
    the next stage; a further one waits for the oldest, and that for `timeout_s` at most, as does every receive. `watch`
    notes each of these waits.
    """

    def __init__(
        self,
        *,
        rank: int,
        world_size: int,
        group: RankGroup,
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device,
        max_in_flight: int,
        timeout_s: float,
        watch: Watch | None = None,
    ) -> None:
        first = rank - group.rank
        self._group = group
        self._rank = rank
        self._before = first - group.size if first > 0 else None
        self._after = first + group.size if first + group.size < world_size else None
        self._hidden_size = hidden_size
        self._dtype = dtype
        self._device = device
        self._on_host = device.type == "cpu" or dist.get_backend() == "gloo"
        self._max_in_flight = max_in_flight
        self._timeout = timedelta(seconds=timeout_s)
        self._watch = watch or Watch()
        self._sending: deque[tuple[dist.Work | None, Tensor]] = deque()

    @property
    def is_first(self) -> bool:
        return self._before is None

    @property
    def is_last(self) -> bool:
        return self._after is None

    def receive(self, num_tokens: int, *, step: int) -> Tensor:
        assert self._before is not None, "no stage comes before"
        shape = (num_tokens, self._hidden_size)
        if self._group.rank == 0:
            where = torch.device("cpu") if self._on_host else self._device
            x = torch.empty(shape, dtype=self._dtype, device=where)
            with self._reported("receive", self._before):
                self._wait(dist.irecv(x, src=self._before, tag=step % MAX_TAG))
            x = x.to(self._device)
        else:
            x = torch.empty(shape, dtype=self._dtype, device=self._device)
        return self._group.broadcast(x)

    def send(self, x: Tensor, *, step: int) -> None:
        assert self._after is not None, "no stage comes after"
        if self._group.rank != 0:
            return
        # What a CUDA graph gives is overwritten by the next step, which may come before this one has left.
        staged = (x if x.is_cpu else x.cpu() if self._on_host else x.clone()).contiguous()
        with self._reported("send", self._after):
            while len(self._sending) >= self._max_in_flight:
                self._wait(self._sending.popleft()[0])
            self._sending.append((dist.isend(staged, dst=self._after, tag=step % MAX_TAG), staged))

    def _wait(self, work: dist.Work | None) -> None:
        assert work is not None, "this rank is in the group"
        work.wait(self._timeout)

    @contextmanager
    def _reported(self, name: str, peer: int) -> Iterator[None]:
        """Note the wait, and turn torch.distributed's errors, which are RuntimeErrors, into PeerLostError."""
        self._watch.enter(WAITS.index(name))
        try:
            yield
            self._watch.leave()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise PeerLostError(
                f"{name} between stages failed on rank {self._rank}: rank {peer} has gone or did not answer in time "
                f"({first_line(error)})"
            ) from error
