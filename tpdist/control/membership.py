"""Who is in the cluster, what phase it is in, and what happens next: one pure function.

`advance(state, event, now, rules)` returns the next state and the actions to take; it reads no clock and touches no
socket. The coordinator feeds it what arrives and carries out what it answers.

Phases, each with a deadline that names who is missing:

    register   every node has said who it is
    compare    every node has sent its fingerprint (a hub download may run); the head compares and plans
    start      ranks are processes
    connect    ranks meet
    load       weights
    warmup     first forward
    ready      requests are served
    recover    an epoch was aborted: the ranks of all nodes end; then comes register again, and the next epoch
    draining   no new requests; ends when none is left
    ended      everybody has been told how it ends; waits for their goodbyes

Invariants: within an epoch the phases come in this order, some are skipped, none comes back. The first failure aborts
an epoch, and what comes of it later changes nothing. The first cause sets `outcome`, and nothing changes it. A message
counts only from the instance that holds a place, and a rank's only in its own epoch.
"""

from collections.abc import Iterable
from dataclasses import replace

from tpdist.control import deadlines, endings, joining, leaving, recovery
from tpdist.control.events import Action, Answer, Beats, Event, Finish, Heard, HungUp, Interrupt, Publish, Send, Tick
from tpdist.control.messages import (
    Connect,
    DrainRequest,
    EngineInfo,
    EpochEnded,
    Fingerprint,
    Goodbye,
    Heartbeat,
    Listening,
    RankGone,
    RankProgress,
    RankUpdate,
    Register,
)
from tpdist.control.state import RANK_PHASES, SERVING, Failure, Key, Node, RankPace, Rules, State, seen
from tpdist.errors import JoinError, LostError, TpdistError

STOPPED = ("T", "t")


def advance(state: State, event: Event, now: float, rules: Rules) -> Answer:
    """The whole of the head's decisions."""
    match event:
        case Heard(instance=instance, body=Register() as register):
            return joining.on_register(state, register, now, rules) if register.instance == instance else (state, ())
        case Heard(body=Heartbeat()):
            return _on_beats(state, (event,), now)
        case Beats(beats=beats):
            return _on_beats(state, beats, now)
        case Heard():
            return _heard(state, event, now, rules)
        case HungUp(instance=instance):
            return leaving.on_hangup(state, instance, now, rules)
        case Interrupt(request=request):
            return endings.drain(state, request, now)
        case Tick():
            return _tick(replace(state, ticks=state.ticks + 1), event, now, rules)


def _heard(state: State, heard: Heard, now: float, rules: Rules) -> Answer:
    if heard.instance in state.standbys:
        return _heard_of_standby(state, state.standbys[heard.instance], heard, now, rules)
    if heard.instance not in state.members:
        return state, endings.answer_stranger(state, heard.instance, heard.body)
    key = state.members[heard.instance]
    state = state.heard(key, now)
    match heard.body:
        case Goodbye() as goodbye:
            return leaving.on_goodbye(state, key, goodbye, now, rules)
        case _ if state.outcome is not None:
            return state, ()
        case DrainRequest() as request:
            return endings.drain(state, request, now)
        case Fingerprint() as fingerprint:
            return joining.on_fingerprint(state, key, fingerprint, now, rules)
        case EpochEnded() if heard.epoch == state.epoch:
            return recovery.on_epoch_ended(state, key, now, rules)
        case Listening() | RankUpdate() | RankGone() if _is_current(state, heard.epoch):
            return _heard_of_ranks(state, key, heard.body, now, rules)
        case _:
            return state, ()


def _heard_of_standby(state: State, standby: Node, heard: Heard, now: float, rules: Rules) -> Answer:
    standby = seen(standby, now, state.ticks)
    match heard.body:
        case Goodbye():
            return state.without_standby(heard.instance), (Publish(),)
        case Fingerprint() as fingerprint if state.outcome is None:
            return joining.on_standby_fingerprint(state, standby, fingerprint, rules)
        case _:
            return replace(state, standbys={**state.standbys, heard.instance: standby}), ()


def _tick(state: State, tick: Tick, now: float, rules: Rules) -> Answer:
    if state.outcome is not None:
        return state, (() if endings.waits_for_goodbyes(state, now, rules) else (Finish(*state.outcome),))
    if tick.stood_still:
        state = deadlines.forgive(state, now)
    state = recovery.without_silent_standbys(state, now, rules)
    failure = deadlines.lost(state, now, rules) or deadlines.hanging(state, tick, now, rules)
    if failure:
        return recovery.abort(state, failure, now, rules)
    late = deadlines.expired(state, now, rules)
    if late:
        code = LostError.exit_code if state.restarts else JoinError.exit_code
        return endings.end(state, code, late, now)
    if state.phase == "draining" and (tick.in_flight == 0 or now - state.phase_since > rules.shutdown_timeout_s):
        return endings.end(state, 0, state.draining_reason, now)
    if state.phase == "recover":
        return recovery.proceed(state, now, rules)
    return recovery.refill(state, now, rules) if state.phase == "register" else (state, ())


def _is_current(state: State, epoch: int) -> bool:
    """Whether a message about ranks is about those of this epoch."""
    return state.layout is not None and epoch == state.epoch


