"""Decode steps as CUDA graphs: one launch in the place of hundreds.

A small decode keeps a GPU busy for less time than Python takes to launch its kernels. A graph is recorded once and then
launched as a whole, with the shapes and addresses that it was recorded with. So there is one graph for each rung: a
number of sequences and a number of blocks for each, to which a step is padded. All of them read one buffer, which is
filled before a launch by one copy from pinned memory. The graph works out the rest on the device: token ids from the
last token of each slot, slots of the cache and lengths from positions and block tables. On a later pipeline stage it
reads hidden states in the place of tokens, from a buffer of their own.

Padding rows repeat row 0. They write to the cache what row 0 writes, to where row 0 writes it; whichever write is the
last, the same keys and values are read. So no place has to be kept free for them, and no other sequence is touched.

All ranks must do the same: NCCL takes the launch of a graph as one collective, on graphs that were captured together
(https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/usage/cudagraph.html). What is recorded and when follows from
the plan alone, and ranks agree on whether it worked. A group that stages tensors through the host cannot be recorded.

This module knows neither why a step holds what it holds, nor how tokens are sampled.
"""

import logging
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from tpdist.control.messages import SequenceStart, SlotWork
from tpdist.engine.kv_cache import KVCache
from tpdist.engine.transfer import to_device
from tpdist.errors import TpdistError
from tpdist.layers.attention import AttentionContext
from tpdist.parallel.group import PeerLostError, RankGroup
from tpdist.parallel.store import first_line

logger = logging.getLogger(__name__)

LEAST_KEYS = 256
"""The lowest rung holds this many tokens of each sequence: below, padding costs less than another graph."""

MAX_GATHERED_KEYS = 2**17
"""Steps of more tokens in the cache, padding included, are left to the eager path: attention copies them together in
every layer, which takes the GPU longer than the launches take the host, and the eager path pads less."""

TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Most distance of a graph's hidden states from the eager path's, as a part of their length. Padded products may add up
in another order, which 16 bits show as some hundredths after many layers; wrong inputs make it about 1."""


class Forward(Protocol):
    """A model, or a stage of it, up to its last hidden states."""

    def __call__(
        self,
        x: Tensor,
        *,
        positions: Tensor,
        attention: AttentionContext,
        caches: Sequence[tuple[Tensor, ...]],
    ) -> Tensor:
        """x: token ids [num_tokens], or on a later stage hidden states [num_tokens, hidden_size]; positions:
        [num_tokens]. Returns [num_tokens, hidden_size], replicated."""


class RecordingError(TpdistError):
    """A step cannot be recorded; it can be run as before."""


class Recorder(Protocol):
    """Turns a function that reads and writes tensors at fixed places into one that does the same again, faster."""

    def __call__(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """May run `function` first; its errors are passed on then. What is returned gives a tensor that holds until the
        next call of anything that this recorder returned. Raises RecordingError."""


class CudaRecorder:
    """Records CUDA graphs, which share one pool of memory: no two of them run at once."""

    def __call__(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self._stream.wait_stream(torch.cuda.current_stream())
        # This also leaves the stream when a capture fails: torch.cuda.graph alone stays on it.
        with torch.cuda.stream(self._stream):
            # What libraries set up at first use, for each stream, may not be set up during a capture.
            function()
            graph, output = self._capture(function)
        torch.cuda.current_stream().wait_stream(self._stream)

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay

    def _capture(self, function: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """thread_local: other threads, such as NCCL's watchdog, may go on asking for the state of their events. No
        collective runs during a capture, so that a PeerLostError does not mean a lost peer here."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                output = function()
        except (RuntimeError, PeerLostError) as error:
            raise RecordingError(f"the capture failed: {first_line(error)}") from error
        return graph, output

    @cached_property
    def _stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream()  # type: ignore[no-untyped-call]

    @cached_property
    def _pool(self) -> Any:
        """A handle, whose type is torch's own affair."""
        return torch.cuda.graph_pool_handle()


class Rung(NamedTuple):
    """The shape of a graph: `num_seqs` sequences of up to `num_blocks` blocks each."""

    num_seqs: int
    num_blocks: int


