"""A placement on the terminal: what each device holds, as a table and as bars, what to expect of it, and why not
another. Predicted and measured bytes side by side, once they are measured.

Shows what a Placement says and decides nothing. `tpdist plan` prints all of it, `tpdist serve` the parts it wants.
"""

import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tpdist.cli.plan_bars import bars, shows_blocks
from tpdist.cli.plan_model import ModelFacts
from tpdist.cli.sizes import UNITS, size
from tpdist.plan.memory import DTYPE_BYTES
from tpdist.plan.placement import Candidate, DevicePlan, Placement
from tpdist.plan.shards import Interval, QueryHeads

MOST_REJECTED = 5
BULLET = "  - "
SIZES = ("weights", "KV", "other", "total", "usable")


def print_plan(placement: Placement, facts: ModelFacts, *, console: Console | None = None, full: bool = False) -> None:
    """All of it on stdout; `full`: every layout that was weighed, not only the first few."""
    console = console or Console(highlight=False)
    console.print(_wrapped(headline(facts, placement), width=console.width), style="bold")
    console.print(_wrapped(layout_line(placement), width=console.width))
    console.print()
    console.print(devices_table(placement, facts))
    console.print()
    console.print(bars(placement, width=console.width, blocks=shows_blocks(console)))
    for title, lines in _sections(placement, full=full):
        if lines:
            console.print(f"\n[bold]{title}[/bold]")
        for lead, words in lines:
            console.print(_wrapped(words, width=console.width, lead=lead))


