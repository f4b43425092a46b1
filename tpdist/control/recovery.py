"""From a failure to the next epoch: the ranks of all nodes end, lost places are filled, and everything starts again.

    abort     the first failure of an epoch ends it everywhere; the restart budget decides whether there is another
    recover   the nodes that are left kill their ranks, each says so
    register  the nodes that are left wait for those that are lost, or for standbys in their place

Pure, like everything that membership.advance calls.
"""

from dataclasses import replace
from typing import Any

from tpdist.control import deadlines
from tpdist.control.endings import dismissal, end
from tpdist.control.events import Action, Answer, Publish, Send, after
from tpdist.control.joining import gather
from tpdist.control.messages import EndEpoch
from tpdist.control.state import RANK_PHASES, Failure, Key, Node, Restart, Rules, State, promoted
from tpdist.errors import LostError

RESTART_WINDOW_S = 3600.0
NUM_KEPT = 20


def abort(state: State, failure: Failure, now: float, rules: Rules) -> Answer:
    """End the epoch on all nodes because of its first failure; the cluster too if it may not be restarted."""
    if state.phase in ("recover", "ended"):
        return state, ()
    recent = [restart for restart in state.restarts if now - restart.at < RESTART_WINDOW_S]
    if state.phase == "draining" or _is_of_head(state, failure) or len(recent) >= rules.max_restarts:
        code = LostError.exit_code if recent else failure.exit_code
        return end(state, code, _with_history(failure, recent, rules), now)
    restart = Restart(epoch=state.epoch, failure=failure, at=now)
    left, actions = _without(state, failure.instance, failure.cause)
    running = state.phase in RANK_PHASES
    anew: dict[str, Any] = {"ranks": {}, "updated_at": {}, "paces": {}, "ended": not running}
    nodes = {key: replace(node, has_run=node.has_run or running, **anew) for key, node in left.nodes.items()}
    aborted = replace(
        left,
        phase="recover",
        phase_since=now,
        nodes=nodes,
        num_ranks_at=(0,) * len(RANK_PHASES),
        layout=None,
        engine=None,
        suspect=None,
        startup_s={},
        restarts=_kept((*state.restarts, restart), now, rules),
        aborts={**state.aborts, failure.reason: state.aborts.get(failure.reason, 0) + 1},
    )
    told = [Send(instance, EndEpoch(cause=failure.cause)) for instance in aborted.members] if running else []
    return after((*actions, *told, Publish()), proceed(aborted, now, rules))


def on_epoch_ended(state: State, key: Key, now: float, rules: Rules) -> Answer:
    """A node has no rank left."""
    if state.phase != "recover":
        return state, ()
    state = state.update(key, replace(state.nodes[key], ended=True))
    if not all(node.ended for node in state.nodes.values()):
        return state, ()  # who is lost meanwhile is found with the next tick
    return proceed(state, now, rules)


def proceed(state: State, now: float, rules: Rules) -> Answer:
    """Leave phase recover once no node has ranks any more. One that goes meanwhile, or does not end them, is lost."""
    actions: list[Action] = []
    for node in list(state.nodes.values()):
        if not (why := _why_lost(state, node, now, rules)):
            continue
        if node.register.worker_id is None:
            return after(actions, end(state, LostError.exit_code, f"{node.where} {why}", now))
        state, more = _without(state, node.register.instance, f"{node.where} {why}")
        actions += [*more, Publish()]
    if not all(node.ended for node in state.nodes.values()):
        return state, tuple(actions)
    nodes = {key: replace(node, ended=False) for key, node in state.nodes.items()}
    state = replace(state.enter("register", now), nodes=nodes)
    return after((*actions, Publish()), refill(state, now, rules))


def refill(state: State, now: float, rules: Rules) -> Answer:
    """In phase register: places whose nodes have gone are free, standbys take them, and the ranks may be dealt."""
    actions: list[Action] = []
    for key, node in list(state.nodes.items()):
        if key is not None and state.restarts and deadlines.is_silent(state, node, now, rules):
            state, more = _without(state, node.register.instance, f"{node.where} has fallen silent")
            actions += [*more, Publish()]
    if state.restarts:
        state, promotions = _promote(state, now, rules)
        actions += promotions
    return after(actions, gather(state, now, rules))


def _promote(state: State, now: float, rules: Rules) -> tuple[State, list[Action]]:
    """Standbys take free places, in the order in which they came."""
    actions: list[Action] = []
    for key in [key for key in rules.keys if key not in state.nodes]:
        usable = (node for node in state.standbys.values() if _is_usable(state, node, now, rules))
        if (node := next(usable, None)) is not None:
            state = state.without_standby(node.register.instance).admit(key, promoted(node, key))
            actions.append(Publish())
    return state, actions


def without_silent_standbys(state: State, now: float, rules: Rules) -> State:
    standbys = {
        instance: node for instance, node in state.standbys.items() if not deadlines.is_silent(state, node, now, rules)
    }
    return state if len(standbys) == len(state.standbys) else replace(state, standbys=standbys)


def _is_usable(state: State, standby: Node, now: float, rules: Rules) -> bool:
    """One that differs from the head is no standby any more as soon as that is known."""
    return standby.fingerprint is not None and not deadlines.is_silent(state, standby, now, rules)


def _why_lost(state: State, node: Node, now: float, rules: Rules) -> str:
    """Why a node cannot be waited for in phase recover, or nothing."""
    if deadlines.is_silent(state, node, now, rules):
        return "fell silent while its ranks were ended"
    if not node.ended and now - state.phase_since > deadlines.ENDING_LIMIT_S:
        return f"did not end its ranks within {deadlines.ENDING_LIMIT_S:g} s"
    return ""


def _without(state: State, instance: str | None, why: str) -> tuple[State, tuple[Action, ...]]:
    """A node loses its place. If it still lives, it hears so and may come again."""
    if instance is None or instance not in state.members:
        return state, ()
    return state.dismiss(state.members[instance]), (dismissal(instance, why),)


def _kept(restarts: tuple[Restart, ...], now: float, rules: Rules) -> tuple[Restart, ...]:
    """Those that count against the budget, the last few in any case; of all but the last the cause's first line."""
    recent = [restart for restart in restarts if now - restart.at < RESTART_WINDOW_S][-rules.max_restarts :]
    kept = recent if len(recent) >= NUM_KEPT else restarts[-NUM_KEPT:]
    return (*(_in_short(restart) for restart in kept[:-1]), kept[-1])


def _in_short(restart: Restart) -> Restart:
    return replace(restart, failure=replace(restart.failure, cause=restart.failure.headline))


def _is_of_head(state: State, failure: Failure) -> bool:
    """Without the head's own node there is nobody to go on."""
    return failure.instance is not None and state.members.get(failure.instance, 0) is None


def _with_history(failure: Failure, recent: list[Restart], rules: Rules) -> str:
    if not recent:
        return failure.cause
    earlier = "\n".join(f"  epoch {restart.epoch}: {restart.failure.headline}" for restart in recent)
    return (
        f"{failure.cause}\nno restart is left: {len(recent)} in the last hour "
        f"(TPDIST_MAX_RESTARTS={rules.max_restarts}):\n{earlier}"
    )
