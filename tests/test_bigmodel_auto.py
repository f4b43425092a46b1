"""The exact planner on random models: it spills no model that fits, keeps what belongs together, covers all."""

import random
import warnings
from functools import cache
from typing import Any

import pytest
import torch
from module_trees import Layer, cases, random_memory, random_module, tie_some
from torch import nn

from tpdist.bigmodel import (
    auto_device_map,
    check_device_map,
    compute_module_sizes,
    devices,
    find_tied_parameters,
    infer_auto_device_map,
)
from tpdist.bigmodel.device_map import device_of

pytestmark = pytest.mark.filterwarnings("ignore:buffers of offloaded layers")

ALL_DEVICES = [0, 1, 2, 3, 4, "cpu"]


@pytest.fixture(autouse=True)
def _five_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "present_devices", lambda: ALL_DEVICES)


def bytes_on(model: nn.Module, device_map: dict[int | str, int | str]) -> dict[int | str, int]:
    """What each device holds, tied parameters once."""
    used: dict[int | str, int] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        device = device_of(name, device_map)
        used[device] = used.get(device, 0) + tensor.nbytes
    return used


def spilled_bytes(model: nn.Module, device_map: dict[int | str, int | str]) -> tuple[int, int]:
    used = bytes_on(model, device_map)
    return used.get("disk", 0), used.get("cpu", 0)


def units_in_order(model: nn.Module, no_split: str) -> list[int]:
    """Bytes of what may not be split, in order; units that share a parameter are one, at the place of the first."""

    def walk(module: nn.Module) -> list[list[torch.Tensor]]:
        children = list(module.children())
        if not children or type(module).__name__ == no_split:
            return [[*module.parameters(), *module.buffers()]]
        own = [[tensor] for tensor in module.parameters(recurse=False)]
        below = [unit for child in children for unit in walk(child)]
        return [*own, *below, *([buffer] for buffer in module.buffers(recurse=False))]

    groups: list[dict[int, torch.Tensor]] = []
    for unit in walk(model):
        tensors = {id(tensor): tensor for tensor in unit}
        sharing = [group for group in groups if group.keys() & tensors.keys()]
        if not sharing:
            groups.append(tensors)
            continue
        for group in sharing[1:]:
            sharing[0].update(group)
            groups.remove(group)
        sharing[0].update(tensors)
    return [sum(tensor.nbytes for tensor in group.values()) for group in groups]


@cache
def fits(units: tuple[int, ...], room: tuple[int, ...]) -> bool:
    """Whether units fit in any arrangement: by trying the first on every device that is different."""
    if not units:
        return True
    return any(
        fits(units[1:], tuple(sorted((*room[:device], size - units[0], *room[device + 1 :]))))
        for device, size in enumerate(room)
        if size >= units[0] and size not in room[:device]
    )


@pytest.mark.parametrize("seed", range(4))
def test_a_model_that_fits_is_never_spilled(seed: int) -> None:
    fitting = 0
    for draw in cases(seed, 400):
        model = random_module(draw, own_buffers=True)
        tie_some(draw, model, groups=draw.choice((0, 0, 1, 2)))
        total = compute_module_sizes(model)[""]
        memory = random_memory(draw, total, gaps=True)
        room = [size for device, size in memory.items() if device != "cpu"]
        device_map = auto_device_map(model, memory, "Layer")
        check_device_map(model, device_map)
        used = bytes_on(model, device_map)
        assert all(used.get(device, 0) <= size for device, size in memory.items())
        units = [size for size in units_in_order(model, "Layer") if size]
        if room and len(units) < 12 and fits(tuple(sorted(units, reverse=True)), tuple(sorted(room))):
            fitting += 1
            assert not {"cpu", "disk"} & set(device_map.values()), (memory, device_map)
        if not room and total <= memory.get("cpu", 0):
            assert set(device_map.values()) == {"cpu"}
    assert fitting > 50


@pytest.mark.parametrize("seed", range(3))
def test_no_greedy_map_is_better(seed: int) -> None:
    """Where both keep room alike: the greedy one keeps it on GPU 0 even if they run on another, since nothing else is
    there, and keeps none for tensors beside submodules."""
    compared = 0
    for draw in cases(50 + seed, 300):
        model = random_module(draw, own_parameters=False)
        memory = random_memory(draw, compute_module_sizes(model)[""])
        ours = auto_device_map(model, memory, ["Layer"])
        greedy = infer_auto_device_map(model, memory, ["Layer"])
        if bytes_on(model, greedy).keys() & {1, 2} and not bytes_on(model, greedy).get(0):
            continue
        compared += 1
        assert spilled_bytes(model, ours) <= spilled_bytes(model, greedy), (memory, ours, greedy)
    assert compared > 150


