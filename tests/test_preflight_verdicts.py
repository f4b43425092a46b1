"""What findings mean: which lines are red, what they name, and the exit code."""

from typing import Any

import pytest
from clusters import gpus, probe_of
from examinations import GIB, cluster_of, findings_of, limits_of, link_of, node_of

from tpdist.control.messages import Register
from tpdist.preflight.verdicts import diagnose
from tpdist.preflight.words import (
    Diagnosis,
    Examination,
    Failed,
    Findings,
    HeadUnreached,
    Line,
    ModelFound,
    ReduceFigures,
    ReduceMeasured,
)


def red_lines(examination: Examination) -> list[Line]:
    return [line for line in diagnose(examination) if line.state == "red"]


def only_red(examination: Examination) -> Line:
    (line,) = red_lines(examination)
    assert line.next_step
    return line


def alone(findings: Findings, **changes: Any) -> Examination:
    return Examination(nodes=(node_of(findings=findings),), **changes)


def exit_code(examination: Examination) -> int:
    return Diagnosis(examination=examination, lines=diagnose(examination)).exit_code


def test_a_healthy_cluster_is_green_and_names_every_way_between_nodes() -> None:
    examination = cluster_of(2)
    assert not red_lines(examination)
    assert exit_code(examination) == 0
    links = [line.where for line in diagnose(examination) if line.check == "link"]
    assert len(links) == 6
    assert "worker 0 to worker 1" in links


