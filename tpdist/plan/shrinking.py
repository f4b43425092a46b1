"""What shrinks of a demand until the model fits.

What the user left unset does, in this order: the context, to the largest multiple of a block that fits, down to one
block; then max_num_batched_tokens and then max_num_seqs, by halves, each time with the longest context that fits. There
are never fewer sequences than max_batch_size, which does not shrink.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from tpdist.plan.costs import context_tokens
from tpdist.plan.fitting import Fit, Problem, first_that_fits
from tpdist.plan.placement import Demand
from tpdist.plan.refusal import lacked


def shrunk(problems: Sequence[Problem], demand: Demand) -> Fit | None:
    """The fit of the largest demand that fits, by the rule above; None if not even the smallest does."""
    for batch in _batches(demand):
        made = first_that_fits(problems, batch)
        if made is not None or "max_seq_len" in demand.fixed or "max_model_len" in demand.fixed:
            if made is not None:
                return made
            continue
        context = _longest_context(problems, batch)
        if context is not None:
            return first_that_fits(problems, replace(batch, max_seq_len=context))
    return None


def smallest(demand: Demand) -> Demand:
    """What is left when all that may shrink has."""
    *_, least = _batches(demand)
    if "max_seq_len" in demand.fixed or "max_model_len" in demand.fixed:
        return least
    return replace(least, max_seq_len=min(context_tokens(demand), demand.block_size))


def shrink_notes(before: Demand, fit: Fit, lacking: Fit) -> tuple[str, ...]:
    """A sentence for each number that shrank from `before`, of which `lacking` is the fit that did not work out."""
    after, why = fit.demand, lacked(lacking)
    pairs = (
        ("max_seq_len", context_tokens(before), context_tokens(after), "tokens"),
        ("max_num_batched_tokens", before.max_num_batched_tokens, after.max_num_batched_tokens, "tokens"),
        ("max_num_seqs", before.max_num_seqs, after.max_num_seqs, "sequences"),
    )
    return tuple(
        f"{name} shrank from {old} to {new} {unit}, so that the model fits: {why}"
        for name, old, new, unit in pairs
        if old != new
    )


def _batches(demand: Demand) -> Iterator[Demand]:
    """The demand, and what halving its batch makes of it step by step, the context untouched."""
    yield demand
    if "max_num_batched_tokens" not in demand.fixed:
        while demand.max_num_batched_tokens > demand.block_size:
            tokens = max(demand.block_size, demand.max_num_batched_tokens // 2)
            demand = replace(demand, max_num_batched_tokens=tokens)
            yield demand
    if "max_num_seqs" not in demand.fixed:
        while demand.max_num_seqs > demand.max_batch_size:
            demand = replace(demand, max_num_seqs=max(demand.max_batch_size, demand.max_num_seqs // 2))
            yield demand


def _longest_context(problems: Sequence[Problem], demand: Demand) -> int | None:
    """The most tokens, in whole blocks, that fit, by halving: what fits with a context fits with every shorter one.
    Whether there is room for one block is asked first, since the answer is often no."""

    def fits(num_blocks: int) -> bool:
        shorter = replace(demand, max_seq_len=num_blocks * demand.block_size)
        return any(
            problem.may_fit(shorter) and (problem.room_decides(shorter) or problem.fit(shorter) is not None)
            for problem in problems
        )

    low, high = 1, (context_tokens(demand) - 1) // demand.block_size
    if high < 1 or not fits(low):
        return None
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low * demand.block_size
