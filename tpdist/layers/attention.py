"""Attention over a paged key-value cache: what a step looks like to it, and the default backend.

A step holds tokens of several sequences, one sequence after another: chunks of prompts and single tokens, in any mix.
The cache of a layer is a tuple of tensors [num_blocks, block_size, *shape_per_token]; a sequence owns the blocks of its
row of the block table, and token i of it lies in slot block * block_size + i % block_size. Models and layers above only
pass the AttentionContext through; a backend derives what it needs from it once per step, not once per layer.
"""

import functools
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

_T = TypeVar("_T")

MAX_MASK_ELEMENTS = 1 << 23
"""A mask of a chunk that would be larger is made in parts."""


@dataclass(frozen=True, eq=False, kw_only=True)
class AttentionContext:
    """The sequences of one step, in the order of their tokens.

    slot_mapping: [num_tokens] int64, the cache slot that each token of this step is written to.
    block_tables: [num_seqs, max_blocks] int64, the blocks of each sequence, padded with 0.
    context_lens: tokens of each sequence in the cache once this step's are written.
    query_lens: tokens of each sequence in this step, its last ones; 1 for a decode. They add up to num_tokens.

    device_lens: None, or [num_seqs] int64 in a step of decodes that is recorded to be replayed (a CUDA graph). What a
    backend does then must not depend on values that the host sees, since they change from replay to replay: the lengths
    are these, and context_lens only bounds them. A backend that cannot do so raises NotImplementedError.
    """

    slot_mapping: Tensor
    block_tables: Tensor
    context_lens: list[int]
    query_lens: list[int]
    block_size: int
    device_lens: Tensor | None = None
    _memo: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False)

    def once(self, key: Hashable, build: Callable[[], _T]) -> _T:
        """build()'s value, kept for the rest of the step."""
        if key not in self._memo:
            self._memo[key] = build()
        value: _T = self._memo[key]
        return value

    def on(self, device: torch.device) -> "AttentionContext":
        """The same step for layers on another device; copied once a step."""
        if self.slot_mapping.device == device:
            return self
        return self.once(("on", device), lambda: self._copied(device))

    def _copied(self, device: torch.device) -> "AttentionContext":
        return replace(
            self,
            slot_mapping=self.slot_mapping.to(device),
            block_tables=self.block_tables.to(device),
            device_lens=None if self.device_lens is None else self.device_lens.to(device),
        )


