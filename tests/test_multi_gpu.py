"""TransformerLens' functions: devices are chosen by memory, maps are checked, and nothing needs a GPU to be tested."""

import itertools
import warnings
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tpdist.multi_gpu import (
    AvailableDeviceMemory,
    calculate_available_device_cuda_memory,
    count_unique_devices,
    determine_available_memory_for_available_devices,
    find_embedding_device,
    get_best_available_cuda_device,
    get_best_available_device,
    get_device_for_block_index,
    resolve_device_map,
    sort_devices_based_on_available_memory,
)


def pretend(monkeypatch: pytest.MonkeyPatch, *memory: tuple[int, int]) -> list[int]:
    """Stand in for CUDA devices of these total and allocated bytes. Returns those that are looked at, as they are."""
    looked_at: list[int] = []

    def properties(index: int) -> SimpleNamespace:
        looked_at.append(index)
        return SimpleNamespace(total_memory=memory[index][0])

    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(memory))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(memory))
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda index: memory[index][1])
    return looked_at


def config(n_layers: int = 12, n_devices: int = 1, device: Any = "cuda") -> SimpleNamespace:
    return SimpleNamespace(n_layers=n_layers, n_devices=n_devices, device=device)


def block_device(index: int, cfg: Any, device: Any = None) -> torch.device:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return get_device_for_block_index(index, cfg, device)


def test_available_memory_is_what_is_not_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at = pretend(monkeypatch, (80, 60), (80, 15), (80, 40))
    assert calculate_available_device_cuda_memory(1) == 65
    assert looked_at == [1]


def test_memory_is_listed_by_device_up_to_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at = pretend(monkeypatch, (80, 60), (80, 15), (80, 40))
    assert determine_available_memory_for_available_devices(3) == [(0, 20), (1, 65), (2, 40)]
    assert determine_available_memory_for_available_devices(9) == [(0, 20), (1, 65), (2, 40)]
    looked_at.clear()
    assert determine_available_memory_for_available_devices(2) == [(0, 20), (1, 65)]
    assert looked_at == [0, 1]


def test_devices_are_sorted_by_memory_and_the_list_given_is_left_alone() -> None:
    devices: AvailableDeviceMemory = [(0, 20), (1, 65), (2, 40), (3, 65)]
    assert sort_devices_based_on_available_memory(devices) == [(1, 65), (3, 65), (2, 40), (0, 20)]
    assert devices == [(0, 20), (1, 65), (2, 40), (3, 65)]


def test_the_best_device_has_most_memory_of_those_considered(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, (80, 60), (80, 15), (80, 0))
    assert get_best_available_cuda_device() == torch.device("cuda", 2)
    assert get_best_available_cuda_device(2) == torch.device("cuda", 1)
    assert get_best_available_cuda_device(1) == torch.device("cuda", 0)


@pytest.mark.parametrize("max_devices", [None, 0, 2])
def test_no_cuda_device_is_an_environment_error(monkeypatch: pytest.MonkeyPatch, max_devices: int | None) -> None:
    pretend(monkeypatch)
    with pytest.raises(EnvironmentError, match=f"0 visible, max_devices is {max_devices}"):
        get_best_available_cuda_device(max_devices)


def test_no_device_to_consider_is_an_environment_error(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, (80, 0))
    with pytest.raises(EnvironmentError, match="1 visible, max_devices is 0"):
        get_best_available_cuda_device(0)


