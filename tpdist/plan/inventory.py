"""Which devices there are, as people write it in one argument, and how sizes, rates and times are written.

    80GiB,80GiB,24GiB   4x80GiB   2xH100   80GiB@3.35TB/s   2x24GiB,cpu=64GiB      on one node

A file of several nodes is inventory_file.py's. Knows no model, and not which devices become ranks.
"""

import re
from collections.abc import Iterator, Mapping, Sequence

from tpdist.errors import SettingsError
from tpdist.plan import devices as known
from tpdist.plan.placement import Device, Inventory, Link
from tpdist.settings_options import nearest
from tpdist.settings_values import BYTE_UNITS, parse_bytes

ONE_NODE = "node0"
MAX_GPUS = 1024
DEVICES_EXAMPLE = "2x80GiB,24GiB@1TB/s,cpu=64GiB"
TIME_UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
BIT_UNITS = {"kbit": 10**3 / 8, "mbit": 10**6 / 8, "gbit": 10**9 / 8, "tbit": 10**12 / 8}


def parse_size(value: object) -> int:
    """Bytes, from a number or text such as "80GiB". Raises ValueError unless it is at least one."""
    try:
        size = parse_bytes(value)
    except (ValueError, OverflowError):
        size = None
    if isinstance(size, bool) or not isinstance(size, int | float) or not 1 <= size < float("inf"):
        raise ValueError('must be a size, as "80GiB"')
    return int(size)


def parse_rate(value: object) -> float:
    """Bytes per second, from a number or text such as "3.35TB/s" or "100Gbit/s"."""
    rate = value
    if isinstance(value, str):
        parts = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-z]+)/s\s*", value.lower())
        unit = (BIT_UNITS | BYTE_UNITS).get(parts[2]) if parts else None
        rate = float(parts[1]) * unit if parts and unit else None
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < float("inf"):
        raise ValueError('must be a rate, as "3.35TB/s" or "100Gbit/s"')
    return float(rate)


def parse_seconds(value: object) -> float:
    """Seconds, from a number or text such as "50us"."""
    seconds = value
    if isinstance(value, str):
        parts = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(s|ms|us|ns)\s*", value.lower())
        seconds = float(parts[1]) * TIME_UNITS[parts[2]] if parts else None
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds < float("inf"):
        raise ValueError('must be a time, as "50us"')
    return float(seconds)


# -- devices ----------------------------------------------------------------------------------------------------------


def parse_devices(text: str) -> Inventory:
    """The devices of one node, from text such as 2x80GiB,24GiB@1TB/s,cpu=64GiB. Raises SettingsError."""
    devices: list[Device] = []
    for item in text.split(","):
        try:
            devices += _item(item.strip(), first=sum(device.kind == "cuda" for device in devices))
        except ValueError as error:
            raise SettingsError(f"--devices {text}: {item.strip()!r} {error}; example: {DEVICES_EXAMPLE}") from error
    if sum(device.kind == "cpu" for device in devices) > 1:
        raise SettingsError(f"--devices {text}: cpu stands in it twice; a node has one memory")
    return make_inventory(devices)


def make_inventory(devices: Sequence[Device], *, inside: Mapping[str, Link] | None = None) -> Inventory:
    """`devices` with the default links between them, but for `inside` by node."""
    nodes = dict.fromkeys(device.node for device in devices)
    links = {node: known.default_inside([each for each in devices if each.node == node]) for node in nodes}
    return Inventory(
        devices=tuple(devices), inside={**links, **(inside or {})}, across={}, default_across=known.DEFAULT_ACROSS
    )


def _item(item: str, *, first: int) -> Iterator[Device]:
    """The devices of one item; `first` is the index of its first GPU."""
    parts = re.fullmatch(r"(?:([0-9]+)\s*x\s*)?(?:(cpu)\s*=\s*)?([^@=]+)(?:@(.+))?", item, re.IGNORECASE)
    if parts is None:
        raise ValueError("is no device")
    count, kind = int(parts[1] or 1), "cpu" if parts[2] else "cuda"
    if count > MAX_GPUS:
        raise ValueError(f"counts {count} devices, and one item may stand for {MAX_GPUS}")
    if count < 1 or (kind == "cpu" and parts[1]):
        raise ValueError("counts no device" if count < 1 else "counts a memory, of which a node has one")
    model = "" if re.match(r"[0-9.]", parts[3]) else parts[3].strip()
    size = memory_of(model) if model else parse_size(parts[3])
    rate = parse_rate(parts[4]) if parts[4] else None
    yield from make_devices(ONE_NODE, kind=kind, count=count, first=first, model=model, size=size, bandwidth=rate)


def memory_of(model: str) -> int:
    """Of a GPU by its name. Raises ValueError for one that is not known."""
    size = known.memory_of(model)
    if size is None:
        raise ValueError(
            f"is neither a size nor a known GPU (the nearest is {nearest(model, known.NAMES)}): write its memory, "
            "as 80GiB, or 80GiB@2TB/s with its bandwidth"
        )
    return size


def make_devices(
    node: str,
    *,
    kind: str,
    count: int = 1,
    first: int = 0,
    model: str = "",
    size: int,
    free: int | None = None,
    bandwidth: float | None = None,
) -> Iterator[Device]:
    """`count` equal devices; a memory is `cpu`, a GPU cuda:`first` and up. `model` gives the bandwidth if none is."""
    for index in range(first, first + count):
        yield Device(
            name=f"cuda:{index}" if kind == "cuda" else "cpu",
            kind="cuda" if kind == "cuda" else "cpu",
            node=node,
            total_bytes=size,
            free_bytes=size if free is None else free,
            bandwidth=bandwidth or known.bandwidth_of(model, kind=kind, total_bytes=size),
        )
