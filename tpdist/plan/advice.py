"""Why one layout was taken and another not, and which other one is worth a thought, in sentences."""

from collections.abc import Sequence

from tpdist.plan.amounts import amount
from tpdist.plan.costs import demanded_tokens, kv_bytes_per_layer
from tpdist.plan.fitting import Fit
from tpdist.plan.memory import DTYPE_BYTES
from tpdist.plan.placement import Objective
from tpdist.plan.shards import Partition

WORTH_SAYING = 1.05
"""A layout is recommended if what is taken needs this many times its seconds."""

NEARLY_AS_FAST = 1.1


def reason_for(other: Fit, chosen: Fit, objective: Objective) -> str:
    """Why `other` was not taken."""
    if other.shortfall_bytes:
        worst = other.worst.device
        return f"does not fit: lacks {amount(other.shortfall_bytes)} on {worst.name} of {worst.node}{_repeated(other)}"
    ratio = other.seconds(objective) / chosen.seconds(objective)
    if ratio > 1.005:
        return f"not asked for: slower by {ratio:.2f}x{_repeated(other)}"
    if ratio < 0.995:
        return f"not asked for: faster by {1 / ratio:.2f}x{_repeated(other)}"
    return f"not asked for: as fast{_repeated(other)}"


def advise(others: Sequence[Fit], chosen: Fit, objective: Objective) -> tuple[str, ...]:
    """The fastest layout that fits, if it is enough faster than what is taken; of those that are nearly as fast, the
    one that is best for the other objective."""
    fitting = [other for other in others if not other.shortfall_bytes]
    least = min((other.seconds(objective) for other in fitting), default=0.0)
    if least == 0 or least * WORTH_SAYING >= chosen.seconds(objective):
        return ()
    enough = min(least * NEARLY_AS_FAST, chosen.seconds(objective) / WORTH_SAYING)
    nearly = [other for other in fitting if other.seconds(objective) <= enough]
    best = min(nearly, key=lambda other: (other.latency_s, other.slowest_stage_s)[objective == "latency"])
    return (f"{flags(best)} would be {_faster(best, chosen, objective)}, since {_why(best, chosen)}",)


def _faster(best: Fit, chosen: Fit, objective: Objective) -> str:
    """By how much, and what it does to the other objective."""
    steps = f"a step of the slowest stage takes {_times(best.slowest_stage_s, chosen.slowest_stage_s)}"
    tokens = f"a token of one sequence {'takes ' * (objective == 'latency')}{_times(best.latency_s, chosen.latency_s)}"
    parts = (steps, tokens) if objective == "throughput" else (tokens, steps.replace("takes ", ""))
    return f"{chosen.seconds(objective) / best.seconds(objective):.2f}x as fast: {parts[0]}, and {parts[1]}"


def roomier(others: Sequence[Fit], chosen: Fit) -> tuple[str, ...]:
    """Of `others`, which have the demand as it was before it shrank, the one that has room for most tokens."""
    fitting = [other for other in others if not other.shortfall_bytes]
    if not fitting:
        return ()
    best = max(fitting, key=lambda other: other.num_blocks)
    return (f"{flags(best)} would fit without shrinking anything, with a cache of {_tokens(best)} tokens",)


def flags(fit: Fit) -> str:
    """The flags that give a layout."""
    tp_size, pp_size = len(fit.layout.places[0].devices), len(fit.layout.places)
    return f"--tensor-parallel-size {tp_size} --pipeline-parallel-size {pp_size}"


def repeated_bytes(fit: Fit) -> int:
    """Bytes of cache, for the demanded tokens, that exist only because ranks repeat key-value heads."""
    config, dtype_bytes = fit.layout.model.config, DTYPE_BYTES[fit.demand.dtype]
    once = kv_bytes_per_layer(config, Partition.even(1), 0, dtype_bytes=dtype_bytes) * config.num_hidden_layers
    held = sum(need.token_bytes for need in fit.needs)
    return (held - once) * demanded_tokens(fit.demand)


def _repeated(fit: Fit) -> str:
    more = repeated_bytes(fit)
    return f"; key-value heads are repeated: {amount(more)} more" if more else ""


def _why(best: Fit, chosen: Fit) -> str:
    best_size, chosen_size = (len(fit.layout.places[0].devices) for fit in (best, chosen))
    if _spans_nodes(chosen) and not _spans_nodes(best):
        return "its all-reduces stay inside a node, and only hidden states cross the link between nodes"
    if best_size > chosen_size:
        return f"{best_size} devices read each layer's weights at once, and not {chosen_size}"
    return f"it has fewer or shorter all-reduces: groups of {best_size} and not of {chosen_size}"


def _spans_nodes(fit: Fit) -> bool:
    return any(len({device.node for device in place.devices}) > 1 for place in fit.layout.places)


def _tokens(fit: Fit) -> int:
    return fit.num_blocks * fit.demand.block_size


def _times(new_s: float, old_s: float) -> str:
    return f"{1000 * new_s:.3g} ms instead of {1000 * old_s:.3g} ms"
