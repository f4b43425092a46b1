"""Dispatched models: modules run where the map puts them, and callers notice nothing but errors that explain.

GPUs are imagined: FakeTensorMode follows devices through every operation, and refuses what torch would refuse.
"""

import copy
import gc
import os
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tpdist.bigmodel import (
    DeviceMapError,
    DispatchedModelError,
    align,
    align_module_device,
    cpu_offload,
    devices,
    disk_offload,
    dispatch_model,
    find_tied_parameters,
    load_checkpoint_and_dispatch,
    remove_hook_from_submodules,
    set_module_tensor_to_device,
)
from tpdist.bigmodel.layout import Layout
from tpdist.errors import CheckpointError, SettingsError, TpdistError


class Block(nn.Module):
    """A layer with a residual connection, an own parameter and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.rand(4))
        self.register_buffer("mask", torch.rand(4))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.lin(x) * self.scale + self.mask
        return result


class Model(nn.Module):
    _no_split_modules = ("Block",)

    def __init__(self, num_blocks: int = 4) -> None:
        super().__init__()
        self.words = nn.Embedding(10, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(num_blocks))
        self.out = nn.Linear(4, 10, bias=False)

    def forward(self, ids: Tensor, *, factor: Tensor | None = None) -> Tensor:
        x = self.words(ids)
        for block in self.blocks:
            x = block(x)
        result: Tensor = self.out(x) if factor is None else self.out(x) * factor.to(x.device)
        return result


def tied_model(num_blocks: int = 4) -> Model:
    model = Model(num_blocks)
    model.out.weight = model.words.weight
    return model


IDS = torch.tensor([[1, 2, 3]])
MAPS: list[dict[str, Any]] = [
    {"": "disk"},
    {"words": "cpu", "blocks": "disk", "out": "cpu"},
    {"words": "disk", "blocks.0": "cpu", "blocks.1": "disk", "blocks.2": "cpu", "blocks.3": "disk", "out": "disk"},
    {
        "words": "cpu",
        "blocks.0.lin": "disk",
        "blocks.0.scale": "cpu",
        "blocks.0.mask": "cpu",
        "blocks": "disk",
        "out": "cpu",
    },
    {
        "words": "cpu",
        "blocks.0.lin": "cpu",
        "blocks.0.scale": "disk",
        "blocks.0.mask": "disk",
        "blocks": "cpu",
        "out": "cpu",
    },
]


@pytest.fixture
def _imagined_gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(devices, "present_devices", lambda: [0, 1, 2, "cpu"])
    with FakeTensorMode(), torch.no_grad():
        yield


@pytest.mark.parametrize("device_map", MAPS)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("offload_buffers", [False, True])
@pytest.mark.parametrize("prefetch", [0, 1, 2, 9])
def test_offloaded_models_compute_the_same(
    tmp_path: Path, device_map: dict[str, Any], tied: bool, offload_buffers: bool, prefetch: int
) -> None:
    model = tied_model() if tied else Model()
    expected = model(IDS)
    dispatch_model(model, device_map, offload_dir=tmp_path, offload_buffers=offload_buffers, prefetch_blocks=prefetch)
    assert model.hf_device_map == device_map
    for _ in range(3):
        assert torch.equal(model(IDS), expected)
    on_disk = [name for name, parameter in model.named_parameters() if parameter.device.type == "meta"]
    assert on_disk
    remove_hook_from_submodules(model)
    assert torch.equal(model(IDS), expected)
    assert bool(find_tied_parameters(model)) == tied


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_every_mode_of_autograd_works(tmp_path: Path, mode: Any) -> None:
    model = Model()
    expected = model(IDS)
    disk_offload(model, tmp_path)
    with mode():
        first = model(ids=IDS, factor=torch.ones(1))
    second = model(IDS)
    assert torch.equal(first, expected)
    assert torch.equal(second, expected)
    assert first.requires_grad == (mode is torch.enable_grad)


def test_gradients_reach_the_inputs_of_offloaded_blocks(tmp_path: Path) -> None:
    """Buffers of the disk are used again only once nothing needs what was in them: not while a graph does."""
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(6)))
    x = torch.rand(3, 64, requires_grad=True)
    model(x).sum().backward()
    assert x.grad is not None
    expected, x.grad = x.grad.clone(), None
    disk_offload(model, tmp_path)
    model(x).sum().backward()
    assert torch.equal(x.grad, expected)


def test_a_failing_forward_leaves_nothing_loaded(tmp_path: Path) -> None:
    model = disk_offload(Model(), tmp_path)
    with pytest.raises(IndexError):
        model(torch.tensor([[99]]))
    assert all(parameter.device.type == "meta" for parameter in model.parameters())
    assert model(IDS).shape == (1, 3, 10)


def test_a_dispatch_that_fails_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = tied_model()
    expected = model(IDS)
    (tmp_path / "file").touch()
    with pytest.raises(DeviceMapError, match="give a folder"):
        dispatch_model(model, {"words": "cpu", "blocks": "disk", "out": "cpu"})
    with pytest.raises(CheckpointError, match="cannot be written"):
        dispatch_model(model, {"": "disk"}, offload_dir=tmp_path / "file")
    assert torch.equal(model(IDS), expected)
    assert not hasattr(model, "hf_device_map")
    assert find_tied_parameters(model)


def test_a_part_of_a_block_can_be_called_alone(tmp_path: Path) -> None:
    model = Model()
    x = torch.rand(2, 4)
    expected = model.blocks[2].lin(x)
    disk_offload(model, tmp_path)
    assert torch.equal(model.blocks[2].lin(x), expected)


class Preloaded(nn.Module):
    """Uses the parameters of a submodule without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.inner.weight, self.inner.bias)


