"""`tpdist plan`: every option, what it prints, and how it ends."""

import json
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sparse_checkpoints import LLAMA_1B, LLAMA_70B, LLAVA, make_sparse, make_sparse_llava, write_config

from tpdist import builtin
from tpdist.cli.frame import run
from tpdist.cli.plan_output import MOST_REJECTED

GIB = 1024**3
EXAMPLE = Path(__file__).parents[1] / "configs" / "two-machines.toml"

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("TPDIST_", "MISTRALRS_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def plan(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command; its exit code, stdout and stderr."""

    def run_it(*argv: object) -> tuple[int, str, str]:
        code = run(["plan", *map(str, argv)])
        return (code, *capsys.readouterr())

    return run_it


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 1.5 billion parameters."""
    return make_sparse(tmp_path_factory.mktemp("small"), LLAMA_1B)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 70 billion parameters in 30 files."""
    return make_sparse(tmp_path_factory.mktemp("large"), LLAMA_70B, num_files=30)


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sparse_llava(tmp_path_factory.mktemp("llava"))


def as_json(result: tuple[int, str, str]) -> dict[str, Any]:
    code, out, err = result
    assert code == 0, err
    found = json.loads(out)
    assert isinstance(found, dict)
    return found


def plain(text: str) -> str:
    """Without line breaks and indentation."""
    return " ".join(text.split())


# -- what it prints ---------------------------------------------------------------------------------------------------


def test_a_plan_shows_model_devices_bars_and_predictions(plan: Run, small: Path) -> None:
    code, out, err = plan(small, "--devices", "2x24GiB", "--tensor-parallel-size", "2")
    assert (code, err) == (0, "")
    for word in (
        "LlamaForCausalLM, 1.5B parameters, 2.8 GiB in bfloat16",
        "2 ranks share every layer (tensor parallel) on node0: 16 layers",
        "node0",
        "cuda:1",
        "0-15",
        "weights",
        "KV cache",
        "predicted",
        "tokens/s",
        "at most",
        "the longest that fits is 8192 tokens",
        "why not another layout",
    ):
        assert word in plain(out)


@pytest.mark.parametrize("devices", ["2x24GiB", "8xH100,cpu=1TiB", "80GiB,48GiB,24GiB"])
@pytest.mark.parametrize("columns", [80, 120])
def test_no_line_is_wider_than_the_terminal(
    plan: Run, small: Path, devices: str, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    code, out, err = plan(small, "--devices", devices, "--all", "--pipeline-parallel-size", "1")
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= columns


def test_two_nodes_with_stages_fit_80_columns(plan: Run, large: Path) -> None:
    code, out, err = plan(large, "--inventory", EXAMPLE, "--pipeline-parallel-size", "2", "--all")
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    assert "in 2 pipeline stages" in plain(out)


def test_the_json_is_the_placement_and_the_model(plan: Run, small: Path) -> None:
    found = as_json(plan(small, "--devices", "2x24GiB", "--json"))
    assert set(found) == {
        "advice",
        "architecture",
        "demand",
        "devices",
        "extra",
        "latency_s",
        "longest_context",
        "method",
        "model",
        "notes",
        "objective",
        "pp_size",
        "rejected",
        "shares",
        "slowest_stage_s",
        "stage_layers",
        "tp_size",
    }
    assert set(found["devices"][0]) == {
        "activation_bytes",
        "communication_bytes",
        "device",
        "holds_embedding",
        "holds_head",
        "kv_cache_bytes",
        "layers",
        "overhead_bytes",
        "rank",
        "stage",
        "tokens",
        "tp_rank",
        "usable_bytes",
        "weight_bytes",
    }
    assert set(found["model"]) == {
        "architecture",
        "can_be_served",
        "checkpoint_bytes",
        "dtype",
        "hidden_size",
        "intermediate_size",
        "max_model_len",
        "name",
        "num_attention_heads",
        "num_hidden_layers",
        "num_key_value_heads",
        "num_parameters",
        "vision_bytes",
        "vocab_size",
    }
    assert found["devices"][0]["layers"] == [0, 16]
    assert found["demand"]["fixed"] == []
    assert found["model"]["num_parameters"] * 2 == found["model"]["checkpoint_bytes"]


def test_weights_of_all_ranks_are_those_of_the_model_and_what_is_replicated(plan: Run, small: Path) -> None:
    found = as_json(plan(small, "--devices", "4x24GiB", "--json"))
    total = sum(device["weight_bytes"] for device in found["devices"])
    assert 1 <= total / found["model"]["checkpoint_bytes"] < 1.01


def test_the_picture_is_written_beside_the_table_or_the_json(plan: Run, small: Path, tmp_path: Path) -> None:
    file = tmp_path / "plan.svg"
    for more in ((), ("--json",)):
        file.unlink(missing_ok=True)
        code, out, _ = plan(small, "--devices", "2x24GiB", "--svg", file, *more)
        assert code == 0
        assert out
        root = ElementTree.parse(file).getroot()
        assert root.tag.endswith("svg")
        assert {"cuda:0", "cuda:1"} <= {element.text for element in root.iter()}


@pytest.mark.parametrize("model", ["large", "small"])
def test_few_other_layouts_are_shown_unless_all_are_asked_for(plan: Run, request: Any, model: str) -> None:
    folder = request.getfixturevalue(model)
    _, some, _ = plan(folder, "--devices", "64xH100")
    _, every, _ = plan(folder, "--devices", "64xH100", "--all")
    assert some.count("  - tensor ") == MOST_REJECTED
    assert "more; --all shows them" in some
    assert every.count("  - tensor ") > MOST_REJECTED
    assert "more; --all" not in every


# -- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "key", "expected"),
    [
        (("--tensor-parallel-size", "2"), "tp_size", 2),
        (("--pipeline-parallel-size", "4"), "pp_size", 4),
        (("--pipeline-layers", "3,4,4,5"), "stage_layers", [[0, 3], [3, 7], [7, 11], [11, 16]]),
        (("--tensor-parallel-size", "4", "--tensor-shares", "2,1,1,2"), "shares", [[2, 1, 1, 2]]),
        (("--optimize", "latency"), "objective", "latency"),
    ],
)
def test_sizes_layers_and_shares_are_as_asked_for(
    plan: Run, small: Path, flags: tuple[str, ...], key: str, expected: object
) -> None:
    assert as_json(plan(small, "--devices", "4x24GiB", "--json", *flags))[key] == expected


def test_shares_by_memory_give_a_larger_gpu_more(plan: Run, small: Path) -> None:
    found = as_json(plan(small, "--devices", "24GiB,48GiB", "--tensor-shares", "auto", "--json"))
    first, second = found["devices"]
    assert second["weight_bytes"] > 1.5 * first["weight_bytes"]


@pytest.mark.parametrize(
    ("flag", "value", "name"),
    [
        ("--max-model-len", 4096, "max_model_len"),
        ("--max-num-seqs", 7, "max_num_seqs"),
        ("--max-num-batched-tokens", 512, "max_num_batched_tokens"),
        ("--block-size", 32, "block_size"),
        ("--kv-cache-memory-bytes", GIB, "kv_cache_memory_bytes"),
        ("--gpu-memory-utilization", 0.5, "gpu_memory_utilization"),
        ("--max-seq-len", 1024, "max_seq_len"),
        ("--max-batch-size", 2, "max_batch_size"),
        ("--max-image-length", 512, "max_image_length"),
        ("--max-num-images", 3, "max_num_images"),
    ],
)
def test_what_is_set_is_demanded_and_stays(plan: Run, small: Path, flag: str, value: object, name: str) -> None:
    found = as_json(plan(small, "--devices", "24GiB", flag, value, "--json"))
    assert found["demand"][name] == value
    assert found["demand"]["fixed"] == [name]


def test_a_variable_counts_as_a_flag(plan: Run, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TPDIST_MAX_NUM_SEQS", "9")
    monkeypatch.setenv("MISTRALRS_PIPELINE_PARALLEL", "2")
    found = as_json(plan(small, "--devices", "2x24GiB", "--json"))
    assert (found["demand"]["max_num_seqs"], found["demand"]["fixed"], found["pp_size"]) == (9, ["max_num_seqs"], 2)


def test_weights_take_twice_as_much_in_float32(plan: Run, small: Path) -> None:
    sizes = [
        as_json(plan(small, "--devices", "80GiB", "--json", *flags))["devices"][0]["weight_bytes"]
        for flags in ((), ("--dtype", "float32"))
    ]
    assert sizes[1] / sizes[0] == pytest.approx(2, rel=1e-4)
    assert "in float32 (the checkpoint has bfloat16)" in plain(
        plan(small, "--devices", "80GiB", "--dtype", "float32")[1]
    )


@pytest.mark.parametrize("flags", [("2x80GiB",), ("4x48GiB",), ("4x48GiB", "--pipeline-layers", "41,39")])
def test_the_longest_context_that_is_told_can_be_asked_for(plan: Run, large: Path, flags: tuple[str, ...]) -> None:
    longest = as_json(plan(large, "--devices", *flags, "--json"))["longest_context"]
    batch = ("--max-num-batched-tokens", "2048", "--max-num-seqs", "256")
    found = as_json(plan(large, "--devices", *flags, *batch, "--max-seq-len", longest, "--json"))
    assert found["demand"]["max_seq_len"] == found["longest_context"] == longest
    code, _, err = plan(large, "--devices", *flags, *batch, "--max-seq-len", longest + 16)
    assert (code, "does not fit" in err) == (3, True)


def test_a_length_beyond_the_models_is_told(plan: Run, small: Path) -> None:
    code, out, err = plan(small, "--devices", "24GiB", "--max-seq-len", "300000")
    assert (code, err) == (0, "")
    assert "--max-seq-len 300000 is more than what LlamaForCausalLM supports: planned for 8192 tokens" in plain(out)
    assert "the longest that fits is 8192 tokens, all that the model allows" in plain(out)


def test_a_cache_that_was_asked_for_is_named_where_the_context_shrinks_for_it(plan: Run, small: Path) -> None:
    code, out, err = plan(small, "--devices", "24GiB", "--kv-cache-memory-bytes", "64MiB")
    assert (code, err) == (0, "")
    assert "may take 64.0 MiB with --kv-cache-memory-bytes 64MiB, and lacked 64.0 MiB" in plain(out)


def test_a_demand_that_shrinks_is_told(plan: Run, large: Path) -> None:
    code, out, _ = plan(large, "--devices", "2x75GiB")
    assert code == 0
    assert "shrank from" in plain(out)


# -- this machine -----------------------------------------------------------------------------------------------------


def test_without_devices_it_plans_for_this_machine(plan: Run) -> None:
    found = as_json(plan(builtin.path(), "--device", "cpu", "--local-world-size", "2", "--json"))
    assert [device["device"]["name"] for device in found["devices"]] == ["cpu:0", "cpu:1"]
    assert [device["rank"] for device in found["devices"]] == [0, 1]


# -- one process ------------------------------------------------------------------------------------------------------


def test_one_process_places_layers_over_its_devices(plan: Run, large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MISTRALRS_NO_NCCL", "1")
    found = as_json(plan(large, "--devices", "2x48GiB,cpu=128GiB", "--json"))
    held = {device["device"]["name"]: device["layers"] for device in found["devices"]}
    assert set(held) == {"cuda:0", "cuda:1", "cpu"}
    assert sum(stop - start for start, stop in held.values()) == 80
    assert {device["rank"] for device in found["devices"]} == {None}
    code, out, _ = plan(large, "--devices", "2x48GiB,cpu=128GiB")
    assert code == 0
    assert "one process on node0, exact: 80 layers as cuda:0" in plain(out)
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize("method", ["exact", "first-fit"])
def test_the_method_is_as_asked_for(plan: Run, small: Path, method: str) -> None:
    found = as_json(plan(small, "--no-nccl", "--devices", "2x24GiB", "--placement", method, "--json"))
    assert found["method"] == method


def test_layers_by_hand_are_where_they_were_put(plan: Run, small: Path) -> None:
    found = as_json(plan(small, "--no-nccl", "--devices", "2x24GiB", "-n", "0:10;1:6", "--json"))
    assert found["method"] == "manual"
    assert [device["layers"] for device in found["devices"] if device["layers"][0] < device["layers"][1]] == [
        [0, 10],
        [10, 16],
    ]


@pytest.mark.parametrize(
    ("device_map", "method", "layers"),
    [
        ("auto", "exact", [16]),
        ("balanced", "manual", [8, 8]),
        ("balanced_low_0", "manual", [16]),
        ("sequential", "first-fit", [16]),
        ('{"": 0, "model.layers.15": 1, "model.norm": 1, "lm_head": 1}', "manual", [15, 1]),
    ],
)
def test_a_device_map_says_how_layers_are_placed(
    plan: Run, small: Path, device_map: str, method: str, layers: list[int]
) -> None:
    found = as_json(plan(small, "--devices", "2x24GiB", "--device-map", device_map, "--json"))
    held = [device["layers"][1] - device["layers"][0] for device in found["devices"]]
    assert (found["method"], [count for count in held if count]) == (method, layers)


def test_a_limit_of_memory_means_one_process(plan: Run, small: Path) -> None:
    found = as_json(plan(small, "--devices", "2x24GiB,cpu=64GiB", "--max-memory", "1=20GiB", "--json"))
    assert [device["device"]["name"] for device in found["devices"]] == ["cuda:1"]
    assert found["devices"][0]["rank"] is None


def test_layers_may_be_on_disk_with_a_folder(plan: Run, large: Path, tmp_path: Path) -> None:
    flags = ("--no-nccl", "--devices", "24GiB,cpu=32GiB")
    assert plan(large, *flags)[0] == 3
    found = as_json(plan(large, *flags, "--offload-folder", tmp_path, "--json"))
    disk = found["devices"][-1]
    assert disk["device"]["kind"] == "disk"
    assert disk["layers"][1] > disk["layers"][0]


# -- models -----------------------------------------------------------------------------------------------------------


def test_config_json_alone_is_enough_and_it_is_told(plan: Run, tmp_path: Path) -> None:
    code, out, err = plan(write_config(tmp_path, LLAMA_1B), "--devices", "24GiB")
    assert (code, err) == (0, "")
    assert "no *.safetensors is in the folder: planned from config.json alone" in plain(out)


def test_a_vision_model_has_its_tower_on_the_first_device(plan: Run, llava: Path) -> None:
    found = as_json(plan(llava, "--devices", "2x24GiB", "--pipeline-parallel-size", "2", "--json"))
    assert found["model"]["architecture"] == "LlavaForConditionalGeneration"
    assert found["model"]["can_be_served"] is False
    tower = found["model"]["vision_bytes"]
    assert tower == 2 * (1024 * 3 * 14 * 14 + 1024 * 1024 + 1024 + 2048 * 1024)
    first, second = found["devices"]
    assert first["weight_bytes"] + second["weight_bytes"] == pytest.approx(found["model"]["checkpoint_bytes"], rel=1e-4)
    assert "serving LlavaForConditionalGeneration is not supported yet" in found["notes"][0]


def test_images_decide_what_the_first_device_needs_beside_weights(plan: Run, llava: Path) -> None:
    def first(*flags: str) -> int:
        found = as_json(plan(llava, "--devices", "2x24GiB", "--pipeline-parallel-size", "2", "--json", *flags))
        return int(found["devices"][0]["activation_bytes"])

    few, many = first("--max-num-images", "1"), first("--max-num-images", "64")
    assert many > few
    assert first("--max-num-images", "16", "--max-image-length", "2048") > few


@pytest.mark.parametrize("one_process", [False, True])
@pytest.mark.parametrize(("flag", "value"), [("--max-image-length", 100_000), ("--max-num-images", 100_000)])
def test_images_that_do_not_fit_are_named_and_leaving_them_out_helps(
    plan: Run, llava: Path, flag: str, value: int, one_process: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if one_process:
        monkeypatch.setenv("MISTRALRS_NO_NCCL", "1")
    devices = ("--devices", "2x24GiB")
    code, _, err = plan(llava, *devices, flag, value)
    assert (code, f"{value} " in err.splitlines()[2]) == (3, True)
    assert f"  - without {flag} it would fit with one sequence of 4096 tokens" in err
    assert plan(llava, *devices)[0] == 0


def test_a_vision_model_without_files_has_an_estimated_tower(plan: Run, tmp_path: Path) -> None:
    found = as_json(plan(write_config(tmp_path, LLAVA), "--devices", "24GiB", "--json"))
    assert found["model"]["vision_bytes"] > 500 * 1024**2
    assert any("is an estimate from vision_config" in note for note in found["notes"])


# -- how it ends ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--devices", "80 apples"), "--devices 80 apples: '80 apples' must be a size"),
        (("--inventory", "none.toml"), "--inventory none.toml: No such file"),
        (("--devices", "24GiB", "--inventory", "none.toml"), "--devices and --inventory"),
        (("--devices", "24GiB", "--svg", "/none/plan.svg"), "cannot write --svg /none/plan.svg: /none is no folder"),
        (("--devices", "24GiB", "--svg", "/dev/full"), "cannot write --svg /dev/full"),
        (("--device", "24GiB"), "--device=24GiB"),
        (("--devces", "24GiB"), "nearest is --devices"),
        (("--devices", "3x24GiB", "--pipeline-parallel-size", "2"), "2 stages"),
        (("--devices", "24GiB", "--no-nccl", "-n", "x"), "'x' is not ORD:NUM"),
        (("--devices", "24GiB", "--revision", "main"), "--revision main means nothing"),
        (("--devices", "24GiB", "--pipeline-layers", "0"), "--pipeline-layers=0"),
    ],
)
def test_wrong_usage_ends_with_2(plan: Run, small: Path, flags: tuple[str, ...], told: str) -> None:
    code, _, err = plan(small, *flags)
    assert code == 2, err
    assert told in plain(err)


def test_a_missing_model_is_wrong_usage(plan: Run) -> None:
    code, _, err = plan()
    assert code == 2
    assert "Missing argument 'MODEL'" in err


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--devices", "24GiB"), "the model does not fit: cuda:0 on node0 lacks"),
        (("--devices", "8xH100", "--max-model-len", "999999"), "--max-model-len 999999 is more than the 131072 tokens"),
        (("--devices", "8xH100", "--pipeline-layers", "1,2,3,4,5,6,7,8"), "add up to the model's 80 layers"),
        (("--devices", "8xH100", "--tensor-shares", "1,2"), "2 shares (1, 2) were given"),
        (("--devices", "8xH100", "--device", "cpu"), "memory of node0 is not named"),
        (("--devices", "cpu=64GiB", "--device", "cuda"), "node0 has no GPU"),
    ],
)
def test_what_does_not_fit_ends_with_3_and_the_numbers(
    plan: Run, large: Path, flags: tuple[str, ...], told: str
) -> None:
    code, out, err = plan(large, *flags)
    assert told in plain(err)
    assert (code, out) == (2 if "not named" in told else 3, "")