def test_what_belongs_together_stays_together() -> None:
    for draw in cases(7, 300):
        model = random_module(draw, own_buffers=True)
        tie_some(draw, model, groups=2)
        device_map = auto_device_map(model, random_memory(draw, compute_module_sizes(model)[""]), "Layer")
        for group in find_tied_parameters(model):
            assert len({device_of(name, device_map) for name in group}) == 1
        for path, module in model.named_modules():
            if isinstance(module, Layer):
                assert not any(key.startswith(path + ".") for key in device_map)


def test_a_model_is_split_only_where_it_must_be() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)) for _ in range(4)))
    block = compute_module_sizes(model)["0"]
    assert auto_device_map(model, {0: 4 * block}) == {"": 0}
    assert auto_device_map(model, {0: 2 * block, 1: 2 * block}) == {"0": 0, "1": 0, "2": 1, "3": 1}
    # Nearly three blocks have room on GPU 0: the border goes between blocks, since all fits.
    assert auto_device_map(model, {0: 3 * block - 1, 1: 3 * block - 1}) == {"0": 0, "1": 0, "2": 1, "3": 1}
    spilled = auto_device_map(model, {0: 2 * block, "cpu": 9 * block})
    assert spilled == {"0": 0, "1.0": 0, "1.1": 0, "1.2": "cpu", "2": "cpu", "3": "cpu"}


def test_a_model_that_fits_in_another_order_of_the_gpus_is_not_spilled() -> None:
    model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.Linear(4, 4, bias=False))
    device_map = auto_device_map(model, {0: 64, 1: 128, "cpu": 1000})
    assert list(device_map.items()) == [("0", 1), ("1", 0)]
    assert auto_device_map(model, {0: 128, 1: 192}) == {"": 1}
    assert auto_device_map(model, {0: 60, 1: 64, "cpu": 1000}) == {"": "cpu"}


def test_a_model_that_fits_only_in_several_places_of_a_device_is_not_spilled() -> None:
    model = nn.Sequential(*(nn.Linear(1, size, bias=False) for size in (6, 8, 4, 2)))
    memory = {0: 40, 1: 40, "cpu": 1000}
    assert auto_device_map(model, memory) == {"0": 1, "1": 0, "2": 1, "3": 0}
    assert auto_device_map(model, {**memory, 1: 39})["3"] == "cpu"


def test_the_map_is_in_the_order_of_the_model() -> None:
    """Its first GPU is the one that runs what is offloaded, and has room for it."""
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), *(nn.Linear(4, 4) for _ in range(3)))
    device_map = auto_device_map(model, {0: 240, 1: 80, "cpu": 1000})
    assert list(device_map.items()) == [("0", 0), ("1", 1), ("2", "cpu"), ("3", "cpu")]


def test_tied_parameters_count_once() -> None:
    model = nn.Sequential(nn.Embedding(100, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 100, bias=False))
    model[2].weight = model[0].weight
    assert auto_device_map(model, {0: 1600 + 64}) == {"": 0}
    assert auto_device_map(model, {0: 1600, 1: 64}) == {"0": 0, "1": 1, "2": 0}


def test_bools_take_a_byte() -> None:
    model = nn.Module()
    model.register_buffer("mask", torch.ones(80, dtype=torch.bool))
    assert auto_device_map(model, {0: 79}) == {"": "disk"}
    assert auto_device_map(model, {0: 80}) == {"": 0}


def test_a_type_makes_floats_smaller_but_no_whole_numbers() -> None:
    model = nn.Module()
    model.a = nn.Linear(4, 4, bias=False)
    model.b = nn.Module()
    model.b.register_buffer("ids", torch.zeros(4, dtype=torch.int64))
    assert auto_device_map(model, {0: 32 + 32}, dtype=torch.float16) == {"": 0}
    assert auto_device_map(model, {0: 32 + 31}, dtype=torch.float16) != {"": 0}
    assert auto_device_map(model, {0: 64}, dtype="float16", special_dtypes={"a.weight": torch.float32}) != {"": 0}


