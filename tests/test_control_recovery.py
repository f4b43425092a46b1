"""What the head does when something ends that should not: one epoch ends everywhere, and the next begins."""

from collections.abc import Sequence
from typing import Any

import pytest
from clusters import Head, fingerprint_of, plan_one_rank_each, register_of, rules_of, update_of

from tpdist.control.events import Finish, Heard, HungUp, Send, Tick
from tpdist.control.messages import (
    Assign,
    DrainRequest,
    EndEpoch,
    EngineStats,
    EpochEnded,
    Goodbye,
    Heartbeat,
    Message,
    RankGone,
    RankProgress,
    Rejoin,
    Shutdown,
    Welcome,
)
from tpdist.control.state import Layout, NodeFacts, name_of
from tpdist.control.view import view
from tpdist.errors import PlanError

KILLED = RankGone(rank=1, exit_code=6, cause="was killed by SIGKILL")
HEAD, WORKER = "head", "worker 0"
BOTH = (HEAD, WORKER)


def ready(num_workers: int = 1, **rules: Any) -> Head:
    head = Head(rules_of(num_workers, **{"max_restarts": 3, **rules}))
    head.be_ready()
    return head


def all_end(head: Head) -> None:
    """Every node that has a place says that its ranks are gone."""
    for instance in list(head.state.members):
        head.hear(instance, EpochEnded(instance=instance))


def progress(
    rank: int, step: int, *, waits: int = 0, waiting: bool = False, process: str = "S", in_step: bool = True
) -> RankProgress:
    return RankProgress(rank, step, waits, "all_reduce", waiting, process, in_step)


def beat(head: Head, instance: str, *ranks: RankProgress) -> None:
    head.hear(instance, Heartbeat(instance=instance, ranks=ranks))


# -- epochs -----------------------------------------------------------------------------------------------------------


def test_a_dead_rank_ends_the_epoch_on_all_nodes_and_the_next_starts_without_a_new_comparison() -> None:
    head = ready()
    head.hear(WORKER, KILLED)
    assert head.state.phase == "recover"
    assert all("SIGKILL" in head.told(instance, EndEpoch)[0].cause for instance in BOTH)
    head.hear(HEAD, EpochEnded(instance=HEAD))
    assert head.state.phase == "recover"
    head.hear(WORKER, EpochEnded(instance=WORKER))
    assert (head.state.phase, head.state.epoch) == ("start", 2)
    assert [assign.epoch for assign in head.told(WORKER, Assign)] == [1, 2]
    head.update("ready", kv_blocks=9)
    assert head.state.phase == "ready"
    assert head.state.engine is not None


def test_what_the_ended_epoch_still_says_changes_nothing() -> None:
    head = ready()
    head.hear(WORKER, KILLED)
    before = head.state
    for body in (KILLED, update_of(1, "ready"), RankGone(rank=0, exit_code=3, cause="late", secondary=False)):
        head.hear(WORKER, body)
    assert (head.state.phase, head.state.restarts) == ("recover", before.restarts)
    assert sum(head.state.num_ranks_at) == 0


@pytest.mark.parametrize("body", [KILLED, EpochEnded(instance=WORKER), update_of(1, "load")])
def test_words_of_an_earlier_epoch_that_are_said_again_change_nothing(body: Message) -> None:
    head = ready()
    head.hear(WORKER, KILLED)
    all_end(head)
    head.update("ready")
    before = head.state
    head.apply(Heard(WORKER, body, epoch=1))
    assert (head.state.phase, head.state.restarts, head.state.num_ranks_at) == (
        *(before.phase, before.restarts, before.num_ranks_at),
    )


@pytest.mark.parametrize(("code", "reason"), [(6, "rank_lost"), (1, "rank_failed"), (3, "rank_failed")])
def test_the_kind_of_a_failure_is_counted(code: int, reason: str) -> None:
    head = ready()
    head.hear(WORKER, RankGone(rank=1, exit_code=code, cause="x"))
    assert [each.failure.reason for each in head.state.restarts] == [reason]


@pytest.mark.parametrize("phase", ["start", "connect", "load", "warmup"])
def test_a_rank_that_is_killed_before_it_serves_is_started_again(phase: str) -> None:
    head = Head(rules_of(1, max_restarts=3))
    head.start()
    head.update(phase)
    head.hear(WORKER, KILLED)
    all_end(head)
    assert (head.state.phase, head.state.epoch) == ("start", 2)


