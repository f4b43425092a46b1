"""The head's examination of the nodes that came: every link both ways, then sums over all nodes.

Knows nothing of sockets: a node is somebody who can be asked to do a work. What the answers mean is for verdicts.py.
"""

import asyncio
import secrets
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from tpdist.control.layout import HeadAddress, head_address
from tpdist.control.messages import Fingerprint, ProbeReport, Register
from tpdist.control.route import is_loopback
from tpdist.control.state import NodeFacts
from tpdist.preflight.link import TOKEN_BYTES
from tpdist.preflight.words import (
    Answer,
    Failed,
    LinkFigures,
    LinkMeasured,
    Listen,
    NodeExamined,
    Port,
    Reach,
    Reduce,
    ReduceFigures,
    ReduceMeasured,
    Work,
)

LISTEN_S = 15.0
REACH_S = 60.0
REDUCE_S = 30.0
REDUCE_REPLY_S = 60.0


class Colleague(Protocol):
    """A node that can be asked for work. It answers within `timeout_s`; if it cannot, the answer is Failed."""

    async def ask(self, work: Work, *, timeout_s: float) -> Answer: ...


def facts_of(nodes: Sequence[NodeExamined]) -> list[NodeFacts]:
    """As the planner and the layout know nodes; only for nodes whose probe succeeded, or where no probe is needed."""
    return [NodeFacts(node.register, fingerprint_of(node)) for node in nodes]


def fingerprint_of(node: NodeExamined) -> Fingerprint:
    """What must agree between nodes. Without a probe nothing is known of the machine."""
    findings = node.findings
    probe = findings.probe if findings is not None else None
    model = findings.model if findings is not None else None
    return Fingerprint(
        instance=node.register.instance,
        probe=probe or _unknown(node.register.hostname),
        model=dict(model.digests) if model is not None else {},
        explicit=dict(findings.explicit) if findings is not None else {},
    )


def _unknown(hostname: str) -> ProbeReport:
    return ProbeReport(
        hostname=hostname,
        host_id=hostname,
        num_cpus=1,
        memory_bytes=0,
        available_bytes=0,
        python="",
        tpdist="",
        torch=None,
        cuda=None,
        nccl=None,
        driver=None,
        devices=(),
    )


# -- links ------------------------------------------------------------------------------------------------------------


def rounds(num_nodes: int) -> Iterator[list[tuple[int, int]]]:
    """All ordered pairs of nodes, in rounds in which no node is in two pairs: what one measures does not disturb
    another. (A round-robin tournament by the circle method, each round there and back.)"""
    places = list(range(num_nodes + num_nodes % 2))
    for _ in range(len(places) - 1):
        half = len(places) // 2
        pairs = zip(places[:half], places[: half - 1 : -1], strict=True)
        met = [pair for pair in pairs if max(pair) < num_nodes]
        yield met
        yield [(second, first) for first, second in met]
        places = [places[0], places[-1], *places[1:-1]]


async def measure_links(
    colleagues: Sequence[Colleague], registers: Sequence[Register], head: HeadAddress
) -> list[LinkMeasured]:
    """Every way between two nodes, in the order of nodes. A node that cannot listen fails the ways to it."""
    token = secrets.token_bytes(TOKEN_BYTES)
    hosts = [_bind_host(register, head) for register in registers]
    asked = (
        each.ask(Listen(host=host, token=token), timeout_s=LISTEN_S)
        for each, host in zip(colleagues, hosts, strict=True)
    )
    listening = await asyncio.gather(*asked)
    found: list[LinkMeasured] = []
    for pairs in rounds(len(colleagues)):
        reached = (_measure_link(colleagues, registers, head, listening, token, *pair) for pair in pairs)
        found += await asyncio.gather(*reached)
    return sorted(found, key=lambda link: (link.source, link.target))