def _heard_of_ranks(
    state: State, key: Key, body: Listening | RankUpdate | RankGone, now: float, rules: Rules
) -> Answer:
    match body:
        case Listening() if key is None and state.phase in ("start", "connect"):
            connect = Connect(store_port=body.store_port, plan_port=body.plan_port)
            return state, tuple(Send(node.register.instance, connect) for node in state.nodes.values())
        case RankUpdate() if _is_of(state, key, body):
            return _proceed(_with_rank(state, key, body, now), now)
        case RankGone():
            return _rank_gone(state, state.nodes[key], body, now, rules)
        case _:
            return state, ()


def _on_beats(state: State, beats: Iterable[Heard], now: float) -> Answer:
    """Note signs of life, which ranks have advanced, and which stand still."""
    nodes, standbys = dict(state.nodes), dict(state.standbys)
    strangers: list[Action] = []
    advanced_at = state.advanced_at
    for beat in beats:
        if beat.instance in standbys:
            standbys[beat.instance] = seen(standbys[beat.instance], now, state.ticks)
        elif beat.instance not in state.members:
            strangers += endings.answer_stranger(state, beat.instance, beat.body)
        else:
            key = state.members[beat.instance]
            nodes[key] = node = _beating(state, nodes[key], beat, now)
            if any(pace.advanced_at == now for pace in node.paces.values()):
                advanced_at = now
    return replace(state, nodes=nodes, standbys=standbys, advanced_at=advanced_at), tuple(strangers)


def _beating(state: State, node: Node, beat: Heard, now: float) -> Node:
    """A member with what it says of its ranks, if these are those of this epoch."""
    assert isinstance(beat.body, Heartbeat)
    node = seen(node, now, state.ticks)
    if state.outcome is not None or not _is_current(state, beat.epoch):
        return node
    paces = {progress.rank: _pace(node.paces.get(progress.rank), progress, now) for progress in beat.body.ranks}
    return replace(node, paces=paces)


def _pace(before: RankPace | None, progress: RankProgress, now: float) -> RankPace:
    stopped_at = None
    if progress.process in STOPPED:
        stopped_at = before.stopped_at if before is not None and before.stopped_at is not None else now
    stands = before is not None and (before.progress.step, before.progress.num_waits) == (
        progress.step,
        progress.num_waits,
    )
    return RankPace(progress, before.advanced_at if before is not None and stands else now, stopped_at)


def _is_of(state: State, key: Key, update: RankUpdate) -> bool:
    """Whether a node speaks of a rank that it has, in a phase that there is."""
    assign = state.assign_of(key)
    return 0 <= update.rank - assign.first_rank < assign.local_world_size and update.phase in RANK_PHASES


def _with_rank(state: State, key: Key, update: RankUpdate, now: float) -> State:
    node = state.nodes[key]
    before = node.ranks.get(update.rank)
    counts = list(state.num_ranks_at)
    counts[RANK_PHASES.index(update.phase)] += 1
    if before is not None:
        counts[RANK_PHASES.index(before.phase)] -= 1
    ranks, updated_at = {**node.ranks, update.rank: update}, {**node.updated_at, update.rank: now}
    state = state.update(key, replace(node, ranks=ranks, updated_at=updated_at))
    return replace(state, num_ranks_at=tuple(counts))


def _proceed(state: State, now: float) -> Answer:
    """The cluster is where its slowest rank is, and never goes back."""
    assert state.layout is not None
    if state.phase not in RANK_PHASES or sum(state.num_ranks_at) < state.layout.assigns[0].world_size:
        return state, ()
    slowest = next(index for index, count in enumerate(state.num_ranks_at) if count)
    if slowest <= RANK_PHASES.index(state.phase):
        return state, ()
    state = state.enter(RANK_PHASES[slowest], now)
    if state.phase == "ready":
        state = replace(state, engine=_engine_info(state), was_ready=True, advanced_at=now)
    return state, (Publish(),)


def _engine_info(state: State) -> EngineInfo:
    assign = state.assign_of(None)
    return EngineInfo(
        max_model_len=assign.max_model_len,
        num_kv_blocks=min(update.kv_blocks for node in state.nodes.values() for update in node.ranks.values()),
        block_size=assign.settings["block_size"],
    )


def _rank_gone(state: State, node: Node, gone: RankGone, now: float, rules: Rules) -> Answer:
    cause = f"rank {gone.rank} on {node.where_is(gone.rank)}: {gone.cause}"
    if gone.last_lines:
        cause += "\n" + "\n".join(f"  | {line}" for line in gone.last_lines)
    if gone.secondary:
        return _suspected(state, gone.rank, cause, now), ()
    code = endings.failure(gone.exit_code)
    if _is_lasting(state, code):
        return endings.end(state, code, cause, now)
    reason = "rank_lost" if code == LostError.exit_code else "rank_failed"
    return recovery.abort(state, Failure(reason, cause, code), now, rules)


def _is_lasting(state: State, code: int) -> bool:
    """Whether a rank would end in the same way again: what is wrong before ranks serve is wrong the next time too,
    except for kills; a bug is given another chance where ranks have served before."""
    if state.phase in SERVING:
        return False
    return code in leaving.LASTING_CODES or (code == TpdistError.exit_code and not state.was_ready)


def _suspected(state: State, rank: int, cause: str, now: float) -> State:
    """Keep the report of the lowest rank: stages wait for those before them, so it stands nearest to what hangs."""
    since, lowest, _ = state.suspect or (now, rank + 1, "")
    return replace(state, suspect=(since, rank, cause)) if rank < lowest else state
