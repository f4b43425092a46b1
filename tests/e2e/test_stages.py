"""Pipeline stages as a user runs them: on one node, over unequal nodes, and over machines with addresses of their own.

Every endpoint gives the tokens of transformers; who is killed is named; what cannot be is refused with the numbers.
"""

import json
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from checkpoints import make_checkpoint, reference_logits, reference_tokens

from e2e.clients import Stream, complete, completed_tokens
from e2e.cluster import (
    LOOPBACK,
    QUICK_LOSS,
    NodeProcess,
    Processes,
    free_port,
    head_variables,
    worker_variables,
)
from e2e.namespaces import Machine, machines, why_not

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

NUM_LAYERS = 5
NUM_TOKENS = 8
STREAM_TOKENS = 100
PROMPTS = [[(7 * index + length) % 256 for index in range(length)] for length in (1, 2, 16, 17, 40, 75)]
ODD = {"hidden_size": 60, "num_attention_heads": 12, "head_dim": 20, "max_position_embeddings": 4096}
CACHE = {"TPDIST_KV_CACHE_MEMORY_BYTES": "8MiB"}
LOCAL_SIZE = "MISTRALRS_MN_LOCAL_WORLD_SIZE"
STAGES = "MISTRALRS_PIPELINE_PARALLEL"
AT_ONCE_S = 20.0
RANK_BOUND_S = 8.0
"""Agents ask the ranks that are left to end, and give them five seconds."""
HANG_TIMEOUT_S = "4"
NO_RESTARTS = {"TPDIST_MAX_RESTARTS": "0"}
HANG_BOUND_S = 16.0
"""A stopped process does not end when it is asked to: after five seconds it is killed."""
PLAN, USAGE, DISAGREEMENT, LOST = 3, 2, 5, 6


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of five layers whose output is tied to its embedding."""
    return make_checkpoint(
        tmp_path_factory.mktemp("staged"),
        architecture="Qwen3ForCausalLM",
        tokenizer=True,
        tie_word_embeddings=True,
        num_hidden_layers=NUM_LAYERS,
        **ODD,
    )


@pytest.fixture(scope="module")
def expected(staged: Path) -> list[list[int]]:
    return reference_tokens(staged, PROMPTS, NUM_TOKENS)


def stages_of(node: NodeProcess) -> list[tuple[int, list[int]]]:
    """Stage and layers of each rank, as the node shows them."""
    return [(rank["stage"], rank["layers"]) for rank in node.cluster()["plan"]["ranks"]]


def holds_what_was_foretold(node: NodeProcess) -> None:
    """Bytes of weights and cache on every rank, within 5 percent."""
    state = node.cluster()
    foretold = {plan["rank"]: plan for plan in state["plan"]["devices"]}
    held = {each["rank"]: each for each in state["plan"]["measured"]}
    assert set(held) == set(foretold)
    for rank, measured in held.items():
        for name in ("weight_bytes", "kv_cache_bytes"):
            assert measured[name] == pytest.approx(foretold[rank][name], rel=0.05), f"rank {rank}: {name}"


# -- one node ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trace")


@pytest.fixture(scope="module")
def two_stages(staged: Path, trace: Path) -> Iterator[NodeProcess]:
    """One node with two ranks, a stage each, whose steps are traced. At the end it drains."""
    variables = {LOCAL_SIZE: "2", STAGES: "2", "TPDIST_TRACE_FOLDER": str(trace), **CACHE}
    with Processes() as processes:
        yield processes.serve("single", staged, variables).wait_ready()
        processes.stop()


def test_two_stages_on_one_node_answer_concurrent_requests_of_all_kinds(
    two_stages: NodeProcess, staged: Path, expected: list[list[int]]
) -> None:
    """Whole, in a stream, with log-probabilities, with an echo, and one whose client leaves in the middle."""
    leaving = Stream(two_stages, [9, 9, 9], max_tokens=4000).wait_first()
    with ThreadPoolExecutor(len(PROMPTS) + 2) as pool:
        streams = [Stream(two_stages, prompt, max_tokens=NUM_TOKENS) for prompt in PROMPTS]
        wholes = [pool.submit(completed_tokens, two_stages, prompt, NUM_TOKENS) for prompt in PROMPTS]
        scored = pool.submit(complete, two_stages, PROMPTS[2], max_tokens=NUM_TOKENS, logprobs=2, prompt_logprobs=0)
        echoed = pool.submit(complete, two_stages, PROMPTS[3], max_tokens=NUM_TOKENS, echo=True, logprobs=0)
        leaving.leave()
    assert [stream.finish().token_ids for stream in streams] == expected
    assert [whole.result() for whole in wholes] == expected
    assert not leaving.done
    check_scores(staged, PROMPTS[2], expected[2], scored.result()["choices"][0])
    check_echo(staged, PROMPTS[3], expected[3], echoed.result()["choices"][0])
    two_stages.wait_until(
        lambda: two_stages.metric("tpdist_num_requests_running") == 0, "stays busy", timeout_s=AT_ONCE_S
    )
    assert two_stages.metric("tpdist_kv_cache_usage_perc") == 0


def logprobs_of(model: Path, prompt: Sequence[int], tokens: Sequence[int]) -> list[float]:
    """What transformers makes of each token after the first."""
    scores = reference_logits(model, [*prompt, *tokens]).log_softmax(-1)
    following = [*prompt, *tokens][1:]
    return [scores[position, token].item() for position, token in enumerate(following)]


def check_scores(model: Path, prompt: Sequence[int], tokens: Sequence[int], choice: Any) -> None:
    reference = logprobs_of(model, prompt, tokens)
    assert choice["token_ids"] == tokens
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(reference[len(prompt) - 1 :], abs=1e-3)
    first, *rest = choice["prompt_logprobs"]
    assert first is None
    found = [entry[str(token)]["logprob"] for entry, token in zip(rest, prompt[1:], strict=True)]
    assert found == pytest.approx(reference[: len(prompt) - 1], abs=1e-3)


def check_echo(model: Path, prompt: Sequence[int], tokens: Sequence[int], choice: Any) -> None:
    first, *rest = choice["logprobs"]["token_logprobs"]
    assert first is None
    assert rest == pytest.approx(logprobs_of(model, prompt, tokens), abs=1e-3)


def test_a_node_shows_its_stages_and_what_they_hold(two_stages: NodeProcess) -> None:
    plan = two_stages.cluster()["plan"]
    assert (plan["tensor_parallel_size"], plan["pipeline_parallel_size"]) == (1, 2)
    (first, (start, stop)), (second, (middle, end)) = stages_of(two_stages)
    assert (first, second, start, end) == (0, 1, 0, NUM_LAYERS)
    assert stop == middle
    holds_what_was_foretold(two_stages)


def test_stages_work_on_different_steps_at_the_same_time(two_stages: NodeProcess, trace: Path) -> None:
    """The first stage computes a step while the last one is not done with the step before."""
    complete(two_stages, PROMPTS, max_tokens=40)
    first, last = (
        [json.loads(line) for line in (trace / f"rank-{rank}.jsonl").read_text().splitlines()] for rank in range(2)
    )
    assert {event["name"] for event in first} == {"forward", "send"}
    assert {event["name"] for event in last} == {"receive", "forward", "sample"}
    begins = {event["step"]: event["begin"] for event in first if event["name"] == "forward"}
    ends = {event["step"]: event["end"] for event in last if event["name"] == "sample"}
    assert any(begins[step + 1] < ends[step] for step in ends if step > 0 and step + 1 in begins)


def test_more_ranks_than_heads_are_the_fewest_stages_that_work_and_the_plan_says_so(
    processes: Processes, tmp_path: Path
) -> None:
    model = make_checkpoint(
        tmp_path / "narrow",
        tokenizer=True,
        hidden_size=20,
        head_dim=6,
        intermediate_size=28,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    node = processes.serve("single", model, {LOCAL_SIZE: "3", **CACHE}).wait_ready()
    assert completed_tokens(node, PROMPTS[4], NUM_TOKENS) == reference_tokens(model, [PROMPTS[4]], NUM_TOKENS)[0]
    plan = node.cluster()["plan"]
    assert (plan["tensor_parallel_size"], plan["pipeline_parallel_size"]) == (1, 3)
    assert any("3 ranks" in note and "2 query heads" in note and "3 stages" in note for note in plan["notes"])
    processes.stop()


def test_torchrun_runs_stages(processes: Processes, staged: Path, expected: list[list[int]]) -> None:
    flags = ("--nproc-per-node", "2", "--master-port", str(free_port()))
    command = [sys.executable, "-m", "torch.distributed.run", *flags, "-m", "tpdist", "serve", str(staged)]
    node = processes.run("torchrun", command, {STAGES: "2", **CACHE}).wait_ready()
    assert [completed_tokens(node, prompt, NUM_TOKENS) for prompt in PROMPTS[3:]] == expected[3:]
    assert [stage for stage, _ in stages_of(node)] == [0, 1]
    node.send(signal.SIGTERM)
    node.wait(AT_ONCE_S)


def test_layers_on_the_disk_of_one_process_answer_as_transformers(
    processes: Processes, staged: Path, tmp_path: Path, expected: list[list[int]]
) -> None:
    names = {"": "cpu", "model.layers.3": "disk", "model.layers.4": "disk", "model.norm": "disk", "lm_head": "disk"}
    variables = {"TPDIST_DEVICE_MAP": json.dumps(names), "TPDIST_OFFLOAD_FOLDER": str(tmp_path / "offload")}
    node = processes.serve("single", staged, {"MISTRALRS_NO_NCCL": "1", **variables, **CACHE}).wait_ready()
    assert [choice["token_ids"] for choice in complete(node, PROMPTS, max_tokens=NUM_TOKENS)["choices"]] == expected
    state = node.cluster()
    measured = {each["device"]: each for each in state["plan"]["measured"]}
    assert [*measured] == ["cpu", "disk"]
    for foretold in state["plan"]["devices"]:
        held = measured[foretold["device"]["name"]]
        assert held["weight_bytes"] == pytest.approx(foretold["weight_bytes"], rel=0.05)
        assert held["kv_cache_bytes"] == pytest.approx(foretold["kv_cache_bytes"], rel=0.05)
    assert not list((tmp_path).glob("offload/*"))
    processes.stop()


# -- several nodes ----------------------------------------------------------------------------------------------------


def two_unequal_nodes(
    processes: Processes, model: Path, *, both: Mapping[str, str] | None = None, **more: object
) -> tuple[NodeProcess, NodeProcess]:
    """A head with one rank and a worker with two; `more` the head alone sets, and it holds for both."""
    port = free_port()
    sizes = [{LOCAL_SIZE: "1"}, {LOCAL_SIZE: "2"}]
    shared = {**QUICK_LOSS, **(both or {})}
    head_only = head_variables(port, world_size=3, num_workers=1, **more)
    head = processes.serve("head", model, {**head_only, **sizes[0], **CACHE, **shared})
    worker = processes.serve("worker-0", model, {**worker_variables(0, port, world_size=3), **sizes[1], **shared})
    return head.wait_ready(), worker.wait_ready()


@pytest.mark.parametrize(("rank", "place"), [(1, "in the middle"), (2, "the last")], ids=["middle", "last"])
def test_a_killed_rank_of_a_stage_ends_every_node_and_is_named(
    processes: Processes, staged: Path, rank: int, place: str
) -> None:
    head, worker = two_unequal_nodes(processes, staged, both=NO_RESTARTS, **{STAGES: 3})
    assert stages_of(worker)[rank][0] == rank, place
    streams = [Stream(node, [1, 2, 3], max_tokens=4000) for node in (head, worker, head)]
    for stream in streams:
        stream.wait_first()
    pids = {each["rank"]: each["pid"] for node in head.cluster()["nodes"] for each in node["ranks"]}
    os.kill(pids[rank], signal.SIGKILL)
    assert processes.exit_codes(RANK_BOUND_S) == {"head": LOST, "worker-0": LOST}, processes.logs()
    for node in (head, worker):
        error = node.log[node.log.index("error: ") :]
        assert f"rank {rank} on worker 0" in error
        assert "SIGKILL" in error
        assert "Traceback" not in node.log
    for stream in streams:
        stream.finish(timeout_s=5)
        assert f"rank {rank} on worker 0" in stream.error
        assert not stream.done


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_stage_that_hangs_ends_every_node_and_is_named(processes: Processes, staged: Path, rank: int) -> None:
    """The others wait for it, in a receive or for a plan or a result; it is known by what each has noted."""
    both = {**NO_RESTARTS, "TPDIST_NODE_LOST_S": "60", "TPDIST_HANG_TIMEOUT_S": HANG_TIMEOUT_S}
    head, worker = two_unequal_nodes(processes, staged, both=both, **{STAGES: 3})
    stream = Stream(head, [1, 2, 3], max_tokens=4000).wait_first()
    ranks = [each for node in worker.cluster()["nodes"] for each in node["ranks"]]
    os.kill(ranks[rank]["pid"], signal.SIGSTOP)
    assert processes.exit_codes(HANG_BOUND_S) == {"head": LOST, "worker-0": LOST}, processes.logs()
    place = "head" if rank == 0 else "worker 0"
    for node in (head, worker):
        assert f"furthest behind is rank {rank} on {place}" in node.log[node.log.index("error: ") :]
    assert stream.finish(timeout_s=5).error


def test_every_rank_reports_its_steps_while_requests_run(processes: Processes, staged: Path) -> None:
    """With stages the next plan is always there when a step ends: ranks must find time for a word all the same."""
    at_once = {"TPDIST_SHUTDOWN_TIMEOUT_S": "0"}
    node = processes.serve("single", staged, {STAGES: "2", **CACHE, **at_once}).wait_ready()
    streams = [Stream(node, [1, 2, number], max_tokens=4000) for number in range(4)]
    for stream in streams:
        stream.wait_first()

    def lowest_step() -> int:
        return min(rank["step"] for each in node.cluster()["nodes"] for rank in each["ranks"])

    first = lowest_step()
    node.wait_until(lambda: lowest_step() > first + 50, "shows no later step of every rank", timeout_s=AT_ONCE_S)
    assert not any(stream.done for stream in streams)
    processes.stop()


def test_sigterm_drains_the_stages_of_all_nodes(processes: Processes, staged: Path) -> None:
    """The worker learns of the stages from the head. Streams of both nodes go on to their ends."""
    head, worker = two_unequal_nodes(processes, staged, **{STAGES: 3})
    streams = [Stream(node, [1, 2, 3], max_tokens=STREAM_TOKENS).wait_first() for node in (head, worker)]
    worker.send(signal.SIGTERM)
    answers = [stream.finish().token_ids for stream in streams]
    assert all(stream.done for stream in streams)
    assert answers[0] == answers[1]
    assert answers[0][:NUM_TOKENS] == reference_tokens(staged, [[1, 2, 3]], NUM_TOKENS)[0]
    assert len(answers[0]) == STREAM_TOKENS
    assert processes.exit_codes() == {"head": 0, "worker-0": 0}


@pytest.fixture(scope="module")
def network() -> Iterator[list[Machine]]:
    if reason := why_not():
        pytest.skip(reason)
    with machines(3) as made:
        yield made


@pytest.mark.netns
@pytest.mark.parametrize(
    ("sizes", "asked", "shown"),
    [
        pytest.param(
            (1, 1, 1),
            {STAGES: 3, "TPDIST_PIPELINE_LAYERS": "1,3,1"},
            [(0, [0, 1]), (1, [1, 4]), (2, [4, 5])],
            id="a stage on each machine",
        ),
        pytest.param(
            (2, 1, 1),
            {"TPDIST_PIPELINE_LAYERS": "3,2", "TPDIST_TENSOR_SHARES": "1,2,3,1"},
            [(0, [0, 3])] * 2 + [(1, [3, 5])] * 2,
            id="two stages of two ranks on unequal machines",
        ),
    ],
)
def test_stages_over_machines_answer_as_transformers_on_every_one(
    processes: Processes,
    network: list[Machine],
    staged: Path,
    expected: list[list[int]],
    sizes: tuple[int, ...],
    asked: dict[str, object],
    shown: list[tuple[int, list[int]]],
) -> None:
    """Layers and shares are given by the head alone."""
    port, world_size, insecure = free_port(), sum(sizes), {"TPDIST_INSECURE": "1"}
    roles = [head_variables(port, world_size=world_size, num_workers=2, **asked, **CACHE)]
    roles += [worker_variables(index, port, world_size=world_size, host=network[0].address) for index in range(2)]
    for name, machine, size, role in zip(("head", "worker-0", "worker-1"), network, sizes, roles, strict=True):
        variables = {"TPDIST_HOST": machine.address, LOCAL_SIZE: str(size), **role, **insecure}
        processes.serve(name, staged, variables, prefix=machine.prefix)
    for node, machine in zip(processes.nodes, network, strict=True):
        machine.call(node.wait_ready)
    for node, machine in zip(processes.nodes, network, strict=True):
        answer = machine.call(lambda at=node: complete(at, PROMPTS, max_tokens=NUM_TOKENS))
        assert [choice["token_ids"] for choice in answer["choices"]] == expected, node.name
        assert machine.call(stages_of, node) == shown
        machine.call(holds_what_was_foretold, node)
    processes.stop()


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_a_worker_with_another_number_of_stages_disagrees(processes: Processes, staged: Path) -> None:
    port = free_port()
    processes.serve("head", staged, head_variables(port, world_size=2, num_workers=1, **{STAGES: 2}))
    processes.serve("worker-0", staged, worker_variables(0, port, world_size=2, **{STAGES: 1}))
    assert processes.exit_codes(AT_ONCE_S) == {"head": DISAGREEMENT, "worker-0": DISAGREEMENT}, processes.logs()
    for node in processes.nodes:
        assert not [text for text in ("pipeline_parallel_size", "head=2", "worker 0=1") if text not in node.log]
        assert "rank=" not in node.log
        assert "Traceback" not in node.log


@pytest.mark.parametrize(
    ("variables", "flags", "exit_code", "named"),
    [
        pytest.param(
            {LOCAL_SIZE: "2"},
            ("--pipeline-layers", "2,2"),
            PLAN,
            ["2, 2", "5 layers"],
            id="layers that do not add up",
        ),
        pytest.param(
            {LOCAL_SIZE: "2"},
            ("--pipeline-parallel-size", "2", "--pipeline-layers", "1,2,2"),
            USAGE,
            ["TPDIST_PIPELINE_LAYERS=1,2,2", "3 stages", f"{STAGES}=2"],
            id="layers of another number of stages",
        ),
        pytest.param({LOCAL_SIZE: "6", STAGES: "6"}, (), PLAN, ["6 stages", "5 layers"], id="more stages than layers"),
        pytest.param(
            {LOCAL_SIZE: "4", STAGES: "2", "TPDIST_TENSOR_SHARES": "1,2,1"},
            (),
            PLAN,
            ["1, 2, 1", "2 (the same for each stage) or 4"],
            id="shares of another number of ranks",
        ),
        pytest.param(
            {LOCAL_SIZE: "3", STAGES: "2"}, (), USAGE, [f"{STAGES}=2", f"{LOCAL_SIZE}=3"], id="ranks that are left"
        ),
        pytest.param(
            {"MISTRALRS_NO_NCCL": "1", STAGES: "2"},
            (),
            USAGE,
            ["MISTRALRS_NO_NCCL=1", f"{STAGES}=2"],
            id="stages in one process",
        ),
        pytest.param(
            {"MISTRALRS_NO_NCCL": "1", **worker_variables(0, 5555, world_size=2, host=LOOPBACK)},
            (),
            USAGE,
            ["MISTRALRS_NO_NCCL=1", "MISTRALRS_MN_GLOBAL_WORLD_SIZE=2", "MISTRALRS_MN_WORKER_ID=0"],
            id="one process and several nodes",
        ),
        pytest.param(
            {"MISTRALRS_NO_NCCL": "1"}, ("-n", "0:3"), PLAN, ["0:3", "there are none"], id="layers on a GPU that is not"
        ),
        pytest.param(
            {"TPDIST_DEVICE_MAP": '{"": "disk"}'},
            (),
            PLAN,
            ["disk", "--offload-folder"],
            id="the disk without a folder",
        ),
        pytest.param(
            {"TPDIST_MAX_MEMORY": "cpu=257MiB"},
            (),
            PLAN,
            ["cpu on head lacks", "257.0 MiB"],
            id="memory that does not do",
        ),
    ],
)
def test_a_placement_that_cannot_be_is_refused_with_the_numbers(
    processes: Processes,
    staged: Path,
    variables: dict[str, str],
    flags: tuple[str, ...],
    exit_code: int,
    named: list[str],
) -> None:
    command = [sys.executable, "-m", "tpdist", "serve", str(staged), *flags]
    node = processes.run("node", command, variables)
    assert node.wait(AT_ONCE_S) == exit_code, node.log
    assert not [text for text in named if text not in node.log], node.log
    assert "Traceback" not in node.log
    assert "rank=" not in node.log
