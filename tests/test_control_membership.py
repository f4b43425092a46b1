"""The head's decisions: who joins, when ranks are dealt, what ends the cluster, and who hears of it."""

from dataclasses import replace
from typing import Any

import pytest
from clusters import Head, fingerprint_of, register_of, rules_of, update_of
from hypothesis import given, settings
from hypothesis import strategies as st

from tpdist.control.events import Beats, Event, Finish, Heard, HungUp, Interrupt, Send, Tick
from tpdist.control.membership import advance
from tpdist.control.messages import (
    Abort,
    Assign,
    Connect,
    DrainRequest,
    EndEpoch,
    EngineStats,
    EpochEnded,
    Goodbye,
    Heartbeat,
    Listening,
    RankGone,
    RankHello,
    RankProgress,
    Rejoin,
    Shutdown,
    Wait,
    Welcome,
)
from tpdist.control.state import RANK_PHASES, Key, Rules, State, name_of
from tpdist.control.view import view
from tpdist.errors import PlanError

PHASES = ("recover", "register", "compare", *RANK_PHASES, "draining", "ended")
LISTENING = Listening(store_port=5, plan_port=6)


def goodbye(instance: str, exit_code: int = 0, cause: str = "") -> Goodbye:
    return Goodbye(instance=instance, exit_code=exit_code, cause=cause)


# -- joining ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [(None, 0, 1), (1, 0, None), (0, None, 1)])
def test_nodes_may_register_in_any_order_and_ranks_are_node_major(order: tuple[Key, ...]) -> None:
    head = Head(rules_of(2))
    head.register(*order)
    assert head.state.phase == "compare"
    for key in order:
        assert not head.told("head", Assign)
        head.hear(name_of(key), fingerprint_of(name_of(key)))
    assert head.state.phase == "start"
    firsts = [head.told(name, Assign)[0].first_rank for name in ("head", "worker 0", "worker 1")]
    assert firsts == [0, 1, 2]
    assert {assign.epoch for name in ("head", "worker 1") for assign in head.told(name, Assign)} == {1}


def test_every_registered_node_is_welcomed_each_time_that_it_asks() -> None:
    head = Head(rules_of(1))
    head.register(0, 0, None)
    assert head.told("worker 0", Welcome) == [Welcome(cluster_id="cluster")] * 2


def test_fingerprints_that_come_before_the_last_node_are_kept() -> None:
    head = Head(rules_of(1))
    head.register(0)
    head.hear("worker 0", fingerprint_of("worker 0"))
    head.register(None)
    head.hear("head", fingerprint_of("head"))
    assert head.state.phase == "start"


def test_nodes_that_disagree_end_all_nodes_with_a_table() -> None:
    head = Head(rules_of(1))
    head.register(None, 0)
    head.hear("head", fingerprint_of("head"))
    head.hear("worker 0", fingerprint_of("worker 0", torch="2.12.0"))
    (shutdown,) = head.told("worker 0", Shutdown)
    assert shutdown.exit_code == 5
    assert "torch" in shutdown.cause
    assert "head=2.13.0  worker 0=2.12.0" in shutdown.cause
    assert head.told("head", Shutdown) == [shutdown]


def test_a_plan_that_cannot_be_made_ends_all_nodes_with_its_code() -> None:
    def refuse(nodes: object) -> Any:
        raise PlanError("3 ranks cannot share 2 heads")

    head = Head(rules_of(1, plan=refuse))
    head.start()
    assert head.told("worker 0", Shutdown) == [Shutdown(exit_code=3, cause="3 ranks cannot share 2 heads")]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"worker_id": 2}, "MISTRALRS_MN_HEAD_NUM_WORKERS=2"),
        ({"worker_id": -1}, "MISTRALRS_MN_HEAD_NUM_WORKERS=2"),
        ({"worker_id": 1, "global_world_size": 7}, "MISTRALRS_MN_GLOBAL_WORLD_SIZE is 7 on worker 1"),
    ],
)
def test_a_worker_that_does_not_belong_ends_everybody_before_the_start(changes: dict[str, Any], named: str) -> None:
    head = Head(rules_of(2))
    head.register(None, 0)
    head.hear("odd", register_of(1, instance="odd", **changes))
    for instance in ("odd", "head", "worker 0"):
        (shutdown,) = head.told(instance, Shutdown)
        assert shutdown.exit_code == 5
        assert named in shutdown.cause