@pytest.mark.parametrize("code", [1, 2, 3, 4, 5])
def test_what_would_happen_again_is_not_tried_again(code: int) -> None:
    head = Head(rules_of(1, max_restarts=3))
    head.start()
    head.hear(WORKER, RankGone(rank=1, exit_code=code, cause="x"))
    assert head.state.outcome is not None
    assert head.state.outcome[0] == code


def test_a_bug_in_a_rank_that_has_served_gets_another_chance_also_while_it_starts() -> None:
    head = ready()
    head.hear(WORKER, KILLED)
    all_end(head)
    head.hear(WORKER, RankGone(rank=1, exit_code=1, cause="bug"))
    assert head.state.outcome is None
    assert head.state.phase == "recover"


def test_the_budget_of_restarts_ends_the_cluster_with_the_history() -> None:
    head = ready(max_restarts=2)
    for _ in range(2):
        head.hear(WORKER, KILLED)
        all_end(head)
        head.update("ready")
    head.hear(WORKER, RankGone(rank=1, exit_code=3, cause="out of memory"))
    assert head.state.outcome is not None
    code, cause = head.state.outcome
    assert code == 6
    assert cause.startswith("rank 1 on worker 0 (host-worker 0, pid 1001): out of memory\n")
    assert "no restart is left: 2 in the last hour (TPDIST_MAX_RESTARTS=2)" in cause
    assert cause.count("epoch ") == 2
    assert {body for _, body in head.sent if isinstance(body, Shutdown)} == {Shutdown(exit_code=6, cause=cause)}


def test_restarts_of_more_than_an_hour_ago_do_not_count() -> None:
    head = ready(max_restarts=1)
    head.hear(WORKER, KILLED)
    all_end(head)
    head.update("ready")
    head.now += 3601
    head.hear(HEAD, Heartbeat(instance=HEAD))
    head.hear(WORKER, KILLED)
    assert head.state.outcome is None


def test_a_failure_while_the_cluster_drains_ends_it() -> None:
    head = ready()
    head.interrupt(reason="SIGTERM")
    head.hear(WORKER, KILLED)
    assert head.state.outcome is not None
    assert head.state.outcome[0] == 6


def test_a_drain_while_the_cluster_recovers_ends_it() -> None:
    head = ready()
    head.hear(WORKER, KILLED)
    head.hear(HEAD, DrainRequest(reason="SIGTERM"))
    assert head.state.outcome == (0, "SIGTERM")


# -- nodes ------------------------------------------------------------------------------------------------------------


def test_a_silent_node_loses_its_place_and_the_cluster_waits_for_it() -> None:
    head = ready()
    head.wait(11, alive=[HEAD])
    assert head.state.restarts[-1].failure.reason == "node_lost"
    assert "not been heard" in head.told(WORKER, Rejoin)[0].reason
    head.hear(HEAD, EpochEnded(instance=HEAD))
    assert head.state.phase == "register"
    head.hear("again", register_of(0, instance="again"))
    head.hear("again", fingerprint_of("again"))
    assert (head.state.phase, head.state.epoch) == ("start", 2)


def test_a_closed_connection_is_a_lost_node_at_once() -> None:
    """It could connect again, but what was on its way is lost."""
    head = ready()
    head.apply(HungUp(WORKER))
    assert "its connection has closed" in head.state.restarts[-1].failure.cause
    assert set(head.state.nodes) == {None}
    (answer,) = head.hear(WORKER, Heartbeat(instance=WORKER))
    assert isinstance(answer, Send)
    assert isinstance(answer.body, Rejoin)


def test_the_connection_of_a_stranger_is_nobodys_loss() -> None:
    head = ready()
    head.apply(HungUp("stranger"))
    assert head.state.phase == "ready"


def test_a_connection_that_closes_at_the_end_is_a_goodbye() -> None:
    head = ready()
    head.interrupt(reason="SIGTERM", immediate=True)
    for instance in BOTH:
        head.apply(HungUp(instance))
    assert head.tick() == (Finish(0, "SIGTERM"),)


def test_a_node_that_goes_while_the_ranks_end_is_not_waited_for() -> None:
    head = ready(num_workers=2)
    head.hear("worker 1", RankGone(rank=2, exit_code=6, cause="killed"))
    head.hear(HEAD, EpochEnded(instance=HEAD))
    head.hear("worker 1", EpochEnded(instance="worker 1"))
    head.apply(HungUp(WORKER))
    assert head.state.phase == "register"
    assert set(head.state.nodes) == {None, 1}
    assert len(head.state.restarts) == 1


