"""How nodes come in: registration, replacement, fingerprints, and the moment at which all ranks are dealt. Pure."""

from collections.abc import Iterable
from dataclasses import replace

import msgspec

from tpdist.control import compare, deadlines
from tpdist.control.endings import dismissal, end, tell_the_end
from tpdist.control.events import Action, Answer, Publish, Send, after
from tpdist.control.messages import Fingerprint, Register, Shutdown, Wait, Welcome
from tpdist.control.state import Key, Node, NodeFacts, Rules, State, name_of, where
from tpdist.errors import JoinError, TpdistError


def on_register(state: State, register: Register, now: float, rules: Rules) -> Answer:
    """A node says who it is: it gets a place, waits for one, or hears why it cannot have any."""
    key = register.worker_id
    problem = _mismatch(register, rules)
    if state.outcome is not None:
        return tell_the_end(state, register, now, known_place=not problem and not register.standby)
    if register.standby:
        return _on_standby(state, register, problem, now, rules)
    if problem:
        return _refuse(state, register, problem, now)
    if register.instance in state.members:
        return _welcome_again(state, register, now, rules)
    holder = state.nodes.get(key)
    if holder is not None and (state.phase != "register" or not deadlines.is_silent(state, holder, now, rules)):
        wait = Wait(reason=_taken(holder, rules))
        return state, (Send(register.instance, wait),)
    state = state.admit(key, Node(register, last_seen=now, seen_at=state.ticks, ended=state.phase == "recover"))
    actions: list[Action] = [_welcome(register, rules), Publish()]
    if holder is not None:
        actions.append(dismissal(holder.register.instance, f"{where(register)} took its place"))
    return after(actions, gather(state, now, rules))


def _on_standby(state: State, register: Register, problem: str, now: float, rules: Rules) -> Answer:
    """A node that waits for a place: it is welcome, and hears at once if it could never have one."""
    instance = register.instance
    if problem:
        return state, (Send(instance, Shutdown(exit_code=JoinError.exit_code, cause=problem)),)
    if instance not in state.members and instance not in state.standbys:
        standby = Node(register, last_seen=now, seen_at=state.ticks)
        state = replace(state, standbys={**state.standbys, instance: standby})
    return state, (_welcome(register, rules), Publish())


def on_standby_fingerprint(state: State, standby: Node, fingerprint: Fingerprint, rules: Rules) -> Answer:
    """A standby says what it is. One that differs ends, alone."""
    known = replace(standby, fingerprint=fingerprint)
    standbys = {**state.standbys, standby.register.instance: known}
    return _without_those_that_differ(replace(state, standbys=standbys), (known,), rules)


def _without_those_that_differ(state: State, nodes: Iterable[Node], rules: Rules) -> Answer:
    """Of `nodes`, members or standbys, those that differ from the head end, each alone, as far as that is known."""
    actions: list[Action] = []
    for node in nodes:
        if problem := _difference(state, node, rules):
            instance, key = node.register.instance, node.register.worker_id
            state = state.dismiss(key) if instance in state.members else state.without_standby(instance)
            actions += [Send(instance, Shutdown(exit_code=JoinError.exit_code, cause=problem)), Publish()]
    return state, tuple(actions)


def _difference(state: State, node: Node, rules: Rules) -> str:
    head = state.nodes.get(None)
    if head is None or node is head or head.fingerprint is None or node.fingerprint is None:
        return ""
    rows = compare.differences({"head": head.fingerprint, node.where: node.fingerprint}, settings=rules.settings)
    return f"this node differs from the head; make these equal:\n{compare.table(rows)}" if rows else ""


def _refuse_newcomers(state: State, nodes: Iterable[Node], error: TpdistError) -> Answer:
    """With those that came for lost nodes no layout is possible: they end, and the others wait for better ones."""
    actions: list[Action] = []
    for node in nodes:
        state = state.dismiss(node.register.worker_id)
        cause = f"this node cannot take the place of the one that was lost: {error}"
        actions.append(Send(node.register.instance, Shutdown(exit_code=error.exit_code, cause=cause)))
    return state, (*actions, Publish())