def _sections(placement: Placement, *, full: bool) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Titles, and under each the lines: how a line begins, and its words."""
    expected = [(f"  {label:<12}", words) for label, words in expectations(placement)]
    yield "predicted, from the bandwidths of memory and links", expected
    yield "notes", [(BULLET, sentence) for sentence in placement.notes]
    yield "advice", [(BULLET, sentence) for sentence in placement.advice]
    yield "why not another layout", [(BULLET, words) for words in rejected_words(placement, full=full)]


# -- words ------------------------------------------------------------------------------------------------------------


def headline(facts: ModelFacts, placement: Placement) -> str:
    """Model, parameters, bytes and type, in a line."""
    dtype = placement.demand.dtype
    bytes_of = f"{size(facts.num_parameters * DTYPE_BYTES[dtype])} in {dtype}"
    stored = "" if facts.dtype == dtype else f" (the checkpoint has {facts.dtype})"
    return f"{facts.architecture}, {parameters(facts.num_parameters)} parameters, {bytes_of}{stored}"


def parameters(count: int) -> str:
    """As in 70.6B or 1.1M."""
    for unit, factor in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= factor:
            return f"{count / factor:.1f}{unit}"
    return str(count)


def layout_line(placement: Placement) -> str:
    """How the model is cut, in words."""
    nodes = dict.fromkeys(plan.device.node for plan in placement.devices)
    where = f"on {len(nodes)} nodes" if len(nodes) > 1 else f"on {next(iter(nodes), 'no node')}"
    total = max((interval.stop for interval in placement.stage_layers), default=0)
    if in_one_process(placement):
        used = [plan for plan in placement.devices if plan.layers.size]
        parts = ", ".join(f"{plan.device.name} {plan.layers.size}" for plan in used)
        return f"one process {where}, {placement.method}: {total} layers as {parts}"
    ranks = len(placement.devices)
    if placement.pp_size == 1:
        cut = "one rank" if ranks == 1 else f"{ranks} ranks share every layer (tensor parallel)"
        return f"{cut} {where}: {total} layers"
    layers = _stage_words([interval.size for interval in placement.stage_layers])
    shared = f", the {placement.tp_size} ranks of each share its layers" if placement.tp_size > 1 else ""
    return f"{ranks} ranks {where} in {placement.pp_size} pipeline stages{shared}: {total} layers as {layers}"


def in_one_process(placement: Placement) -> bool:
    """Whether one process has all devices, and computes on them one after another."""
    return any(plan.rank is None for plan in placement.devices)


def expectations(placement: Placement) -> Iterator[tuple[str, str]]:
    """What is predicted, as label and words."""
    demand = placement.demand
    if placement.latency_s > 0:
        batch = demand.max_batch_size
        whose = "for one sequence" if batch == 1 else f"for each of {batch} sequences"
        yield (
            "decode",
            f"{milliseconds(placement.latency_s)} a token {whose} ({rate(batch / placement.latency_s)} tokens/s)",
        )
    if placement.slowest_stage_s > 0 and not in_one_process(placement):
        step = f"{milliseconds(placement.slowest_stage_s)} each"
        step += " in the slowest stage, with all stages busy" if placement.pp_size > 1 else ""
        yield "throughput", f"at most {rate(1 / placement.slowest_stage_s)} steps/s ({step})"
    most = "--max-model-len" if "max_model_len" in demand.fixed else "the model"
    enough = f"all that {most} allows"
    if placement.longest_context < demand.max_model_len:
        enough = f"less than the {demand.max_model_len} that {most} allows"
    yield "context", f"the longest that fits is {placement.longest_context} tokens, {enough}"
    tokens = min((plan.tokens for plan in placement.devices if plan.layers.size), default=0)
    if tokens:
        whole = tokens // max(1, placement.longest_context)
        yield "KV cache", f"{tokens} tokens: {whole} sequence{'' if whole == 1 else 's'} of that length at once"


# -- table ------------------------------------------------------------------------------------------------------------


def devices_table(placement: Placement, facts: ModelFacts) -> Table:
    """A row for each device; bytes in one unit for all. What has nothing to tell, such as ranks where there are none,
    is left out, so that 80 columns are enough."""
    unit = _unit(max((plan.used_bytes for plan in placement.devices), default=0))
    rows = list(_rows(placement, facts, unit))
    headings = ("node", "device", "rank", "stage", "layers", "heads", *SIZES, "used")
    kept = [at for at, heading in enumerate(headings) if _tells(heading, placement)]
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 0))
    for at in kept:
        heading = headings[at]
        table.add_column(
            f"{heading}\n{UNITS[unit]}" if heading in SIZES else heading,
            justify="left" if heading in ("node", "device") else "right",
            vertical="bottom",
            no_wrap=heading != "node",
            overflow="ellipsis",
            min_width=4 if heading == "node" else None,
        )
    for row in rows:
        table.add_row(*(Text(row[at]) for at in kept))
    return table


def _tells(heading: str, placement: Placement) -> bool:
    """Whether a column says anything of this placement."""
    if heading == "rank":
        return any(plan.rank is not None for plan in placement.devices)
    return heading != "stage" or placement.pp_size > 1


def _rows(placement: Placement, facts: ModelFacts, unit: int) -> Iterator[list[str]]:
    before = ""
    for plan, heads in zip(placement.devices, head_counts(placement, facts), strict=True):
        node, before = ("" if plan.device.node == before else plan.device.node), plan.device.node
        other = plan.activation_bytes + plan.communication_bytes + plan.overhead_bytes
        sizes = (plan.weight_bytes, plan.kv_cache_bytes, other, plan.used_bytes, plan.usable_bytes)
        yield [
            node,
            plan.device.name,
            "" if plan.rank is None else str(plan.rank),
            str(plan.stage),
            layers_of(plan.layers),
            heads,
            *(f"{each / 1024**unit:.1f}" for each in sizes),
            f"{percent(plan)}%",
        ]


def layers_of(layers: Interval) -> str:
    """As people count: first and last."""
    if not layers.size:
        return "-"
    return str(layers.start) if layers.size == 1 else f"{layers.start}-{layers.stop - 1}"


def percent(plan: DevicePlan) -> int:
    """Of the usable bytes; a device that is over never shows 100."""
    used = 100 * plan.used_bytes / max(1, plan.usable_bytes)
    return int(used) + (1 if used > int(used) >= 100 else 0)


def head_counts(placement: Placement, facts: ModelFacts) -> list[str]:
    """How many query heads each device computes; "-" on one without layers."""
    axis = QueryHeads(facts.num_attention_heads, facts.num_key_value_heads)
    counts = []
    for plan in placement.devices:
        shares = placement.shares[plan.stage] if plan.stage < len(placement.shares) else (1,)
        own = axis.intervals(shares)
        inside = plan.layers.size and plan.tp_rank < len(own)
        counts.append(str(own[plan.tp_rank].size) if inside else "-")
    return counts


# -- other layouts ----------------------------------------------------------------------------------------------------


def rejected_words(placement: Placement, *, full: bool) -> Iterator[str]:
    """A sentence for each of the layouts that were not taken, or for the first few."""
    shown = placement.rejected if full else placement.rejected[:MOST_REJECTED]
    for candidate in shown:
        one_process = in_one_process(placement)
        layout = f"layers {_stage_words(candidate.stage_layers)}" if one_process else layout_of(candidate)
        yield f"{layout}: {why_not(candidate)}"
    if left := len(placement.rejected) - len(shown):
        yield f"{left} more; --all shows them"


def layout_of(candidate: Candidate) -> str:
    """As in `tensor 4 x pipeline 2 (40 + 40)`."""
    if candidate.pp_size == 1:
        return f"tensor {candidate.tp_size}"
    return f"tensor {candidate.tp_size} x pipeline {candidate.pp_size} ({_stage_words(candidate.stage_layers)})"


def why_not(candidate: Candidate) -> str:
    """The planner's reason with its numbers."""
    parts = [candidate.reason] if candidate.reason else []
    if candidate.shortfall_bytes and size(candidate.shortfall_bytes) not in candidate.reason:
        parts.append(f"{size(candidate.shortfall_bytes)} too little on its fullest device")
    if not candidate.shortfall_bytes and 0 < candidate.latency_s < float("inf"):
        parts.append(
            f"{milliseconds(candidate.latency_s)} a token, slowest stage {milliseconds(candidate.slowest_stage_s)}"
        )
    return "; ".join(parts) or "not chosen"