def test_a_node_that_does_not_end_its_ranks_loses_its_place() -> None:
    head = ready()
    head.hear(HEAD, RankGone(rank=0, exit_code=6, cause="killed"))
    head.hear(HEAD, EpochEnded(instance=HEAD))
    head.wait(21, alive=BOTH)
    assert "did not end its ranks" in head.told(WORKER, Rejoin)[0].reason
    assert head.state.phase == "register"


def test_a_node_that_comes_back_while_others_still_end_their_ranks_is_taken() -> None:
    head = ready()
    head.apply(HungUp(WORKER))
    head.hear("again", register_of(0, instance="again"))
    head.hear("again", fingerprint_of("again"))
    assert head.told("again", Welcome)
    assert head.state.phase == "recover"
    head.hear(HEAD, EpochEnded(instance=HEAD))
    assert (head.state.phase, head.state.epoch) == ("start", 2)


@pytest.mark.parametrize("code", [0, 1, 6, 130])
def test_a_worker_that_leaves_a_running_cluster_may_come_back(code: int) -> None:
    head = ready()
    head.hear(WORKER, Goodbye(instance=WORKER, exit_code=code, cause="restarted"))
    head.hear(HEAD, EpochEnded(instance=HEAD))
    assert head.state.phase == "register"
    head.hear("again", register_of(0, instance="again"))
    assert head.state.phase == "compare"


@pytest.mark.parametrize("code", [2, 3, 4, 5])
def test_a_worker_that_leaves_for_good_ends_the_cluster(code: int) -> None:
    head = ready()
    head.hear(WORKER, Goodbye(instance=WORKER, exit_code=code, cause="no tokenizer"))
    assert head.state.outcome is not None
    assert head.state.outcome[0] == code


def test_without_its_own_node_a_head_does_not_go_on() -> None:
    head = ready()
    head.hear(HEAD, Goodbye(instance=HEAD, exit_code=1, cause="bug"))
    assert head.state.outcome == (1, "head (host-head, pid 100) left: bug")


def test_a_lost_node_that_does_not_come_back_ends_the_cluster_with_6_and_is_named() -> None:
    head = ready(register_timeout_s=30)
    head.wait(11, alive=[HEAD])
    head.hear(HEAD, EpochEnded(instance=HEAD))
    head.wait(31, alive=[HEAD])
    assert head.state.outcome is not None
    code, cause = head.state.outcome
    assert code == 6
    assert "worker 0: missing" in cause
    assert "TPDIST_REGISTER_TIMEOUT_S" in cause


def test_a_node_lost_while_nodes_are_compared_is_waited_for() -> None:
    head = Head(rules_of(1, max_restarts=3))
    head.register(None, 0)
    head.hear(HEAD, fingerprint_of(HEAD))
    head.apply(HungUp(WORKER))
    assert head.state.phase == "register"
    assert not head.told(HEAD, EndEpoch)
    head.hear("again", register_of(0, instance="again"))
    head.hear("again", fingerprint_of("again"))
    assert (head.state.phase, head.state.epoch) == ("start", 1)


def test_a_worker_killed_while_nodes_gather_frees_its_place_at_once() -> None:
    head = Head(rules_of(2))
    head.register(None, 0)
    head.apply(HungUp(WORKER))
    assert set(head.state.nodes) == {None}
    assert head.state.restarts == ()


# -- standbys ---------------------------------------------------------------------------------------------------------


def with_standby(head: Head, instance: str = "spare", **probe: Any) -> None:
    head.hear(instance, register_of(None, instance=instance, hostname=f"host-{instance}", standby=True))
    head.hear(instance, fingerprint_of(instance, **probe))


def test_a_standby_takes_the_place_of_a_lost_node() -> None:
    head = ready()
    with_standby(head)
    head.apply(HungUp(WORKER))
    head.hear(HEAD, EpochEnded(instance=HEAD))
    assert (head.state.phase, head.state.epoch) == ("start", 2)
    assert head.state.members == {HEAD: None, "spare": 0}
    assert head.told("spare", Assign)[0].node_index == 1
    assert not head.state.standbys
    assert [node.host for node in view(head.state, head.now, stats=EngineStats()).nodes] == ["host-head", "host-spare"]


def test_standbys_hold_no_place_while_nobody_is_lost() -> None:
    head = Head(rules_of(1, max_restarts=3))
    with_standby(head)
    head.register(None)
    head.wait(5, alive=[HEAD, "spare"])
    assert head.state.phase == "register"
    assert head.told("spare", Welcome)
    assert [node.state for node in view(head.state, head.now, stats=EngineStats()).standbys] == ["ready"]


