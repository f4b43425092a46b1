"""The cluster as people and other nodes see it: /v1/cluster, `tpdist status`, /readyz. Pure."""

import msgspec

from tpdist.control.messages import (
    ClusterNews,
    ClusterState,
    EngineStats,
    NodeView,
    RankUpdate,
    RankView,
    RestartView,
)
from tpdist.control.state import SERVING, Node, RankPace, State, node_id
from tpdist.errors import InterruptedByUser

NUM_SHOWN = 20


def view(state: State, now: float, *, stats: EngineStats, retried: int = 0) -> ClusterState:
    """What every node is told of the cluster. `retried`: requests that went on in another epoch."""
    return ClusterState(
        state=_state_name(state),
        reason=_reason(state),
        epoch=state.epoch,
        phase=state.phase,
        nodes=tuple(_node_view(state, node, now) for node in state.ordered),
        standbys=tuple(_standby_view(node, now) for node in state.standbys.values()),
        restarts=tuple(
            RestartView(
                epoch=each.epoch, cause=each.failure.cause, reason=each.failure.reason, age_s=round(now - each.at, 1)
            )
            for each in state.restarts[-NUM_SHOWN:]
        ),
        aborts=dict(state.aborts),
        startup_s={phase: round(seconds, 3) for phase, seconds in state.startup_s.items()},
        retried=retried,
        plan=state.layout.plan if state.layout else {},
        engine=state.engine,
        stats=stats,
    )


def news_of(view: ClusterState) -> ClusterNews:
    """What is in a view besides the nodes and the plan."""
    return ClusterNews(**{name: getattr(view, name) for name in ClusterNews.__struct_fields__})


def with_news(view: ClusterState, news: ClusterNews) -> ClusterState:
    """An earlier view with what is new; its nodes and its plan stay as they were."""
    return msgspec.structs.replace(view, **msgspec.structs.asdict(news))


def _state_name(state: State) -> str:
    if state.outcome is not None:
        return "draining" if state.outcome[0] in (0, InterruptedByUser.exit_code) else "failed"
    if state.phase in SERVING:
        return state.phase
    return "recovering" if state.restarts else "starting"


def _reason(state: State) -> str:
    if state.outcome is not None:
        return state.outcome[1]
    if state.phase == "draining":
        return state.draining_reason
    if state.phase == "ready":
        return ""
    if not state.restarts:
        return f"phase {state.phase}"
    last = state.restarts[-1]
    return f"phase {state.phase}, because epoch {last.epoch} ended: {last.failure.cause}"


def _node_view(state: State, node: Node, now: float) -> NodeView:
    key = node.register.worker_id
    first_rank = state.assign_of(key).first_rank if state.layout else 0
    return NodeView(
        node_id=node_id(key),
        role="head" if key is None else "worker",
        host=node.register.hostname,
        pid=node.register.pid,
        state=_node_state(node),
        last_seen_s=round(now - node.last_seen, 3),
        ranks=tuple(
            _rank_view(update, node.paces.get(rank), now, first_rank=first_rank)
            for rank, update in sorted(node.ranks.items())
        ),
    )


def _standby_view(node: Node, now: float) -> NodeView:
    return NodeView(
        node_id="standby",
        role="standby",
        host=node.register.hostname,
        pid=node.register.pid,
        state="starting" if node.fingerprint is None else "ready",
        last_seen_s=round(now - node.last_seen, 3),
        ranks=(),
    )


def _node_state(node: Node) -> str:
    if node.gone:
        return "gone"
    ready = bool(node.ranks) and all(update.phase == "ready" for update in node.ranks.values())
    return "ready" if ready else "starting"


def _rank_view(update: RankUpdate, pace: RankPace | None, now: float, *, first_rank: int) -> RankView:
    return RankView(
        rank=update.rank,
        local_rank=update.rank - first_rank,
        pid=update.pid,
        device=update.device,
        state=update.phase,
        step=0 if pace is None else pace.progress.step,
        weight_bytes=update.weight_bytes,
        kv_blocks=update.kv_blocks,
        held=update.held,
        step_age_s=0.0 if pace is None else round(now - pace.advanced_at, 3),
        load_bytes=update.done,
        load_s=update.load_s,
    )
