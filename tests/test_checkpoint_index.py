"""A checkpoint folder against its index file, its weight table, and another folder."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import make_checkpoint
from safetensors.torch import load_file, save_file

from tpdist.checkpoint.index import INDEX_NAME, CheckpointIndex, check_names, model_fingerprint
from tpdist.errors import CheckpointError
from tpdist.models.registry import load_config, weights
from tpdist.plan.shards import Rows, Split, Weights, WeightSpec

FILE = "model.safetensors"
NORM = "model.norm.weight"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "sharded", max_shard_size=100_000)


@pytest.fixture
def single(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "single")


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Replace, add or (None) remove tensors of a checkpoint of one file; `__` in a keyword stands for a dot."""
    changes = {name.replace("__", "."): value for name, value in tensors.items()}
    content = {**load_file(folder / FILE), **changes}
    save_file({name: value for name, value in content.items() if value is not None}, folder / FILE)


def change_map(folder: Path, **files: str | None) -> None:
    """Place tensors in other files, or (None) nowhere, in the folder's index."""
    path = folder / INDEX_NAME
    index = json.loads(path.read_text())
    weight_map = {**index["weight_map"], **{name.replace("__", "."): file for name, file in files.items()}}
    index["weight_map"] = {name: file for name, file in weight_map.items() if file is not None}
    path.write_text(json.dumps(index))


def check(folder: Path) -> None:
    check_names(CheckpointIndex.read(folder), weights(load_config(folder)))


def test_one_file_and_several_hold_the_same(single: Path, sharded: Path) -> None:
    one, several = CheckpointIndex.read(single), CheckpointIndex.read(sharded)
    assert len({entry.file for entry in several.tensors.values()}) > 5
    assert {name: entry.shape for name, entry in one.tensors.items()} == {
        name: entry.shape for name, entry in several.tensors.items()
    }
    assert one.total_bytes == several.total_bytes == sum(t.nbytes for t in load_file(single / FILE).values())
    check(single)
    check(sharded)


def test_the_dtype_of_a_checkpoint_is_that_of_most_of_its_bytes(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(90, dtype=torch.bfloat16), "b": torch.zeros(30), "c": torch.zeros(1000).long()}
    save_file(tensors, tmp_path / FILE)
    assert CheckpointIndex.read(tmp_path).dtype == "bfloat16"
    save_file({"c": torch.zeros(4).long()}, tmp_path / FILE)
    assert CheckpointIndex.read(tmp_path).dtype is None


def test_files_outside_the_checkpoint_are_left_alone(sharded: Path, single: Path) -> None:
    (sharded / "consolidated.safetensors").write_bytes(b"not ours")
    (single / "adapter_model.safetensors").write_bytes(b"not ours")
    check(sharded)
    check(single)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no \*.safetensors"):
        CheckpointIndex.read(tmp_path)


def test_a_missing_shard_is_named(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[2]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name} does not exist"):
        CheckpointIndex.read(sharded)


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "one.safetensors")
    save_file({"a": torch.zeros(2)}, tmp_path / "two.safetensors")
    with pytest.raises(CheckpointError, match=r"tensor a is in both .*one\.safetensors and .*two\.safetensors"):
        CheckpointIndex.read(tmp_path)


@pytest.mark.parametrize("file", ["model-00001-of-00010.safetensors", None])
def test_an_index_that_disagrees_with_the_files_is_refused(sharded: Path, file: str | None) -> None:
    change_map(sharded, model__norm__weight=file)
    with pytest.raises(CheckpointError, match=rf"places tensor {NORM} in {file}"):
        CheckpointIndex.read(sharded)