def test_a_standby_that_differs_ends_alone() -> None:
    head = ready()
    with_standby(head, torch="2.11.0")
    (shutdown,) = head.told("spare", Shutdown)
    assert shutdown.exit_code == 5
    assert "torch" in shutdown.cause
    assert head.state.phase == "ready"
    assert not head.state.standbys


def test_a_standby_that_came_before_the_head_and_differs_ends_when_that_is_known() -> None:
    head = Head(rules_of(1, max_restarts=3))
    with_standby(head, torch="2.11.0")
    with_standby(head, instance="another")
    assert not head.told("spare", Shutdown)
    head.be_ready()
    assert head.told("spare", Shutdown)[0].exit_code == 5
    assert list(head.state.standbys) == ["another"]
    assert head.state.phase == "ready"


@pytest.mark.parametrize("silent", [False, True])
def test_a_standby_that_has_gone_is_forgotten(silent: bool) -> None:
    head = ready()
    with_standby(head)
    if silent:
        head.wait(12, alive=BOTH)
    else:
        head.apply(HungUp("spare"))
    assert not head.state.standbys
    head.apply(HungUp(WORKER))
    head.hear(HEAD, EpochEnded(instance=HEAD))
    assert head.state.phase == "register"


def test_a_worker_that_does_not_belong_ends_alone_also_while_the_cluster_recovers() -> None:
    head = ready()
    head.apply(HungUp(WORKER))
    head.hear(HEAD, EpochEnded(instance=HEAD))
    head.hear("odd", register_of(9, instance="odd"))
    assert head.told("odd", Shutdown)[0].exit_code == 5
    assert head.state.phase == "register"


def test_a_replacement_that_differs_ends_alone_and_another_is_waited_for() -> None:
    head = ready()
    head.apply(HungUp(WORKER))
    head.hear(HEAD, EpochEnded(instance=HEAD))
    head.hear("other", register_of(0, instance="other"))
    head.hear("other", fingerprint_of("other", torch="2.11.0"))
    (shutdown,) = head.told("other", Shutdown)
    assert shutdown.exit_code == 5
    assert "torch" in shutdown.cause
    assert head.state.phase == "register"
    head.hear("again", register_of(0, instance="again"))
    head.hear("again", fingerprint_of("again"))
    assert (head.state.phase, head.state.epoch) == ("start", 2)


def test_the_wait_for_another_replacement_begins_when_one_was_refused() -> None:
    head = ready(register_timeout_s=60)
    head.apply(HungUp(WORKER))
    head.hear(HEAD, EpochEnded(instance=HEAD))
    head.hear("other", register_of(0, instance="other"))
    head.wait(100, alive=[HEAD, "other"])
    head.hear("other", fingerprint_of("other", torch="2.11.0"))
    head.wait(50, alive=[HEAD])
    assert (head.state.phase, head.state.outcome) == ("register", None)
    head.wait(11, alive=[HEAD])
    assert head.state.outcome is not None


def test_a_replacement_with_which_the_model_does_not_fit_ends_alone_and_the_next_standby_is_tried() -> None:
    def plan(nodes: Sequence[NodeFacts]) -> Layout:
        if any(node.fingerprint.probe.memory_bytes < 1000 for node in nodes):
            raise PlanError("2 GiB short")
        return plan_one_rank_each(nodes)

    head = ready(plan=plan)
    with_standby(head, instance="small", memory_bytes=10)
    with_standby(head, instance="large")
    head.apply(HungUp(WORKER))
    head.hear(HEAD, EpochEnded(instance=HEAD))
    (shutdown,) = head.told("small", Shutdown)
    assert shutdown.exit_code == 3
    assert shutdown.cause == "this node cannot take the place of the one that was lost: 2 GiB short"
    assert not head.told(HEAD, Shutdown)
    head.wait(1, alive=[HEAD, "large"])
    assert (head.state.phase, head.state.epoch) == ("start", 2)
    assert head.state.members == {HEAD: None, "large": 0}


def test_nodes_with_which_the_model_never_fitted_end_the_cluster_also_after_one_was_lost() -> None:
    def plan(nodes: Sequence[NodeFacts]) -> Layout:
        raise PlanError("2 GiB short")

    head = Head(rules_of(1, max_restarts=3, plan=plan))
    head.register(None, 0)
    head.apply(HungUp(WORKER))
    head.hear("other", register_of(0, instance="other"))
    for instance in (HEAD, "other"):
        head.hear(instance, fingerprint_of(instance))
    assert head.state.outcome == (3, "2 GiB short")


