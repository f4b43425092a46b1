"""From logits to token ids: edits of the logits, filters and one random draw per row.

Rows do not touch each other: in float32 a row gets the same token alone and in any batch. It knows nothing of slots,
ranks or steps.

The order and meaning of the steps are vLLM's: mask, bias and penalties (in penalties.py), temperature, min_p, top_k,
top_p. Tokens that tie at a cut are all kept. A greedy row takes the highest logit after the edits, the lowest id on a
tie.

The device is never waited for: what rows ask for is known on the host, and travels to the device by itself.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tpdist.engine.penalties import adjust
from tpdist.engine.sample_row import SampleRow
from tpdist.engine.transfer import rows_of, to_device

CPU_PART_SIZE = 2**17
DEVICE_PART_SIZE = 2**22
"""Random rows are drawn in parts of about this many logits, which bounds the memory for weights and their float64 sums.
On a CPU a part stays in the cache, and below the size for which malloc asks the kernel for new pages every time."""

LEAST_TEMPERATURE = 1e-5
"""Divisors below this are raised to it: the outcome is greedy in float32 either way, except on a tie."""

DIGIT_BITS = 15
NUM_DIGITS = 1 << DIGIT_BITS
ONE_BITS = 0x3F800000
"""The bits of 1.0, and of all floats from 0 to it, are two digits of 15 bits each."""

_GAMMA = 0x9E3779B97F4A7C15
_MASK = 0xFFFFFFFFFFFFFFFF


def sample(logits: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """Choose one token per row.

    logits: [n, vocab_size] float32; edits are written into it. Returns [n] int64 on the same device.
    """
    adjust(logits, rows)
    random_rows = [position for position, row in enumerate(rows) if not row.greedy]
    if not random_rows:
        return logits.argmax(dim=-1)
    all_random = len(random_rows) == len(rows)
    tokens = logits.new_empty(len(rows), dtype=torch.int64) if all_random else logits.argmax(dim=-1)
    part_size = CPU_PART_SIZE if logits.device.type == "cpu" else DEVICE_PART_SIZE
    rows_at_once = max(1, part_size // logits.shape[1])
    for first in range(0, len(random_rows), rows_at_once):
        part = random_rows[first : first + rows_at_once]
        chosen = rows_of(logits, part)
        tokens[chosen] = _draw(logits[chosen], [rows[position] for position in part])
    return tokens


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) that depends on nothing but `seed` and `index`.

    SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014; constants as in
    https://prng.di.unimi.it/splitmix64.c), started at the mixed seed and jumped to `index`. 52 bits: times any float64
    total it stays below that total.
    """
    start = _mix64((seed + _GAMMA) & _MASK)
    return float(_mix64((start + (index + 1) * _GAMMA) & _MASK) >> 12) * 2.0**-52


