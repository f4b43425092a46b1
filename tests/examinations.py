"""Findings of nodes and whole examinations by hand, for tests of what they mean."""

from typing import Any

from clusters import probe_of, register_of

from tpdist.control.state import Key
from tpdist.preflight.words import (
    Answer,
    Examination,
    Findings,
    Limits,
    LinkFigures,
    LinkMeasured,
    NodeExamined,
    ReduceFigures,
    ReduceMeasured,
)

GIB = 1024**3


def limits_of(**changes: Any) -> Limits:
    fields = {"shm_bytes": 16 * GIB, "open_files": 1 << 20, "locked_bytes": None, "infiniband": False}
    return Limits(**{**fields, **changes})


def findings_of(**changes: Any) -> Findings:
    """A healthy machine without a GPU."""
    fields: dict[str, Any] = {"limits": limits_of(), "probe": probe_of()}
    return Findings(**{**fields, **changes})


def node_of(key: Key = None, findings: Findings | None = None, **changes: Any) -> NodeExamined:
    """The head, or worker `key` on a machine of its own."""
    number = 1 if key is None else key + 2
    address = "127.0.0.1" if key is None else f"10.0.0.{number}"
    fields = {"address": address, "head_address": "127.0.0.1" if key is None else "10.0.0.1", "interface": "eth0"}
    probe = probe_of(host_id=f"machine-{number}")
    return NodeExamined(
        register=register_of(key, **{**fields, **changes}), findings=findings or findings_of(probe=probe)
    )


def link_of(source: int, target: int, answer: Answer | None = None, **changes: Any) -> LinkMeasured:
    """A fast link, or what became of it."""
    figures = LinkFigures(**{"latency_s": 50e-6, "bandwidth": 1.25e9, "skew_s": 1e-3, **changes})
    return LinkMeasured(source=source, target=target, host=f"10.0.0.{target + 1}", port=40000, answer=answer or figures)


def cluster_of(num_workers: int = 1, **changes: Any) -> Examination:
    """A head and workers with healthy links."""
    count = num_workers + 1
    pairs = [(source, target) for source in range(count) for target in range(count) if source != target]
    everybody = tuple(range(count))
    figures = (ReduceFigures(small_s=1e-3, large_s=1e-2),) * count
    fields: dict[str, Any] = {
        "nodes": (node_of(), *(node_of(key) for key in range(num_workers))),
        "control": "port 7100 of all interfaces",
        "has_key": True,
        "waited_s": 60.0,
        "global_world_size": count,
        "links": tuple(link_of(*pair) for pair in pairs),
        "reduces": (ReduceMeasured(backend="gloo", world_size=count, nodes=everybody, answers=figures),),
    }
    return Examination(**{**fields, **changes})
