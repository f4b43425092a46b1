"""What the findings of all nodes mean: a line for each check, green or red, and what to do about each red one. Pure.

Exit code 5 for a node or a way that is missing, or a node that disagrees.
"""

from collections.abc import Iterator

from tpdist.control.compare import differences
from tpdist.control.layout import node_sizes
from tpdist.control.route import is_loopback
from tpdist.control.state import name_of
from tpdist.errors import JoinError
from tpdist.preflight.examine import facts_of, fingerprint_of
from tpdist.preflight.machine_verdicts import SKIPPED, green, node_lines, num_gpus, rate, red, seconds, where
from tpdist.preflight.words import (
    Examination,
    Failed,
    HeadUnreached,
    Line,
    LinkFigures,
    LinkMeasured,
    NodeExamined,
    ReduceFigures,
    ReduceMeasured,
)

MAX_SKEW_S = 1.0
MIN_BANDWIDTH = 10e6
"""Less than a hundred megabit a second is a broken link, or not the network that was meant."""
MAX_LATENCY_S = 20e-3
PORTS = "all TCP ports that programs get (`sysctl net.ipv4.ip_local_port_range`)"


def diagnose(examination: Examination) -> tuple[Line, ...]:
    """All lines, machine by machine, then what is between them."""
    return (
        *(
            line
            for node in examination.nodes
            for line in node_lines(node, _place(node, examination), device=examination.device)
        ),
        *_head_lines(examination),
        *_missing_lines(examination),
        *_agreement_lines(examination),
        *_clock_lines(examination),
        *(link_line(link, examination) for link in examination.links),
        *(reduce_line(reduce, examination) for reduce in examination.reduces),
        *_skipped_lines(examination),
    )


def _place(node: NodeExamined, examination: Examination) -> str:
    """A machine that is examined alone has no part in a cluster."""
    alone = not examination.control and examination.unreached is None
    return node.register.hostname if alone else where(node)


# -- who came ---------------------------------------------------------------------------------------------------------


def _head_lines(examination: Examination) -> Iterator[Line]:
    """How each worker reaches the head, or why it does not."""
    if examination.unreached is not None:
        yield unreached_line(examination.unreached, examination.nodes[0])
        return
    if examination.control:
        found = f"listening on {examination.control}{'' if examination.has_key else ', without a key'}"
        yield green("control port", where(examination.nodes[0]), found)
    for node in examination.nodes[1:]:
        register = node.register
        found = f"{register.address} ({register.interface or 'no interface'}) to {register.head_address}"
        if register.interface is None:
            step = "`ip route get` and `ip address` there: the address on the route to the head is of no interface"
            yield red("route to head", where(node), found, step, JoinError.exit_code)
        else:
            yield green("route to head", where(node), found)


def unreached_line(unreached: HeadUnreached, node: NodeExamined) -> Line:
    """Why a worker does not reach its head."""
    check = "way to head"
    names = ", ".join(unreached.addresses)
    if unreached.heard:
        found = f"the head's doctor at {unreached.host}:{unreached.port} fell silent for {unreached.waited_s:g} s"
        step = f"see what it prints there, and whether the link holds (`ping {unreached.host}`); then start both again"
    elif not unreached.addresses:
        found = f"the name {unreached.host} cannot be resolved: {unreached.problem}"
        step = "write the head's IP address into MISTRALRS_MN_WORKER_SERVER_ADDR, or its name into /etc/hosts or DNS"
    elif all(is_loopback(each) for each in unreached.addresses) and unreached.host not in unreached.addresses:
        found = f"the head's name {unreached.host} stands for {names}, which is this machine, and no head is here"
        step = "correct it in /etc/hosts, or write the head's IP address into MISTRALRS_MN_WORKER_SERVER_ADDR"
    elif not unreached.routed:
        check = "route to head"
        found = f"{node.register.hostname} has no route to {_named(unreached)}: {unreached.problem}"
        step = (
            f"`ip route get {unreached.addresses[0]}` and `ip address` there: add a route to it, remove one that is a "
            "blackhole, or bring the interface up"
        )
    elif unreached.problem:
        found = f"{node.register.hostname} to {_named(unreached)}, port {unreached.port}: {unreached.problem}"
        step = (
            f"start `tpdist doctor` on the head, and open TCP port {unreached.port} of the head for "
            f"{node.register.address or node.register.hostname}; a head without a key listens on 127.0.0.1 only"
        )
    else:
        address = f"{unreached.host}:{unreached.port}"
        found = f"a connection to {address} comes about, but no doctor answered within {unreached.waited_s:g} s"
        step = (
            "start `tpdist doctor` on the head, too (not `tpdist serve`), and see that TPDIST_KEY_FILE holds the same "
            "key on both: `sha256sum` it"
        )
    return red(check, where(node), found, step, JoinError.exit_code)


def _named(unreached: HeadUnreached) -> str:
    """The head's address, behind its name if that is another."""
    if unreached.host in unreached.addresses:
        return unreached.host
    return f"{unreached.host} ({', '.join(unreached.addresses)})"


def _missing_lines(examination: Examination) -> Iterator[Line]:
    for worker_id in examination.missing:
        step = (
            f"start `tpdist doctor` there with MISTRALRS_MN_WORKER_ID={worker_id}, and look at what it prints: it "
            f"names what stands between it and {examination.control or 'the head'}"
        )
        if examination.local_only:
            step += "; the head has no TPDIST_KEY_FILE, so that other machines do not reach it"
        found = f"did not come within {examination.waited_s:g} s"
        yield red("node", name_of(worker_id), found, step, JoinError.exit_code)