def _mix64(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def _draw(logits: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """Filter and draw. logits: [n, vocab_size], left as they are. Returns [n] int64.

    The draw inverts the cumulative sum of the probabilities in the order of token ids: no sort is needed, and two
    tokens of nearly equal probability cannot trade places because of a rounding error.
    """
    temperature, min_p, top_p, draw = _columns(rows, like=logits)
    weights = _weights(logits, temperature)
    _filter(weights, min_p, top_p, rows)
    sums = weights.cumsum(dim=-1, dtype=torch.float64)
    tokens = torch.searchsorted(sums, draw * sums[:, -1:], right=True)
    return tokens.squeeze(1).clamp_(max=logits.shape[1] - 1)  # only a row of NaN is out of range


def _columns(rows: Sequence[SampleRow], *, like: Tensor) -> tuple[Tensor, ...]:
    """Temperature, min_p, top_p and random number of the rows, each [n, 1] float64, in one copy to the device."""
    options = [(row.sampling, uniform(row.seed, row.num_sampled)) for row in rows]
    values = np.array([(max(one.temperature, LEAST_TEMPERATURE), one.min_p, one.top_p, draw) for one, draw in options])
    return to_device(values, like.device).unsqueeze(2).unbind(1)


def _weights(logits: Tensor, temperature: Tensor) -> Tensor:
    """exp((logits - highest) / temperature): probabilities over the best one's, 1 for that. [n, vocab_size]"""
    return (logits - logits.amax(dim=-1, keepdim=True)).div_(temperature.to(logits.dtype)).exp_()


def _filter(weights: Tensor, min_p: Tensor, top_p: Tensor, rows: Sequence[SampleRow]) -> None:
    """Zero what min_p, top_k and top_p rule out. weights: [n, vocab_size], 1 at best; min_p, top_p: [n, 1]."""
    if any(row.sampling.min_p for row in rows):
        weights.mul_(weights >= min_p.to(weights.dtype))
    limited = [0 < row.sampling.top_k < weights.shape[1] for row in rows]
    by_rank = [position for position, by_rank in enumerate(limited) if by_rank]
    by_mass = [position for position, row in enumerate(rows) if row.sampling.top_p < 1 and not limited[position]]
    if not by_rank and not by_mass:
        return
    cuts = torch.zeros_like(weights[:, :1])
    if by_rank:
        chosen = rows_of(weights, by_rank)
        cuts[chosen] = _top_k_cuts(
            weights[chosen], top_p[chosen], [rows[position].sampling.top_k for position in by_rank]
        )
    if by_mass:
        chosen = rows_of(weights, by_mass)
        cuts[chosen] = _nucleus_cuts(weights[chosen], top_p[chosen])
    weights.mul_(weights >= cuts)


def _top_k_cuts(weights: Tensor, top_p: Tensor, top_k: Sequence[int]) -> Tensor:
    """The k-th best value, or a higher one that, with all above it, makes up top_p of what the k-th best leaves.

    weights: [n, vocab_size] float32; top_p: [n, 1] float64. Returns [n, 1] float32.
    """
    counts = to_device(np.array(top_k)[:, None], weights.device)
    best = weights.topk(max(top_k), dim=-1).values
    cuts = best.gather(1, counts - 1)
    num_tied = (weights >= cuts).sum(dim=1, keepdim=True) - counts
    sums = best.cumsum(dim=1, dtype=torch.float64)
    total = sums.gather(1, counts - 1) + num_tied * cuts
    num_kept = (sums - best < top_p * total).sum(dim=1, keepdim=True)
    return best.gather(1, num_kept.minimum(counts).clamp_(min=1) - 1)  # none counts in a row of NaN


def _nucleus_cuts(weights: Tensor, top_p: Tensor) -> Tensor:
    """The highest value whose mass, with all above it, is top_p of the whole row's or more.

    weights: [n, vocab_size] float32, 1 at best; top_p: [n, 1] float64, below 1. Returns [n, 1] float32.

    A radix select in place of a sort (five times faster on a CPU for 128 thousand ids): the bits of floats in [0, 1]
    are ordered as the floats are, so the cut is found digit by digit, highest first, from the mass of each digit's
    bucket among the values that share the digits found so far. What lies below the cut may weigh 1 - top_p at most.
    """
    bits = weights.view(torch.int32)
    masses = weights.double()
    spare = 1 - top_p
    cuts = torch.zeros_like(bits[:, :1])
    for shift in (DIGIT_BITS, 0):
        digits = bits.bitwise_right_shift(shift).bitwise_and_(NUM_DIGITS - 1)
        sums = masses.new_zeros(len(masses), NUM_DIGITS + 1)
        sums.scatter_add_(1, digits.long().add_(1), masses).cumsum_(dim=1)
        if shift:
            spare = spare * sums[:, -1:]
        digit = torch.searchsorted(sums, spare, right=True).sub_(1).clamp_(max=NUM_DIGITS - 1)
        spare = spare - sums.gather(1, digit)
        cuts |= digit.int() << shift
        masses.mul_(digits == digit)
    return cuts.clamp_(max=ONE_BITS).view(torch.float32)  # rounding may not cut off the best
