"""What has taken too long: phases and silent nodes. Pure; time is an argument.

A node counts as silent only after the head has ticked a few times without hearing it. A head that was itself stopped
(a suspended machine, a stalled event loop) thus reads what waits in its sockets before it calls anybody lost.
"""

from tpdist.control.events import Tick
from tpdist.control.messages import RankUpdate
from tpdist.control.state import RANK_PHASES, Key, Node, Rules, State, name_of

SILENT_TICKS = 4
SECONDARY_GRACE_HEARTBEATS = 3
MIN_SECONDARY_GRACE_S = 2.0
MAX_LINES = 32


def expired(state: State, now: float, rules: Rules) -> str:
    """Why the current phase has taken too long, or nothing."""
    if state.phase in ("ready", "draining", "ended"):
        return ""
    limit_s, setting = _limit(state.phase, rules)
    if now - state.phase_since <= limit_s:
        return ""
    behind = [key for key in rules.keys if _holds_up(state, key, now, rules)]
    others = [key for key in rules.keys if key not in set(behind)]
    lines = [f"  {name_of(key)}: {_last_word(state.nodes.get(key), now)}" for key in [*behind, *others][:MAX_LINES]]
    if len(rules.keys) > MAX_LINES:
        lines.append(f"  and {len(rules.keys) - MAX_LINES} more nodes")
    return "\n".join([f"phase {state.phase} took longer than {limit_s:g} s ({setting} extends it)", *lines])


def lost(state: State, now: float, rules: Rules) -> str:
    """A node that has been silent for too long, or a rank's broken collective whose grace is over; or nothing.

    In phase register nobody is lost: a node that has gone may be started again. A node that died with its ranks has
    been silent for about as long as its peers' collectives have been broken; its last heartbeat may have come after
    their report.
    """
    if state.phase in ("register", "ended"):
        return ""
    silent = max(state.nodes.values(), key=lambda node: silence_s(state, node, now))
    silent_s = silence_s(state, silent, now)
    if silent_s > rules.node_lost_s:
        return f"{silent.where} has not been heard for {silent_s:.1f} s (TPDIST_NODE_LOST_S={rules.node_lost_s:g})"
    if state.suspect is None:
        return ""
    grace_s = _grace_s(rules)
    since, _, cause = state.suspect
    if now - since < grace_s:
        return ""
    if silent_s > grace_s - rules.heartbeat_interval_s:
        return f"{silent.where} was lost: not heard for {silent_s:.1f} s, and its peers' collectives failed\n  {cause}"
    return cause


def stalled(state: State, tick: Tick, rules: Rules) -> str:
    """Requests wait, and the engine has finished no step for too long; or nothing. Of the ranks that are furthest
    behind the lowest is named: the others wait for it.

    A rank that waits in a collective for one that hangs has the same deadline and knows more: its report comes first.
    """
    if state.phase not in ("ready", "draining") or tick.stalled_s <= rules.hang_timeout_s + 2 * _grace_s(rules):
        return ""
    step, rank, where = min(
        (update.step, update.rank, node.where) for node in state.nodes.values() for update in node.ranks.values()
    )
    return (
        f"{tick.in_flight} requests wait, and no step has been finished for {tick.stalled_s:.1f} s "
        f"(TPDIST_HANG_TIMEOUT_S={rules.hang_timeout_s:g}); furthest behind is rank {rank} on {where}, at step {step}"
    )


def silence_s(state: State, node: Node, now: float) -> float:
    """Seconds for which the head has listened and heard nothing from a node."""
    return now - node.last_seen if state.ticks - node.seen_at >= SILENT_TICKS else 0.0


def is_silent(state: State, node: Node, now: float, rules: Rules) -> bool:
    return silence_s(state, node, now) > rules.node_lost_s


def _grace_s(rules: Rules) -> float:
    """How long a rank's report that its peers have gone waits for the first cause."""
    return max(MIN_SECONDARY_GRACE_S, SECONDARY_GRACE_HEARTBEATS * rules.heartbeat_interval_s)


def _limit(phase: str, rules: Rules) -> tuple[float, str]:
    if phase == "register":
        return rules.register_timeout_s, "TPDIST_REGISTER_TIMEOUT_S"
    if phase == "compare":
        return rules.fetch_timeout_s, "TPDIST_FETCH_TIMEOUT_S"
    return rules.load_timeout_s, "TPDIST_LOAD_TIMEOUT_S"


def _holds_up(state: State, key: Key, now: float, rules: Rules) -> bool:
    """Whether this node keeps the cluster in its phase."""
    node = state.nodes.get(key)
    if node is None or is_silent(state, node, now, rules):
        return True
    if state.phase in ("register", "compare"):
        return state.phase == "compare" and node.fingerprint is None
    complete = len(node.ranks) == state.assign_of(key).local_world_size
    furthest = RANK_PHASES.index(state.phase)
    return not complete or any(RANK_PHASES.index(update.phase) <= furthest for update in node.ranks.values())


def _last_word(node: Node | None, now: float) -> str:
    if node is None:
        return "missing: nothing heard from it; is it started, with this head's address and port?"
    word = f"{node.register.hostname} pid {node.register.pid}, heard {now - node.last_seen:.1f} s ago"
    if node.fingerprint is None:
        return f"{word}, registered, no fingerprint yet"
    ranks = ", ".join(f"rank {rank} {_progress(update)}" for rank, update in sorted(node.ranks.items()))
    return f"{word}, {ranks or 'no ranks yet'}"


def _progress(update: RankUpdate) -> str:
    return f"{update.phase} {update.done}/{update.total} bytes" if update.phase == "load" else update.phase