def _agreement_lines(examination: Examination) -> Iterator[Line]:
    """Versions, kinds of devices, models and settings that are not the same everywhere, and sizes that do not fit."""
    known = [node for node in examination.nodes if node.findings is not None and node.findings.probe is not None]
    if len(known) < 2 or known[0].register.worker_id is not None:
        return
    names = {("head" if node is known[0] else where(node)): node for node in known}
    fingerprints = {name: fingerprint_of(node) for name, node in names.items()}
    rows = differences(fingerprints, settings={**examination.settings, "device": examination.device})
    for what, cells in rows:
        found = f"{what}: " + ", ".join(f"{name} has {value}" for name, value in cells.items())
        yield red("agreement", "all nodes", found, _same(what), JoinError.exit_code)
    if not rows:
        yield green("agreement", "all nodes", "versions, kinds of devices, model and settings are the same")
    if not examination.missing and len(known) == len(examination.nodes):
        yield from _size_lines(examination)


def _size_lines(examination: Examination) -> Iterator[Line]:
    """Ranks of each node against those of all."""
    gpus = [num_gpus(node.findings) for node in examination.nodes if node.findings is not None]
    device = "cuda" if examination.device != "cpu" and all(gpus) else "cpu"
    try:
        sizes = node_sizes(facts_of(examination.nodes), device=device, global_world_size=examination.global_world_size)
    except JoinError as error:
        step = "correct MISTRALRS_MN_GLOBAL_WORLD_SIZE on all nodes, or MISTRALRS_MN_LOCAL_WORLD_SIZE on some"
        yield red("ranks", "all nodes", str(error), step, JoinError.exit_code)
        return
    counted = ", ".join(
        f"{name_of(node.register.worker_id)} {size}" for node, size in zip(examination.nodes, sizes, strict=True)
    )
    yield green("ranks", "all nodes", f"{sum(sizes)} on {device}: {counted}")


def _same(what: str) -> str:
    if what.startswith("model "):
        return "copy the model from one node to the others: its files differ"
    if what in ("tpdist", "torch", "cuda", "nccl", "python"):
        return f"install the same {what} on all nodes"
    if what == "device":
        return "use nodes with GPUs only, or set TPDIST_DEVICE=cpu on all"
    return "set it on the head alone: it holds on all nodes"


def _clock_lines(examination: Examination) -> Iterator[Line]:
    """How far each worker's clock is from the head's, by the exchange with the shorter way."""
    skews: dict[int, float] = {}
    for link in examination.links:
        if link.source == 0 and isinstance(link.answer, LinkFigures):
            skews[link.target] = link.answer.skew_s
    for index, skew_s in skews.items():
        place = where(examination.nodes[index])
        found = f"{seconds(abs(skew_s))} {'ahead of' if skew_s > 0 else 'behind'} the head's"
        if abs(skew_s) > MAX_SKEW_S:
            step = "start chrony or systemd-timesyncd on both (`timedatectl`): logs cannot be compared else"
            yield red("clock", place, found, step, JoinError.exit_code)
        else:
            yield green("clock", place, found)


def link_line(link: LinkMeasured, examination: Examination) -> Line:
    """One way between two nodes."""
    source, target = examination.nodes[link.source], examination.nodes[link.target]
    place = f"{name_of(source.register.worker_id)} to {name_of(target.register.worker_id)}"
    if isinstance(link.answer, Failed):
        found = f"{source.register.hostname} to {link.host} port {link.port}: {link.answer.problem}"
        step = f"open {PORTS} of {link.host} for {source.register.address}, both ways"
        return red("link", place, found, step, JoinError.exit_code)
    figures = link.answer
    found = f"{seconds(figures.latency_s)}, {rate(figures.bandwidth)} to {link.host}"
    if figures.bandwidth < MIN_BANDWIDTH or figures.latency_s > MAX_LATENCY_S:
        step = f"see `ethtool` and `ip route get {link.host}`: is this the network that was meant?"
        return red("link", place, found, step, JoinError.exit_code)
    return green("link", place, found)


def reduce_line(reduce: ReduceMeasured, examination: Examination) -> Line:
    """A sum over ranks of one node or of all."""
    place = "all nodes" if len(reduce.nodes) > 1 else _place(examination.nodes[reduce.nodes[0]], examination)
    check = f"{reduce.backend} all-reduce"
    failed = [
        (node, answer) for node, answer in zip(reduce.nodes, reduce.answers, strict=False) if isinstance(answer, Failed)
    ]
    if failed:
        node, answer = failed[0]
        found = f"{where(examination.nodes[node])}: {answer.problem}"
        return red(check, place, found, _reduce_step(reduce), JoinError.exit_code)
    figures = [each for each in reduce.answers if isinstance(each, ReduceFigures)]
    small_s, large_s = max(each.small_s for each in figures), max(each.large_s for each in figures)
    return green(check, place, f"{reduce.world_size} ranks: 16 KiB in {seconds(small_s)}, 4 MiB in {seconds(large_s)}")


def _reduce_step(reduce: ReduceMeasured) -> str:
    if len(reduce.nodes) == 1:
        return "see whether loopback works (`ping 127.0.0.1`), and run with NCCL_DEBUG=INFO if it is NCCL"
    variable = "NCCL_SOCKET_IFNAME" if reduce.backend == "nccl" else "GLOO_SOCKET_IFNAME"
    more = ", and run with NCCL_DEBUG=INFO" if reduce.backend == "nccl" else ""
    return f"open {PORTS} between the nodes; leave {variable} unset, or name the interface of the cluster{more}"


def _skipped_lines(examination: Examination) -> Iterator[Line]:
    if examination.reduces or examination.unreached is not None:
        return
    broken = any(isinstance(link.answer, Failed) for link in examination.links)
    found = "not tried, because a link is broken" if broken else "not tried, because no other node came"
    yield Line(check="gloo all-reduce", where="all nodes", state=SKIPPED, found=found)