def test_an_index_that_leads_out_of_the_folder_is_refused(sharded: Path) -> None:
    change_map(sharded, model__norm__weight="../other/model.safetensors")
    with pytest.raises(CheckpointError, match="not directly in the folder"):
        CheckpointIndex.read(sharded)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": null}', "\udcff", "[" * 100_000]
)
def test_an_index_that_cannot_be_read_is_refused(sharded: Path, text: str) -> None:
    (sharded / INDEX_NAME).write_text(text, errors="surrogateescape")
    with pytest.raises(CheckpointError, match="holds no weight_map"):
        CheckpointIndex.read(sharded)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__norm__weight": None}, f"in 1 tensors: {NORM} is missing"),
        ({"extra": torch.zeros(2)}, "extra in model.safetensors is unknown"),
        ({"model__norm__weight": torch.zeros(63)}, rf"{NORM} in .* has shape \[63\], expected \[64\]"),
        ({"model__norm__weight": torch.zeros(64).double()}, f"{NORM} in .* has dtype F64, supported are F32"),
        ({"model__norm__weight": torch.zeros(64).to(torch.float8_e4m3fn)}, "has dtype F8_E4M3"),
        ({"model__norm__weight": torch.zeros(64).to(torch.int8)}, "has dtype I8"),
    ],
)
def test_a_tensor_that_is_not_as_the_model_needs_it_is_named(
    single: Path, changes: dict[str, Any], message: str
) -> None:
    change(single, **changes)
    with pytest.raises(CheckpointError, match=message):
        check(single)


def test_many_wrong_tensors_are_counted_and_five_are_named(single: Path) -> None:
    change(single, **{f"extra__{index}": torch.zeros(1) for index in range(20)})
    with pytest.raises(CheckpointError, match="in 20 tensors: ") as caught:
        check(single)
    assert str(caught.value).count("unknown") == 5


def test_a_name_that_is_known_to_be_useless_is_ignored_whatever_its_type(single: Path) -> None:
    change(single, model__layers__0__self_attn__rotary_emb__inv_freq=torch.zeros(8).double())
    check(single)


def test_a_tied_output_projection_may_be_stored_if_it_is_the_embedding(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, tie_word_embeddings=True)
    embedding = load_file(folder / FILE)["model.embed_tokens.weight"]
    change(folder, lm_head__weight=embedding.clone())
    check(folder)
    changed = embedding.clone()
    changed[-1, -1] += 1
    change(folder, lm_head__weight=changed)
    with pytest.raises(CheckpointError, match="set tie_word_embeddings to false"):
        check(folder)


def test_parts_that_are_fused_on_disk_add_up_to_the_shape_of_their_tensor(tmp_path: Path) -> None:
    save_file({"qk": torch.zeros(5, 3)}, tmp_path / FILE)
    parts = [
        WeightSpec(name="qk", shape=(2, 3), parameter="p", part=0, split=Split(0, Rows(2))),
        WeightSpec(name="qk", shape=(3, 3), parameter="p", part=1, split=Split(0, Rows(3)), offset=2),
    ]
    check_names(CheckpointIndex.read(tmp_path), Weights(specs=tuple(parts)))
    with pytest.raises(CheckpointError, match=r"has shape \[5, 3\], expected \[2, 3\]"):
        check_names(CheckpointIndex.read(tmp_path), Weights(specs=(parts[0],)))


def test_equal_checkpoints_have_equal_fingerprints(tmp_path: Path) -> None:
    folders = [make_checkpoint(tmp_path / name, tokenizer=True) for name in ("a", "b")]
    first, second = (model_fingerprint(folder) for folder in folders)
    assert first == second
    assert set(first) == {"config.json", "generation_config.json", "tokenizer", FILE}
    assert all(len(digest) == 16 for digest in first.values())


def test_a_fine_tune_has_another_fingerprint_in_its_weights_alone(tmp_path: Path) -> None:
    base, tuned = (model_fingerprint(make_checkpoint(tmp_path / str(seed), seed=seed)) for seed in (0, 1))
    assert {part for part in base if base[part] != tuned[part]} == {FILE}


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "chat_template.jinja"])
def test_a_changed_file_shows_in_its_part_of_the_fingerprint(tmp_path: Path, file: str) -> None:
    folder = make_checkpoint(tmp_path, tokenizer=True)
    before = model_fingerprint(folder)
    (folder / file).write_text((folder / file).read_text() + " ")
    after = model_fingerprint(folder)
    assert [part for part in before if before[part] != after[part]] == [file if file in before else "tokenizer"]