class DecodeGraphs:
    """The graphs of one rank. `model` and `cache` are what the eager path runs with; `max_tokens` bounds a sequence.

    The last known token of each slot is kept on the device, so `start` and `remember` must be called in every step.
    With `enabled` false, or once something went wrong, all steps are left to the eager path.
    """

    def __init__(
        self,
        model: Forward,
        *,
        group: RankGroup,
        cache: KVCache,
        max_num_seqs: int,
        max_tokens: int,
        device: torch.device,
        enabled: bool,
        record: Recorder | None = None,
    ) -> None:
        self._model = model
        self._group = group
        self._cache = cache
        self._device = device
        self._enabled = enabled
        self._record = record or CudaRecorder()
        self._batch_sizes = batch_sizes(max_num_seqs)
        self._block_counts = block_counts(max_tokens, block_size=cache.block_size)
        self._replays: dict[Rung, Callable[[], Tensor]] = {}
        self._last_tokens = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        most_inputs = 2 * max_num_seqs + MAX_GATHERED_KEYS // cache.block_size if enabled else 0
        self._inputs = torch.zeros(most_inputs, dtype=torch.int64, device=device)
        self._hidden: Tensor | None = None

    def start(self, starts: Sequence[SequenceStart]) -> None:
        """Take the last tokens of sequences that begin."""
        if starts and self._enabled:
            last_tokens = [int.from_bytes(start.token_ids[-4:], "little") for start in starts]
            self.remember([start.slot for start in starts], to_device(np.array(last_tokens), self._device))

    def remember(self, slots: Sequence[int], tokens: Tensor) -> None:
        """Take the tokens that were sampled for `slots`. tokens: [len(slots)] int64 on the device."""
        if slots and self._enabled:
            self._last_tokens.index_copy_(0, to_device(np.array(slots), self._device), tokens)

    def serves(self, work: Sequence[SlotWork]) -> bool:
        """Whether `run` can take this step: one token of each sequence, its last one, and not too much to read. The
        same on every rank."""
        if not self._enabled or any(each.num_tokens != 1 or not each.sample for each in work):
            return False
        num_blocks = max(each.start for each in work) // self._cache.block_size + 1
        return self._num_keys(self._rung(len(work), num_blocks)) <= MAX_GATHERED_KEYS

    def run(
        self,
        slots: np.ndarray,
        positions: np.ndarray,
        block_tables: np.ndarray,
        *,
        x: Tensor | None = None,
        eager: Callable[[], Tensor],
    ) -> Tensor:
        """The hidden states of a step that this object serves, [num_seqs, hidden_size], which hold until the next run.

        slots, positions: [num_seqs]; block_tables: [num_seqs, max_blocks]; x: on a later stage the hidden states that
        go in, [num_seqs, hidden_size]. `eager` runs the same step without a graph:
        the first step of a rung does both, and returns what `eager` gives. Every rank must call it. Raises
        PeerLostError.
        """
        rung = self._rung(*block_tables.shape)
        self._fill(rung, slots, positions, block_tables)
        if x is not None:
            self._take_hidden(rung, x)
        replay = self._replays.get(rung)
        if replay is None:
            return self._run_first(rung, len(slots), eager)
        return replay()[: len(slots)]

    def _rung(self, num_seqs: int, num_blocks: int) -> Rung:
        return Rung(_at_least(num_seqs, self._batch_sizes), _at_least(num_blocks, self._block_counts))

    def _num_keys(self, rung: Rung) -> int:
        return rung.num_seqs * rung.num_blocks * self._cache.block_size

    def _rows(self, rung: Rung) -> Tensor:
        """The input of a graph, [num_seqs, 2 + num_blocks]: slot, position and blocks of each sequence."""
        width = 2 + rung.num_blocks
        return self._inputs[: rung.num_seqs * width].view(rung.num_seqs, width)

    def _fill(self, rung: Rung, slots: np.ndarray, positions: np.ndarray, block_tables: np.ndarray) -> None:
        num_seqs, num_blocks = block_tables.shape
        # torch gives a pinned block out again only once the copies that read it have run.
        staged = torch.zeros(
            rung.num_seqs, 2 + rung.num_blocks, dtype=torch.int64, pin_memory=self._device.type == "cuda"
        )
        rows = staged.numpy()
        rows[:num_seqs, 0] = slots
        rows[:num_seqs, 1] = positions
        rows[:num_seqs, 2 : 2 + num_blocks] = block_tables
        rows[num_seqs:] = rows[0]
        self._rows(rung).copy_(staged, non_blocking=True)

    def _take_hidden(self, rung: Rung, x: Tensor) -> None:
        """x: [num_seqs, hidden_size]. Padding rows repeat row 0 here too."""
        if self._hidden is None:
            self._hidden = x.new_zeros(self._batch_sizes[-1], x.shape[1])
        self._hidden[: len(x)] = x
        self._hidden[len(x) : rung.num_seqs] = x[0]

    def _forward(self, rung: Rung) -> Tensor:
        """What is recorded. Its operations and their shapes depend on `rung` alone."""
        rows, size = self._rows(rung), self._cache.block_size
        slots, positions, block_tables = rows[:, 0], rows[:, 1], rows[:, 2:]
        blocks = block_tables.gather(1, (positions // size)[:, None]).squeeze(1)
        attention = AttentionContext(
            slot_mapping=blocks * size + positions % size,
            block_tables=block_tables,
            context_lens=[rung.num_blocks * size] * rung.num_seqs,
            query_lens=[1] * rung.num_seqs,
            block_size=size,
            device_lens=positions + 1,
        )
        known = self._last_tokens.index_select(0, slots) if self._hidden is None else self._hidden[: rung.num_seqs]
        return self._model(known, positions=positions, attention=attention, caches=self._cache.layers)

    def _run_first(self, rung: Rung, num_seqs: int, eager: Callable[[], Tensor]) -> Tensor:
        """Record a rung and compare what it gives with the eager path, which runs last and so leaves its keys and
        values in the cache."""
        try:
            replay, problem = self._record(partial(self._forward, rung)), ""
        except (RecordingError, NotImplementedError) as error:
            replay, problem = None, str(error)
        if not self._all_agree(replay is not None):
            self._switch_off(problem)
            return eager()
        assert replay is not None
        replayed = replay()[:num_seqs]
        expected = eager()
        problem = _difference(replayed, expected)
        if self._all_agree(not problem):
            self._replays[rung] = replay
        else:
            self._switch_off(problem)
        return expected

    def _all_agree(self, worked: bool) -> bool:
        votes = torch.tensor([float(worked)], device=self._device)
        return int(self._group.all_reduce(votes)) == self._group.size

    def _switch_off(self, problem: str) -> None:
        self._enabled = False
        self._replays.clear()
        if problem or self._group.rank == 0:
            reason = problem or "another rank could not record a step"
            logger.warning("decode steps run without CUDA graphs from now on, which is slower: %s", reason)


def batch_sizes(max_num_seqs: int) -> list[int]:
    """1, 2, 4, 8, 16, 24, ... and `max_num_seqs`."""
    return [*(size for size in (1, 2, 4, *range(8, max_num_seqs, 8)) if size < max_num_seqs), max_num_seqs]


def block_counts(max_tokens: int, *, block_size: int) -> list[int]:
    """Blocks for LEAST_KEYS tokens, twice, four times as many, ... and those for `max_tokens`."""
    counts, most = [-(-LEAST_KEYS // block_size)], -(-max_tokens // block_size)
    while counts[-1] < most:
        counts.append(2 * counts[-1])
    return [*counts[:-1], most]


def _at_least(count: int, ladder: Sequence[int]) -> int:
    return ladder[bisect_left(ladder, count)]


def _difference(replayed: Tensor, expected: Tensor) -> str:
    """What is wrong with the hidden states that a graph gave, or "" if nothing is. Both: [num_seqs, hidden_size]."""
    distance = float((replayed.float() - expected.float()).norm() / expected.float().norm())
    tolerance = TOLERANCE[expected.dtype]
    if distance <= tolerance:  # false for NaN
        return ""
    return f"a graph's result is {distance:.2g} of its length away from the eager path's, more than {tolerance:g}"
