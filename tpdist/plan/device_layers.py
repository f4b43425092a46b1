"""Layers placed by hand: "0:16;1:16" is 16 layers on GPU 0 and the next 16 on GPU 1, "16" is 16 on GPU 0.

The text and the list of its entries are mistral.rs' forms. Layers follow each other in the order of the entries, and
those that no entry takes are on the CPU. Knows nothing of bytes.
"""

import re
from collections.abc import Sequence

from tpdist.errors import PlanError, SettingsError

CPU = "cpu"
DeviceLayers = tuple[tuple[str, int], ...]

# Nine digits are more than any model or machine needs, and keep int() clear of its limit.
_ENTRY = re.compile(r"\s*(?:(\d{1,9})\s*:\s*)?(\d{1,9})\s*", re.ASCII)


def parse_device_layers(value: str | Sequence[str], *, num_layers: int, num_devices: int) -> DeviceLayers:
    """Return (device, number of layers) in the order of the layers: cuda:N as `value` says, then cpu if any are left.

    Raises SettingsError for a text that says nothing or contradicts itself, PlanError for one that does not go with the
    `num_layers` of the model or the `num_devices` GPUs.
    """
    text = value if isinstance(value, str) else ";".join(value)
    example = _example(num_layers, num_devices)
    counts = _counts(text, example)
    _check_devices(counts, text, num_devices, example)
    left = num_layers - sum(counts.values())
    if left < 0:
        raise PlanError(
            f"device layers {text!r} place {sum(counts.values())} layers, but the model has {num_layers}; lower the "
            f"counts, for example {example}"
        )
    rest = ((CPU, left),) if left else ()
    return (*((f"cuda:{ordinal}", count) for ordinal, count in counts.items()), *rest)


def format_device_layers(layers: DeviceLayers) -> str:
    """Write a placement as parse_device_layers reads it; the CPU's layers are what is left, and not written."""
    return ";".join(f"{name.removeprefix('cuda:')}:{count}" for name, count in layers if name != CPU)


def _counts(text: str, example: str) -> dict[int, int]:
    """The number of layers by GPU, in the order written."""
    if not text.strip():
        raise SettingsError(f"device layers {text!r} are empty; write ORD:NUM;..., for example {example}")
    entries = text.split(";")
    counts: dict[int, int] = {}
    for entry in entries:
        ordinal, count = _entry(entry, text, example, alone=len(entries) == 1)
        if ordinal in counts:
            raise SettingsError(
                f"device layers {text!r} have GPU {ordinal} twice, with {counts[ordinal]} and {count} layers; write "
                f"each GPU once, for example {example}"
            )
        counts[ordinal] = count
    return counts


def _entry(entry: str, text: str, example: str, *, alone: bool) -> tuple[int, int]:
    """The GPU and the number of layers of one ORD:NUM; a number that stands `alone` is for GPU 0."""
    parts = _ENTRY.fullmatch(entry)
    if parts is None:
        raise SettingsError(
            f"device layers {text!r}: {entry!r} is not ORD:NUM, a GPU's number and how many layers it takes; write for "
            f"example {example}"
        )
    if parts[1] is None and not alone:
        raise SettingsError(
            f"device layers {text!r}: {entry!r} names no GPU, which only a number that stands alone may; write "
            f"for example {example}"
        )
    if int(parts[2]) == 0:
        raise SettingsError(
            f"device layers {text!r}: {entry!r} places 0 layers; leave out a GPU that takes none, for example {example}"
        )
    return int(parts[1] or 0), int(parts[2])


def _check_devices(counts: dict[int, int], text: str, num_devices: int, example: str) -> None:
    if not num_devices:
        raise PlanError(f"device layers {text!r} name GPUs, but there are none; leave them out to run on the CPU")
    for ordinal in counts:
        if ordinal >= num_devices:
            raise PlanError(
                f"device layers {text!r} name GPU {ordinal}, but there are {num_devices}, numbered from 0 to "
                f"{num_devices - 1}; write for example {example}"
            )


def _example(num_layers: int, num_devices: int) -> str:
    """A text that is right for this model and these GPUs: all layers, evenly. Without GPUs, one that shows the form."""
    num_used = min(num_layers, num_devices)
    if num_used < 1:
        return '"0:16;1:16"'
    share, extra = divmod(num_layers, num_used)
    return '"' + ";".join(f"{ordinal}:{share + (ordinal < extra)}" for ordinal in range(num_used)) + '"'