def test_a_worker_too_many_after_the_start_ends_alone() -> None:
    head = Head(rules_of(1))
    head.be_ready()
    head.hear("odd", register_of(1, instance="odd"))
    assert head.told("odd", Shutdown)[0].exit_code == 5
    assert head.state.phase == "ready"
    assert not head.told("worker 0", Shutdown)


def test_a_worker_of_a_head_without_workers_is_told_that_there_are_no_ids() -> None:
    head = Head(rules_of(0))
    head.hear("odd", register_of(0, instance="odd"))
    assert "allows the ids none" in head.told("odd", Shutdown)[0].cause


def test_a_second_instance_waits_while_the_first_lives() -> None:
    head = Head(rules_of(2))
    head.register(None, 0)
    head.wait(20, alive=["head", "worker 0"])
    head.hear("second", register_of(0, instance="second"))
    (wait,) = head.told("second", Wait)
    assert wait.reason.startswith("worker 0 is already here (host-worker 0, pid 100)")
    assert head.state.nodes[0].register.instance == "worker 0"


def test_a_second_instance_replaces_a_silent_first_which_is_told_so() -> None:
    head = Head(rules_of(2))
    head.register(None, 0)
    head.wait(11, alive=["head"])
    head.hear("second", register_of(0, instance="second"))
    assert head.told("second", Welcome)
    (rejoin,) = head.told("worker 0", Rejoin)
    assert "took its place" in rejoin.reason
    head.hear("worker 0", fingerprint_of("worker 0", torch="other"))
    assert head.state.nodes[0].fingerprint is None


def test_a_replaced_instance_that_wakes_up_is_told_again() -> None:
    head = Head(rules_of(2))
    head.register(None, 0)
    head.wait(11, alive=["head"])
    head.hear("second", register_of(0, instance="second"))
    (answer,) = head.hear("worker 0", Heartbeat(instance="worker 0"))
    assert isinstance(answer, Send)
    assert isinstance(answer.body, Rejoin)


def test_heartbeats_that_came_together_count_each_for_its_own_node() -> None:
    head = Head(rules_of(2))
    head.be_ready()
    head.wait(5, alive=[])
    step = RankProgress(2, step=4, num_waits=9, wait="gather", waiting=False, process="S")
    beats = (
        Heard("worker 1", Heartbeat(instance="worker 1", ranks=(step,)), epoch=1),
        Heard("stranger", Heartbeat(instance="stranger"), epoch=1),
        Heard("head", Heartbeat(instance="head"), epoch=1),
    )
    (answer,) = head.apply(Beats(beats))
    assert (answer.instance, type(answer.body)) == ("stranger", Rejoin)
    assert {key: node.last_seen for key, node in head.state.nodes.items()} == {None: 5, 0: 0, 1: 5}
    assert head.state.nodes[1].paces[2].progress == step
    assert head.state.advanced_at == 5


@pytest.mark.parametrize("exit_code", [0, 130])
def test_a_worker_that_leaves_before_all_are_here_may_be_started_again(exit_code: int) -> None:
    head = Head(rules_of(2))
    head.register(None, 0)
    head.hear("worker 0", goodbye("worker 0", exit_code))
    head.register(1)
    assert head.state.phase == "register"
    head.hear("second", register_of(0, instance="second"))
    assert head.state.phase == "compare"
    assert not head.told("head", Shutdown)


def test_a_second_instance_after_the_start_waits_for_the_place_of_the_first() -> None:
    head = Head(rules_of(1))
    head.be_ready()
    head.hear("second", register_of(0, instance="second"))
    assert "takes its place if that one goes, or is silent for 10 s" in head.told("second", Wait)[0].reason


def test_the_cluster_does_not_start_with_a_node_that_has_fallen_silent() -> None:
    head = Head(rules_of(2))
    head.register(None, 0)
    head.wait(100, alive=["head"])
    head.register(1)
    head.wait(5, alive=["head", "worker 1"])
    assert head.state.phase == "register"
    head.wait(1, alive=["head", "worker 0", "worker 1"])
    assert head.state.phase == "compare"


def test_one_instance_cannot_hold_two_places() -> None:
    head = Head(rules_of(2))
    head.register(None, 0)
    head.hear("worker 0", register_of(1, instance="worker 0"))
    assert set(head.state.nodes) == {None, 0}