def test_one_rank_that_does_not_fit_with_its_cpu_is_told_what_would_help_and_it_does(
    plan: Run, small: Path, tmp_path: Path
) -> None:
    code, _, err = plan(small, "--devices", "1500MiB,cpu=1GiB")
    assert (code, "MISTRALRS_NO_NCCL" in err) == (3, False)
    assert "a CPU with 4GiB among the devices would take the layers that do not fit" in err
    assert "--offload-folder FOLDER would fit" in err
    assert plan(small, "--devices", "1500MiB,cpu=4GiB")[0] == 0
    assert plan(small, "--devices", "1500MiB,cpu=1GiB", "--offload-folder", tmp_path)[0] == 0


def test_limits_that_leave_out_the_cpu_are_told_how_to_name_it(plan: Run, small: Path) -> None:
    devices, limits = ("--devices", "2x24GiB,cpu=64GiB"), "0=1500MiB,1=1500MiB"
    code, _, err = plan(small, *devices, "--max-memory", limits)
    assert (code, "--gpu-memory-utilization" in err) == (3, False)
    assert "cpu=2GiB in --max-memory would take the layers that do not fit" in err
    assert plan(small, *devices, "--max-memory", f"{limits},cpu=2GiB")[0] == 0


def test_layers_by_hand_that_do_not_fit_are_told_to_be_left_out(
    plan: Run, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MISTRALRS_NO_NCCL", "1")
    devices = ("--devices", "2GiB,cpu=64GiB")
    code, _, err = plan(small, *devices, "-n", "16")
    assert (code, "--offload-folder" in err) == (3, False)
    assert "without --device-layers (-n), --device-map or --placement first-fit it would fit: " in err
    assert plan(small, *devices)[0] == 0


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architecture GPT2LMHeadModel is not supported"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantized (awq)"),
        ({"hidden_act": "relu"}, "hidden_act relu is not supported"),
    ],
)
def test_a_model_of_another_kind_ends_with_3(plan: Run, tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    code, _, err = plan(write_config(tmp_path, {**LLAMA_1B, **changes}), "--devices", "24GiB")
    assert code == 3
    assert told in err


def test_a_vision_model_around_another_text_model_ends_with_3(plan: Run, tmp_path: Path) -> None:
    text = {**LLAMA_1B, "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2"}
    code, _, err = plan(write_config(tmp_path, {**LLAVA, "text_config": text}), "--devices", "24GiB")
    assert code == 3
    assert "text_config is of model_type gemma2, which is not supported" in err


def test_a_checkpoint_that_is_missing_or_damaged_ends_with_4(plan: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "config.json does not exist" in told_by(plan(tmp_path / "empty", "--devices", "24GiB"))
    folder = make_sparse(tmp_path / "short", LLAMA_1B, num_files=2)
    file = folder / "model-00002-of-00002.safetensors"
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size - 1)
    assert f"{file} is truncated" in told_by(plan(folder, "--devices", "24GiB"))
    file.unlink()
    assert f"{file} does not exist" in told_by(plan(folder, "--devices", "24GiB"))
    other = make_sparse(tmp_path / "other", LLAMA_1B)
    write_config(other, {**LLAMA_1B, "vocab_size": 5})
    assert "expected [5, 2048]" in told_by(plan(other, "--devices", "24GiB"))


def told_by(result: tuple[int, str, str]) -> str:
    assert result[0] == 4, result
    return result[2]


def test_a_vision_checkpoint_without_its_text_model_ends_with_4(plan: Run, tmp_path: Path) -> None:
    folder = make_sparse_llava(tmp_path)
    write_config(folder, {**LLAVA, "text_config": {**LLAMA_1B, "hidden_size": 1024}})
    assert "no 16 text layers of hidden size 1024" in told_by(plan(folder, "--devices", "24GiB"))


def test_help_has_examples_and_every_option(plan: Run) -> None:
    code, out, _ = plan("-h")
    assert code == 0
    for word in (
        "Examples:\n  tpdist plan ./model",
        "--devices",
        "--inventory",
        "--svg",
        "--all",
        "--json",
        "--pipeline-layers",
        "--tensor-shares",
        "--device-layers",
        "Exit codes: 0 it fits; 2 wrong usage; 3 it does not fit",
    ):
        assert word in out


# -- a large checkpoint -----------------------------------------------------------------------------------------------

# ru_maxrss would count the process that started this one: it survives exec, VmHWM does not.
MEASURED = """
import sys
from pathlib import Path
from tpdist.cli.frame import run
code = run(sys.argv[1:])
heavy = [name for name in ("torch", "transformers", "fastapi") if name in sys.modules]
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(code, status["VmHWM"].split()[0], *heavy, file=sys.stderr)
"""


def measured(*argv: object) -> tuple[int, int, list[str], str]:
    """Run the command in a process of its own: exit code, peak of memory in bytes, heavy modules, and stdout."""
    command = [sys.executable, "-c", MEASURED, "plan", *map(str, argv)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    code, kibibytes, *heavy = done.stderr.splitlines()[-1].split()
    return int(code), int(kibibytes) * 1024, heavy, done.stdout


@pytest.mark.parametrize("devices", ["8xH100", "16x24GiB,16x16GiB,80GiB,48GiB"])
def test_140_gigabytes_are_planned_from_headers_in_little_memory(large: Path, devices: str) -> None:
    started = time.monotonic()
    code, peak, heavy, out = measured(large, "--devices", devices, "--json")
    print(f"{devices}: {time.monotonic() - started:.2f} s, {peak / 1024**2:.0f} MiB")
    assert (code, heavy) == (0, [])
    assert peak < 300 * 1000**2
    assert json.loads(out)["model"]["checkpoint_bytes"] == 141_107_412_992


def test_this_machine_is_planned_for_without_torch() -> None:
    code, _, heavy, _ = measured(builtin.path(), "--device", "cpu")
    assert (code, heavy) == (0, [])
