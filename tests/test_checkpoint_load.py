"""Loading: every rank gets exactly its slices, whatever the shapes, types and threads; failures name their cause."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import ARCHITECTURES, make_checkpoint
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tpdist.checkpoint import load
from tpdist.checkpoint.index import CheckpointIndex
from tpdist.checkpoint.load import load_weights
from tpdist.errors import CheckpointError
from tpdist.models.registry import load_config, weights
from tpdist.plan.shards import Partition, QueryHeads, Rows, Split, Weights, WeightSpec, local_shape


class Parts(nn.Module):
    """Parameters made of parts along their first dimension, as those of the fused linear layers are."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.sizes: dict[str, list[int]] = {}
        self.finished: list[str] = []

    def add(self, leaf: str, shapes: list[tuple[int, ...]]) -> None:
        self.sizes[leaf] = [shape[0] for shape in shapes]
        values = torch.full((sum(self.sizes[leaf]), *shapes[0][1:]), torch.nan, dtype=self.dtype)
        self.register_parameter(leaf, nn.Parameter(values, requires_grad=False))

    def part_view(self, leaf: str, part: int) -> Tensor:
        sizes = self.sizes[leaf]
        return self.get_parameter(leaf).narrow(0, sum(sizes[:part]), sizes[part])

    def finish_loading(self, leaf: str) -> None:
        assert not self.get_parameter(leaf).isnan().any()
        self.finished.append(leaf)


