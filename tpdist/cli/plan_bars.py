"""Bars of the memory of devices, for a terminal: what each part of it is used for.

In block characters, each with a colour; in ASCII where blocks cannot be shown.
"""

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from tpdist.cli.sizes import size
from tpdist.plan.placement import DevicePlan, Placement

MIN_BAR, MAX_WIDTH = 12, 120
# Name, block, what stands for it in ASCII, colour; in the order of a bar.
SEGMENTS = (
    ("weights", "\u2588", "#", "blue"),
    ("KV cache", "\u2593", "=", "green"),
    ("activations", "\u2592", "+", "yellow"),
    ("rest", "\u259a", "o", "magenta"),
    ("free", "\u2591", ".", "dim"),
    ("not usable", "\u00b7", "x", "dim"),
)


def shows_blocks(console: Console) -> bool:
    """Whether the terminal, or the file, can show block characters."""
    try:
        "".join(block for _, block, *_ in SEGMENTS).encode(console.encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return not console.legacy_windows


def bars(placement: Placement, *, width: int, blocks: bool) -> Text:
    """A legend, and a bar for each device, those of a kind to one scale: what its memory is used for."""
    names = [_bar_name(plan) for plan in placement.devices]
    numbers = [f"{size(plan.used_bytes)} of {size(plan.device.total_bytes)}" for plan in placement.devices]
    name_width, number_width = max(map(len, names), default=0), max(map(len, numbers), default=0)
    room = max(MIN_BAR, min(width, MAX_WIDTH) - name_width - number_width - 3)
    largest = largest_by_kind(placement)
    text = _legend(blocks=blocks)
    for plan, name, number in zip(placement.devices, names, numbers, strict=True):
        length = max(MIN_BAR, round(room * plan.device.total_bytes / largest[plan.device.kind]))
        text.append(f"\n{name:{name_width}} ")
        text.append_text(_bar(segment_bytes(plan), length, blocks=blocks))
        text.append(f"{'':{room - length + 1}}{number:>{number_width}}")
    return text


def segment_bytes(plan: DevicePlan) -> tuple[int, ...]:
    """The bytes of each of SEGMENTS; together the device's memory, or more if the device is over."""
    rest = plan.communication_bytes + plan.overhead_bytes
    free = max(0, plan.usable_bytes - plan.used_bytes)
    blocked = max(0, plan.device.total_bytes - max(plan.usable_bytes, plan.used_bytes))
    return plan.weight_bytes, plan.kv_cache_bytes, plan.activation_bytes, rest, free, blocked


def largest_by_kind(placement: Placement) -> dict[str, int]:
    """The bytes of the largest device of each kind: a machine's memory would make its GPUs look empty."""
    largest: dict[str, int] = {}
    for plan in placement.devices:
        largest[plan.device.kind] = max(largest.get(plan.device.kind, 1), plan.device.total_bytes)
    return largest


def _bar_name(plan: DevicePlan) -> str:
    node = plan.device.node if len(plan.device.node) <= 14 else plan.device.node[:11] + "..."
    return f"{node} {plan.device.name}"


def _bar(parts: Sequence[int], length: int, *, blocks: bool) -> Text:
    text = Text()
    for (_, block, plain, colour), count in zip(SEGMENTS, _cells(parts, length), strict=True):
        text.append((block if blocks else plain) * count, style=colour)
    return text


def _cells(parts: Sequence[int], length: int) -> list[int]:
    """`length` cells dealt in proportion; every part that is not 0 gets one, from the largest."""
    total = max(1, sum(parts))
    cells = [max(1 if part else 0, int(length * part / total)) for part in parts]
    largest = max(range(len(parts)), key=lambda at: parts[at])
    cells[largest] += length - sum(cells)
    return cells


def _legend(*, blocks: bool) -> Text:
    text = Text()
    for name, block, plain, colour in SEGMENTS:
        text.append((block if blocks else plain) * 2, style=colour)
        text.append(f" {name}   ")
    text.rstrip()
    return text