# -- one machine ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("findings", "check", "step", "code"),
    [
        (findings_of(probe=None, probe_problem="it did not end"), "versions", "tpdist probe", 2),
        (findings_of(probe=probe_of(torch=None)), "versions", "install torch", 2),
        (findings_of(probe=probe_of(driver="570.1")), "devices", "built for CUDA", 2),
        (findings_of(probe=probe_of(available_bytes=GIB // 2)), "memory", "cgroup", 2),
        (findings_of(limits=limits_of(open_files=256)), "open files", "ulimit -n", 2),
        (findings_of(model_problem="no config.json"), "model", "same model", 4),
        (findings_of(model_problem="quantized", model_exit_code=3), "model", "supported", 3),
        (
            findings_of(probe=probe_of(devices=gpus(2)), limits=limits_of(shm_bytes=64 * 1024**2)),
            "/dev/shm",
            "--shm-size",
            2,
        ),
        (
            findings_of(probe=probe_of(devices=gpus(1)), limits=limits_of(locked_bytes=65536, infiniband=True)),
            "locked memory",
            "ulimit -l",
            2,
        ),
    ],
)
def test_what_is_wrong_with_a_machine_is_red_with_the_next_step(
    findings: Findings, check: str, step: str, code: int
) -> None:
    line = only_red(alone(findings))
    assert (line.check, line.exit_code) == (check, code)
    assert step in line.next_step


def test_little_shared_memory_harms_nobody_without_several_gpus() -> None:
    assert not red_lines(alone(findings_of(limits=limits_of(shm_bytes=0))))


def test_a_gpu_that_is_asked_for_and_not_there_is_red() -> None:
    assert only_red(alone(findings_of(), device="cuda")).check == "devices"
    assert not red_lines(alone(findings_of(probe=probe_of(driver="570.1")), device="cpu"))


def test_the_time_for_the_whole_model_is_told() -> None:
    found = ModelFound(folder="m", total_bytes=4 * GIB, read_bytes=GIB, read_s=1.0, from_disk=True, digests={})
    line = next(line for line in diagnose(alone(findings_of(model=found))) if line.check == "model")
    assert "4.0 GiB" in line.found
    assert "4 s for all of it" in line.found


# -- who came ---------------------------------------------------------------------------------------------------------


def test_a_missing_worker_is_named_and_a_head_without_a_key_says_why() -> None:
    line = only_red(cluster_of(1, missing=(1,), local_only=True, global_world_size=None))
    assert (line.where, line.exit_code) == ("worker 1", 5)
    assert "60 s" in line.found
    assert "MISTRALRS_MN_WORKER_ID=1" in line.next_step
    assert "TPDIST_KEY_FILE" in line.next_step


def test_a_worker_that_says_nothing_of_itself_is_red() -> None:
    silent = Examination(nodes=(node_of(), node_of(0)), control="port 1")
    nodes = (silent.nodes[0], type(silent.nodes[1])(register=silent.nodes[1].register, findings=None))
    line = next(line for line in red_lines(cluster_of(1, nodes=nodes)) if line.check == "checkup")
    assert line.where == "worker 0 (host-worker 0)"
    assert line.exit_code == 5


def unreached(**changes: Any) -> Examination:
    fields = {"host": "alpha", "port": 7100, "addresses": ("10.0.0.1",), "problem": "", "waited_s": 60.0}
    return Examination(nodes=(node_of(0),), unreached=HeadUnreached(**{**fields, **changes}))


@pytest.mark.parametrize(
    ("changes", "found", "step"),
    [
        ({"addresses": (), "problem": "Name or service not known"}, "cannot be resolved", "IP address"),
        ({"addresses": ("127.0.1.1",), "problem": "refused"}, "alpha stands for 127.0.1.1", "/etc/hosts"),
        ({"problem": "no answer within 5 s"}, "alpha (10.0.0.1), port 7100: no answer", "open TCP port 7100"),
        ({"host": "127.0.0.1", "addresses": ("127.0.0.1",), "problem": "refused"}, "127.0.0.1, port 7100", "start"),
        ({}, "comes about, but no doctor answered within 60 s", "TPDIST_KEY_FILE"),
    ],
)
def test_a_head_that_is_not_reached_is_told_apart_by_how(changes: dict[str, Any], found: str, step: str) -> None:
    line = only_red(unreached(**changes))
    assert (line.check, line.exit_code) == ("way to head", 5)
    assert found in line.found
    assert step in line.next_step


def test_a_head_without_a_route_is_told_by_the_kernel_s_words_and_without_an_address_of_this_node() -> None:
    line = only_red(unreached(problem="[Errno 101] Network is unreachable", routed=False))
    assert (line.check, line.exit_code) == ("route to head", 5)
    assert line.found == "host-worker 0 has no route to alpha (10.0.0.1): [Errno 101] Network is unreachable"
    assert "`ip route get 10.0.0.1`" in line.next_step
    assert "127.0.0.1" not in line.next_step


@pytest.mark.parametrize("addresses", [("10.0.0.1",), (), ("127.0.1.1",)])
def test_a_head_that_falls_silent_is_told_as_such_whatever_its_name_stands_for(addresses: tuple[str, ...]) -> None:
    line = only_red(unreached(addresses=addresses, problem="refused", waited_s=20.0, heard=True))
    assert (line.check, line.exit_code) == ("way to head", 5)
    assert line.found == "the head's doctor at alpha:7100 fell silent for 20 s"
    assert "start both again" in line.next_step


# -- between nodes ----------------------------------------------------------------------------------------------------


def test_other_versions_models_and_settings_disagree_with_the_head() -> None:
    other = findings_of(probe=probe_of(torch="2.11.0", host_id="other"), explicit={"block_size": 32})
    lines = red_lines(cluster_of(1, nodes=(node_of(), node_of(0, other)), settings={"block_size": 16}))
    assert [line.found.partition(":")[0] for line in lines] == ["torch", "block_size"]
    assert "head has 2.13.0, worker 0 (host-worker 0) has 2.11.0" in lines[0].found
    assert {line.exit_code for line in lines} == {5}


def test_sizes_that_do_not_add_up_are_red() -> None:
    nodes = (node_of(local_world_size=1), node_of(0, local_world_size=1))
    line = only_red(cluster_of(1, nodes=nodes, global_world_size=4))
    assert line.check == "ranks"
    assert "MISTRALRS_MN_GLOBAL_WORLD_SIZE is 4" in line.found


def test_a_clock_that_is_off_is_red_by_how_much() -> None:
    links = (link_of(0, 1, skew_s=-90.0), link_of(1, 0, skew_s=90.0))
    line = only_red(cluster_of(1, links=links))
    assert (line.check, line.where) == ("clock", "worker 0 (host-worker 0)")
    assert line.found == "90 s behind the head's"


def test_a_broken_link_is_named_with_both_ends_and_sums_are_not_tried() -> None:
    links = (link_of(0, 1), link_of(1, 0, Failed(problem="refused")))
    examination = cluster_of(1, links=links, reduces=())
    line = only_red(examination)
    assert (line.check, line.where, line.exit_code) == ("link", "worker 0 to head", 5)
    assert "host-worker 0 to 10.0.0.1 port 40000: refused" in line.found
    assert "10.0.0.2" in line.next_step
    skipped = [line for line in diagnose(examination) if line.state == "skipped"]
    assert "a link is broken" in skipped[0].found


@pytest.mark.parametrize("figures", [{"bandwidth": 1e6}, {"latency_s": 0.1}])
def test_a_link_that_is_hardly_one_is_red(figures: dict[str, float]) -> None:
    assert only_red(cluster_of(1, links=(link_of(0, 1, **figures), link_of(1, 0)))).where == "head to worker 0"


def test_a_sum_that_fails_names_the_node_and_the_interface_variable() -> None:
    answers = (ReduceFigures(small_s=1e-3, large_s=1e-2), Failed(problem="rank 1: timed out"))
    reduce = ReduceMeasured(backend="nccl", world_size=2, nodes=(0, 1), answers=answers)
    line = only_red(cluster_of(1, reduces=(reduce,)))
    assert line.check == "nccl all-reduce"
    assert line.found == "worker 0 (host-worker 0): rank 1: timed out"
    assert "NCCL_SOCKET_IFNAME" in line.next_step


def test_the_highest_exit_code_of_the_red_lines_is_the_commands() -> None:
    broken = findings_of(model_problem="gone", limits=limits_of(open_files=1))
    assert exit_code(alone(broken)) == 4
    assert exit_code(cluster_of(1, nodes=(node_of(findings=broken), node_of(0)), missing=(1,))) == 5


def test_an_interface_that_is_not_found_is_red() -> None:
    lines = red_lines(cluster_of(1, nodes=(node_of(), node_of(0, interface=None))))
    assert [line.check for line in lines] == ["route to head"]
    assert isinstance(node_of(0).register, Register)
