"""What has taken too long: phases and silent nodes. Pure; time is an argument.

A node counts as silent only after the head has ticked a few times without hearing it. A head that was itself stopped
(a suspended machine, a stalled event loop) thus reads what waits in its sockets before it calls anybody lost; and what
it has not seen advance meanwhile is given its time anew (`forgive`).
"""

from collections.abc import Iterator
from dataclasses import replace

from tpdist.control.events import Tick
from tpdist.control.messages import RankProgress, RankUpdate
from tpdist.control.state import RANK_PHASES, RUNNING, SERVING, Failure, Key, Node, RankPace, Rules, State, name_of
from tpdist.errors import LostError

SILENT_TICKS = 4
ENDING_LIMIT_S = 20.0
SECONDARY_GRACE_HEARTBEATS = 3
MIN_SECONDARY_GRACE_S = 2.0
MAX_LINES = 32


def expired(state: State, now: float, rules: Rules) -> str:
    """Why the current phase has taken too long, or nothing."""
    if state.phase in (*SERVING, "recover", "ended"):
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


def lost(state: State, now: float, rules: Rules) -> Failure | None:
    """A node that has been silent for too long, or a rank's broken collective whose grace is over.

    In phase register nobody is lost: a node that has gone may be started again. A node that died with its ranks has
    been silent for about as long as its peers' collectives have been broken; its last heartbeat may have come after
    their report.
    """
    if state.phase in ("register", "recover", "ended"):
        return None
    silent = max(state.nodes.values(), key=lambda node: silence_s(state, node, now))
    silent_s = silence_s(state, silent, now)
    instance = silent.register.instance
    if silent_s > rules.node_lost_s:
        cause = f"{silent.where} has not been heard for {silent_s:.1f} s (TPDIST_NODE_LOST_S={rules.node_lost_s:g})"
        return Failure("node_lost", cause, LostError.exit_code, instance=instance)
    if state.suspect is None:
        return None
    grace_s = _grace_s(rules)
    since, _, cause = state.suspect
    if now - since < grace_s:
        return None
    if silent_s > grace_s - rules.heartbeat_interval_s:
        cause = f"{silent.where} was lost: not heard for {silent_s:.1f} s, and its peers' collectives failed\n  {cause}"
        return Failure("node_lost", cause, LostError.exit_code, instance=instance)
    return Failure("rank_lost", cause, LostError.exit_code)


def hanging(state: State, tick: Tick, now: float, rules: Rules) -> Failure | None:
    """A rank whose process has been stopped for too long, or that reads its weights and gets none; or requests wait,
    and neither outputs nor any rank's progress have been seen for too long."""
    if state.layout is None or state.phase not in RUNNING:
        return None
    if state.phase == "load" and (failure := _starving(state, now, rules)):
        return failure
    for node, pace in _paces(state):
        if pace.stopped_at is not None and now - pace.stopped_at > rules.node_lost_s:
            rank, process = pace.progress.rank, pace.progress.process
            cause = (
                f"rank {rank} on {node.where_is(rank)} has been stopped for {now - pace.stopped_at:.1f} s (its process "
                f"is in state {process}; TPDIST_NODE_LOST_S={rules.node_lost_s:g})"
            )
            return Failure("hang", cause, LostError.exit_code)
    idle_s = min(tick.stalled_s, now - state.advanced_at)
    if state.phase not in SERVING or idle_s <= rules.hang_timeout_s:
        return None
    cause = (
        f"{tick.in_flight} requests wait, and no rank has advanced for {idle_s:.1f} s "
        f"(TPDIST_HANG_TIMEOUT_S={rules.hang_timeout_s:g}){_furthest_behind(state)}"
    )
    return Failure("hang", cause, LostError.exit_code)


def forgive(state: State, now: float) -> State:
    """The head has stood still, and saw nobody advance: nobody hangs yet."""

    def forgiven(node: Node) -> Node:
        paces = {
            rank: replace(pace, stopped_at=None if pace.stopped_at is None else now)
            for rank, pace in node.paces.items()
        }
        return replace(node, paces=paces, updated_at=dict.fromkeys(node.updated_at, now))

    return replace(state, advanced_at=now, nodes={key: forgiven(node) for key, node in state.nodes.items()})


def _starving(state: State, now: float, rules: Rules) -> Failure | None:
    """A rank that has not read a byte for too long. It reports every piece, of some megabytes."""
    for node in state.nodes.values():
        for rank, update in node.ranks.items():
            waited_s = now - node.updated_at[rank]
            if update.phase == "load" and update.done < update.total and waited_s > rules.hang_timeout_s:
                cause = (
                    f"rank {rank} on {node.where_is(rank)} has read nothing of the checkpoint for {waited_s:.1f} s "
                    f"(TPDIST_HANG_TIMEOUT_S={rules.hang_timeout_s:g}), after {update.done} of {update.total} bytes: "
                    "is its disk, or the file system that it comes from, stuck?"
                )
                return Failure("hang", cause, LostError.exit_code)
    return None


def _furthest_behind(state: State) -> str:
    """The rank that the others wait for. One whose process has been stopped comes first: what its main thread has sent
    may still wait for its other threads. Then the one in the earliest step, or that has not begun the next though
    others have; of several, one that does not itself wait comes before one that does; in a tensor-parallel group that
    waits, the one that has entered the fewest collectives.

    A rank that hangs in the middle of a wait never leaves it, and so enters the next one never. Of stages that wait in
    the same step the first is named: hidden states come from there.
    """
    paces = {pace.progress.rank: (node, pace) for node, pace in _paces(state)}
    if not paces:
        return ""
    tp_size = state.assign_of(None).tp_size

    def place(rank: int) -> tuple[bool, int, bool, bool]:
        pace = paces[rank][1]
        progress = pace.progress
        return pace.stopped_at is None, progress.step, not progress.in_step, progress.waiting

    first = min(paces, key=lambda rank: (*place(rank), rank))
    group = [rank for rank in paces if rank // tp_size == first // tp_size and place(rank) == place(first)]
    node, pace = paces[min(group, key=lambda rank: (paces[rank][1].progress.num_waits, rank))]
    progress = pace.progress
    return (
        f"; furthest behind is rank {progress.rank} on {node.where_is(progress.rank)}, {_doing(progress)}, "
        f"its process in state {progress.process or 'unknown'}"
    )


def _doing(progress: RankProgress) -> str:
    if not progress.in_step:
        return f"after step {progress.step}"
    if progress.waiting:
        return f"in step {progress.step}, in {progress.wait} {progress.num_waits}"
    return f"in step {progress.step}, after {progress.num_waits} collectives"


def _paces(state: State) -> Iterator[tuple[Node, RankPace]]:
    return ((node, pace) for node in state.nodes.values() for pace in node.paces.values())


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
