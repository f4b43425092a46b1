"""What must be equal on all nodes before a process group exists, and the table that names what is not. Pure."""

from collections.abc import Mapping, Sequence
from typing import Any

from tpdist.control.messages import Fingerprint

HEAD = "head"
_VERSIONS = ("tpdist", "torch")
_CUDA_VERSIONS = ("cuda", "nccl")

# What differs, and its value on the head and on each node that has another one.
Row = tuple[str, dict[str, str]]


def differences(fingerprints: Mapping[str, Fingerprint], *, settings: Mapping[str, Any]) -> list[Row]:
    """One row for everything that some node has other than the head; empty when the nodes fit together.

    `fingerprints` are by node name, the head's under "head". Versions, kinds of devices (unless all ranks are to use
    the CPU) and model files are compared between all nodes. A setting that somebody set explicitly on a worker is
    compared with the head's `settings`, whether the head's value was set or is a default.
    """
    cpu_only = settings.get("device") == "cpu"
    facts = {node: _facts(fingerprint, cpu_only=cpu_only) for node, fingerprint in fingerprints.items()}
    rows = [_row(what, facts) for what in _names(facts)]
    for node, fingerprint in fingerprints.items():
        if node != HEAD:
            rows += [_setting(node, name, value, settings) for name, value in fingerprint.explicit.items()]
    return [(what, cells) for what, cells in rows if len(cells) > 1]


def _facts(fingerprint: Fingerprint, *, cpu_only: bool) -> dict[str, str]:
    probe = fingerprint.probe
    versions = _VERSIONS if cpu_only else _VERSIONS + _CUDA_VERSIONS
    facts = {name: str(getattr(probe, name) or "none") for name in versions}
    facts["python"] = ".".join(probe.python.split(".")[:2])
    if not cpu_only:
        facts["device"] = probe.devices[0].kind if probe.devices else "cpu"
    return facts | {f"model {part}": digest for part, digest in fingerprint.model.items()}


def _names(facts: Mapping[str, Mapping[str, str]]) -> list[str]:
    """All that any node has a value for, in the order of first mention."""
    return list(dict.fromkeys(name for each in facts.values() for name in each))


def _row(what: str, facts: Mapping[str, Mapping[str, str]]) -> Row:
    values = {node: each.get(what, "missing") for node, each in facts.items()}
    return what, {node: value for node, value in values.items() if node == HEAD or value != values[HEAD]}


def _setting(node: str, name: str, value: Any, settings: Mapping[str, Any]) -> Row:
    if name in settings and settings[name] == value:
        return name, {}
    return name, {HEAD: str(settings.get(name, "unknown")), node: str(value)}


def table(rows: Sequence[Row]) -> str:
    """The differences as aligned text: one line a row, one `node=value` a cell."""
    width = max(len(what) for what, _ in rows)
    return "\n".join(
        f"  {what:<{width}}  " + "  ".join(f"{node}={value}" for node, value in cells.items()) for what, cells in rows
    )