async def _measure_link(
    colleagues: Sequence[Colleague],
    registers: Sequence[Register],
    head: HeadAddress,
    listening: Sequence[Answer],
    token: bytes,
    source: int,
    target: int,
) -> LinkMeasured:
    host, opened = _host_towards(registers, head, source, target), listening[target]
    if not isinstance(opened, Port):
        problem = opened.problem if isinstance(opened, Failed) else "it did not open a port"
        return LinkMeasured(source=source, target=target, host=host, port=0, answer=Failed(problem=problem))
    work = Reach(host=host, port=opened.port, token=token)
    answer = await colleagues[source].ask(work, timeout_s=REACH_S)
    if not isinstance(answer, LinkFigures | Failed):
        answer = Failed(problem="it answered with something else")
    return LinkMeasured(source=source, target=target, host=host, port=opened.port, answer=answer)


def _bind_host(register: Register, head: HeadAddress) -> str:
    """Where a node listens: on its own way to the head; on the head's machine as rank 0 would."""
    return head.bind_host if is_loopback(register.address) else register.address


def _host_towards(registers: Sequence[Register], head: HeadAddress, source: int, target: int) -> str:
    """The address of `target` as `source` reaches it; what is on the head's machine has the head's."""
    own = registers[target]
    return (
        head.host_for(facts_of([NodeExamined(register=registers[source], findings=None)])[0])
        if is_loopback(own.address)
        else own.address
    )


# -- sums -------------------------------------------------------------------------------------------------------------


async def measure_reduce(
    colleagues: Sequence[Colleague],
    nodes: Sequence[NodeExamined],
    head: HeadAddress,
    *,
    backend: str,
    num_ranks: Sequence[int],
    open_store: Callable[[str], int],
) -> ReduceMeasured:
    """An all-reduce over all nodes, with `num_ranks` of each. `open_store` listens on an address of the head's and
    returns the port, or raises OSError."""
    world_size = sum(num_ranks)
    everybody = tuple(range(len(nodes)))
    try:
        port = open_store(head.bind_host)
    except OSError as error:
        problem = Failed(problem=f"cannot listen on {head.bind_host} for the store: {error.strerror or error}")
        return ReduceMeasured(backend=backend, world_size=world_size, nodes=everybody, answers=(problem,))
    facts = facts_of(nodes)
    works = [
        Reduce(
            backend=backend,
            first_rank=sum(num_ranks[:index]),
            num_ranks=num_ranks[index],
            world_size=world_size,
            host=head.host_for(facts[index]),
            port=port,
            interface=head.interface_for(facts[index]),
            timeout_s=REDUCE_S,
        )
        for index in everybody
    ]
    asked = (each.ask(work, timeout_s=REDUCE_REPLY_S) for each, work in zip(colleagues, works, strict=True))
    answers = tuple(_sum_answer(answer) for answer in await asyncio.gather(*asked))
    return ReduceMeasured(backend=backend, world_size=world_size, nodes=everybody, answers=answers)


def nccl_ranks(nodes: Sequence[NodeExamined]) -> list[int] | None:
    """Ranks of each node for a sum over all GPUs; None where NCCL would not serve: fewer than two, a node without one,
    or several nodes on one machine."""
    probes = [node.findings.probe for node in nodes if node.findings is not None and node.findings.probe is not None]
    counts = [sum(device.kind == "cuda" for device in probe.devices) for probe in probes]
    apart = len({probe.host_id for probe in probes}) == len(nodes)
    return counts if apart and all(counts) and sum(counts) > 1 else None


def make_head_address(nodes: Sequence[NodeExamined], local_interface: Callable[[str], str | None]) -> HeadAddress:
    """Where the head listens for ranks, as it will when it serves."""
    return head_address(facts_of(nodes), local_interface)


def _sum_answer(answer: Answer) -> ReduceFigures | Failed:
    if isinstance(answer, ReduceFigures | Failed):
        return answer
    return Failed(problem="it answered with something else")
