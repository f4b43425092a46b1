"""How nodes go: with a word, or with a connection that closes. Pure.

A connection that closes ends a node's registration, on both of its ends: what was on its way is lost, and neither side
could tell what that was. A node that lives comes again, as another instance.
"""

from dataclasses import replace

from tpdist.control import endings, recovery
from tpdist.control.events import Answer, Publish, after
from tpdist.control.messages import Goodbye
from tpdist.control.state import Failure, Key, Rules, State
from tpdist.errors import InterruptedByUser, LostError, SettingsError

# What another start would meet again: wrong settings, a model that does not fit, a damaged checkpoint, a disagreement.
LASTING_CODES = range(SettingsError.exit_code, LostError.exit_code)
# A worker that somebody ends while nodes gather may be started again.
HARMLESS_CODES = (0, LostError.exit_code, InterruptedByUser.exit_code)


def on_goodbye(state: State, key: Key, goodbye: Goodbye, now: float, rules: Rules) -> Answer:
    """A node ends. While nodes gather a worker may come back; what ends one for good ends all."""
    node = state.nodes[key]
    cause = f"{node.where} left: {goodbye.cause or 'no reason given'}"
    code = endings.failure(goodbye.exit_code)
    gone = state.update(key, replace(node, gone=True))
    if state.outcome is not None or key is None or goodbye.exit_code in LASTING_CODES:
        return endings.end(gone, code, cause, now)
    if state.phase == "register" and not state.restarts and goodbye.exit_code not in HARMLESS_CODES:
        return endings.end(gone, code, cause, now)
    return _go_on_without(gone, key, Failure("node_lost", cause, code, instance=node.register.instance), now, rules)


def on_hangup(state: State, instance: str, now: float, rules: Rules) -> Answer:
    """A connection of a node has closed."""
    if instance in state.standbys:
        return state.without_standby(instance), (Publish(),)
    if instance not in state.members:
        return state, ()
    key = state.members[instance]
    node = state.nodes[key]
    if state.outcome is not None:
        return state.update(key, replace(node, gone=True)), ()
    cause = f"{node.where} was lost: its connection has closed; was it killed, or its machine restarted?"
    failure = Failure("node_lost", cause, LostError.exit_code, instance=instance)
    if key is None:
        return endings.end(state, LostError.exit_code, cause, now)
    return _go_on_without(state, key, failure, now, rules)


def _go_on_without(state: State, key: Key, failure: Failure, now: float, rules: Rules) -> Answer:
    """Where no rank runs, the place is free; otherwise the epoch is over."""
    if state.phase == "register":
        return after((Publish(),), recovery.refill(state.dismiss(key), now, rules))
    if state.phase == "recover":
        return after((Publish(),), recovery.proceed(state.dismiss(key), now, rules))
    return recovery.abort(state, failure, now, rules)
