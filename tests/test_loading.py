"""What a stage's model is given, from where, and what its devices then hold beside what the plan foretold.

Models are run by hand in this process; sums of float32 in another order move logits of some units by less than 1e-4.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from checkpoints import ARCHITECTURES, make_checkpoint, reference_logits
from clusters import SETTINGS, assigns_of
from decoding import Tape
from inventories import GIB, cpu, disk, inventory
from safetensors import safe_open
from torch import Tensor

from tpdist.cache_room import blocks_with_room
from tpdist.checkpoint.index import CheckpointIndex
from tpdist.control.placing import OneProcess, demand_of, item_devices, place_layers, place_ranks
from tpdist.engine.kv_cache import KVCache, allocate
from tpdist.errors import CheckpointError
from tpdist.layers import packed
from tpdist.loading import held_bytes, load
from tpdist.models import registry
from tpdist.models.decoder import Decoder
from tpdist.models.item_devices import ItemDevices, computing_device
from tpdist.parallel.group import FakeGroup, SingleGroup
from tpdist.plan.placement import Placement
from tpdist.plan.shards import Interval, Partition, slices
from tpdist.plan.stages import EMBEDDING, Stage, stage_weights, whole

torch.set_num_threads(1)

CPU = torch.device("cpu")
NUM_LAYERS = 5
PROMPT = [5, 17, 280, 3, 99, 5, 5, 61, 230, 8, 12, 250, 7]
ODD = {"hidden_size": 60, "num_hidden_layers": NUM_LAYERS, "num_attention_heads": 12, "head_dim": 20, "vocab_size": 307}
PARTICULAR: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"attention_bias": True, "mlp_bias": True},
    "MistralForCausalLM": {"sliding_window": 5},
    "Qwen2ForCausalLM": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
    "Qwen3ForCausalLM": {},
}
SMALL = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "max_model_len": 128, "kv_cache_memory_bytes": 1 << 20}


@dataclass(frozen=True)
class Checkpoints:
    """Folders by family, tied or not, and type; each is made once."""

    root: Path

    @cache  # noqa: B019  # lives as long as the module
    def folder(self, architecture: str, tied: bool, dtype: torch.dtype = torch.float32) -> Path:
        folder = self.root / f"{architecture}-{tied}-{dtype}"
        options = {**ODD, **PARTICULAR[architecture], "tie_word_embeddings": tied}
        return make_checkpoint(folder, architecture=architecture, dtype=dtype, max_shard_size="150KB", **options)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return Checkpoints(tmp_path_factory.mktemp("models"))


@pytest.fixture
def unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights stay where they can be compared."""
    monkeypatch.setattr(packed, "can_pack", lambda weight: False)


def loaded(
    folder: Path,
    *,
    items: Sequence[str] | None = None,
    stage: Stage | None = None,
    shares: tuple[int, ...] = (1,),
    rank: int = 0,
    dtype: torch.dtype = torch.float32,
    threads: int = 2,
) -> Decoder:
    """One rank's part of a stage, filled; `items` are the places of its embedding, layers and output."""
    config = registry.load_config(folder)
    model = Decoder(
        config,
        partition=Partition(shares),
        group=SingleGroup() if len(shares) == 1 else FakeGroup(rank=rank, size=len(shares)),
        dtype=dtype,
        device=CPU,
        stage=stage,
        items=None if items is None else ItemDevices.of(items),
    )
    load(
        model,
        config=config,
        folder=folder,
        partition=Partition(shares),
        rank=rank,
        threads=threads,
        progress=lambda done, total: None,
    )
    return model


@torch.inference_mode()
def logits_of(*stages: Decoder) -> Tensor:
    """Logits of every position of the prompt, through one stage after the other."""
    x = Tape(stages[0], num_seqs=1, max_len=len(PROMPT)).step({0: PROMPT})
    for stage in stages[1:]:
        tape = Tape(stage, num_seqs=1, max_len=len(PROMPT))
        tape.decoder = _Fed(stage, x)  # type: ignore[assignment]
        x = tape.step({0: PROMPT})
    logits = stages[-1].logits(x)
    assert logits is not None
    return logits


@dataclass
class _Fed:
    """A later stage: it takes what the one before made in the place of token ids."""

    stage: Decoder
    x: Tensor

    def __call__(self, token_ids: Tensor, **options: Any) -> Tensor:
        hidden: Tensor = self.stage(self.x, **options)
        return hidden