def test_a_node_cannot_register_in_the_name_of_another() -> None:
    head = Head(rules_of(1))
    assert head.hear("somebody", register_of(0)) == ()
    assert not head.state.nodes


def test_a_worker_that_comes_after_the_end_is_told_how_it_ended_and_waited_for() -> None:
    head = Head(rules_of(2))
    head.register(None)
    head.hear("head", goodbye("head", 4, "no config.json"))
    head.hear("worker 0", register_of(0))
    (shutdown,) = head.told("worker 0", Shutdown)
    assert shutdown.exit_code == 4
    assert "no config.json" in shutdown.cause
    head.wait(2)
    assert not head.finishes
    head.hear("worker 0", goodbye("worker 0", 4))
    head.hear("worker 1", register_of(1))
    head.hear("worker 1", goodbye("worker 1", 4))
    assert head.tick() == (Finish(4, shutdown.cause),)


@pytest.mark.parametrize("key", [0, 7, -3, 10**9])
def test_a_worker_that_comes_after_the_end_of_a_running_cluster_leaves_no_trace(key: int) -> None:
    head = Head(rules_of(1))
    head.be_ready()
    head.hear("head", goodbye("head", 1, "bug"))
    head.hear("late", register_of(key, instance="late"))
    assert head.told("late", Shutdown)[0].exit_code == 1
    assert set(head.state.nodes) == {None, 0}
    view(head.state, head.now, stats=EngineStats())


# -- ranks ------------------------------------------------------------------------------------------------------------


