"""What a user is told when a model does not fit: what is missing where, what takes the room, and what would help."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from tpdist.errors import DoesNotFitError
from tpdist.plan.amounts import amount, exact_amount
from tpdist.plan.costs import asks_too_much, context_tokens, demanded_tokens
from tpdist.plan.fitting import Fit
from tpdist.plan.placement import Demand

FLAGS = {
    "max_model_len": "--max-model-len",
    "max_seq_len": "--max-seq-len",
    "max_batch_size": "--max-batch-size",
    "max_num_batched_tokens": "--max-num-batched-tokens",
    "max_num_seqs": "--max-num-seqs",
    "max_image_length": "--max-image-length",
    "max_num_images": "--max-num-images",
    "kv_cache_memory_bytes": "--kv-cache-memory-bytes",
}
DO_NOT_SHRINK = ("max_batch_size", "max_image_length", "max_num_images", "kv_cache_memory_bytes")
DEFAULTS: Mapping[str, Any] = {each.name: each.default for each in fields(Demand) if each.name in DO_NOT_SHRINK}


def refuse(fit: Fit, *, before: Demand, helps: Sequence[str]) -> DoesNotFitError:
    """The error for a model of which `fit` is the closest it comes to fitting, after all that may shrink has."""
    images = fit.layout.model.extra.tower is not None
    left, asked = demand_in_words(fit.demand, images=images), demand_in_words(before, images=images)
    lines = [
        f"the model does not fit: {_lacking(fit)}",
        f"  it needs {breakdown(fit)}",
        f"  for {left}" + ("" if before == fit.demand else f" (shrunk from {asked})"),
    ]
    return DoesNotFitError("\n".join(lines), helps=helps)


def _lacking(fit: Fit) -> str:
    """What is missing where: room, or leave for the cache to take it."""
    worst, shortfall = fit.worst, exact_amount(fit.shortfall_bytes)
    if _lacks_room(fit):
        return f"{_where(fit)} lacks {shortfall} of the {exact_amount(worst.usable_bytes)} that may be used of it"
    budget, enough = exact_amount(fit.worst_budget), asked_cache_bytes(fit, fit.demand)
    return (
        f"the KV cache of {_where(fit)} may take {budget} {_cache_rule(fit.demand)}, which is {shortfall} less than it "
        f"needs; that takes --kv-cache-memory-bytes {enough} or more"
    )


def asked_cache_bytes(fit: Fit, demand: Demand) -> int:
    """The kv_cache_memory_bytes that are enough for the demanded tokens: of a rank, or of one process' devices
    together."""
    sizes = [need.token_bytes for need in fit.needs]
    return demanded_tokens(demand) * (sum(sizes) if fit.layout.mode == "devices" else max(sizes))


def lacked(fit: Fit) -> str:
    """The same in short, of a fit that did not work out."""
    shortfall = amount(fit.shortfall_bytes)
    if _lacks_room(fit):
        return f"{_where(fit)} lacked {shortfall}"
    rule = _cache_rule(fit.demand)
    return f"the KV cache of {_where(fit)} may take {amount(fit.worst_budget)} {rule}, and lacked {shortfall}"


def _where(fit: Fit) -> str:
    return f"{fit.worst.device.name} on {fit.worst.device.node}"


def _lacks_room(fit: Fit) -> bool:
    cache = demanded_tokens(fit.demand) * fit.worst.token_bytes
    return max(cache, fit.cache_bytes(fit.worst)) > fit.worst.room_bytes


def _cache_rule(demand: Demand) -> str:
    asked = demand.kv_cache_memory_bytes
    return "by default" if asked is None else f"with --kv-cache-memory-bytes {flag_size(asked)}"


def flag_size(num_bytes: int) -> str:
    """As an option takes it, in the largest unit that leaves it whole."""
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if num_bytes and num_bytes % 1024**power == 0:
            return f"{num_bytes // 1024**power}{unit}"
    return str(num_bytes)


def breakdown(fit: Fit) -> str:
    """What the worst device needs, part by part."""
    worst = fit.worst
    cache = max(fit.cache_bytes(worst), demanded_tokens(fit.demand) * worst.token_bytes)
    parts = (
        ("weights", worst.weight_bytes),
        ("KV cache", cache),
        ("activations", worst.activation_bytes),
        ("communication", worst.communication_bytes),
        ("overhead", worst.overhead_bytes),
    )
    layers = f"layers {worst.layers.start} to {worst.layers.stop - 1}"
    return f"{', '.join(f'{name} {amount(size)}' for name, size in parts)} ({layers}, {fit.demand.dtype})"


def demand_in_words(demand: Demand, *, images: bool = False) -> str:
    sequences = "one sequence" if demand.max_batch_size == 1 else f"{demand.max_batch_size} sequences"
    tokens = f"{context_tokens(demand)} tokens"
    if asks_too_much(demand):
        tokens += f" ({demand.max_seq_len} asked for)"
    if images:
        tokens += f" with {_images_in_words(demand)}"
    return (
        f"{sequences} of {tokens}, max_num_batched_tokens {demand.max_num_batched_tokens} and "
        f"max_num_seqs {demand.max_num_seqs}"
    )


def _images_in_words(demand: Demand) -> str:
    count, length = demand.max_num_images, demand.max_image_length
    return f"{count} image{'' if count == 1 else 's'} of {length} x {length} pixels"


def common_helps(demand: Demand, fits: Callable[[Demand], Demand | None]) -> Iterator[str]:
    """What would help on the same devices: each is tried. `fits` gives what is left of a demand that fits."""
    if demand.dtype == "float32" and fits(replace(demand, dtype="bfloat16")):
        yield "--dtype bfloat16 would fit"
    yield from _without_limits(demand, fits)
    if demand.gpu_memory_utilization < 0.98 and fits(replace(demand, gpu_memory_utilization=0.98)):
        yield "--gpu-memory-utilization 0.98 would fit, if nothing else uses the GPUs"


def _without_limits(demand: Demand, fits: Callable[[Demand], Demand | None]) -> Iterator[str]:
    """Which of the numbers that the user set are to blame, each by itself, or else all of them together."""
    given = set(demand.fixed) | ({"kv_cache_memory_bytes"} if demand.kv_cache_memory_bytes is not None else set())
    names = [name for name in FLAGS if name in given]
    alone = [[name] for name in names]
    tried = [(each, left) for each in alone if (left := fits(_without(demand, each)))]
    if not tried and len(names) > 1 and (left := fits(_without(demand, names))):
        tried = [(names, left)]
    for each, left in tried:
        yield f"without {', '.join(FLAGS[name] for name in each)} it would fit with {demand_in_words(left)}"


def _without(demand: Demand, names: Collection[str]) -> Demand:
    """As if the user had not set these."""
    unset = {name: value for name, value in DEFAULTS.items() if name in names}
    return replace(demand, fixed=demand.fixed - set(names), **unset)