def test_modules_without_tensors_and_without_anything_have_a_place() -> None:
    assert auto_device_map(nn.ReLU(), {0: 10}) == {"": 0}
    assert auto_device_map(nn.Sequential(nn.ReLU(), nn.Linear(1, 1)), {0: 8}) == {"": 0}


def test_no_split_modules_of_the_model_are_used_if_none_are_given() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 4))
    memory: dict[int | str, int | str] = {0: 90, 1: 165, 2: 10}
    assert auto_device_map(model, memory) == {"0.0": 0, "0.1": 1, "1": 1}
    model._no_split_modules = {"Sequential"}
    assert auto_device_map(model, memory) == {"": "disk"}


def test_verbose_names_every_piece(capsys: pytest.CaptureFixture[str]) -> None:
    auto_device_map(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), {"cpu": "1KB"}, verbose=True)
    assert capsys.readouterr().out.splitlines() == ["0 (24 bytes) goes to cpu", "1 (24 bytes) goes to cpu"]


@pytest.mark.parametrize("plan", [auto_device_map, infer_auto_device_map])
def test_buffers_that_no_gpu_has_room_for_are_warned_of(plan: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), *(nn.BatchNorm1d(32) for _ in range(3)))
    with warnings.catch_warnings(action="error"):
        assert plan(model, {0: 2000, "cpu": 0}) == {"": 0}
        plan(model, {0: 600, "cpu": 2000}, offload_buffers=True)
    with pytest.warns(UserWarning, match="buffers of offloaded layers take 792 bytes"):
        assert plan(model, {0: 600, "cpu": 4000}) == {"0": 0, "1": "cpu", "2": "cpu", "3": "cpu"}


class Twice(nn.Module):
    """A parameter and a module under two names each, beside another module."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(4))
        self.other = nn.Linear(4, 4)
        self.left = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        self.right, self.same = self.left, self.scale


@pytest.mark.parametrize("plan", [auto_device_map, infer_auto_device_map])
@pytest.mark.parametrize("clean", [False, True])
def test_what_stands_twice_in_a_module_has_a_device_under_both_names(plan: Any, clean: bool) -> None:
    linear = nn.Linear(4, 4)
    twice = nn.Sequential(nn.Linear(4, 4), linear, nn.ReLU(), linear, nn.Linear(4, 4))
    for model in (twice, Twice(), nn.Sequential(Twice(), nn.Linear(2, 2))):
        total = compute_module_sizes(model)[""]
        for room in range(0, total + 80, 16):
            device_map = plan(model, {0: room, "cpu": total}, clean_result=clean)
            check_device_map(model, device_map)
            for path, module in model.named_modules(remove_duplicate=False):
                if path and module is linear:
                    assert device_map.get(path) == device_map.get("1")
    device_map = auto_device_map(twice, {0: 200, 1: 200})
    assert list(device_map.items()) == [("0", 0), ("1", 0), ("2", 0), ("3", 0), ("4", 1)]


class Signs(nn.Module):
    """Has a buffer only, which a state dict may hold."""

    def __init__(self, *, persistent: bool) -> None:
        super().__init__()
        self.register_buffer("signs", torch.ones(8), persistent=persistent)


@pytest.mark.parametrize("plan", [auto_device_map, infer_auto_device_map])
def test_only_what_needs_a_device_has_one_under_its_second_name(plan: Any) -> None:
    """Accelerate's maps have none for modules without parameters; it takes those if no state dict has the buffers."""
    for shared, covered in ((nn.ReLU(), False), (Signs(persistent=False), False), (Signs(persistent=True), True)):
        model = nn.Sequential(nn.Linear(4, 4), shared, shared, nn.Linear(4, 4))
        device_map = plan(model, {0: 160, "cpu": 1000})
        assert ("2" in device_map) == covered
        check_device_map(model, device_map)


def test_many_layers_take_a_moment_only() -> None:
    draw = random.Random(0)
    with torch.device("meta"):
        model = nn.ModuleList(nn.ModuleList(nn.Linear(8, draw.randint(1, 64)) for _ in range(40)) for _ in range(60))
    total = compute_module_sizes(model)[""]
    device_map = auto_device_map(model, dict.fromkeys(range(5), total // 5) | {"cpu": total})
    check_device_map(model, device_map)
