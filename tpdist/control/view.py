"""The cluster as people and other nodes see it: /v1/cluster, `tpdist status`, /readyz. Pure."""

from tpdist.control.messages import ClusterState, EngineStats, NodeView, RankUpdate, RankView
from tpdist.control.state import Node, State, node_id
from tpdist.errors import InterruptedByUser


def view(state: State, now: float, *, stats: EngineStats) -> ClusterState:
    """What every node is told of the cluster."""
    return ClusterState(
        state=_state_name(state),
        reason=_reason(state),
        epoch=state.epoch,
        phase=state.phase,
        nodes=tuple(_node_view(state, node, now) for node in state.ordered),
        plan=state.layout.plan if state.layout else {},
        engine=state.engine,
        stats=stats,
    )


def _state_name(state: State) -> str:
    if state.outcome is not None:
        return "draining" if state.outcome[0] in (0, InterruptedByUser.exit_code) else "failed"
    return state.phase if state.phase in ("ready", "draining") else "starting"


def _reason(state: State) -> str:
    if state.outcome is not None:
        return state.outcome[1]
    if state.phase == "draining":
        return state.draining_reason
    return "" if state.phase == "ready" else f"phase {state.phase}"


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
        ranks=tuple(_rank_view(update, first_rank=first_rank) for _, update in sorted(node.ranks.items())),
    )


def _node_state(node: Node) -> str:
    if node.gone:
        return "gone"
    ready = bool(node.ranks) and all(update.phase == "ready" for update in node.ranks.values())
    return "ready" if ready else "starting"


def _rank_view(update: RankUpdate, *, first_rank: int) -> RankView:
    return RankView(
        rank=update.rank,
        local_rank=update.rank - first_rank,
        pid=update.pid,
        device=update.device,
        state=update.phase,
        step=update.step,
        weight_bytes=update.weight_bytes,
        kv_blocks=update.kv_blocks,
        held=update.held,
    )