def test_nodes_with_which_the_model_does_not_fit_any_more_end_the_cluster() -> None:
    plans = iter([plan_one_rank_each])

    def plan(nodes: Sequence[NodeFacts]) -> Layout:
        for make in plans:
            return make(nodes)
        raise PlanError("2 GiB short")

    head = ready(plan=plan)
    head.hear(WORKER, RankGone(rank=1, exit_code=-9, cause="killed"))
    all_end(head)
    assert head.state.outcome == (3, "2 GiB short")


def test_a_worker_that_somebody_ends_while_nodes_gather_is_no_failure() -> None:
    head = Head(rules_of(2, max_restarts=3))
    head.register(None, 0)
    head.hear(WORKER, Goodbye(instance=WORKER, exit_code=6, cause="second signal"))
    assert (head.state.phase, head.state.restarts, set(head.state.nodes)) == ("register", (), {None})


def test_standbys_hear_how_the_cluster_ends() -> None:
    head = ready()
    with_standby(head)
    head.interrupt(reason="SIGTERM", immediate=True)
    assert head.told("spare", Shutdown) == [Shutdown(exit_code=0, cause="SIGTERM")]


# -- hangs ------------------------------------------------------------------------------------------------------------


def hang_of(head: Head, *ranks: RankProgress) -> str:
    """The cause that is found once nothing has advanced for the time that a hang takes."""
    for rank in ranks:
        beat(head, name_of(rank.rank - 1 if rank.rank else None), rank)
    head.now += 61
    for rank in ranks:
        beat(head, name_of(rank.rank - 1 if rank.rank else None), rank)
    head.apply(Tick(in_flight=2, stalled_s=61))
    return head.state.restarts[-1].failure.cause if head.state.restarts else ""


def test_requests_that_wait_while_no_rank_advances_are_a_hang() -> None:
    cause = hang_of(ready(), progress(0, 9, waits=4, waiting=True), progress(1, 9, waits=3))
    assert "2 requests wait, and no rank has advanced for 61.0 s (TPDIST_HANG_TIMEOUT_S=60)" in cause
    assert "furthest behind is rank 1 on worker 0 (host-worker 0, pid 1001), in step 9, after 3 collectives" in cause


def test_a_rank_that_was_stopped_in_a_collective_is_told_from_the_one_that_waits_for_it() -> None:
    both_wait = (progress(0, 9, waits=7, waiting=True), progress(1, 9, waits=6, waiting=True))
    assert "rank 1 on worker 0" in hang_of(ready(), *both_wait)


def test_the_rank_with_the_earliest_step_is_behind_whatever_else() -> None:
    cause = hang_of(ready(), progress(0, 9, waits=1, waiting=True), progress(1, 8, waits=99, waiting=True))
    assert "rank 1 on worker 0" in cause


def test_a_rank_0_that_hangs_between_two_steps_is_named() -> None:
    cause = hang_of(ready(), progress(0, 9, in_step=False), progress(1, 9, in_step=False, waiting=True))
    assert "furthest behind is rank 0 on head (host-head, pid 1000), after step 9, its process in state S" in cause


def test_a_rank_that_has_not_begun_the_step_of_the_others_is_behind() -> None:
    cause = hang_of(ready(), progress(0, 10, waiting=True), progress(1, 9, in_step=False, waiting=True))
    assert "rank 1 on worker 0" in cause


def test_a_stage_that_hangs_in_a_step_is_told_from_rank_0_which_waits_for_its_result() -> None:
    cause = hang_of(ready(), progress(0, 9, in_step=False, waiting=True), progress(1, 9, waiting=True))
    assert "furthest behind is rank 1 on worker 0 (host-worker 0, pid 1001), in step 9, in all_reduce 0" in cause


def test_a_rank_that_was_stopped_after_its_step_is_told_from_the_one_that_waits_for_what_it_sent() -> None:
    head = ready(node_lost_s=100.0)
    cause = hang_of(head, progress(0, 9, in_step=False, process="T"), progress(1, 9, waiting=True))
    assert "furthest behind is rank 0 on head (host-head, pid 1000), after step 9, its process in state T" in cause


def test_a_slow_step_whose_ranks_advance_is_no_hang() -> None:
    head = ready()
    for waits in range(100):
        head.now += 10
        beat(head, HEAD, progress(0, 1, waits=waits))
        beat(head, WORKER, progress(1, 1, waits=0, waiting=True))
        head.apply(Tick(in_flight=1, stalled_s=10.0 * waits))
    assert head.state.phase == "ready"


