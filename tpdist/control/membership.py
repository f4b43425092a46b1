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
    draining   no new requests; ends when none is left
    ended      everybody has been told how it ends; waits for their goodbyes

Invariants: the phases come in this order, some are skipped, none comes back. The first cause sets `outcome`, and
nothing changes it. A message counts only from the instance that holds a place, and a rank's only in its own epoch.
"""

from dataclasses import replace

from tpdist.control import deadlines, endings, joining
from tpdist.control.events import Answer, Event, Finish, Heard, Interrupt, Publish, Send, Tick
from tpdist.control.messages import (
    Connect,
    DrainRequest,
    EngineInfo,
    Fingerprint,
    Goodbye,
    Listening,
    RankGone,
    RankUpdate,
    Register,
)
from tpdist.control.state import RANK_PHASES, Key, Node, Rules, State
from tpdist.errors import JoinError, LostError


def advance(state: State, event: Event, now: float, rules: Rules) -> Answer:
    """The whole of the head's decisions."""
    match event:
        case Heard(instance=instance, body=Register() as register):
            return joining.on_register(state, register, now, rules) if register.instance == instance else (state, ())
        case Heard():
            return _heard(state, event, now, rules)
        case Interrupt(request=request):
            return endings.drain(state, request, now)
        case Tick():
            return _tick(replace(state, ticks=state.ticks + 1), event, now, rules)


def _heard(state: State, heard: Heard, now: float, rules: Rules) -> Answer:
    if heard.instance not in state.members:
        return state, endings.answer_stranger(state, heard.instance, heard.body)
    key = state.members[heard.instance]
    state = state.heard(key, now)
    match heard.body:
        case Goodbye() as goodbye:
            return endings.on_goodbye(state, key, goodbye, now)
        case _ if state.outcome is not None:
            return state, ()
        case DrainRequest() as request:
            return endings.drain(state, request, now)
        case Fingerprint() as fingerprint:
            return joining.on_fingerprint(state, key, fingerprint, now, rules)
        case Listening() | RankUpdate() | RankGone() if _is_current(state, heard.epoch):
            return _heard_of_ranks(state, key, heard.body, now)
        case _:
            return state, ()


def _tick(state: State, tick: Tick, now: float, rules: Rules) -> Answer:
    if state.outcome is not None:
        return state, (() if endings.waits_for_goodbyes(state, now, rules) else (Finish(*state.outcome),))
    lost = deadlines.lost(state, now, rules) or deadlines.stalled(state, tick, rules)
    if lost:
        return endings.end(state, LostError.exit_code, lost, now)
    late = deadlines.expired(state, now, rules)
    if late:
        return endings.end(state, JoinError.exit_code, late, now)
    if state.phase == "draining" and (tick.in_flight == 0 or now - state.phase_since > rules.shutdown_timeout_s):
        return endings.end(state, 0, state.draining_reason, now)
    return joining.gather(state, now, rules)


def _is_current(state: State, epoch: int) -> bool:
    """Whether a message about ranks is about those of this epoch."""
    return state.layout is not None and epoch == state.epoch


def _heard_of_ranks(state: State, key: Key, body: Listening | RankUpdate | RankGone, now: float) -> Answer:
    match body:
        case Listening() if key is None and state.phase in ("start", "connect"):
            connect = Connect(store_port=body.store_port, plan_port=body.plan_port)
            return state, tuple(Send(node.register.instance, connect) for node in state.nodes.values())
        case RankUpdate() if _is_of(state, key, body):
            return _proceed(_with_rank(state, key, body), now)
        case RankGone():
            return _rank_gone(state, state.nodes[key], body, now)
        case _:
            return state, ()


def _is_of(state: State, key: Key, update: RankUpdate) -> bool:
    """Whether a node speaks of a rank that it has, in a phase that there is."""
    assign = state.assign_of(key)
    return 0 <= update.rank - assign.first_rank < assign.local_world_size and update.phase in RANK_PHASES


def _with_rank(state: State, key: Key, update: RankUpdate) -> State:
    node = state.nodes[key]
    before = node.ranks.get(update.rank)
    counts = list(state.num_ranks_at)
    counts[RANK_PHASES.index(update.phase)] += 1
    if before is not None:
        counts[RANK_PHASES.index(before.phase)] -= 1
    state = state.update(key, replace(node, ranks={**node.ranks, update.rank: update}))
    return replace(state, num_ranks_at=tuple(counts))


def _proceed(state: State, now: float) -> Answer:
    """The cluster is where its slowest rank is, and never goes back."""
    assert state.layout is not None
    if state.phase not in RANK_PHASES or sum(state.num_ranks_at) < state.layout.assigns[0].world_size:
        return state, ()
    slowest = next(index for index, count in enumerate(state.num_ranks_at) if count)
    if slowest <= RANK_PHASES.index(state.phase):
        return state, ()
    state = replace(state, phase=RANK_PHASES[slowest], phase_since=now)
    if state.phase == "ready":
        state = replace(state, engine=_engine_info(state))
    return state, (Publish(),)


def _engine_info(state: State) -> EngineInfo:
    assign = state.assign_of(None)
    return EngineInfo(
        max_model_len=assign.max_model_len,
        num_kv_blocks=min(update.kv_blocks for node in state.nodes.values() for update in node.ranks.values()),
        block_size=assign.settings["block_size"],
    )


def _rank_gone(state: State, node: Node, gone: RankGone, now: float) -> Answer:
    cause = f"rank {gone.rank} on {node.where}: {gone.cause}"
    if gone.last_lines:
        cause += "\n" + "\n".join(f"  | {line}" for line in gone.last_lines)
    if gone.secondary:
        return _suspected(state, gone.rank, cause, now), ()
    return endings.end(state, endings.failure(gone.exit_code), cause, now)


def _suspected(state: State, rank: int, cause: str, now: float) -> State:
    """Keep the report of the lowest rank: stages wait for those before them, so it stands nearest to what hangs."""
    since, lowest, _ = state.suspect or (now, rank + 1, "")
    return replace(state, suspect=(since, rank, cause)) if rank < lowest else state