def rank_model(table: Weights, partition: Partition, rank: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model without any arithmetic whose parameters are those of `table` on one rank."""
    shapes: dict[str, list[tuple[int, ...]]] = {}
    for spec in sorted(table.specs, key=lambda spec: spec.part):
        shapes.setdefault(spec.parameter, []).append(local_shape(spec, partition, rank))
    root = nn.Module()
    for parameter, parts in shapes.items():
        path, _, leaf = parameter.rpartition(".")
        owner = reach(root, path, dtype)
        owner.add(leaf, parts)
    return root


def reach(root: nn.Module, path: str, dtype: torch.dtype) -> Parts:
    """The Parts at `path`, made if it is not there, as the plain modules above it."""
    *above, name = path.split(".")
    module = root
    for step in above:
        if step not in dict(module.named_children()):
            module.add_module(step, nn.Module())
        module = module.get_submodule(step)
    if name not in dict(module.named_children()):
        module.add_module(name, Parts(dtype))
    owner = module.get_submodule(name)
    assert isinstance(owner, Parts)
    return owner


def load_rank(
    folder: Path,
    table: Weights,
    partition: Partition,
    rank: int,
    *,
    threads: int = 2,
    dtype: torch.dtype = torch.float32,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[nn.Module, int]:
    model = rank_model(table, partition, rank, dtype)
    index = CheckpointIndex.read(folder)
    num_bytes = load_weights(
        model, index=index, weights=table, partition=partition, rank=rank, threads=threads, progress=progress
    )
    return model, num_bytes


def part_of(model: nn.Module, spec: WeightSpec) -> Tensor:
    path, _, leaf = spec.parameter.rpartition(".")
    module = model.get_submodule(path)
    assert isinstance(module, Parts)
    return module.part_view(leaf, spec.part)


def reassembled(table: Weights, models: list[nn.Module]) -> dict[str, Tensor]:
    """Each tensor from the parts of all ranks; ranks that share key-value heads count once."""
    return {spec.name: torch.cat([part_of(model, spec) for model in models], spec.dim) for spec in table.specs}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("shares", [(1,), (1, 1), (2, 1), (1, 1, 1), (1, 2, 1, 3)])
def test_the_ranks_parts_put_together_are_the_checkpoint(
    tmp_path: Path, architecture: str, shares: tuple[int, ...]
) -> None:
    make_checkpoint(tmp_path, architecture=architecture, max_shard_size=100_000)
    table, partition = weights(load_config(tmp_path)), Partition(shares)
    models = [load_rank(tmp_path, table, partition, rank)[0] for rank in range(partition.size)]
    parts = reassembled(table, models)
    stored = {name: value for file in tmp_path.glob("*.safetensors") for name, value in load_file(file).items()}
    assert set(parts) == set(stored)
    for spec in table.specs:
        copies = 1 if spec.split else partition.size
        assert torch.equal(parts[spec.name], torch.cat([stored[spec.name]] * copies)), spec.name


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    dim=st.integers(0, 1),
    shares=st.lists(st.integers(1, 9), min_size=1, max_size=5).map(tuple),
    chunk_bytes=st.sampled_from([1, 64, 400, 1 << 20]),
    threads=st.integers(1, 4),
)
def test_slices_reassemble_a_tensor_of_any_shape_in_chunks_of_any_size(
    tmp_path: Path, rows: int, columns: int, dim: int, shares: tuple[int, ...], chunk_bytes: int, threads: int
) -> None:
    size = (rows, columns)[dim]
    assume(size >= len(shares))
    values = torch.arange(rows * columns, dtype=torch.float32).reshape(rows, columns)
    save_file({"w": values}, tmp_path / "model.safetensors")
    spec = WeightSpec(name="w", shape=(rows, columns), parameter="m.weight", split=Split(dim, Rows(size)))
    table, partition = Weights(specs=(spec,)), Partition(shares)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load, "CHUNK_BYTES", chunk_bytes)
        ranks = [load_rank(tmp_path, table, partition, rank, threads=threads) for rank in range(partition.size)]
    assert torch.equal(reassembled(table, [model for model, _ in ranks])["w"], values)
    assert sum(num_bytes for _, num_bytes in ranks) == values.nbytes


def test_parts_that_are_fused_on_disk_are_split_each_by_itself(tmp_path: Path) -> None:
    values = torch.arange(8 * 3, dtype=torch.float32).reshape(8, 3)
    save_file({"qkv": values}, tmp_path / "model.safetensors")
    query, key = Split(0, QueryHeads(4, 2)), Split(0, Rows(2))
    specs = tuple(
        WeightSpec(name="qkv", shape=(size, 3), parameter="m.weight", part=part, split=split, offset=offset)
        for part, (size, split, offset) in enumerate([(4, query, 0), (2, key, 4), (2, key, 6)])
    )
    model, _ = load_rank(tmp_path, Weights(specs=specs), Partition.even(2), 1)
    assert torch.equal(model.get_parameter("m.weight"), values[[2, 3, 5, 7]])


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16, torch.float16])
def test_values_are_converted_as_torch_does(tmp_path: Path, stored: torch.dtype, wanted: torch.dtype) -> None:
    values = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)).to(stored)
    save_file({"w": values}, tmp_path / "model.safetensors")
    spec = WeightSpec(name="w", shape=(6, 8), parameter="m.weight", split=Split(1, Rows(8)))
    model, num_bytes = load_rank(tmp_path, Weights(specs=(spec,)), Partition.even(2), 1, dtype=wanted)
    assert torch.equal(model.get_parameter("m.weight"), values[:, 4:].to(wanted))
    assert num_bytes == 6 * 4 * values.itemsize


def test_progress_counts_this_ranks_bytes_from_one_thread_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_checkpoint(tmp_path, max_shard_size=100_000)
    monkeypatch.setattr(load, "CHUNK_BYTES", 1000)
    table = weights(load_config(tmp_path))
    calls: list[tuple[int, int]] = []
    inside = threading.Lock()

    def progress(done: int, total: int) -> None:
        assert inside.acquire(blocking=False)
        calls.append((done, total))
        inside.release()

    _, num_bytes = load_rank(tmp_path, table, Partition.even(2), 0, threads=4, progress=progress)
    assert calls[0] == (0, num_bytes)
    assert calls[-1] == (num_bytes, num_bytes)
    assert calls == sorted(calls)


def test_a_module_is_told_once_when_its_parameter_is_complete(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, architecture="Qwen2ForCausalLM")
    model, _ = load_rank(tmp_path, weights(load_config(tmp_path)), Partition.even(1), 0)
    fused = model.get_submodule("model.layers.0.self_attn.qkv_proj")
    assert isinstance(fused, Parts)
    assert fused.finished == ["weight", "bias"]


def test_a_slice_of_columns_is_a_view_of_the_mapped_file(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(4, 8)}, tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        columns = file.get_slice("w")[:, 2:4]
        assert columns.stride() == (8, 1)


def test_a_model_with_a_parameter_that_the_table_does_not_fill_is_our_bug(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    table = weights(load_config(tmp_path))
    model = rank_model(table, Partition.even(1), 0)
    index = CheckpointIndex.read(tmp_path)
    less = Weights(specs=tuple(spec for spec in table.specs if spec.name != "model.norm.weight"))
    with pytest.raises(AssertionError, match=r"model\.norm\.weight"):
        load_weights(
            model,
            index=index,
            weights=less,
            partition=Partition.even(1),
            rank=0,
            threads=1,
            progress=lambda done, total: None,
        )


@pytest.mark.parametrize("threads", [1, 3])
def test_a_file_that_vanishes_while_it_is_loaded_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    make_checkpoint(tmp_path, max_shard_size=100_000)
    table, index = weights(load_config(tmp_path)), CheckpointIndex.read(tmp_path)
    gone = sorted(tmp_path.glob("*.safetensors"))[3]
    gone.unlink()
    monkeypatch.setattr(load.CheckpointIndex, "read", lambda folder: index)
    with pytest.raises(CheckpointError, match=rf"{gone.name} cannot be read") as caught:
        load_rank(tmp_path, table, Partition.even(1), 0, threads=threads)
    assert isinstance(caught.value.__cause__, OSError)


@pytest.mark.parametrize("threads", [1, 3])
def test_what_a_thread_raises_ends_the_load_and_reaches_the_caller(tmp_path: Path, threads: int) -> None:
    make_checkpoint(tmp_path)
    calls: list[Any] = []

    def progress(done: int, total: int) -> None:
        calls.append(done)
        if len(calls) == 3:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        load_rank(tmp_path, weights(load_config(tmp_path)), Partition.even(1), 0, threads=threads, progress=progress)
    assert len(calls) <= 3 + threads