def test_the_configured_device_is_the_best_unless_it_stands_for_several(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at = pretend(monkeypatch, (80, 60), (80, 15), (80, 0))
    assert get_best_available_device(config(device="cpu", n_devices=2)) == torch.device("cpu")
    assert get_best_available_device(config(device="cuda:1")) == torch.device("cuda", 1)
    assert get_best_available_device(config(device=torch.device("cuda"))) == torch.device("cuda")
    assert looked_at == []
    assert get_best_available_device(config(n_devices=2)) == torch.device("cuda", 1)


@pytest.mark.parametrize("choose", [get_best_available_device, lambda cfg: block_device(0, cfg)])
def test_a_configuration_without_a_device_is_an_error(choose: Any) -> None:
    with pytest.raises(ValueError, match="no device is configured"):
        choose(config(device=None))
    with pytest.raises(ValueError, match="'gpu' is no device"):
        choose(config(device="gpu"))


def test_the_device_of_a_block_is_deprecated() -> None:
    with pytest.warns(DeprecationWarning, match="get_best_available_device") as caught:
        get_device_for_block_index(0, config())
    assert caught[0].filename == __file__


@given(n_devices=st.integers(1, 16), share=st.integers(1, 16))
def test_blocks_are_dealt_in_equal_consecutive_shares(n_devices: int, share: int) -> None:
    cfg = config(n_layers=n_devices * share, n_devices=n_devices)
    assert [block_device(layer, cfg).index for layer in range(cfg.n_layers)] == [
        layer // (cfg.n_layers // n_devices) for layer in range(cfg.n_layers)
    ]


@given(n_layers=st.integers(1, 100), n_devices=st.integers(1, 16), first=st.integers(0, 3))
def test_blocks_never_go_past_the_last_device(n_layers: int, n_devices: int, first: int) -> None:
    cfg = config(n_layers, n_devices, f"cuda:{first}")
    indexes = [block_device(layer, cfg).index for layer in range(n_layers)]
    assert indexes[0] == first
    assert all(after >= before for before, after in itertools.pairwise(indexes))
    assert indexes[-1] < first + n_devices
    counts = Counter(indexes)
    assert max(counts.values()) - min(counts[first + number] for number in range(n_devices)) <= 1


def test_blocks_start_at_the_device_given() -> None:
    cfg = config(n_layers=32, n_devices=4, device="cpu")
    assert block_device(31, cfg, "cuda:2") == torch.device("cuda", 5)
    assert block_device(31, cfg, torch.device("cuda")) == torch.device("cuda", 3)
    assert block_device(31, cfg) == torch.device("cpu")
    assert block_device(31, config(32, 4), "cpu") == torch.device("cpu")
    assert block_device(3, SimpleNamespace(device="cpu")) == torch.device("cpu")


@pytest.mark.parametrize("index", [-1, 12, 100])
def test_a_block_that_the_model_has_not_is_an_error(index: int) -> None:
    with pytest.raises(ValueError, match=f"layer {index} is not one of the model's layers 0 to 11"):
        block_device(index, config(12, 2))


def test_blocks_on_no_device_are_an_error() -> None:
    with pytest.raises(ValueError, match="n_devices is 0"):
        block_device(0, config(12, 0))


@pytest.mark.parametrize("n_devices", [None, 1, 0])
@pytest.mark.parametrize("device", [None, "cpu", "cuda:1"])
def test_a_single_device_needs_no_map(n_devices: int | None, device: str | None) -> None:
    assert resolve_device_map(n_devices, None, device) == (None, None)
    assert resolve_device_map(n_devices, None, device, {0: "10GiB"}) == (None, None)


@pytest.mark.parametrize("device", [None, "cuda", "cuda:0", torch.device("cuda", 1)])
def test_several_devices_are_balanced_over_exactly_that_many(monkeypatch: pytest.MonkeyPatch, device: Any) -> None:
    looked_at = pretend(monkeypatch, (80, 0), (80, 0), (80, 0))
    assert resolve_device_map(2, None, device) == ("balanced", {0: "auto", 1: "auto"})
    assert looked_at == []


def test_budgets_that_are_given_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, (80, 0), (80, 0))
    max_memory: dict[str | int, str] = {1: "10GiB", "cpu": "30GiB"}
    assert resolve_device_map(2, None, None, max_memory) == ("balanced", {0: "auto", **max_memory})
    assert max_memory == {1: "10GiB", "cpu": "30GiB"}


