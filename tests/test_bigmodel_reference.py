"""The same sizes, balanced memory and greedy device maps as Accelerate, on thousands of random models.

Accelerate's own order depends on that of Python's sets, which differs from process to process: here its sets keep the
order in which things came, which is one of its possible results. Where it ends with an IndexError or AttributeError of
its own, or loses buffers, there is nothing to compare with: the tests of those faults are in test_bigmodel_faults.py.
"""

import random
import warnings
from collections.abc import Iterable, Iterator, Set
from typing import Any

import pytest
import torch
from accelerate.utils import modeling as reference
from module_trees import cases, random_memory, random_module, tie_some
from torch import nn

from tpdist.bigmodel import (
    calculate_maximum_sizes,
    compute_module_sizes,
    convert_file_size_to_int,
    dtype_byte_size,
    find_tied_parameters,
    get_balanced_memory,
    get_max_layer_size,
    infer_auto_device_map,
)

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:buffers of offloaded layers")]

NUM_CASES = 400


class OrderedSet(Set[Any]):
    """A set that keeps the order in which things came."""

    def __init__(self, items: Iterable[Any] = ()) -> None:
        self._items = dict.fromkeys(items)

    def __contains__(self, item: object) -> bool:
        return item in self._items

    def __iter__(self) -> Iterator[Any]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)


@pytest.fixture(autouse=True)
def _ordered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "set", OrderedSet, raising=False)


def options(draw: random.Random, model: nn.Module) -> dict[str, Any]:
    """Random no-split classes and types."""
    chosen: dict[str, Any] = {
        "no_split_module_classes": draw.choice([None, "Layer", ["Layer"], ["Layer", "Group"], ["Absent"]]),
        "dtype": draw.choice([None, None, "float16", torch.bfloat16, "torch.float32"]),
    }
    names = [name for name, _ in model.named_parameters()]
    if draw.random() < 0.3 and names:
        chosen["special_dtypes"] = {name: draw.choice([torch.float32, "int8"]) for name in draw.sample(names, 1)}
    return chosen


def test_sizes_are_the_same() -> None:
    for draw in cases(1, NUM_CASES):
        model = random_module(draw, own_buffers=True)
        tie_some(draw, model, groups=draw.randint(0, 2))
        chosen = options(draw, model)
        classes = chosen.pop("no_split_module_classes")
        buffers_only = draw.random() < 0.2
        ours = compute_module_sizes(model, buffers_only=buffers_only, **chosen)
        theirs = reference.compute_module_sizes(model, buffers_only=buffers_only, **chosen)
        assert dict(ours) == dict(theirs)
        assert list(ours) == list(theirs)
        assert calculate_maximum_sizes(model) == reference.calculate_maximum_sizes(model)
        parts = list(model.named_children())
        sizes = compute_module_sizes(model)
        whole = [classes] if isinstance(classes, str) else classes or []
        assert get_max_layer_size(parts, sizes, whole) == reference.get_max_layer_size(parts, sizes, whole)
        assert find_tied_parameters(model) == reference.find_tied_parameters(model)


@pytest.mark.parametrize("size", ["1GiB", "1.5MiB", "2KiB", "3GB", "0.5MB", "7KB", "16Gb", "8mb", "5gb", 12])
def test_sizes_with_units_are_the_same(size: Any) -> None:
    assert convert_file_size_to_int(size) == reference.convert_file_size_to_int(size)


def test_sizes_of_types_are_the_same() -> None:
    for dtype in {getattr(torch, name) for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype)}:
        if dtype.is_complex or "uint" in str(dtype) or "q" in str(dtype):
            continue
        try:
            expected = reference.dtype_byte_size(dtype)
        except ValueError:
            continue
        if expected >= 1 or dtype == torch.bool:
            assert dtype_byte_size(dtype) == expected, dtype


def test_balanced_memory_is_the_same() -> None:
    for draw in cases(2, NUM_CASES):
        model = random_module(draw, own_buffers=True)
        tie_some(draw, model, groups=draw.randint(0, 1))
        chosen, low_zero = options(draw, model), draw.random() < 0.4
        memory = random_memory(draw, compute_module_sizes(model)[""], gaps=not low_zero)
        if low_zero:
            memory = {device: size or 1 for device, size in memory.items()}
        ours = get_balanced_memory(model, dict(memory), low_zero=low_zero, **chosen)
        theirs = reference.get_balanced_memory(model, dict(memory), low_zero=low_zero, **chosen)
        assert list(ours.items()) == list(theirs.items()), (memory, chosen, low_zero)


@pytest.mark.parametrize("seed", range(6))
def test_greedy_device_maps_are_the_same(seed: int) -> None:
    compared = 0
    for draw in cases(100 + seed, NUM_CASES):
        model = random_module(draw)
        tie_some(draw, model, groups=draw.choice((0, 0, 1, 1, 2)))
        chosen = options(draw, model)
        memory = random_memory(draw, compute_module_sizes(model)[""], gaps=True)
        chosen |= {
            "clean_result": draw.random() < 0.5,
            "fallback_allocation": draw.random() < 0.4,
            "offload_buffers": draw.random() < 0.5,
        }
        ours = infer_auto_device_map(model, dict(memory), **chosen)
        try:
            with warnings.catch_warnings(action="ignore"):
                theirs = reference.infer_auto_device_map(model, dict(memory), **chosen)
        except (IndexError, AttributeError):  # its own
            continue
        compared += 1
        assert list(ours.items()) == list(theirs.items()), (memory, chosen)
    assert compared > NUM_CASES * 0.8


def test_verbose_says_where_modules_go(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    assert infer_auto_device_map(model, {"cpu": 71}, verbose=True) == {"0": "cpu", "1": "disk"}
    assert "splitting 1" in capsys.readouterr().out