def _stage_words(counts: Sequence[int]) -> str:
    """As in `16 + 16`, or `8 x 10` for many equal ones."""
    (most, times), *others = Counter(counts).most_common() or [(0, 0)]
    return f"{times} x {most}" if times > 4 and not others else " + ".join(map(str, counts))


# -- predicted and measured -------------------------------------------------------------------------------------------


def compare(plan: Mapping[str, Any], ranks: Mapping[int, Mapping[str, Any]]) -> Table:
    """What the plan said and what each device has: weights and KV cache, with the difference in percent of the plan.

    `plan` is the plan of /v1/cluster, and `ranks` are its ranks by number. What is not known yet is a dash.
    """
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 0))
    table.add_column("device", vertical="bottom", no_wrap=True)
    for name in ("weights", "KV cache"):
        for column in (f"{name}\nplanned", "\nmeasured", "\ndiffers"):
            table.add_column(column, justify="right", no_wrap=True)
    for device in plan["devices"]:
        name, found = _measured(device, ranks)
        cells = [_compared(device.get(key), found.get(key)) for key in ("weight_bytes", "kv_cache_bytes")]
        table.add_row(name, *(cell for group in cells for cell in group))
    return table


def _measured(device: Mapping[str, Any], ranks: Mapping[int, Mapping[str, Any]]) -> tuple[str, Mapping[str, int]]:
    """A device of the plan by name, and what lies on it: of a rank's own all that it has, in one process by name."""
    rank = device.get("rank")
    if rank is None:
        held = {each["device"]: each for each in ranks.get(0, {}).get("held", ())}
        return device["device"]["name"], held.get(device["device"]["name"], {})
    held = ranks.get(rank, {}).get("held", ())
    keys = ("weight_bytes", "kv_cache_bytes") if held else ()
    return f"rank {rank}", {key: sum(each[key] for each in held) for key in keys}


def _compared(planned: int | None, measured: int | None) -> tuple[str, str, str]:
    shown = tuple("-" if value is None else size(value) for value in (planned, measured))
    if planned is None or measured is None or (not planned and measured):
        return shown[0], shown[1], "-"
    return shown[0], shown[1], f"{100 * (measured - planned) / max(1, planned):+.1f}%"


# -- small ------------------------------------------------------------------------------------------------------------


def _unit(largest: int) -> int:
    """The index of the largest unit in which `largest` is at least 1."""
    unit = 0
    while largest >= 1024 and unit < len(UNITS) - 1:
        largest, unit = largest // 1024, unit + 1
    return min(unit, UNITS.index("GiB"))


def milliseconds(seconds: float) -> str:
    """Two digits, or as many as there are before the point; from ten seconds on in seconds."""
    value = seconds * 1e3
    if seconds >= 10:
        return f"{seconds:.0f} s"
    return f"{value:.0f} ms" if value >= 9.5 else f"{value:.2g} ms"


def rate(per_second: float) -> str:
    """Two digits, or as many as there are before the point."""
    return f"{per_second:.0f}" if per_second >= 9.5 else f"{per_second:.2g}"


def _wrapped(words: str, *, width: int, lead: str = "") -> Text:
    """`lead` and the words, the lines after the first below the words."""
    lines = textwrap.wrap(words, max(20, width - len(lead)), break_on_hyphens=False) or [""]
    return Text(lead + ("\n" + " " * len(lead)).join(lines))