@pytest.mark.parametrize("key", [2, -1, "disk"])
def test_a_budget_for_none_of_the_devices_is_an_error(monkeypatch: pytest.MonkeyPatch, key: str | int) -> None:
    pretend(monkeypatch, (80, 0), (80, 0), (80, 0))
    with pytest.raises(ValueError, match=f"max_memory has {key!r}, which is none of the CUDA devices 0 to 1"):
        resolve_device_map(2, None, None, {0: "10GiB", key: "10GiB"})


@pytest.mark.parametrize("visible", [0, 1])
def test_more_devices_than_there_are_is_an_error(monkeypatch: pytest.MonkeyPatch, visible: int) -> None:
    pretend(monkeypatch, *[(80, 0)] * visible)
    with pytest.raises(ValueError, match=f"n_devices is 2, which requires CUDA devices, but only {visible} are"):
        resolve_device_map(2, None, None)


@pytest.mark.parametrize("device", ["cpu", "cuda:2", "mps"])
def test_a_device_outside_of_those_asked_for_is_an_error(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    pretend(monkeypatch, (80, 0), (80, 0), (80, 0))
    with pytest.raises(ValueError, match=f"device '{device}' is none of the CUDA devices 0 to 1"):
        resolve_device_map(2, None, device)


@pytest.mark.parametrize(
    "device_map",
    [
        "auto",
        "balanced",
        "balanced_low_0",
        "sequential",
        "cuda:1",
        "cpu",
        {"": 0},
        {"model.embed_tokens": 0, "model.layers": "cuda:1", "lm_head": "cuda"},
        {"": "mps"},
    ],
)
@pytest.mark.parametrize("n_devices", [None, 0, 1, 7])
def test_an_explicit_map_wins_and_passes_through(device_map: Any, n_devices: int | None) -> None:
    max_memory: dict[str | int, str] = {0: "10GiB", "cpu": "30GiB"}
    resolved, budgets = resolve_device_map(n_devices, device_map, None, max_memory)
    assert resolved is device_map
    assert budgets is max_memory
    assert resolve_device_map(n_devices, device_map, None) == (device_map, None)


@pytest.mark.parametrize("device", ["cpu", "cuda:0", torch.device("cuda")])
@pytest.mark.parametrize("device_map", ["auto", {"": 0}])
def test_a_device_beside_a_map_is_an_error(device_map: Any, device: Any) -> None:
    with pytest.raises(ValueError, match="mutually exclusive"):
        resolve_device_map(None, device_map, device)


@pytest.mark.parametrize("target", ["cpu", "disk", "meta", "CPU", "Disk"])
def test_a_map_that_offloads_is_an_error_that_names_the_entry(target: str) -> None:
    with pytest.raises(ValueError, match=rf"device_map\['lm_head'\] is '{target}', which is not supported: "):
        resolve_device_map(None, {"model": 0, "lm_head": target}, None)


@pytest.mark.parametrize("target", ["disk", "meta"])
def test_a_whole_model_that_is_offloaded_is_an_error(target: str) -> None:
    with pytest.raises(ValueError, match=f"device_map is '{target}', which is not supported: weights that"):
        resolve_device_map(None, target, None)


@pytest.mark.parametrize("target", ["gpu", "gpu:0", "cuda:x", "cuda:-1", "0", "", -1, True, None, 1.5])
def test_a_map_to_no_device_is_an_error_that_names_the_entry(target: Any) -> None:
    with pytest.raises(ValueError, match=r"device_map\['model'\] is .*, which is no device"):
        resolve_device_map(None, {"model": target}, None)


def test_a_map_that_is_no_directive_and_no_device_is_an_error() -> None:
    with pytest.raises(ValueError, match="device_map is 'balance', which is no device; use one of auto, balanced"):
        resolve_device_map(None, "balance", None)


def test_an_empty_map_is_an_error() -> None:
    with pytest.raises(ValueError, match="device_map is empty"):
        resolve_device_map(None, {}, None)


class Spread(nn.Module):
    """A model with two towers, the text's second, whose embedding is known by two names."""

    def __init__(self, hf_device_map: Any, embedding: str | None = "model.text.embed") -> None:
        super().__init__()
        self.model = nn.ModuleDict({"vision": nn.ModuleDict({"embed": nn.Embedding(3, 2)}), "text": nn.ModuleDict()})
        self.model["text"]["embed"] = nn.Embedding(3, 2)
        self.lm_head = self.model["text"]["embed"]
        self.hf_device_map = hf_device_map
        self.embedding = embedding

    def get_input_embeddings(self) -> nn.Module:
        if self.embedding is None:
            raise NotImplementedError
        return self.get_submodule(self.embedding)


@pytest.mark.parametrize(
    ("hf_device_map", "expected"),
    [
        ({"model.vision": 0, "model.text": 1, "lm_head": 1}, "cuda:1"),
        ({"": 3}, "cuda:3"),
        ({"": 0, "model": 1, "model.text": 2, "model.text.embed": "cuda:3"}, "cuda:3"),
        ({"model.text.embed": "cpu", "model.vision": 0}, "cpu"),
        ({"model.t": 2, "model.text.emb": 2, "model": 1}, "cuda:1"),
        ({"model.vision": 0, "lm_head": 2}, "cuda:2"),
        ({"model.text": torch.device("cuda", 1)}, "cuda:1"),
        ({"model.vision": "cpu", "model.text": "disk", "lm_head.x": 1}, "cuda:1"),
        ({"": "disk"}, "cpu"),
    ],
)
def test_token_ids_go_where_the_map_has_the_input_embedding(hf_device_map: Any, expected: str) -> None:
    assert find_embedding_device(Spread(hf_device_map)) == torch.device(expected)


def test_a_model_that_was_not_spread_has_no_embedding_device() -> None:
    assert find_embedding_device(nn.Linear(1, 1)) is None
    assert find_embedding_device(Spread(None)) is None
    assert find_embedding_device(Spread({})) is None


def test_an_embedding_that_the_map_does_not_reach_is_asked_itself() -> None:
    assert find_embedding_device(Spread({"model.vision": 1})) == torch.device("cpu")
    offloaded = Spread({"model.vision": 1}).to("meta")
    assert find_embedding_device(offloaded) == torch.device("cuda:1")


def test_an_embedding_that_is_no_module_of_torch_is_asked_too() -> None:
    held = SimpleNamespace(device=torch.device("cuda:1"))
    embedding = SimpleNamespace(parameters=lambda: iter([held]))
    model = SimpleNamespace(hf_device_map={"vision": 0, "text": 1}, get_input_embeddings=lambda: embedding)
    assert find_embedding_device(model) == torch.device("cuda:1")


@pytest.mark.parametrize("model", [Spread({"a": 2, "b": 1}, embedding=None), SimpleNamespace(hf_device_map={"a": 2})])
def test_a_model_that_does_not_tell_its_embedding_takes_ids_at_the_first_entry(model: Any) -> None:
    assert find_embedding_device(model) == torch.device("cuda:2")


def test_no_cuda_device_is_touched_to_find_the_embedding(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise AssertionError("CUDA was asked")

    for name in ("_lazy_init", "device_count", "get_device_properties", "memory_allocated", "current_device"):
        monkeypatch.setattr(torch.cuda, name, fail)
    assert find_embedding_device(Spread({"model": 1})) == torch.device("cuda:1")


@pytest.mark.parametrize(
    ("hf_device_map", "expected"),
    [
        (None, 1),
        ({}, 1),
        ({"": 0}, 1),
        ({"a": 0, "b": 1, "c": 0}, 2),
        ({"a": 0, "b": "cuda:0", "c": torch.device("cuda", 0)}, 1),
        ({"a": 0, "b": "cpu", "c": "disk"}, 3),
    ],
)
def test_unique_devices_are_counted_however_they_are_written(hf_device_map: Any, expected: int) -> None:
    assert count_unique_devices(SimpleNamespace(hf_device_map=hf_device_map)) == expected


def test_a_model_without_a_map_is_on_one_device() -> None:
    assert count_unique_devices(object()) == 1
