"""Which devices there are, in a TOML file of nodes and links.

    [[node]]
    name = "alpha"
    memory = "256GiB"                                    # the machine's own; optional
    devices = [{ model = "H100", count = 4 }]            # or memory, free, bandwidth, kind
    link = { bandwidth = "450GB/s", latency = "10us" }   # between devices of the node; optional

    [[link]]                                             # optional; [across] is for all pairs that have none
    between = ["alpha", "beta"]
    bandwidth = "100Gbit/s"
    latency = "30us"

Nodes stand in the order of ranks, the head first. Knows no model, and not which devices become ranks.
"""

import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tpdist.errors import SettingsError
from tpdist.plan import devices as known
from tpdist.plan.inventory import (
    MAX_GPUS,
    make_devices,
    make_inventory,
    memory_of,
    parse_rate,
    parse_seconds,
    parse_size,
)
from tpdist.plan.placement import Device, Inventory, Link
from tpdist.settings_options import nearest

KINDS = ("cuda", "cpu")

Value = TypeVar("Value")


def read_inventory(path: Path) -> Inventory:
    """The nodes and links of a TOML file. Raises SettingsError with file and key."""
    try:
        with path.open("rb") as file:
            values = tomllib.load(file)
    except OSError as error:
        raise SettingsError(f"--inventory {path}: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"--inventory {path}: not TOML: {error}") from error
    top = _Table(str(path), values)
    top.allow("node", "link", "across")
    nodes = [_node(table) for table in top.tables("node", example='[[node]] with name = "alpha"')]
    names = [node.name for node in nodes]
    for table, node in zip(top.tables("node", example=""), nodes, strict=True):
        if names.count(node.name) > 1:
            raise table.error("name", f"{node.name!r} is the name of another node too")
    inside = {node.name: node.link for node in nodes if node.link is not None}
    made = make_inventory([device for node in nodes for device in node.devices], inside=inside)
    across = _links(top.tables("link", example="", required=False), names)
    default = top.table("across")
    default_across = made.default_across if default is None else _link(default, made.default_across)
    return Inventory(devices=made.devices, inside=made.inside, across=across, default_across=default_across)


@dataclass(frozen=True)
class _Node:
    name: str
    devices: tuple[Device, ...]
    link: Link | None


@dataclass(frozen=True)
class _Table:
    """A table of the file, read key by key. `where` leads to it: the file, and the tables that hold it."""

    where: str
    values: Mapping[str, Any]

    def error(self, key: str, problem: str) -> SettingsError:
        return SettingsError(f"{self.where}: {key}: {problem}")

    def allow(self, *keys: str) -> None:
        for key in self.values:
            if key not in keys:
                raise self.error(key, f"is no key here; the nearest is {nearest(key, keys)} (of {', '.join(keys)})")

    def get(self, key: str, parse: Callable[[object], Value]) -> Value | None:
        """The value under `key`, or None if it is absent. `parse` raises ValueError with what was expected."""
        if key not in self.values:
            return None
        try:
            return parse(self.values[key])
        except ValueError as error:
            raise self.error(key, f"{error}, found {self.values[key]!r}") from error

    def require(self, key: str, parse: Callable[[object], Value], *, example: str) -> Value:
        found = self.get(key, parse)
        if found is None:
            raise self.error(key, f"is missing; write {example}")
        return found

    def table(self, key: str) -> "_Table | None":
        found = self.get(key, _mapping)
        return None if found is None else _Table(f"{self.where}: {key}", found)

    def tables(self, key: str, *, example: str, required: bool = True) -> list["_Table"]:
        found = self.get(key, _mappings) or []
        if not found and required:
            raise self.error(key, f"there is none; write {example}")
        return [_Table(f"{self.where}: {key} {index}", values) for index, values in enumerate(found)]


def _mapping(value: object) -> Mapping[str, Any]:
    if isinstance(value, dict):
        return value
    raise ValueError('must be a table, as { bandwidth = "450GB/s" }')


def _mappings(value: object) -> list[Mapping[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise ValueError('must be a list of tables, as [{ memory = "80GiB", count = 4 }]')
    return value


def _word(value: object) -> str:
    if not isinstance(value, str) or not value.strip() or not value.isprintable():
        raise ValueError('must be a name, as "alpha"')
    return value


def _kind(value: object) -> str:
    if value not in KINDS:
        raise ValueError(f"must be {' or '.join(KINDS)}")
    return str(value)


def _count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_GPUS:
        raise ValueError(f"must be a whole number from 1 to {MAX_GPUS}, as 4")
    return value


def _pair(value: object) -> tuple[str, str]:
    if not isinstance(value, list) or len(value) != 2 or not all(isinstance(each, str) for each in value):
        raise ValueError('must be the names of two nodes, as ["alpha", "beta"]')
    return value[0], value[1]


def _node(table: _Table) -> _Node:
    table.allow("name", "devices", "memory", "link")
    name = table.require("name", _word, example='name = "alpha"')
    named = _Table(f"{table.where} ({name})", table.values)
    found: list[Device] = []
    for each in named.tables("devices", example="", required=False):
        found += _devices(each, name, first=sum(device.kind == "cuda" for device in found))
    memory = named.get("memory", parse_size)
    if memory is not None:
        found += make_devices(name, kind="cpu", size=memory)
    if not found:
        raise named.error("devices", 'there is none; write devices = [{ memory = "80GiB", count = 4 }]')
    if sum(device.kind == "cpu" for device in found) > 1:
        raise named.error("devices", "more than one is of kind cpu (memory is one too); a node has one memory")
    link = named.table("link")
    return _Node(name, tuple(found), None if link is None else _link(link, known.default_inside(found)))


def _devices(table: _Table, node: str, *, first: int) -> Iterator[Device]:
    table.allow("memory", "model", "free", "bandwidth", "kind", "count")
    model, kind = table.get("model", _word) or "", table.get("kind", _kind) or "cuda"
    size = table.get("memory", parse_size)
    if size is None and model:
        size = table.require("model", lambda value: memory_of(str(value)), example="")
    if size is None:
        raise table.error("memory", 'is missing; write memory = "80GiB", or model = "H100"')
    free = table.get("free", parse_size)
    if free is not None and free > size:
        raise table.error("free", f"{table.values['free']!r} is more than the memory, {size} bytes")
    count = table.get("count", _count) or 1
    if kind == "cpu" and count > 1:
        raise table.error("count", "a node has one memory; the ranks on it share it")
    rate = table.get("bandwidth", parse_rate)
    return make_devices(node, kind=kind, count=count, first=first, model=model, size=size, free=free, bandwidth=rate)


def _link(table: _Table, default: Link, *, more: tuple[str, ...] = ()) -> Link:
    table.allow("bandwidth", "latency", *more)
    bandwidth, latency = table.get("bandwidth", parse_rate), table.get("latency", parse_seconds)
    return Link(bandwidth=bandwidth or default.bandwidth, latency_s=default.latency_s if latency is None else latency)


def _links(tables: Sequence[_Table], names: Sequence[str]) -> dict[tuple[str, str], Link]:
    """By pairs of nodes in the order of ranks."""
    links: dict[tuple[str, str], Link] = {}
    for table in tables:
        pair, link = _between(table, names)
        if pair in links:
            raise table.error("between", f"{' and '.join(pair)} have one already")
        links[pair] = link
    return links


def _between(table: _Table, names: Sequence[str]) -> tuple[tuple[str, str], Link]:
    pair = table.require("between", _pair, example='between = ["alpha", "beta"]')
    for name in pair:
        if name not in names:
            raise table.error("between", f"there is no node {name!r}; the nearest is {nearest(name, names)}")
    if pair[0] == pair[1]:
        raise table.error("between", f"{pair[0]!r} twice; the link inside a node is its own link = {{ ... }}")
    first, second = sorted(pair, key=names.index)
    return (first, second), _link(table, known.DEFAULT_ACROSS, more=("between",))