def test_rank_updates_drive_the_phases_at_the_pace_of_the_slowest() -> None:
    head = Head(rules_of(1))
    head.start()
    seen = []
    for phase in RANK_PHASES:
        for rank, name in enumerate(("head", "worker 0")):
            head.hear(name, update_of(rank, phase, kv_blocks=32 - rank))
            seen.append(head.state.phase)
    slowest = [RANK_PHASES[max(0, index // 2 if index % 2 else index // 2 - 1)] for index in range(len(seen))]
    assert seen == slowest
    assert head.state.engine is not None
    assert (head.state.engine.num_kv_blocks, head.state.engine.block_size) == (31, 16)


def test_a_phase_never_goes_back() -> None:
    head = Head(rules_of(1))
    head.start()
    head.update("warmup")
    head.update("load")
    assert head.state.phase == "warmup"
    head.update("ready")
    head.update("load")
    assert head.state.phase == "ready"


@pytest.mark.parametrize(
    ("instance", "body"),
    [
        ("head", update_of(1, "ready")),
        ("head", update_of(-1, "ready")),
        ("worker 0", update_of(0, "ready")),
        ("worker 0", update_of(1, "sleeping")),
        ("worker 0", LISTENING),
        ("nobody", update_of(1, "ready")),
        ("head", RankHello(local_rank=0, pid=1)),
        ("head", Abort(request_id="x")),
    ],
)
def test_news_of_ranks_that_a_node_does_not_have_are_ignored(instance: str, body: Any) -> None:
    head = Head(rules_of(1))
    head.start()
    before = head.state
    actions = head.hear(instance, body)
    assert not any(isinstance(action, Send) and isinstance(action.body, Connect) for action in actions)
    assert head.state.num_ranks_at == before.num_ranks_at
    assert head.state.phase == "start"


def test_ranks_of_another_epoch_are_ignored() -> None:
    head = Head(rules_of(1))
    head.start()
    gone = RankGone(rank=1, exit_code=6, cause="killed")
    for epoch in (0, 2):
        for body in (update_of(1, "ready"), gone, LISTENING):
            head.apply(Heard("head" if body is LISTENING else "worker 0", body, epoch=epoch))
    assert head.state.phase == "start"
    assert sum(head.state.num_ranks_at) == 0
    assert not head.told("worker 0", Connect)


def test_news_of_ranks_before_there_are_any_are_ignored() -> None:
    head = Head(rules_of(1))
    head.register(None)
    for body in (update_of(0, "load"), LISTENING, RankGone(rank=0, exit_code=1, cause="?")):
        head.hear("head", body)
    assert head.state.phase == "register"


def test_where_rank_0_listens_goes_to_every_node() -> None:
    head = Head(rules_of(2))
    head.start()
    head.hear("head", LISTENING)
    for instance in ("head", "worker 0", "worker 1"):
        assert head.told(instance, Connect) == [Connect(store_port=5, plan_port=6)]


# -- deadlines --------------------------------------------------------------------------------------------------------


def test_the_register_deadline_names_who_is_missing_who_is_not_and_the_setting() -> None:
    head = Head(rules_of(2, register_timeout_s=3))
    head.register(None, 1)
    head.wait(4, alive=["head", "worker 1"])
    (shutdown,) = head.told("worker 1", Shutdown)
    assert shutdown.exit_code == 5
    assert "phase register took longer than 3 s (TPDIST_REGISTER_TIMEOUT_S extends it)" in shutdown.cause
    assert "worker 0: missing" in shutdown.cause
    assert "worker 1: host-worker 1 pid 100, heard 0.0 s ago, registered" in shutdown.cause


def test_the_compare_deadline_names_the_node_without_a_fingerprint_first() -> None:
    head = Head(rules_of(1, fetch_timeout_s=3))
    head.register(None, 0)
    head.hear("head", fingerprint_of("head"))
    head.wait(4, alive=["head", "worker 0"])
    cause = head.told("head", Shutdown)[0].cause
    assert "TPDIST_FETCH_TIMEOUT_S" in cause
    assert cause.splitlines()[1].startswith("  worker 0: ")
    assert "no fingerprint yet" in cause.splitlines()[1]


@pytest.mark.parametrize("phase", ["start", "load", "warmup"])
def test_a_slow_rank_is_named_with_its_progress(phase: str) -> None:
    head = Head(rules_of(1, load_timeout_s=3))
    head.start()
    head.update("start")
    head.update(phase, done=5, total=9)
    head.hear("head", update_of(0, "ready"))
    head.wait(4, alive=["head", "worker 0"])
    cause = head.told("head", Shutdown)[0].cause
    assert f"phase {phase} took longer than 3 s (TPDIST_LOAD_TIMEOUT_S extends it)" in cause
    progress = "load 5/9 bytes" if phase == "load" else phase
    assert cause.splitlines()[1] == f"  worker 0: host-worker 0 pid 100, heard 0.0 s ago, rank 1 {progress}"


def test_the_answer_of_a_large_cluster_stays_readable() -> None:
    head = Head(rules_of(500, register_timeout_s=1))
    head.register(None)
    head.wait(2, alive=["head"])
    cause = head.told("head", Shutdown)[0].cause
    assert len(cause.splitlines()) < 40
    assert "and 469 more nodes" in cause


@pytest.mark.parametrize("phase", ["ready", "draining"])
def test_a_cluster_that_serves_has_no_deadline(phase: str) -> None:
    head = Head(rules_of(1, shutdown_timeout_s=10_000))
    head.be_ready()
    if phase == "draining":
        head.interrupt(reason="SIGTERM")
    head.wait(2000, alive=["head", "worker 0"], in_flight=1)
    assert head.state.phase == phase


def test_a_silent_node_ends_the_cluster_and_is_named() -> None:
    head = Head(rules_of(1))
    head.be_ready()
    head.wait(10, alive=["head"])
    assert head.state.outcome is None
    head.wait(1, alive=["head"])
    (shutdown,) = head.told("head", Shutdown)
    assert shutdown.exit_code == 6
    assert "worker 0 (host-worker 0, pid 100) has not been heard for 10.5 s (TPDIST_NODE_LOST_S=10)" in shutdown.cause
    assert head.told("worker 0", Shutdown) == [shutdown]


def test_a_head_that_was_stopped_itself_listens_before_it_calls_anybody_lost() -> None:
    head = Head(rules_of(1))
    head.be_ready()
    head.wait(2, alive=["head", "worker 0"])
    head.now += 3600
    head.tick()
    head.tick()
    assert head.state.outcome is None
    head.wait(20, alive=["head", "worker 0"])
    assert head.state.outcome is None


# -- ends -------------------------------------------------------------------------------------------------------------


def test_a_dead_rank_ends_every_node_with_its_last_lines() -> None:
    head = Head(rules_of(1))
    head.be_ready()
    gone = RankGone(rank=1, exit_code=6, cause="was killed by SIGKILL", last_lines=("a", "b"))
    head.hear("worker 0", gone)
    cause = "rank 1 on worker 0 (host-worker 0, pid 1001): was killed by SIGKILL\n  | a\n  | b"
    for instance in ("head", "worker 0"):
        assert head.told(instance, Shutdown) == [Shutdown(exit_code=6, cause=cause)]


@pytest.mark.parametrize(("code", "expected"), [(3, 3), (0, 6), (-9, 6), (256, 6), (1, 1)])
def test_the_exit_code_of_a_failure_is_one_that_a_process_can_have(code: int, expected: int) -> None:
    head = Head(rules_of(0))
    head.be_ready()
    head.hear("head", RankGone(rank=0, exit_code=code, cause="x"))
    assert head.state.outcome is not None
    assert head.state.outcome[0] == expected


def test_a_rank_that_only_lost_its_peers_waits_for_the_first_cause() -> None:
    head = Head(rules_of(1))
    head.be_ready()
    head.hear("head", RankGone(rank=0, exit_code=6, cause="all_reduce failed", secondary=True))
    head.wait(1, alive=["head", "worker 0"])
    assert head.state.outcome is None
    head.hear("worker 0", RankGone(rank=1, exit_code=3, cause="out of memory"))
    assert head.state.outcome == (3, "rank 1 on worker 0 (host-worker 0, pid 1001): out of memory")


def test_a_broken_collective_blames_the_node_that_fell_silent() -> None:
    head = Head(rules_of(1))
    head.be_ready()
    head.wait(1, alive=["head", "worker 0"])
    head.hear("head", RankGone(rank=0, exit_code=6, cause="all_reduce failed", secondary=True))
    head.wait(4, alive=["head"])
    assert head.state.outcome is not None
    code, cause = head.state.outcome
    assert code == 6
    assert cause.startswith("worker 0 (host-worker 0, pid 100) was lost")
    assert "all_reduce failed" in cause


def test_a_broken_collective_with_all_nodes_alive_is_the_cause_after_a_grace_time() -> None:
    head = Head(rules_of(1, heartbeat_interval_s=0.1))
    head.be_ready()
    head.hear("head", RankGone(rank=0, exit_code=6, cause="all_reduce failed", secondary=True))
    head.hear("worker 0", RankGone(rank=1, exit_code=6, cause="a later one", secondary=True))
    head.wait(1.5, alive=["head", "worker 0"])
    assert head.state.outcome is None, "the agent that watches the first rank to die needs time to say so"
    head.wait(1, alive=["head", "worker 0"])
    assert head.state.outcome == (6, "rank 0 on head (host-head, pid 1000): all_reduce failed")


@pytest.mark.parametrize(("code", "expected"), [(0, 6), (4, 4), (130, 130)])
def test_a_node_that_leaves_a_running_cluster_ends_it(code: int, expected: int) -> None:
    head = Head(rules_of(1))
    head.be_ready()
    head.hear("worker 0", goodbye("worker 0", code, "second signal"))
    assert head.told("head", Shutdown)[0].exit_code == expected
    assert "worker 0 (host-worker 0, pid 100) left: second signal" in head.told("head", Shutdown)[0].cause
    assert not head.told("worker 0", Shutdown)


def test_a_head_that_leaves_before_the_start_takes_its_workers_with_it() -> None:
    head = Head(rules_of(2))
    head.register(None, 0)
    head.hear("head", goodbye("head", 130, "SIGINT"))
    assert head.told("worker 0", Shutdown)[0].exit_code == 130


def test_the_first_cause_wins() -> None:
    head = Head(rules_of(1))
    head.be_ready()
    head.hear("worker 0", RankGone(rank=1, exit_code=3, cause="first"))
    outcome = head.state.outcome
    head.hear("head", RankGone(rank=0, exit_code=1, cause="second"))
    head.hear("head", goodbye("head", 4, "third"))
    head.interrupt(reason="fourth", immediate=True, exit_code=130)
    head.wait(60)
    assert head.state.outcome == outcome
    assert outcome is not None
    assert "first" in outcome[1]


def test_the_head_finishes_once_all_nodes_have_said_goodbye() -> None:
    head = Head(rules_of(1))
    head.be_ready()
    head.interrupt(reason="now", immediate=True, exit_code=130)
    head.hear("head", goodbye("head", 130))
    assert head.tick() == ()
    head.hear("worker 0", goodbye("worker 0", 130))
    assert head.tick() == (Finish(130, "now"),)


def test_the_head_does_not_wait_for_the_goodbye_of_a_lost_node() -> None:
    head = Head(rules_of(1))
    head.be_ready()
    head.wait(11, alive=["head"])
    head.hear("head", goodbye("head", 6))
    head.wait(0.5)
    assert [finish.exit_code for finish in head.finishes] == [6]


def test_the_head_waits_only_so_long_for_goodbyes() -> None:
    head = Head(rules_of(1))
    head.be_ready()
    head.interrupt(reason="", immediate=True)
    head.wait(4, alive=["head", "worker 0"])
    assert not head.finishes
    head.wait(2, alive=["head", "worker 0"])
    assert head.finishes


def test_an_interrupted_head_does_not_wait_for_workers_that_never_came() -> None:
    head = Head(rules_of(3))
    head.register(None)
    head.hear("head", DrainRequest(reason="SIGINT", immediate=True, exit_code=130))
    head.hear("head", goodbye("head", 130))
    assert head.tick() == (Finish(130, "SIGINT"),)


def test_draining_ends_when_the_last_request_has_its_answer() -> None:
    head = Head(rules_of(1))
    head.be_ready()
    head.hear("worker 0", DrainRequest(reason="SIGTERM"))
    head.wait(5, alive=["head", "worker 0"], in_flight=2)
    assert head.state.phase == "draining"
    head.tick(in_flight=0)
    assert head.state.outcome == (0, "SIGTERM")


def test_draining_ends_after_the_timeout_with_requests_unfinished() -> None:
    head = Head(rules_of(1))
    head.be_ready()
    head.interrupt(reason="SIGTERM")
    head.wait(31, alive=["head", "worker 0"], in_flight=1)
    assert head.state.outcome == (0, "SIGTERM")


def test_a_second_drain_changes_nothing_and_an_immediate_one_ends_it() -> None:
    head = Head(rules_of(1))
    head.be_ready()
    head.interrupt(reason="first")
    head.interrupt(reason="second")
    assert head.state.draining_reason == "first"
    head.interrupt(reason="now", immediate=True, exit_code=130)
    assert head.state.outcome == (130, "now")


def test_draining_a_cluster_that_never_became_ready_ends_it_at_once() -> None:
    head = Head(rules_of(1))
    head.start()
    head.interrupt(reason="SIGTERM")
    assert head.state.outcome == (0, "SIGTERM")


def test_a_rank_that_dies_while_draining_is_a_failure() -> None:
    head = Head(rules_of(1))
    head.be_ready()
    head.interrupt(reason="SIGTERM")
    head.hear("worker 0", RankGone(rank=1, exit_code=6, cause="killed"))
    assert head.state.outcome is not None
    assert head.state.outcome[0] == 6


# -- anything at all --------------------------------------------------------------------------------------------------

INSTANCES = ("head", "worker 0", "worker 1", "second", "standby")
KEYS = st.sampled_from([None, 0, 1, 2, -1])
CODES = st.integers(-10, 300)

HEARTBEATS = st.one_of(
    st.sampled_from(INSTANCES).map(lambda instance: Heartbeat(instance=instance)),
    st.builds(
        lambda rank, step, process: Heartbeat(
            instance="x", ranks=(RankProgress(rank, step, step, "gather", step == 1, process),)
        ),
        st.integers(-1, 3),
        st.integers(0, 2),
        st.sampled_from(["S", "T"]),
    ),
)
BODIES = st.one_of(
    st.builds(
        lambda instance, **probe: fingerprint_of(instance, **probe),
        st.sampled_from(INSTANCES),
        torch=st.sampled_from(["2.13.0", "2.13.0", "2.13.0", "2.11.0"]),
    ),
    st.builds(update_of, st.integers(-1, 4), st.sampled_from([*RANK_PHASES, "nonsense"])),
    st.just(EpochEnded(instance="x")),
    st.builds(RankGone, rank=st.integers(-1, 4), exit_code=CODES, cause=st.just("rank"), secondary=st.booleans()),
    st.builds(DrainRequest, reason=st.just("drain"), immediate=st.booleans(), exit_code=CODES),
    st.builds(Goodbye, instance=st.just("x"), exit_code=CODES, cause=st.just("bye")),
    st.sampled_from(
        [LISTENING, Abort(request_id="r"), RankHello(local_rank=0, pid=1), Shutdown(exit_code=1, cause="")]
    ),
)
SENDERS = st.sampled_from([*INSTANCES, "stranger"])
EPOCHS = st.sampled_from([0, 1, 1, 1, 2])
HEARD = st.builds(Heard, SENDERS, BODIES, epoch=EPOCHS)
BEATS = st.lists(st.builds(Heard, SENDERS, HEARTBEATS, epoch=EPOCHS), max_size=4).map(lambda each: Beats(tuple(each)))
REGISTERED = st.builds(
    lambda instance, key: Heard(
        instance, register_of(key, instance=instance, standby=key is None and instance == "standby"), epoch=0
    ),
    st.sampled_from(INSTANCES),
    KEYS,
)
HANGUPS = st.sampled_from(INSTANCES).map(HungUp)
JOINED = st.sampled_from([(None, "head"), (0, "worker 0"), (1, "worker 1")]).map(
    lambda node: Heard(node[1], register_of(node[0], instance=node[1]), epoch=0)
)
TICKS = st.builds(Tick, in_flight=st.integers(0, 2))
INTERRUPTS = st.builds(DrainRequest, reason=st.just("i"), immediate=st.booleans()).map(Interrupt)
EVENTS = st.one_of(HEARD, HEARD, BEATS, REGISTERED, JOINED, HANGUPS, TICKS, INTERRUPTS)
MOMENTS = st.lists(st.tuples(st.sampled_from([0.0, 0.1, 0.5, 3.0, 50.0]), EVENTS), max_size=60)

JOINING: list[Event] = [
    *(Heard(name_of(key), register_of(key), epoch=0) for key in (None, 0, 1)),
    *(Heard(name_of(key), fingerprint_of(name_of(key)), epoch=0) for key in (None, 0, 1)),
]
RUNNING: list[Event] = [
    *JOINING,
    *(Heard(name_of(key), update_of(rank, "ready"), epoch=1) for rank, key in enumerate((None, 0, 1))),
]
BEGINNINGS = st.sampled_from([[], JOINING, RUNNING])


def check_step(before: State, after: State, actions: tuple[Any, ...], rules: Rules) -> None:
    """What holds for every step that the head ever takes."""
    aborted = len(after.restarts) > len(before.restarts)
    assert aborted or PHASES.index(after.phase) >= PHASES.index(before.phase)
    assert len(after.restarts) <= rules.max_restarts
    if aborted and before.phase in RANK_PHASES:
        told = {action.instance for action in actions if isinstance(action, Send) and isinstance(action.body, EndEpoch)}
        assert told >= set(after.members)
    assert before.outcome is None or after.outcome == before.outcome
    assert set(after.nodes) <= set(rules.keys)
    assert after.members == {node.register.instance: key for key, node in after.nodes.items()}
    ranks = [update.phase for node in after.nodes.values() for update in node.ranks.values()]
    assert after.num_ranks_at == tuple(ranks.count(phase) for phase in RANK_PHASES)
    if after.outcome is not None:
        assert 0 <= after.outcome[0] <= 255
    if before.outcome is None and after.outcome is not None:
        told = {action.instance for action in actions if isinstance(action, Send) and isinstance(action.body, Shutdown)}
        assert {node.register.instance for node in after.nodes.values() if not node.gone} <= told
    if any(isinstance(action, Send) and isinstance(action.body, Assign) for action in actions):
        assert len(after.nodes) == len(rules.keys)
        assert all(node.fingerprint is not None for node in after.nodes.values())
        assert before.phase in ("recover", "register", "compare")
        assert after.epoch == before.epoch + 1
    finishes = [action for action in actions if isinstance(action, Finish)]
    assert len(finishes) <= 1
    assert all((finish.exit_code, finish.cause) == after.outcome for finish in finishes)


@settings(max_examples=300, deadline=None)
@given(beginning=BEGINNINGS, moments=MOMENTS, max_restarts=st.integers(0, 2))
def test_no_order_of_events_breaks_an_invariant_and_the_end_always_comes(
    beginning: list[Event], moments: list[tuple[float, Event]], max_restarts: int
) -> None:
    rules = rules_of(2, shutdown_timeout_s=5, max_restarts=max_restarts)
    state, now, last_tick = State(), 0.0, 0.0
    for pause, event in [(0.0, event) for event in beginning] + moments:
        now += pause
        before = state
        state, actions = advance(state, event, now, rules)
        check_step(before, state, actions, rules)
        view(state, now, stats=EngineStats())
    finishes = []
    last_tick = now
    while not finishes:
        now += 0.5
        before = state
        state, actions = advance(state, Tick(in_flight=0), now, rules)
        check_step(before, state, actions, rules)
        finishes = [action for action in actions if isinstance(action, Finish)]
        assert now - last_tick < 6000, f"still waiting in phase {state.phase}"


def test_advance_changes_nothing_that_it_is_given() -> None:
    rules = rules_of(1)
    states = [State()]
    for event in [*JOINING[:2], *JOINING[3:5], Tick(in_flight=0), Heard("worker 0", update_of(1, "load"), epoch=1)]:
        copy = replace(states[-1], nodes=dict(states[-1].nodes), members=dict(states[-1].members))
        state, _ = advance(states[-1], event, 1.0, rules)
        assert states[-1] == copy
        states.append(state)


# -- the view ---------------------------------------------------------------------------------------------------------


def test_the_view_shows_each_node_and_rank() -> None:
    head = Head(rules_of(1))
    head.start()
    head.hear("worker 0", update_of(1, "ready", weight_bytes=7, kv_blocks=9, done=11, load_s=1.5))
    progress = RankProgress(1, step=4, num_waits=9, wait="gather", waiting=False, process="S")
    head.hear("worker 0", Heartbeat(instance="worker 0", ranks=(progress,)))
    head.now = 2.5
    cluster = view(head.state, head.now, stats=EngineStats(num_requests_running=3))
    assert (cluster.state, cluster.reason, cluster.epoch, cluster.phase) == ("starting", "phase start", 1, "start")
    assert cluster.plan == {"world_size": 2}
    assert cluster.stats.num_requests_running == 3
    first, second = cluster.nodes
    assert (first.node_id, first.role, first.state, first.ranks) == ("head", "head", "starting", ())
    assert (second.node_id, second.role, second.host, second.pid) == ("worker-0", "worker", "host-worker 0", 100)
    assert (second.state, second.last_seen_s) == ("ready", 2.5)
    (rank,) = second.ranks
    assert (rank.rank, rank.local_rank, rank.pid, rank.device) == (1, 0, 1001, "cpu")
    assert (rank.state, rank.step, rank.weight_bytes, rank.kv_blocks) == ("ready", 4, 7, 9)
    assert (rank.step_age_s, rank.load_bytes, rank.load_s) == (2.5, 11, 1.5)


@pytest.mark.parametrize(
    ("request_", "state", "reason"),
    [
        (None, "ready", ""),
        (DrainRequest(reason="why"), "draining", "why"),
        (DrainRequest(reason="why", immediate=True, exit_code=130), "draining", "why"),
        (DrainRequest(reason="why", immediate=True, exit_code=6), "failed", "why"),
    ],
)
def test_the_view_names_the_state_of_the_cluster(request_: DrainRequest | None, state: str, reason: str) -> None:
    head = Head(rules_of(1))
    head.be_ready()
    if request_ is not None:
        head.apply(Interrupt(request_))
    cluster = view(head.state, head.now, stats=EngineStats())
    assert (cluster.state, cluster.reason) == (state, reason)
    assert cluster.engine is not None
    assert cluster.engine.max_tokens == 512


def test_a_node_that_has_left_is_shown_as_gone() -> None:
    head = Head(rules_of(1))
    head.be_ready()
    head.hear("worker 0", goodbye("worker 0", 1))
    assert view(head.state, 0.0, stats=EngineStats()).nodes[1].state == "gone"


def test_of_reports_that_a_peer_had_gone_the_lowest_ranks_is_shown() -> None:
    head = Head(rules_of(2))
    head.be_ready()
    for key, rank in ((1, 2), (None, 0), (0, 1)):
        head.hear(name_of(key), RankGone(rank=rank, exit_code=6, cause=f"from {rank}", secondary=True))
    head.wait(30, alive=[name_of(None), name_of(0), name_of(1)])
    assert head.state.outcome is not None
    assert head.state.outcome[0] == 6
    assert "from 0" in head.state.outcome[1]
