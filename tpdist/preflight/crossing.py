"""What the planner makes of links that were measured: whether tensor parallelism or stages should cross them. Pure.

Also the measured nodes and links as the TOML file that `tpdist plan --inventory` reads.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from tpdist.control.devices import probed_devices
from tpdist.control.state import node_id
from tpdist.plan.placement import Candidate, Device, Inventory, Link, Placement
from tpdist.preflight.words import Examination, LinkFigures

LinksByPair = Mapping[tuple[str, str], Link]


@dataclass(frozen=True)
class _Layout:
    tp_size: int
    pp_size: int
    latency_s: float
    slowest_stage_s: float

    @property
    def flags(self) -> str:
        return f"--tensor-parallel-size {self.tp_size} --pipeline-parallel-size {self.pp_size}"

    def seconds(self, placement: Placement) -> float:
        return self.latency_s if placement.objective == "latency" else self.slowest_stage_s


def measured_links(examination: Examination) -> dict[tuple[str, str], Link]:
    """By names of nodes in the order of ranks; of the two ways the slower one counts."""
    ways: dict[tuple[str, str], list[LinkFigures]] = {}
    for link in examination.links:
        if isinstance(link.answer, LinkFigures):
            pair = sorted((link.source, link.target))
            names = [node_id(examination.nodes[index].register.worker_id) for index in pair]
            ways.setdefault((names[0], names[1]), []).append(link.answer)
    return {
        pair: Link(bandwidth=min(each.bandwidth for each in figures), latency_s=max(each.latency_s for each in figures))
        for pair, figures in ways.items()
    }


def with_links(inventory: Inventory, links: LinksByPair) -> Inventory:
    """The same devices with what was measured between their nodes."""
    return replace(inventory, across={**inventory.across, **links})


def advise_crossing(placement: Placement) -> Iterator[str]:
    """Which of the two should cross the links between nodes, by the planner's prediction, and how to have it so."""
    nodes = [plan.device.node for plan in placement.devices]
    if len(set(nodes)) < 2:
        return
    chosen = _Layout(placement.tp_size, placement.pp_size, placement.latency_s, placement.slowest_stage_s)
    layouts = [chosen, *(_of(each) for each in placement.rejected if _fits(each))]
    crossing = [each for each in layouts if _spans(each.tp_size, nodes)]
    inside = [each for each in layouts if not _spans(each.tp_size, nodes)]
    if not crossing or not inside:
        what = "tensor parallelism" if crossing else "stages"
        yield f"only {what} can cross the links between the nodes: the model fits in no other way"
        return
    across = min(crossing, key=lambda each: each.seconds(placement))
    staged = min(inside, key=lambda each: each.seconds(placement))
    stages_win = staged.seconds(placement) <= across.seconds(placement)
    best, other = (staged, across) if stages_win else (across, staged)
    yield (
        f"{'stages' if stages_win else 'tensor parallelism'} should cross the links between the nodes: with "
        f"{best.flags} {_words(best)}; with {other.flags} {_words(other)}"
    )
    yield _how(best, chosen)


def _how(best: _Layout, chosen: _Layout) -> str:
    if best == chosen:
        return "these settings give that already"
    return (
        f"to have it so, start the head with {best.flags} (TPDIST_TENSOR_PARALLEL_SIZE={best.tp_size} "
        f"MISTRALRS_PIPELINE_PARALLEL={best.pp_size})"
    )


def _words(layout: _Layout) -> str:
    return (
        f"a token of one sequence takes {1000 * layout.latency_s:.3g} ms and a step of the slowest stage "
        f"{1000 * layout.slowest_stage_s:.3g} ms"
    )


def _of(candidate: Candidate) -> _Layout:
    return _Layout(candidate.tp_size, candidate.pp_size, candidate.latency_s, candidate.slowest_stage_s)


def _fits(candidate: Candidate) -> bool:
    return candidate.shortfall_bytes == 0 and math.isfinite(candidate.latency_s) and bool(candidate.stage_layers)


def _spans(tp_size: int, nodes: Sequence[str]) -> bool:
    """Whether a tensor-parallel group has ranks of several nodes; groups are runs of `tp_size` ranks."""
    return any(len(set(nodes[start : start + tp_size])) > 1 for start in range(0, len(nodes), tp_size))


# -- file -------------------------------------------------------------------------------------------------------------


def inventory_text(examination: Examination) -> str:
    """All nodes that were examined, their devices, and the links between them, as TOML."""
    parts = ["# Made by `tpdist doctor`: nodes as they were found, links as they were measured."]
    for node in examination.nodes:
        if node.findings is not None and node.findings.probe is not None:
            name = node_id(node.register.worker_id)
            parts.append(_node_text(name, node.register.hostname, probed_devices(node.findings.probe, node=name)))
    for pair, link in measured_links(examination).items():
        parts.append(
            f'[[link]]\nbetween = ["{pair[0]}", "{pair[1]}"]\nbandwidth = "{link.bandwidth / 1e6:.3f}MB/s"\n'
            f'latency = "{link.latency_s * 1e6:.3f}us"'
        )
    return "\n\n".join(parts) + "\n"


def _node_text(name: str, hostname: str, devices: Sequence[Device]) -> str:
    rows = [
        f'    {{ kind = "{device.kind}", memory = {device.total_bytes}, free = {device.free_bytes}, '
        f'bandwidth = "{device.bandwidth / 1e9:.3f}GB/s" }},'
        for device in devices
    ]
    return "\n".join((f'[[node]]  # {hostname}\nname = "{name}"\ndevices = [', *rows, "]"))
