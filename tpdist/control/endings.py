"""How a cluster ends: who is told, in which order, and who is waited for. Pure.

The first cause sets the outcome, (exit code, cause); nothing changes it, and every node that the head knows hears it.
"""

from dataclasses import replace

from tpdist.control import deadlines
from tpdist.control.events import Action, Answer, Publish, Send
from tpdist.control.messages import DrainRequest, Goodbye, Message, Register, Rejoin, Shutdown
from tpdist.control.state import Node, Rules, State
from tpdist.errors import InterruptedByUser, LostError, TpdistError

GOODBYE_GRACE_S = 5.0
MAX_EXIT_CODE = 255


def drain(state: State, request: DrainRequest, now: float) -> Answer:
    """Finish what runs, then end; at once if asked to, or if there is nothing to finish yet."""
    if state.phase == "draining" and not request.immediate:
        return state, ()
    if request.immediate or state.phase != "ready":
        code = request.exit_code if 0 <= request.exit_code <= MAX_EXIT_CODE else TpdistError.exit_code
        return end(state, code, request.reason, now)
    return replace(state, phase="draining", phase_since=now, draining_reason=request.reason), (Publish(),)


def end(state: State, exit_code: int, cause: str, now: float) -> Answer:
    """Tell everybody; after the first cause nothing happens here."""
    if state.outcome is not None:
        return state, ()
    outcome = (exit_code, cause)
    state = replace(state, phase="ended", phase_since=now, outcome=outcome)
    everybody = (*state.nodes.values(), *state.standbys.values())
    told = (Send(node.register.instance, _shutdown(outcome)) for node in everybody if not node.gone)
    return state, (Publish(), *told)


def tell_the_end(state: State, register: Register, now: float, *, known_place: bool) -> Answer:
    """A node that comes too late hears how it ended. It is waited for if the cluster had a place for it."""
    assert state.outcome is not None
    told = Send(register.instance, _shutdown(state.outcome))
    if known_place and register.worker_id not in state.nodes and register.instance not in state.members:
        state = state.admit(register.worker_id, Node(register, last_seen=now, seen_at=state.ticks))
    return state, (told,)


def answer_stranger(state: State, instance: str, body: Message) -> tuple[Action, ...]:
    """An instance that has lost its place must not believe that all is well."""
    if isinstance(body, Goodbye):
        return ()
    if state.outcome is not None:
        return (Send(instance, _shutdown(state.outcome)),)
    return (dismissal(instance, "it is not, or no longer, a node of this cluster"),)


def dismissal(instance: str, why: str) -> Send:
    return Send(instance, Rejoin(reason=why))


def waits_for_goodbyes(state: State, now: float, rules: Rules) -> bool:
    """Whether somebody who can still be told, or tell, is awaited. After a failure that includes nodes that have not
    come yet, so that they hear of it instead of waiting for a head that has gone."""
    if now - state.phase_since > GOODBYE_GRACE_S:
        return False
    assert state.outcome is not None
    failed = state.outcome[0] not in (0, InterruptedByUser.exit_code)
    if failed and len(state.nodes) < len(rules.keys):
        return True
    everybody = (*state.nodes.values(), *state.standbys.values())
    return any(not node.gone and not deadlines.is_silent(state, node, now, rules) for node in everybody)


def _shutdown(outcome: tuple[int, str]) -> Shutdown:
    return Shutdown(exit_code=outcome[0], cause=outcome[1])


def failure(exit_code: int) -> int:
    """The exit code of something that ended although nobody asked it to."""
    return exit_code if 0 < exit_code <= MAX_EXIT_CODE else LostError.exit_code
