"""Whole tensors of safetensors files: found wherever they are, read right in every type, and never from a pickle."""

import gc
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tpdist.checkpoint.header import ITEM_BYTES, read_header
from tpdist.checkpoint.tensors import ALIGNMENT, TORCH_DTYPES, TensorReader, find_tensors, write_tensors
from tpdist.errors import CheckpointError


def tensors() -> dict[str, Tensor]:
    """One of every type and of odd shapes, so that nothing is aligned by chance."""
    found = {name: torch.arange(7).to(dtype) for name, dtype in TORCH_DTYPES.items()}
    return found | {"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4), "matrix": torch.arange(15.0).reshape(3, 5)}


def shards(folder: Path) -> dict[str, str]:
    save_file({"a": torch.ones(2)}, folder / "one.safetensors")
    save_file({"b": torch.ones(3)}, folder / "two.safetensors")
    return {"a": "one.safetensors", "b": "two.safetensors"}


def test_every_type_has_its_size() -> None:
    assert {name: dtype.itemsize for name, dtype in TORCH_DTYPES.items()} == dict(ITEM_BYTES)


@pytest.mark.parametrize("spare_buffers", [0, 2])
def test_tensors_are_read_as_they_were_written(tmp_path: Path, spare_buffers: int) -> None:
    entries = write_tensors(tmp_path / "new" / "x.safetensors", tensors())
    assert list(tmp_path.rglob("*")) == [tmp_path / "new", tmp_path / "new" / "x.safetensors"]
    reader = TensorReader(spare_buffers=spare_buffers)
    for _ in range(3):
        found = reader.read(list(entries.values()))
        for name, expected in tensors().items():
            assert found[name].dtype == expected.dtype
            assert found[name].shape == expected.shape
            assert found[name].view(torch.uint8).equal(expected.view(torch.uint8)) if expected.dim() else True
            assert found[name].data_ptr() % ALIGNMENT == 0
        assert found["scalar"].item() == 3.5


def test_views_and_shared_memory_are_written(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    views = {"column": whole[:, 1], "row": whole[1], "all": whole, "again": whole.T, "flat": whole.view(-1)}
    write_tensors(tmp_path / "x.safetensors", views | {"none": whole[:0], "same": whole, "empty": torch.zeros(0)})
    found = load_file(tmp_path / "x.safetensors")
    assert found["column"].tolist() == [1, 5, 9]
    assert found["again"].equal(whole.T)
    assert found["flat"].tolist() == whole.flatten().tolist()
    assert found["same"].equal(whole)


def test_buffers_are_used_again_only_once_nothing_needs_them(tmp_path: Path) -> None:
    entries = list(write_tensors(tmp_path / "x.safetensors", {"a": torch.zeros(999), "b": torch.ones(999)}).values())
    reader = TensorReader(spare_buffers=2)
    kept = reader.read(entries[:1])["a"][5:7]
    address = reader.read(entries[1:])["b"].data_ptr()
    gc.collect()
    for _ in range(3):
        assert reader.read(entries[1:])["b"].data_ptr() == address
    held = [reader.read(entries[1:])["b"] for _ in range(5)]
    assert len({tensor.data_ptr() for tensor in held}) == 5
    assert kept.tolist() == [0, 0]


def test_files_that_were_replaced_are_still_read_as_they_were(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    entry = write_tensors(file, {"a": torch.zeros(4)})["a"]
    reader = TensorReader()
    reader.open([file])
    write_tensors(file, {"a": torch.ones(4)})
    assert not reader.read([entry])["a"].any()


def test_files_are_closed_with_their_reader(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x.safetensors", {"a": torch.zeros(4)})
    before = len(os.listdir("/proc/self/fd"))
    reader = TensorReader()
    reader.open([tmp_path / "x.safetensors"])
    assert len(os.listdir("/proc/self/fd")) == before + 1
    del reader
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_that_is_cut_short_in_use_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    entry = write_tensors(file, {"a": torch.zeros(100)})["a"]
    os.truncate(file, entry.start + 40)
    with pytest.raises(CheckpointError, match=r"tensor a of .*x\.safetensors ends after 40 of 400 bytes: .* cut short"):
        TensorReader().read([entry])


def test_a_missing_file_and_a_folder_are_errors(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        TensorReader().open([tmp_path / "absent"])
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_tensors(tmp_path / "file" / "x.safetensors", {})


def test_a_type_that_the_format_has_no_word_for_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"tensor b has dtype torch\.complex128, which .*x\.safetensors cannot hold"
    ):
        write_tensors(tmp_path / "x.safetensors", {"a": torch.ones(1), "b": torch.zeros(2, dtype=torch.complex128)})
    assert not list(tmp_path.iterdir())


def test_a_folder_a_file_and_an_index_are_checkpoints(tmp_path: Path) -> None:
    weight_map = shards(tmp_path)
    assert list(find_tensors(tmp_path / "two.safetensors").tensors) == ["b"]
    assert set(find_tensors(tmp_path).tensors) == {"a", "b"}
    for name, content in {
        "model.safetensors.index.json": {"weight_map": weight_map, "metadata": {}},
        "other.json": {"weight_map": weight_map},
        "plain.json": weight_map,
    }.items():
        (tmp_path / name).write_text(json.dumps(content))
        assert set(find_tensors(tmp_path / name).tensors) == {"a", "b"}


def test_the_only_index_of_a_folder_counts_whatever_its_name(tmp_path: Path) -> None:
    weight_map = shards(tmp_path)
    del weight_map["b"]
    (tmp_path / "model.fp16.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert set(find_tensors(tmp_path).tensors) == {"a"}


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "last.ckpt"])
def test_pickles_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04.")
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    for checkpoint in (tmp_path, tmp_path / name, index):
        with pytest.raises(
            CheckpointError, match=rf"{name} is a pickle, .* convert the checkpoint to safetensors first"
        ):
            find_tensors(checkpoint)


def test_other_things_are_no_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    (tmp_path / "bad.json").write_text("[]")
    (tmp_path / "out.json").write_text('{"a": "../x.safetensors"}')
    for path, message in {
        tmp_path: "is no safetensors checkpoint: give a folder",
        tmp_path / "notes.txt": "is no safetensors checkpoint",
        tmp_path / "absent": "does not exist: give a folder",
        tmp_path / "bad.json": "holds no weight_map",
        tmp_path / "out.json": "not directly in its folder",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            find_tensors(path)


def test_unknown_types_and_double_names_are_errors(tmp_path: Path) -> None:
    shards(tmp_path)
    save_file({"a": torch.ones(1)}, tmp_path / "three.safetensors")
    (tmp_path / "x.json").write_text('{"a": "one.safetensors", "c": "three.safetensors"}')
    with pytest.raises(CheckpointError, match="tensor a is in both"):
        find_tensors(tmp_path / "x.json")
    header = b'{"a":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}}'
    (tmp_path / "f4").write_bytes(len(header).to_bytes(8, "little") + header + b"x")
    with pytest.raises(CheckpointError, match="dtype F4, which cannot be read: convert the checkpoint to one of BOOL"):
        TensorReader().read(read_header(tmp_path / "f4"))