def _mismatch(register: Register, rules: Rules) -> str:
    """Why this node cannot belong to this cluster, or nothing."""
    key = register.worker_id
    if key not in rules.keys:
        ids = "none" if rules.num_workers == 0 else f"0 to {rules.num_workers - 1}"
        return (
            f"worker id {key} ({register.hostname}, pid {register.pid}) is not in this cluster: "
            f"MISTRALRS_MN_HEAD_NUM_WORKERS={rules.num_workers} on the head allows the ids {ids}"
        )
    is_worker = key is not None or register.standby
    if is_worker and register.global_world_size != rules.global_world_size:
        return (
            f"MISTRALRS_MN_GLOBAL_WORLD_SIZE is {register.global_world_size} on {where(register)} "
            f"and {rules.global_world_size} on the head; set the same number on all nodes"
        )
    return ""


def _welcome_again(state: State, register: Register, now: float, rules: Rules) -> Answer:
    """A node repeats itself until it hears Welcome. An instance keeps the place that it came with."""
    if state.members[register.instance] != register.worker_id:
        return state, ()
    state = state.heard(register.worker_id, now)
    return after((_welcome(register, rules),), gather(state, now, rules))


def _welcome(register: Register, rules: Rules) -> Send:
    return Send(register.instance, Welcome(cluster_id=rules.cluster_id))


def _taken(holder: Node, rules: Rules) -> str:
    register = holder.register
    return (
        f"{name_of(register.worker_id)} is already here ({register.hostname}, pid {register.pid}); this instance takes "
        f"its place if that one goes, or is silent for {rules.node_lost_s:g} s"
    )


def _refuse(state: State, register: Register, cause: str, now: float) -> Answer:
    """Before anything has run a wrong node ends everybody, so that nobody waits; later it ends itself alone."""
    shutdown = Send(register.instance, Shutdown(exit_code=JoinError.exit_code, cause=cause))
    if state.restarts or state.phase not in ("register", "compare"):
        return state, (shutdown,)
    return after((shutdown,), end(state, JoinError.exit_code, cause, now))


def on_fingerprint(state: State, key: Key, fingerprint: Fingerprint, now: float, rules: Rules) -> Answer:
    """A node says what it is."""
    state = state.update(key, replace(state.nodes[key], fingerprint=fingerprint))
    if key is not None:
        return _compare(state, now, rules)
    state, actions = _without_those_that_differ(state, state.standbys.values(), rules)
    return after(actions, _compare(state, now, rules))


def gather(state: State, now: float, rules: Rules) -> Answer:
    """Leave phase register once every place is held by a node that lives."""
    if state.phase != "register" or len(state.nodes) < len(rules.keys):
        return state, ()
    if any(deadlines.is_silent(state, node, now, rules) for node in state.nodes.values()):
        return state, ()
    state = state.enter("compare", now)
    return after((Publish(),), _compare(state, now, rules))


def _compare(state: State, now: float, rules: Rules) -> Answer:
    """Leave phase compare once every fingerprint is here: with ranks for everybody, or with the reason why not."""
    if state.phase != "compare" or any(node.fingerprint is None for node in state.nodes.values()):
        return state, ()
    ordered = state.ordered
    facts = [NodeFacts(node.register, node.fingerprint) for node in ordered if node.fingerprint is not None]
    fingerprints = {name_of(fact.register.worker_id): fact.fingerprint for fact in facts}
    rows = compare.differences(fingerprints, settings=rules.settings)
    if rows and state.restarts:
        # Who came for a lost node and is not like it; the others wait for another.
        return _without_those_that_differ(state.enter("register", now), ordered, rules)
    if rows:
        cause = f"the nodes disagree; make these equal on all of them:\n{compare.table(rows)}"
        return end(state, JoinError.exit_code, cause, now)
    try:
        layout = rules.plan(facts)
    except TpdistError as error:
        newcomers = [node for node in ordered if node.register.worker_id is not None and not node.has_run]
        if newcomers and any(node.has_run for node in ordered):
            return _refuse_newcomers(state.enter("register", now), newcomers, error)
        return end(state, error.exit_code, str(error), now)
    epoch = state.epoch + 1
    life = {"cluster_id": rules.cluster_id, "epoch": epoch}
    assigns = tuple(msgspec.structs.replace(assign, **life) for assign in layout.assigns)
    state = replace(state.enter("start", now), epoch=epoch, layout=replace(layout, assigns=assigns))
    sends = (Send(node.register.instance, assign) for node, assign in zip(ordered, assigns, strict=True))
    return state, (*sends, Publish())