def equals_transformers(folder: Path, *stages: Decoder) -> None:
    torch.testing.assert_close(logits_of(*stages), reference_logits(folder, PROMPT), rtol=1e-4, atol=1e-4)


# -- where weights come from ------------------------------------------------------------------------------------------

PLACES = {
    "memory": "cpu " * 7,
    "one layer on the disk": "cpu cpu cpu disk cpu cpu cpu",
    "two layers on the disk": "cpu disk cpu cpu disk cpu cpu",
    "the last layers and the output on the disk": "cpu cpu cpu disk disk disk disk",
    "the embedding and the first layers on the disk": "disk disk disk disk cpu cpu cpu",
    "all layers on the disk": "cpu disk disk disk disk disk cpu",
    "the output with the first layers": "disk disk cpu cpu cpu cpu disk",
    "the disk": "disk " * 7,
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("places", PLACES)
def test_a_model_gives_the_same_logits_wherever_its_parts_lie(
    checkpoints: Checkpoints, places: str, tied: bool
) -> None:
    folder = checkpoints.folder("LlamaForCausalLM", tied)
    equals_transformers(folder, loaded(folder, items=PLACES[places].split()))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_layers_of_every_family_may_lie_on_the_disk(checkpoints: Checkpoints, architecture: str) -> None:
    """With windows in some layers, norms of heads and biases: all are the layer's whose weights are in the buffer."""
    folder = checkpoints.folder(architecture, True)
    model = loaded(folder, items=["cpu", "cpu", *["disk"] * 4, "cpu"])
    for _ in range(2):
        equals_transformers(folder, model)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("cuts", [(2,), (1, 4), (1, 2, 3, 4)], ids=str)
def test_stages_one_after_the_other_are_the_model(checkpoints: Checkpoints, cuts: tuple[int, ...], tied: bool) -> None:
    folder = checkpoints.folder("Qwen3ForCausalLM", tied)
    bounds = zip((0, *cuts), (*cuts, NUM_LAYERS), strict=True)
    equals_transformers(folder, *(loaded(folder, stage=Stage(Interval(*each), NUM_LAYERS)) for each in bounds))


@pytest.mark.usefixtures("unpacked")
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("shares", [(1,), (1, 1), (3, 1, 2)], ids=str)
def test_every_parameter_of_a_stage_is_its_ranks_slice_of_the_file(
    checkpoints: Checkpoints, shares: tuple[int, ...], tied: bool
) -> None:
    folder = checkpoints.folder("LlamaForCausalLM", tied)
    table, index = registry.weights(registry.load_config(folder)), CheckpointIndex.read(folder)
    for bounds in ((0, 2), (2, 4), (4, 5)):
        stage = Stage(Interval(*bounds), NUM_LAYERS)
        specs = stage_weights(table, stage).specs
        for rank in range(len(shares)):
            model = loaded(folder, stage=stage, shares=shares, rank=rank)
            assert {spec.parameter for spec in specs} == {name for name, _ in model.named_parameters()}
            for spec in specs:
                with safe_open(index.tensors[spec.name].file, framework="pt") as file:
                    expected = file.get_slice(spec.name)[slices(spec, Partition(shares), rank)]
                module, leaf = model.get_submodule(spec.parameter.rpartition(".")[0]), spec.parameter.rpartition(".")[2]
                part = module.part_view(leaf, spec.part) if hasattr(module, "part_view") else getattr(module, leaf)
                assert torch.equal(part, expected), spec.parameter


def test_a_tied_output_is_the_embedding_itself_only_where_both_lie_in_one_place(checkpoints: Checkpoints) -> None:
    folder = checkpoints.folder("LlamaForCausalLM", True)
    together = loaded(folder)
    assert together.lm_head is not None
    assert together.model.embed_tokens is not None
    assert together.lm_head.weight is together.model.embed_tokens.weight
    apart = loaded(folder, items=["cpu"] * 3 + ["disk"] * 4)
    assert apart.lm_head is not None
    assert apart.model.embed_tokens is not None
    assert apart.lm_head.weight is not apart.model.embed_tokens.weight
    assert torch.equal(apart.lm_head.weight, apart.model.embed_tokens.weight)


def test_the_bytes_read_are_those_that_stay_in_memory(checkpoints: Checkpoints) -> None:
    folder = checkpoints.folder("LlamaForCausalLM", False)
    config, index = registry.load_config(folder), CheckpointIndex.read(folder)
    sizes = {spec.parameter: index.tensors[spec.name].num_bytes for spec in registry.weights(config).specs}
    told: list[tuple[int, int]] = []
    model = Decoder(
        config,
        partition=Partition((1,)),
        group=SingleGroup(),
        dtype=torch.float32,
        device=CPU,
        items=ItemDevices.of(["disk", "disk", *["cpu"] * 5]),
    )
    read = load(
        model,
        config=config,
        folder=folder,
        partition=Partition((1,)),
        rank=0,
        threads=1,
        progress=lambda done, total: told.append((done, total)),
    )
    whole_bytes = sum(index.tensors[spec.name].num_bytes for spec in registry.weights(config).specs)
    first_layer = sum(
        index.tensors[spec.name].num_bytes
        for spec in registry.weights(config).specs
        if spec.parameter.startswith("model.layers.0.")
    )
    assert read == whole_bytes - first_layer - sizes[EMBEDDING]
    assert (told[0], told[-1]) == ((0, read), (read, read))


def test_nothing_is_written_beside_the_checkpoint(checkpoints: Checkpoints) -> None:
    folder = checkpoints.folder("LlamaForCausalLM", False)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    logits_of(loaded(folder, items=["disk"] * 7))
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


# -- files that change meanwhile --------------------------------------------------------------------------------------


@pytest.fixture
def streamed(tmp_path: Path) -> tuple[Path, Decoder]:
    """A model whose layers are all read in every step."""
    folder = make_checkpoint(tmp_path / "model", max_shard_size="150KB", **ODD)
    return folder, loaded(folder, items=["cpu", *["disk"] * 5, "cpu"])


def step_until_it_fails(model: Decoder) -> str:
    """What reading says. What a step needs first may have been read before."""
    with pytest.raises(CheckpointError) as error:
        steps(model, 2)
    return str(error.value)


def steps(model: Decoder, count: int) -> None:
    for _ in range(count):
        logits_of(model)


def test_a_file_that_goes_away_is_an_error_that_names_it(streamed: tuple[Path, Decoder]) -> None:
    folder, model = streamed
    equals_transformers(folder, model)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    told = step_until_it_fails(model)
    assert str(folder) in told
    assert "model.layers." in told


def test_a_file_that_is_cut_short_is_an_error_that_names_it(streamed: tuple[Path, Decoder]) -> None:
    folder, model = streamed
    equals_transformers(folder, model)
    for file in folder.glob("*.safetensors"):
        with file.open("r+b") as opened:
            opened.truncate(file.stat().st_size // 2)
    told = step_until_it_fails(model)
    assert str(folder) in told
    assert "model.layers." in told


def test_a_file_that_comes_back_is_read_again(streamed: tuple[Path, Decoder]) -> None:
    folder, model = streamed
    expected = logits_of(model)
    for file in folder.glob("*.safetensors"):
        file.rename(file.with_suffix(".away"))
    step_until_it_fails(model)
    for file in folder.glob("*.away"):
        file.rename(file.with_suffix(".safetensors"))
    assert torch.equal(logits_of(model), expected)


def test_what_is_mapped_is_still_served_when_its_file_has_gone(tmp_path: Path) -> None:
    """The embedding and the output are used where they lie: a name that goes does not take them away."""
    folder = make_checkpoint(tmp_path / "model", **ODD)
    model = loaded(folder, items=["disk", *["cpu"] * 5, "disk"])
    expected = logits_of(model)
    (folder / "model.safetensors").unlink()
    assert torch.equal(logits_of(model), expected)


def test_the_cache_of_a_plan_with_other_reserves_is_not_measured_again(tmp_path: Path) -> None:
    """As on a machine that swaps, or a GPU that others use."""
    model = loaded(make_checkpoint(tmp_path / "model", **ODD), items=["cpu"] * 7)
    (assign,) = assigns_of([1])
    asked = {**assign.settings, "kv_cache_memory_bytes": None, "dtype": "float32", "device": "cpu"}
    planned = msgspec.structs.replace(assign, settings=asked, item_devices=("cpu",) * 7, most_blocks=1 << 40)
    assert blocks_with_room(model, planned) < 1 << 40
    assert blocks_with_room(model, msgspec.structs.replace(planned, own_reserves=True)) == 1 << 40


# -- held and foretold ------------------------------------------------------------------------------------------------


def cache_of(model: Decoder, placement: Placement, dtype: torch.dtype) -> KVCache:
    """As large as the plan says."""
    return allocate(
        model.cache_shapes(),
        num_blocks=placement.extra["num_blocks"],
        block_size=placement.demand.block_size,
        dtype=dtype,
        device=model.cache_devices(),
    )


def within_5_percent(measured: int, foretold: int) -> bool:
    return abs(measured - foretold) <= 0.05 * max(measured, foretold)


LAYOUTS: dict[str, dict[str, Any]] = {
    "tp 1": {},
    "tp 2": {"tensor_parallel_size": 2},
    "tp 3": {"tensor_parallel_size": 3},
    "tp 3, unequal": {"tensor_parallel_size": 3, "tensor_shares": [1, 2, 1]},
    "pp 2": {"tensor_parallel_size": 1, "pipeline_parallel_size": 2},
    "tp 2 x pp 2, uneven": {"tensor_parallel_size": 2, "pipeline_layers": [1, 4], "tensor_shares": [3, 1, 1, 2]},
    "tp 3 x pp 2": {"tensor_parallel_size": 3, "pipeline_layers": [3, 2]},
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_rank_holds_what_the_plan_foretold(
    checkpoints: Checkpoints, architecture: str, dtype: str, tied: bool
) -> None:
    torch_dtype: torch.dtype = getattr(torch, dtype)
    folder = checkpoints.folder(architecture, tied, torch_dtype)
    config = registry.load_config(folder)
    table = registry.weights(config)
    for name, asked in LAYOUTS.items():
        settings = {**SETTINGS, **SMALL, **asked}
        stages = len(asked.get("pipeline_layers", ())) or asked.get("pipeline_parallel_size", 1)
        devices = [cpu(GIB) for _ in range(asked.get("tensor_parallel_size", 1) * stages)]
        demand = demand_of(config, settings, dtype=dtype, explicit=SMALL)
        placement = place_ranks(config, table, inventory(devices), demand, settings)
        for plan in placement.devices:
            model = loaded(
                folder,
                stage=Stage(plan.layers, NUM_LAYERS),
                shares=placement.shares[plan.stage],
                rank=plan.tp_rank,
                dtype=torch_dtype,
                threads=1,
            )
            (held,) = held_bytes(model, cache_of(model, placement, torch_dtype))
            where = f"{name}, rank {plan.rank}: {held} and {plan}"
            assert held.device == "cpu"
            assert within_5_percent(held.weight_bytes, plan.weight_bytes), where
            assert within_5_percent(held.kv_cache_bytes, plan.kv_cache_bytes), where


ALWAYS_IN_MEMORY = 1024
"""The final norm and the frequencies of rotary embeddings, wherever their layers lie."""
MAPS: dict[str, dict[str, str]] = {
    "the last layers": {
        "": "cpu",
        **dict.fromkeys(("model.layers.3", "model.layers.4", "model.norm", "lm_head"), "disk"),
    },
    "the first layers": {"": "cpu", **dict.fromkeys(("model.embed_tokens", "model.layers.0"), "disk")},
    "all": {"": "disk"},
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("device_map", ["the last layers", "the first layers", "all"])
def test_memory_and_disk_hold_what_the_plan_foretold(checkpoints: Checkpoints, device_map: str, tied: bool) -> None:
    folder = checkpoints.folder("LlamaForCausalLM", tied)
    config = registry.load_config(folder)
    demand = demand_of(config, {**SETTINGS, **SMALL}, dtype="float32", explicit=SMALL)
    asked = OneProcess(placement="exact", device_layers=None, device_map=MAPS[device_map], max_memory=None, disk=True)
    placement = place_layers(config, registry.weights(config), inventory([cpu(GIB), disk(GIB)]), demand, asked)
    model = loaded(folder, items=item_devices(placement))
    found = {held.device: held for held in held_bytes(model, cache_of(model, placement, torch.float32))}
    for plan in placement.devices:
        held = found.get(plan.device.name)
        measured = (held.weight_bytes, held.kv_cache_bytes) if held else (0, 0)
        foretold = (plan.weight_bytes, plan.kv_cache_bytes)
        assert abs(measured[0] - foretold[0]) <= max(ALWAYS_IN_MEMORY, 0.05 * foretold[0]), f"{held} and {plan}"
        assert within_5_percent(measured[1], foretold[1]), f"{held} and {plan}"


def test_what_lies_on_the_disk_is_computed_on_the_cpu() -> None:
    assert computing_device("disk") == CPU
    assert ItemDevices.of(["cpu", "disk", "cpu", "disk", "disk"]).on_disk == (0, 2)
    assert ItemDevices.same(CPU, num_layers=3) == ItemDevices("cpu", ("cpu",) * 3, "cpu")
    assert whole(3).layers.size == 3