def test_preload_classes_have_all_their_weights_from_the_start(tmp_path: Path) -> None:
    model = nn.Sequential(Preloaded(), nn.Linear(4, 4))
    x = torch.rand(2, 4)
    expected = model(x)
    disk_offload(model, tmp_path, preload_module_classes=["Preloaded"])
    assert torch.equal(model(x), expected)
    remove_hook_from_submodules(model)
    cpu_offload(model, preload_module_classes=["Preloaded"], execution_device="cpu")
    assert torch.equal(model(x), expected)
    remove_hook_from_submodules(model)
    cpu_offload(model, execution_device="cpu")
    with pytest.raises(RuntimeError):
        model(x)


class Scaled(nn.Module):
    """Runs another module, and uses its weight too."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner
        self.scale = nn.Parameter(torch.rand(4))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.inner(x) * self.scale + self.inner.weight.sum()
        return result


class ScaledToo(Scaled):
    """Another class of the same."""


def sharing_model() -> nn.Sequential:
    shared = nn.Linear(4, 4)
    return nn.Sequential(Scaled(shared), ScaledToo(shared), shared, nn.Linear(4, 4))


OFFLOADS: list[Any] = [
    lambda model, folder, classes: disk_offload(model, folder, preload_module_classes=classes),
    lambda model, folder, classes: cpu_offload(model, preload_module_classes=classes),
    lambda model, folder, classes: dispatch_model(
        model, {"0": "disk", "": "cpu"}, offload_dir=folder, preload_module_classes=classes
    ),
    lambda model, folder, classes: dispatch_model(
        model, {"1": "disk", "": "cpu"}, offload_dir=folder, preload_module_classes=classes
    ),
]


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("classes", [["Scaled", "ScaledToo"], ["Sequential"], "Sequential", ["Sequential", "Linear"]])
def test_preloaded_modules_may_share_modules_and_be_the_model_itself(
    tmp_path: Path, offload: Any, classes: Any
) -> None:
    model, x = sharing_model(), torch.rand(2, 4)
    alone = [model[0].inner, *(model[:2] if "Scaled" in classes else ())]
    expected = [model(x), *(module(x) for module in alone)]
    offload(model, tmp_path, classes)
    for _ in range(2):
        assert all(map(torch.equal, [model(x), *(module(x) for module in alone)], expected))
    assert torch.equal(copy.deepcopy(model)(x), expected[0])
    assert any(parameter.device.type == "meta" for parameter in model.parameters())
    remove_hook_from_submodules(model)
    assert torch.equal(model(x), expected[0])
    assert model[0].inner is model[1].inner


@pytest.mark.parametrize("classes", [["Scaled"], ["ScaledToo"], ["Linear"]])
def test_a_preloaded_module_leaves_what_it_shares_as_others_find_it(tmp_path: Path, classes: Any) -> None:
    shared = Preloaded()
    model, x = nn.Sequential(Scaled(shared.inner), shared.inner, nn.Linear(4, 4)), torch.rand(2, 4)
    model[0].forward = lambda x: model[0].inner(x) * model[0].scale
    expected = model(x)
    disk_offload(model, tmp_path, preload_module_classes=classes)
    for _ in range(2):
        assert torch.equal(model(x), expected)


def test_a_tensor_that_was_put_into_an_offloaded_module_is_what_runs(tmp_path: Path) -> None:
    model = disk_offload(nn.Sequential(nn.Linear(2, 2)), tmp_path)
    set_module_tensor_to_device(model, "0.bias", "cpu", torch.full((2,), 7.0))
    for _ in range(2):
        assert model(torch.zeros(1, 2)).tolist() == [[7.0, 7.0]]
    assert model[0].weight.device.type == "meta"


def test_a_module_that_is_used_twice_has_one_hook() -> None:
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.Linear(4, 4))})
    x = torch.rand(1, 4)
    expected = model["b"](x)
    cpu_offload(model, execution_device="cpu")
    assert torch.equal(model["b"](x), expected)


def test_cpu_offload_takes_the_given_state_dict() -> None:
    model = Model()
    given = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    cpu_offload(model, execution_device="cpu", state_dict=given)
    assert not model.blocks[0].lin(torch.rand(1, 4)).any()


def test_files_of_an_offload_are_replaced_without_harm(tmp_path: Path) -> None:
    first, second = Model(), Model()
    expected = first(IDS), second(IDS)
    disk_offload(first, tmp_path)
    disk_offload(second, tmp_path)
    assert torch.equal(first(IDS), expected[0])
    assert torch.equal(second(IDS), expected[1])
    assert [path.name for path in tmp_path.iterdir()] == ["offloaded.safetensors"]


def test_a_model_without_values_finds_them_in_the_offload_folder(tmp_path: Path) -> None:
    model = Model()
    expected = model(IDS)
    disk_offload(model, tmp_path)
    again = Model().to("meta")
    for path, module in model.named_modules():
        if isinstance(module, Block):
            again.get_submodule(path).mask = module.mask
    disk_offload(again, tmp_path)
    assert torch.equal(again(IDS), expected)


def test_an_offload_index_names_files(tmp_path: Path) -> None:
    model, other = Model(), Model()
    disk_offload(other, tmp_path)
    remove_hook_from_submodules(other)
    file = str(tmp_path / "offloaded.safetensors")
    index = {"out.weight": {"safetensors_file": file, "weight_name": "words.weight", "dtype": "float32"}}
    device_map = {"words": "cpu", "blocks": "cpu", "out": "disk"}
    dispatch_model(model, device_map, offload_index=index)
    x = torch.rand(1, 4)
    assert torch.equal(model.out(x), x @ other.words.weight.T)
    with pytest.raises(CheckpointError, match="holds no tensor nothing, though offload_index says so of"):
        dispatch_model(
            Model(), device_map, offload_index={"out.weight": {"safetensors_file": file, "weight_name": "nothing"}}
        )
    with pytest.raises(DeviceMapError, match="gives no safetensors_file for"):
        dispatch_model(Model(), device_map, offload_index={"out.weight": {"dtype": "float32", "shape": [1]}})


def test_models_are_freed_at_once_with_their_files(tmp_path: Path) -> None:
    gc.collect()
    num_files = len(os.listdir("/proc/self/fd"))
    on_disk = disk_offload(Model(), tmp_path)
    on_disk(IDS)
    in_memory = cpu_offload(Model(), execution_device="cpu")
    copied = copy.deepcopy(in_memory)
    assert torch.equal(copied(IDS), in_memory(IDS))
    assert len(os.listdir("/proc/self/fd")) == num_files + 1
    alive = [weakref.ref(model) for model in (on_disk, in_memory, copied)]
    alive += [weakref.ref(hook_tensor(model)) for model in (in_memory, copied)]
    del on_disk, in_memory, copied
    gc.collect()
    assert [ref() for ref in alive] == [None] * 5
    deadline = time.monotonic() + 5
    while len(os.listdir("/proc/self/fd")) > num_files and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(os.listdir("/proc/self/fd")) == num_files


def hook_tensor(model: Model) -> Tensor:
    """What stands in a forward for the first parameter of a model that is offloaded to memory."""
    item = model.words._hf_hook.offloaded[0]
    return item.source.fetch([item.slot.name])[item.slot.name]


# -- memory -----------------------------------------------------------------------------------------------------------


def parameters_of(model: nn.Module) -> list[Any]:
    return [weakref.ref(parameter) for parameter in model.parameters()]


@pytest.mark.parametrize("tied", [False, True])
def test_what_is_written_to_the_disk_leaves_the_memory_and_comes_back(tmp_path: Path, tied: bool) -> None:
    model = tied_model() if tied else Model()
    expected = model(IDS).detach()
    for offload in (disk_offload, lambda model, folder: dispatch_model(model, {"": "disk"}, offload_dir=folder)):
        before = parameters_of(model)
        offload(model, tmp_path)
        gc.collect()
        assert not any(parameter() is not None for parameter in before)
        remove_hook_from_submodules(model)
        assert torch.equal(model(IDS), expected)
        assert bool(find_tied_parameters(model)) == tied
        assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
        assert all(parameter.requires_grad for parameter in model.parameters())


def test_what_comes_back_from_the_disk_has_memory_of_its_own(tmp_path: Path) -> None:
    model = disk_offload(Model(), tmp_path)
    copied = copy.deepcopy(model)
    expected = copied(IDS).detach()
    remove_hook_from_submodules(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(copied(IDS), expected)
    remove_hook_from_submodules(copied)
    assert torch.equal(copied(IDS), expected)


def test_what_waits_in_memory_is_the_very_same_afterwards() -> None:
    model = Model()
    before = list(model.parameters())
    copied = copy.deepcopy(cpu_offload(model, execution_device="cpu"))
    for each in (model, copied):
        remove_hook_from_submodules(each)
    assert all(new is old for new, old in zip(model.parameters(), before, strict=True))
    addresses = {parameter.data_ptr() for parameter in model.parameters()}
    assert not addresses & {parameter.data_ptr() for parameter in copied.parameters()}


@pytest.mark.usefixtures("_imagined_gpus")
def test_what_is_offloaded_from_a_gpu_leaves_it_and_comes_back() -> None:
    model = dispatch_model(Model(), {"": 1})
    for offload in (
        lambda: cpu_offload(model),
        lambda: dispatch_model(model, {"words": 0, "blocks": "cpu", "out": "cpu"}),
    ):
        before = parameters_of(model.blocks)
        offload()
        gc.collect()
        assert not any(parameter() is not None for parameter in before)
        assert model(torch.zeros(1, 3, dtype=torch.int64)).device.type == "cpu"
        remove_hook_from_submodules(model)
        assert {parameter.device for parameter in model.blocks.parameters()} == {torch.device("cuda:1")}


def test_a_tie_over_memory_and_disk_comes_back(tmp_path: Path) -> None:
    """As if a GPU ran it."""
    model = tied_model()
    expected = model(IDS)
    layout = Layout(model, {"words": "disk", "": "cpu"}, torch.device("cpu"), False, [], offloads_cpu=True)
    layout.find_sources(None, tmp_path, None, 1)
    layout.carry_out(None, with_hooks=True)
    assert torch.equal(model(IDS), expected)
    remove_hook_from_submodules(model)
    assert torch.equal(model(IDS), expected)
    assert find_tied_parameters(model)


def test_parameters_that_share_memory_are_offloaded(tmp_path: Path) -> None:
    model = Model()
    model.out.weight = nn.Parameter(model.words.weight.detach())
    expected = model(IDS)
    disk_offload(model, tmp_path)
    assert torch.equal(model(IDS), expected)
    remove_hook_from_submodules(model)
    assert torch.equal(model(IDS), expected)


# -- dispatching again ------------------------------------------------------------------------------------------------


def test_a_dispatch_that_fails_leaves_a_dispatched_model_at_work(tmp_path: Path) -> None:
    model = Model()
    expected = model(IDS)
    dispatch_model(model, {"": "disk"}, offload_dir=tmp_path)
    (tmp_path / "file").touch()
    bad_index = {"words.weight": {"safetensors_file": str(tmp_path / "file")}}
    for again in (
        lambda: dispatch_model(model, {"words": "cpu"}),
        lambda: dispatch_model(model, {"": "disk"}, main_device="disk"),
        lambda: dispatch_model(model, {"": "disk"}, offload_index=bad_index),
        lambda: cpu_offload(model, execution_device=5),
        lambda: cpu_offload(model, state_dict={"words.weight": torch.zeros(3)}),
        lambda: disk_offload(model, tmp_path, prefetch_blocks=-1),
    ):
        with pytest.raises(TpdistError):
            again()
        assert torch.equal(model(IDS), expected)
        assert model.hf_device_map == {"": "disk"}


def test_a_dispatched_model_is_dispatched_again_wherever_its_values_are(tmp_path: Path) -> None:
    model = tied_model()
    expected = model(IDS)
    disk_offload(model, tmp_path)
    # The names of its files are another model's by now.
    disk_offload(Model(), tmp_path)
    for device_map in (*MAPS, {"": "cpu"}, *reversed(MAPS)):
        dispatch_model(model, device_map, offload_dir=tmp_path / "again", prefetch_blocks=2)
        for _ in range(2):
            assert torch.equal(model(IDS), expected), device_map
    cpu_offload(model)
    assert torch.equal(model(IDS), expected)
    disk_offload(model, tmp_path / "again")
    assert torch.equal(model(IDS), expected)
    remove_hook_from_submodules(model)
    assert torch.equal(model(IDS), expected)


def test_what_stays_on_the_disk_is_not_written_again(tmp_path: Path) -> None:
    model = Model()
    expected = model(IDS)
    dispatch_model(model, {"": "disk"}, offload_dir=tmp_path)
    dispatch_model(model, {"words": "cpu", "blocks": "disk", "out": "disk"}, prefetch_blocks=0)
    assert torch.equal(model(IDS), expected)
    assert model.words.weight.device.type == "cpu"


def test_hooks_whose_files_are_broken_are_not_removed(tmp_path: Path) -> None:
    model = Model()
    expected = model(IDS)
    disk_offload(model, tmp_path, prefetch_blocks=0)
    file = tmp_path / "offloaded.safetensors"
    content = file.read_bytes()
    os.truncate(file, len(content) // 2)
    with pytest.raises(CheckpointError, match="cut short while it was in use"):
        remove_hook_from_submodules(model)
    with file.open("r+b") as stream:
        stream.write(content)
    assert torch.equal(model(IDS), expected)
    remove_hook_from_submodules(model)
    assert torch.equal(model(IDS), expected)


# -- threads ----------------------------------------------------------------------------------------------------------


class Slow(Block):
    """Lets other threads run in the middle of its forward."""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        time.sleep(0.002)
        return x + self.scale


def test_threads_that_run_one_model_take_turns(tmp_path: Path) -> None:
    for offload in (lambda model: disk_offload(model, tmp_path), lambda model: cpu_offload(model)):
        model = Model()
        model.blocks = nn.ModuleList(Slow() for _ in range(3))
        expected = model(IDS)
        offload(model)
        models = [model, model, copy.deepcopy(model), model]
        with ThreadPoolExecutor(4) as executor:
            for found in executor.map(lambda each: [each(IDS) for _ in range(10)], models):
                assert all(torch.equal(result, expected) for result in found)


def test_threads_take_turns_at_what_preloaded_modules_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(align, "TURN_S", 0.05)
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.rand(1, 4)
    expected = model[0](x)
    cpu_offload(model, preload_module_classes=["Sequential"])
    with align_module_device(model), ThreadPoolExecutor(1) as executor:
        with pytest.raises(TpdistError, match="Linear is offloaded, and another thread has been running it"):
            executor.submit(model[0], x).result()
        assert torch.equal(model[0](x), expected)
    assert torch.equal(model[0](x), expected)


def test_a_thread_that_waits_too_long_says_for_what(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(align, "TURN_S", 0.05)
    model = cpu_offload(Model())
    with align_module_device(model.words), ThreadPoolExecutor(1) as executor:
        with pytest.raises(TpdistError, match="Embedding is offloaded, and another thread has been running it"):
            executor.submit(model, IDS).result()
        assert model.words.weight.device.type == "cpu"
    assert model(IDS).shape == (1, 3, 10)


# -- small things -----------------------------------------------------------------------------------------------------


def test_a_model_without_parameters_is_offloaded(tmp_path: Path) -> None:
    assert cpu_offload(nn.ReLU())(torch.ones(1)) == 1
    assert disk_offload(nn.ReLU(), tmp_path)(torch.ones(1)) == 1


def test_whole_numbers_of_a_state_dict_become_the_type_of_the_model() -> None:
    model = cpu_offload(nn.Linear(2, 2, bias=False), state_dict={"weight": torch.tensor([[1, 2], [3, 4]])})
    assert model(torch.ones(1, 2)).tolist() == [[3.0, 7.0]]
    remove_hook_from_submodules(model)
    assert model.weight.dtype == torch.float32
    assert model.weight.requires_grad


def test_a_type_that_no_file_can_hold_is_an_error(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].phase = nn.Parameter(torch.ones(2, dtype=torch.complex128))
    with pytest.raises(CheckpointError, match=r"tensor 0\.phase has dtype torch\.complex128, which .* cannot hold"):
        disk_offload(model, tmp_path)
    assert model[0].phase.dtype == torch.complex128
    assert not list(tmp_path.iterdir())


def test_a_state_dict_of_another_model_is_an_error() -> None:
    message = r"words\.weight of state_dict has shape \[3\], but words\.weight of the model has shape \[10, 4\]: give"
    with pytest.raises(DeviceMapError, match=message):
        cpu_offload(Model(), state_dict={"words.weight": torch.zeros(3)})


@pytest.mark.parametrize("number", [-1, True, None, 1.5])
def test_what_is_no_number_of_blocks_is_an_error(tmp_path: Path, number: Any) -> None:
    message = "prefetch_blocks is .*: give the number of blocks"
    with pytest.raises(SettingsError, match=message):
        disk_offload(Model(), tmp_path, prefetch_blocks=number)
    with pytest.raises(SettingsError, match=message):
        dispatch_model(Model(), {"": "cpu"}, prefetch_blocks=number)
    with pytest.raises(SettingsError, match=message):
        load_checkpoint_and_dispatch(Model(), tmp_path / "absent", "auto", prefetch_blocks=number)


def test_a_module_under_two_names_has_one_device(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "c": nn.Linear(2, 2)})
    model["b"] = model["a"]
    dispatch_model(model, {"a": "cpu", "b": "disk", "c": "disk"}, offload_dir=tmp_path)
    assert "a.weight is also b.weight, of the same module: it is on cpu alone" in caplog.text
    assert "a copy of its own" not in caplog.text
    assert model["b"].weight.device.type == "cpu"


# -- devices ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_imagined_gpus")
def test_each_block_runs_on_its_device_and_the_output_comes_back() -> None:
    model = tied_model()
    seen = []
    for block in model.blocks:
        block.lin.register_forward_hook(lambda _, args, out: seen.append((args[0].device, out.device)))
    device_map: dict[str, Any] = {"words": 0, "blocks.0": 0, "blocks.1": 1, "blocks.2": "cpu", "blocks.3": 2, "out": 0}
    dispatch_model(model, device_map)
    gpus = [torch.device("cuda", gpu) for gpu in range(3)]
    for home in (torch.device("cpu"), *gpus):
        seen.clear()
        assert model(torch.zeros(1, 3, dtype=torch.int64, device=home)).device == home
        assert seen == [(gpu, gpu) for gpu in (gpus[0], gpus[1], gpus[0], gpus[2])]
    assert model.words.weight is model.out.weight
    assert model.blocks[2].lin.weight.device.type == "meta"
    assert model.blocks[2].mask.device == gpus[0]


@pytest.mark.usefixtures("_imagined_gpus")
def test_the_main_device_can_be_chosen() -> None:
    model = Model()
    device_map: dict[str, Any] = {"words": "cpu", "blocks": 1, "out": "cpu"}
    dispatch_model(model, device_map, main_device="cpu")
    assert model.words.weight.device.type == "cpu"
    with pytest.raises(DeviceMapError, match="main_device is 'disk', where nothing runs"):
        dispatch_model(Model(), device_map, main_device="disk")
    with pytest.raises(DeviceMapError, match="main_device is 5, which is no device"):
        dispatch_model(Model(), device_map, main_device=5)


@pytest.mark.usefixtures("_imagined_gpus")
def test_preloaded_modules_run_where_they_were_brought_and_the_rest_where_it_is() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 4))
    seen: list[torch.device] = []
    for layer in (model[0], model[1][0], model[1][1], model[2]):
        layer.register_forward_hook(lambda module, args, out: seen.append(out.device))
    device_map: dict[str, Any] = {"0": 0, "1": 1, "1.0": "cpu", "2": "cpu"}
    dispatch_model(model, device_map, preload_module_classes=["Sequential"])
    gpus = [torch.device("cuda", gpu) for gpu in range(2)]
    assert model(torch.zeros(1, 4)).device.type == "cpu"
    assert seen == [gpus[0], gpus[0], gpus[1], gpus[0]]
    seen.clear()
    assert model[1](torch.zeros(1, 4, device=gpus[1])).device == gpus[1]
    assert seen == [gpus[1], gpus[1]]


@pytest.mark.usefixtures("_imagined_gpus")
def test_one_device_needs_no_hooks() -> None:
    model = dispatch_model(Model(), {"": 1})
    assert {parameter.device for parameter in model.parameters()} == {torch.device("cuda:1")}
    assert not any(hasattr(module, "_hf_hook") for module in model.modules())
    model = dispatch_model(Model(), {"": 1}, force_hooks=True)
    assert model(torch.zeros(1, 2, dtype=torch.int64)).device.type == "cpu"


def test_a_dispatched_model_is_not_moved() -> None:
    model = dispatch_model(Model(), {"words": "cpu", "blocks": "cpu", "out": "cpu"}, force_hooks=True)
    for move in (lambda: model.to("cuda:0"), lambda: model.to(torch.zeros(1)), model.cuda, model.cpu):
        with pytest.raises(DispatchedModelError, match=r"would move a model that is dispatched over cpu: call remove_"):
            move()
    assert isinstance(DispatchedModelError("x"), RuntimeError)
    model.to(torch.float16)
    assert model.double().words.weight.dtype == torch.float64
    remove_hook_from_submodules(model)
    assert model.to("cpu").float()(IDS).dtype == torch.float32


def test_the_type_of_an_offloaded_model_is_not_changed() -> None:
    model = cpu_offload(Model(), execution_device="cpu")
    for change in (lambda: model.to(torch.float16), model.half, model.double):
        with pytest.raises(DispatchedModelError, match="cannot change parameters that are offloaded: give the type"):
            change()