def test_an_idle_cluster_does_not_hang() -> None:
    head = ready()
    head.wait(1000, alive=BOTH)
    assert head.state.phase == "ready"


@pytest.mark.parametrize("phase", ["connect", "load", "warmup", "ready"])
def test_a_stopped_process_is_noticed_even_when_nothing_is_asked_of_it(phase: str) -> None:
    head = Head(rules_of(1, max_restarts=3))
    head.start()
    head.update(phase)
    for _ in range(24):
        head.now += 0.5
        beat(head, HEAD, progress(0, 0))
        beat(head, WORKER, progress(1, 0, process="T"))
        head.tick()
    assert "rank 1 on worker 0" in head.state.restarts[-1].failure.cause
    assert "has been stopped for" in head.state.restarts[-1].failure.cause


def test_a_slow_load_that_advances_is_no_hang_and_one_that_stands_still_is() -> None:
    head = Head(rules_of(1, max_restarts=3))
    head.start()
    head.update("load", done=0, total=1000)
    head.hear(HEAD, update_of(0, "load", done=1000, total=1000))
    for done in range(10):
        head.wait(50, alive=BOTH)
        head.hear(WORKER, update_of(1, "load", done=done, total=1000))
    assert head.state.phase == "load"
    head.wait(61, alive=BOTH)
    cause = head.state.restarts[-1].failure.cause
    assert cause.startswith(
        "rank 1 on worker 0 (host-worker 0, pid 1001) has read nothing of the checkpoint for 60.5 s"
    )
    assert "after 9 of 1000 bytes" in cause


def test_a_process_that_is_stopped_for_a_moment_is_left_alone() -> None:
    head = ready()
    for second in range(60):
        head.now += 1
        beat(head, HEAD, progress(0, 0))
        beat(head, WORKER, progress(1, 0, process="T" if second % 5 else "S"))
        head.tick()
    assert head.state.phase == "ready"


def test_a_head_that_stood_still_gives_everybody_their_time_anew() -> None:
    head = ready()
    beat(head, HEAD, progress(0, 1))
    beat(head, WORKER, progress(1, 1, process="T"))
    head.now += 500
    head.apply(Tick(in_flight=1, stalled_s=0.5, stood_still=True))
    head.wait(5, alive=BOTH)
    assert head.state.phase == "ready"
    loading = Head(rules_of(1, max_restarts=3))
    loading.start()
    loading.update("load", done=1, total=9)
    loading.now += 500
    loading.apply(Tick(in_flight=0, stood_still=True))
    loading.wait(5, alive=BOTH)
    assert loading.state.phase == "load"


def test_many_restarts_are_counted_and_the_last_few_kept() -> None:
    head = ready(max_restarts=30)
    lines = tuple(f"line {number}" for number in range(20))
    for _ in range(100):
        head.now += 400
        for instance in BOTH:
            head.hear(instance, Heartbeat(instance=instance))
        head.hear(WORKER, RankGone(rank=1, exit_code=6, cause="killed", last_lines=lines))
        all_end(head)
        head.update("ready")
    assert head.state.aborts == {"rank_lost": 100}
    assert len(head.state.restarts) == 20
    assert [each.failure.cause.count("line") for each in head.state.restarts[-2:]] == [0, 20]
    shown = view(head.state, head.now, stats=EngineStats())
    assert (shown.aborts, shown.restarts[-1].epoch) == ({"rank_lost": 100}, 100)


# -- what people see --------------------------------------------------------------------------------------------------


def test_the_view_says_recovering_and_why_and_keeps_the_history() -> None:
    head = ready()
    head.hear(WORKER, KILLED)
    cluster = view(head.state, head.now, stats=EngineStats(), retried=4)
    assert (cluster.state, cluster.phase, cluster.retried) == ("recovering", "recover", 4)
    assert "because epoch 1 ended: rank 1 on worker 0" in cluster.reason
    all_end(head)
    head.update("ready")
    cluster = view(head.state, head.now, stats=EngineStats())
    assert (cluster.state, cluster.reason, cluster.epoch) == ("ready", "", 2)
    assert [(restart.epoch, restart.reason) for restart in cluster.restarts] == [(1, "rank_lost")]
    assert "SIGKILL" in cluster.restarts[0].cause
    assert {"recover", "start"} <= set(cluster.startup_s)
