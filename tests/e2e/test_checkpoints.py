"""Checkpoints that cannot be served: the node ends before it starts anything, and says which file and tensor."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from e2e.cluster import Processes

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

AT_ONCE_S = 20.0
CHECKPOINT, PLAN = 4, 3
DOWN = "model.layers.1.mlp.down_proj.weight"
WEIGHTS = "model.safetensors"
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def folder(model: Path, tmp_path: Path) -> Path:
    """A copy of a good checkpoint, to be damaged."""
    return Path(shutil.copytree(model, tmp_path / "model"))


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_tensors(folder: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def truncate(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def claim_dtype(folder: Path, dtype: str) -> None:
    """Rewrite a type name of the header; both have three letters, so that nothing moves."""
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data.replace(b'"F32"', f'"{dtype}"'.encode(), 1))


DAMAGES: dict[str, tuple[Callable[[Path], object], int, list[str]]] = {
    "no folder": (shutil.rmtree, CHECKPOINT, ["{folder}"]),
    "an empty folder": (lambda it: (shutil.rmtree(it), it.mkdir()), CHECKPOINT, ["{folder}/config.json"]),
    "no config.json": (lambda it: (it / "config.json").unlink(), CHECKPOINT, ["{folder}/config.json"]),
    "config.json is no JSON": (
        lambda it: (it / "config.json").write_text('{"architectures":'),
        CHECKPOINT,
        ["{folder}/config.json"],
    ),
    "config.json is no object": (
        lambda it: (it / "config.json").write_text("[]"),
        CHECKPOINT,
        ["{folder}/config.json"],
    ),
    "an unsupported architecture": (
        lambda it: change_config(it, architectures=["BertModel"]),
        PLAN,
        ["BertModel", "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"],
    ),
    "a quantized model": (
        lambda it: change_config(it, quantization_config={"quant_method": "awq", "bits": 4}),
        PLAN,
        ["awq"],
    ),
    "a context beyond the model's": (lambda it: None, PLAN, ["1000000", "4096"]),
    "an unknown dtype": (
        lambda it: change_config(it, dtype="float11"),
        CHECKPOINT,
        ["float11", "{folder}/config.json"],
    ),
    "no weights": (lambda it: (it / WEIGHTS).unlink(), CHECKPOINT, ["{folder}", "safetensors"]),
    "a truncated file": (truncate, CHECKPOINT, [f"{{folder}}/{WEIGHTS}"]),
    "an empty file": (lambda it: (it / WEIGHTS).write_bytes(b""), CHECKPOINT, [f"{{folder}}/{WEIGHTS}"]),
    "a missing tensor": (
        lambda it: change_tensors(it, lambda tensors: tensors.pop(DOWN)),
        CHECKPOINT,
        ["{folder}", f"{DOWN} is missing"],
    ),
    "an unknown tensor": (
        lambda it: change_tensors(it, lambda tensors: tensors.update({"model.extra.weight": torch.zeros(2)})),
        CHECKPOINT,
        [f"model.extra.weight in {WEIGHTS}"],
    ),
    "a tensor of another shape": (
        lambda it: change_tensors(it, lambda tensors: tensors.update({DOWN: torch.zeros(96, 175)})),
        CHECKPOINT,
        [f"{DOWN} in {WEIGHTS}", "[96, 175]", "[96, 176]"],
    ),
    "a tensor of another type": (lambda it: claim_dtype(it, "I32"), CHECKPOINT, [WEIGHTS, "I32"]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_model_that_cannot_be_served_is_refused_with_its_place(
    processes: Processes, folder: Path, damage: str
) -> None:
    harm, exit_code, named = DAMAGES[damage]
    harm(folder)
    variables = {"TPDIST_MAX_MODEL_LEN": "1000000"} if "context" in damage else {}
    node = processes.serve("single", folder, variables)
    assert node.wait(AT_ONCE_S) == exit_code, node.log
    missing = [text.format(folder=folder) for text in named if text.format(folder=folder) not in node.log]
    assert not missing, f"{missing} not named in\n{node.log}"
    assert node.log.count("error: ") == 1
    assert "Traceback" not in node.log
    assert "rank=" not in node.log


@pytest.mark.parametrize("text", [None, "{"])
def test_a_tokenizer_that_cannot_be_read_ends_the_node(processes: Processes, folder: Path, text: str | None) -> None:
    """It is read while the ranks start, which they may have done by then."""
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer.json").unlink()
    if text is not None:
        (folder / "tokenizer.json").write_text(text)
    node = processes.serve("single", folder)
    assert node.wait(AT_ONCE_S) == CHECKPOINT, node.log
    error = node.log[node.log.index("error: ") :]
    assert str(folder) in error
    assert "tokenizer" in error
    assert "Traceback" not in node.log


def test_too_many_ranks_for_the_model_are_refused_with_the_numbers(processes: Processes, model: Path) -> None:
    node = processes.serve("single", model, {"TPDIST_TENSOR_PARALLEL_SIZE": "13"})
    assert node.wait(AT_ONCE_S) == PLAN, node.log
    assert "13" in node.log
    assert "12" in node.log