class AttentionBackend(Protocol):
    """Write this step's keys and values to the cache, then attend to all that each token may see."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        cache: tuple[Tensor, ...],
        context: AttentionContext,
        scale: float,
        window: int | None,
    ) -> Tensor:
        """
        query: [num_tokens, num_heads, head_dim]; key, value: [num_tokens, num_kv_heads, head_dim]; all of this rank.
        Query head h reads key head h // (num_heads // num_kv_heads). The token at position i sees position j where
        j <= i and, with a window, j > i - window. Returns [num_tokens, num_heads * head_dim].
        """


def gather_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    cache: tuple[Tensor, ...],
    context: AttentionContext,
    scale: float,
    window: int | None,
) -> Tensor:
    """The default AttentionBackend, for every device: copy the blocks together, then scaled_dot_product_attention.

    Sequences with one token each go into one call per class of length, others into a call each. Masked entries of the
    cache are read and given weight 0, so a new cache must hold finite numbers (zeros), not whatever was in memory.
    """
    key_cache, value_cache = cache
    key_cache.flatten(0, 1).index_copy_(0, context.slot_mapping, key)
    value_cache.flatten(0, 1).index_copy_(0, context.slot_mapping, value)
    calls = context.once(("gather", window, query.dtype), lambda: _plan(context, window=window, dtype=query.dtype))
    if len(calls) == 1:
        return calls[0](query, key, value, cache=cache, scale=scale).flatten(1)
    attended = torch.empty_like(query)
    for call in calls:
        attended[call.tokens] = call(query[call.tokens], key[call.tokens], value[call.tokens], cache=cache, scale=scale)
    return attended.flatten(1)


@dataclass(frozen=True, eq=False, kw_only=True)
class _Decodes:
    """One token each of `num_seqs` sequences. `blocks`: [num_seqs * n], n blocks of each, of whose tokens the range
    `keys` is read; `mask`: [num_seqs, 1, 1, num_keys], or None where all see all of the range."""

    tokens: Tensor | slice
    num_seqs: int
    blocks: Tensor | slice
    keys: slice
    mask: Tensor | None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *, cache: tuple[Tensor, ...], scale: float) -> Tensor:
        """The query heads that share a key head take the place of query positions, so that no key is repeated."""
        keys, values = (self._read(each) for each in cache)
        grouped = query.view(self.num_seqs, keys.shape[1], -1, keys.shape[3])
        attended = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=self.mask, scale=scale)
        return attended.flatten(1, 2)

    def _read(self, cache: Tensor) -> Tensor:
        """[num_seqs, num_kv_heads, num_keys, head_dim]"""
        tokens = _select(cache, self.blocks).view(self.num_seqs, -1, *cache.shape[2:])
        return tokens[:, self.keys].transpose(1, 2)


@dataclass(frozen=True, eq=False, kw_only=True)
class _Chunk:
    """Several tokens of one sequence. `blocks`: [n], of whose tokens the range `keys` is read, or None where the step
    itself holds all of them; `mask` makes [num_tokens, num_keys], or is None where plain causality says it."""

    tokens: slice
    blocks: Tensor | slice | None
    keys: slice
    mask: Callable[[], Tensor] | None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *, cache: tuple[Tensor, ...], scale: float) -> Tensor:
        """Key heads are the batch and the query heads that share one its heads: an expanded view, no key repeated."""
        if self.blocks is not None:
            key, value = (_select(each, self.blocks).flatten(0, 1)[self.keys] for each in cache)
        grouped = query.view(len(query), key.shape[1], -1, key.shape[2]).permute(1, 2, 0, 3)
        keys, values = (each.transpose(0, 1)[:, None].expand(-1, grouped.shape[1], -1, -1) for each in (key, value))
        mask = None if self.mask is None else self.mask()
        attended = F.scaled_dot_product_attention(
            grouped, keys, values, attn_mask=mask, is_causal=mask is None, scale=scale
        )
        return attended.permute(2, 0, 1, 3).flatten(1, 2)


def _plan(context: AttentionContext, *, window: int | None, dtype: torch.dtype) -> list[_Decodes | _Chunk]:
    """All calls of one step for layers with this window. A sequence of one token is a decode, whatever it is to the
    scheduler. Decodes are batched with others of about their length (within a factor of 2, or all below 256), to bound
    the padding."""
    if context.device_lens is not None:
        return [_plan_recorded(context, context.device_lens, window=window, dtype=dtype)]
    calls: list[_Decodes | _Chunk] = []
    classes: dict[int, list[tuple[int, int]]] = {}
    token = 0
    for sequence, (query_len, context_len) in enumerate(zip(context.query_lens, context.context_lens, strict=True)):
        if query_len == 1:
            num_keys = min(context_len, window or context_len)
            classes.setdefault((num_keys // 256).bit_length(), []).append((sequence, token))
        else:
            calls += _plan_chunks(context, sequence, token=token, window=window, dtype=dtype)
        token += query_len
    assert token == len(context.slot_mapping), f"{token} tokens in query_lens, {len(context.slot_mapping)} slots"
    return calls + [_plan_decodes(context, members, window=window, dtype=dtype) for members in classes.values()]


def _plan_decodes(
    context: AttentionContext, members: list[tuple[int, int]], *, window: int | None, dtype: torch.dtype
) -> _Decodes:
    """members: (sequence, token) of each decode."""
    size, device = context.block_size, context.block_tables.device
    sequences = [sequence for sequence, _ in members]
    ends = [context.context_lens[sequence] for sequence in sequences]
    begins = [max(0, end - window) if window else 0 for end in ends]
    firsts = [begin // size for begin in begins]
    ranges = [
        (begin - first * size, end - first * size) for begin, end, first in zip(begins, ends, firsts, strict=True)
    ]
    keys = slice(min(begin for begin, _ in ranges), max(end for _, end in ranges))
    columns = torch.tensor(firsts)[:, None] + torch.arange(-(-keys.stop // size))
    columns = columns.clamp_(max=context.block_tables.shape[1] - 1).to(device)
    rows = torch.tensor(sequences)[:, None].to(device)
    masked = len(set(ranges)) > 1
    return _Decodes(
        tokens=_index([token for _, token in members], device=device),
        num_seqs=len(members),
        blocks=_run(context.block_tables[rows, columns].flatten()),
        keys=keys,
        mask=_range_mask(torch.tensor(ranges), keys=keys, dtype=dtype).to(device) if masked else None,
    )


def _plan_recorded(context: AttentionContext, lens: Tensor, *, window: int | None, dtype: torch.dtype) -> _Decodes:
    """Decodes of which the host knows only how many blocks each may have. All shapes follow from that and the window;
    which keys count is computed on the device. Ranges count from the first block that a sequence reads."""
    size, (num_seqs, width) = context.block_size, context.block_tables.shape
    assert len(lens) == len(context.slot_mapping) == num_seqs, "only decodes can be recorded"
    num_blocks = width if window is None else min(width, (window + size - 2) // size + 1)
    begins = torch.zeros_like(lens) if window is None else (lens - window).clamp_(min=0)
    firsts = begins // size
    columns = firsts[:, None] + torch.arange(num_blocks, device=lens.device)
    ranges = torch.stack((begins, lens), dim=1) - firsts[:, None] * size
    keys = slice(0, num_blocks * size)
    return _Decodes(
        tokens=slice(0, num_seqs),
        num_seqs=num_seqs,
        blocks=context.block_tables.gather(1, columns.clamp_(max=width - 1)).flatten(),
        keys=keys,
        mask=_range_mask(ranges, keys=keys, dtype=dtype),
    )


def _run(blocks: Tensor) -> Tensor | slice:
    """A slice if these blocks follow each other in the cache, as those of a sequence often do: it is read in place. On
    another device than the CPU the question would cost a synchronization."""
    if blocks.device.type != "cpu":
        return blocks
    first, count = int(blocks[0]), len(blocks)
    in_a_row = torch.equal(blocks, torch.arange(first, first + count))
    return slice(first, first + count) if in_a_row else blocks


def _select(cache: Tensor, blocks: Tensor | slice) -> Tensor:
    """cache[blocks], [n, block_size, *shape_per_token]: a view for a slice."""
    return cache[blocks] if isinstance(blocks, slice) else cache.index_select(0, blocks)


def _range_mask(ranges: Tensor, *, keys: slice, dtype: torch.dtype) -> Tensor:
    """[num_seqs, 1, 1, num_keys]: key j of sequence b counts where ranges[b] holds it. ranges: [num_seqs, 2]."""
    positions = torch.arange(keys.start, keys.stop, device=ranges.device)
    visible = (positions >= ranges[:, :1]) & (positions < ranges[:, 1:])
    return _additive(visible, dtype=dtype)[:, None, None]


def _plan_chunks(
    context: AttentionContext, sequence: int, *, token: int, window: int | None, dtype: torch.dtype
) -> list[_Chunk]:
    """The tokens of one sequence in this step, the first being number `token` of the step. A whole prompt may need no
    mask. One takes num_tokens * num_keys elements: a large one is made in parts, by each layer anew."""
    end = context.context_lens[sequence]
    start = end - context.query_lens[sequence]
    if start == 0 and (window is None or window >= end):
        return [_plan_chunk(context, sequence, start, end, token=token, window=window, mask=None)]
    num_rows = max(1, MAX_MASK_ELEMENTS // (end - _first_key(start, window)))
    chunks = []
    for first in range(start, end, num_rows):
        last = min(first + num_rows, end)
        mask = partial(_causal_mask, first, last, window=window, dtype=dtype, device=context.block_tables.device)
        kept = mask if num_rows < end - start else functools.cache(mask)
        chunks.append(
            _plan_chunk(context, sequence, first, last, token=token + first - start, window=window, mask=kept)
        )
    return chunks


def _plan_chunk(
    context: AttentionContext,
    sequence: int,
    start: int,
    end: int,
    *,
    token: int,
    window: int | None,
    mask: Callable[[], Tensor] | None,
) -> _Chunk:
    """The tokens at start..end of a sequence, `token` being the first one's number in the step."""
    size, begin = context.block_size, _first_key(start, window)
    first = begin // size
    return _Chunk(
        tokens=slice(token, token + end - start),
        blocks=None if start == 0 else _run(context.block_tables[sequence, first : -(-end // size)]),
        keys=slice(begin - first * size, end - first * size),
        mask=mask,
    )


def _first_key(start: int, window: int | None) -> int:
    """The first position that a token at `start` sees."""
    return max(0, start - window + 1) if window else 0


def _causal_mask(start: int, end: int, *, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[end - start, num_keys]: queries at start..end see keys up to their own, from the first that any of them sees."""
    queries = torch.arange(start, end, device=device)[:, None]
    keys = torch.arange(_first_key(start, window), end, device=device)
    visible = keys <= queries
    if window is not None:
        visible &= keys > queries - window
    return _additive(visible, dtype=dtype)


def _additive(visible: Tensor, *, dtype: torch.dtype) -> Tensor:
    """0 where visible, else -inf: a boolean mask would be converted to this again in every layer."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, float("-inf"))


def _index(positions: list[int], *, device: torch.device) -> Tensor | slice:
    """A slice if they are consecutive, since that reads without a copy."""
    if positions == list(range(positions[0], positions[0] + len(positions))):
        return slice(positions[0], positions[0] + len(positions))
    return torch.tensor(positions, device=device)
