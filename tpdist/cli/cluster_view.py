"""A cluster on the terminal: its state, its ranks as a table, what it works on, and why it restarted.

Shows what a Snapshot says and decides nothing. What the node did not tell is left out.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.styled import Styled
from rich.table import Table
from rich.text import Text

from tpdist.cli.cluster_client import Snapshot
from tpdist.cli.sizes import size

COLUMNS = ("node", "host", "seen", "rank", "device", "state", "step", "weights", "KV blocks")
RATE_COLUMN = "steps/s"
WORDS = ("node", "host", "device", "state")
STYLES = {"ready": "green", "failed": "bold red", "lost": "bold red", "gone": "red", "unreachable": "bold red"}
OTHER_STYLE = "yellow"
USUAL_NODE_STATES = ("ready", "starting")
MOST_RESTARTS = 5


def cluster_view(now: Snapshot, before: Snapshot | None = None) -> RenderableType:
    """All of it. `before` is an earlier snapshot of the same cluster, for the rates of steps."""
    cluster = now.cluster
    rates = None if before is None else step_rates(now, before)
    table = ranks_table(cluster["nodes"], rates=rates)
    return Group(_headline(now), *_lines(now), "", table, "", *_restarts(now))


def silent_view(problem: str, *, since_s: float, last: RenderableType | None) -> RenderableType:
    """A node that does not answer, and what it said last."""
    shown = f"unreachable for {_age(since_s)}" if since_s >= 1 else "unreachable"
    headline = Text.assemble((shown, STYLES["unreachable"]), f": {problem}")
    if last is None:
        return headline
    return Group(headline, Text("what it said last:", style="dim"), Styled(last, "dim"))


def ranks_table(nodes: Sequence[Mapping[str, Any]], *, rates: Mapping[int, float] | None = None) -> Table:
    """One line a rank, in at most 80 columns; a node without ranks shows its own state."""
    columns = [*COLUMNS[:7], *([] if rates is None else [RATE_COLUMN]), *COLUMNS[7:]]
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1 if rates is None else 0, 0, 0))
    for column in columns:
        table.add_column(column, justify="left" if column in WORDS else "right", no_wrap=column not in WORDS)
    for node in nodes:
        seen = _age(node.get("last_seen_s", 0))
        of_node = [str(node.get(key, "-")) for key in ("node_id", "host")] + [seen]
        for rank in node.get("ranks") or [{"state": node.get("state", "-")}]:
            cells = [str(rank.get(key, "-")) for key in ("rank", "device")]
            rate = [] if rates is None else [_rate(rates.get(rank.get("rank", -1)))]
            weights = size(rank["weight_bytes"]) if "weight_bytes" in rank else "-"
            rest = [str(rank.get("step", "-")), *rate, weights, str(rank.get("kv_blocks", "-"))]
            table.add_row(*of_node, *cells, _coloured(_state_of(rank, node)), *rest)
            of_node = [""] * len(of_node)
    return table


def step_rates(now: Snapshot, before: Snapshot) -> dict[int, float]:
    """Steps a second of each rank between two snapshots of one epoch."""
    elapsed_s = now.at_s - before.at_s
    if now.cluster.get("epoch") != before.cluster.get("epoch") or elapsed_s <= 0:
        return {}
    first, last = _steps(before), _steps(now)
    return {rank: max(0, step - first[rank]) / elapsed_s for rank, step in last.items() if rank in first}


def _steps(snapshot: Snapshot) -> dict[int, int]:
    ranks = [rank for node in snapshot.cluster["nodes"] for rank in node.get("ranks", ())]
    return {rank["rank"]: rank["step"] for rank in ranks if "rank" in rank and "step" in rank}


def _headline(now: Snapshot) -> Text:
    cluster = now.cluster
    return Text.assemble(
        _coloured(str(cluster["state"])), f", epoch {cluster.get('epoch')}, phase {cluster.get('phase')}"
    )


def _lines(now: Snapshot) -> Iterator[Text]:
    """Why it is not ready, how many ranks are, and what they work on."""
    if now.reason and now.cluster["state"] != "ready":
        yield Text(now.reason.partition("\n")[0], style=OTHER_STYLE)
    ranks = [rank for node in now.cluster["nodes"] for rank in node.get("ranks", ())]
    metrics = now.metrics
    expected = metrics.get("ranks_expected", len(ranks))
    words = [f"{sum(rank.get('state') == 'ready' for rank in ranks)} of {expected:.0f} ranks ready"]
    if standbys := metrics.get("standbys"):
        words.append(f"{standbys:.0f} standby" + ("s" if standbys > 1 else ""))
    if {"num_requests_running", "num_requests_waiting"} <= metrics.keys():
        running, waiting = metrics["num_requests_running"], metrics["num_requests_waiting"]
        words.append(f"{running:.0f} requests running, {waiting:.0f} waiting")
    if "kv_cache_usage_perc" in metrics:
        words.append(f"KV cache {metrics['kv_cache_usage_perc']:.0%} used")
    yield Text("; ".join(words))


def _restarts(now: Snapshot) -> Iterator[Text]:
    """The last of them, latest last, and that one with all that was said about it."""
    restarts = now.cluster.get("restarts", [])
    if len(restarts) > MOST_RESTARTS:
        yield Text(f"{len(restarts)} epochs ended; the last {MOST_RESTARTS}:")
    for number, restart in enumerate(restarts[-MOST_RESTARTS:], start=1):
        is_last = number == len(restarts[-MOST_RESTARTS:])
        age_s = now.metrics.get("last_epoch_abort_age_seconds") if is_last else None
        ago = "" if age_s is None else f" {_age(age_s)} ago"
        cause, _, rest = str(restart.get("cause")).partition("\n")
        yield Text(f"epoch {restart.get('epoch')} ended{ago}: {cause}")
        if is_last and rest:
            yield Text(rest, style="dim")


def _state_of(rank: Mapping[str, Any], node: Mapping[str, Any]) -> str:
    """The rank's, unless its node is in a worse one."""
    of_node = str(node.get("state", "-"))
    return str(rank.get("state", "-")) if of_node in USUAL_NODE_STATES else of_node


def _coloured(state: str) -> Text:
    return Text(state, style=STYLES.get(state, OTHER_STYLE))


def _rate(steps_per_s: float | None) -> str:
    return "-" if steps_per_s is None else f"{steps_per_s:.1f}"


def _age(seconds: float) -> str:
    """As in 0.5 s, 42 s, 5 min, 3 h."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"
