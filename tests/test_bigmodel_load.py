"""Loading checkpoints: values, types, devices, ties, and what is said of checkpoints that do not fit the model."""

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import modeling as reference
from safetensors.torch import save_file
from torch import Tensor, nn

from tpdist.bigmodel import (
    DeviceMapError,
    DispatchedModelError,
    devices,
    dispatch_model,
    find_tied_parameters,
    init_empty_weights,
    load_checkpoint_and_dispatch,
    load_checkpoint_in_model,
    remove_hook_from_submodules,
    set_module_tensor_to_device,
)
from tpdist.bigmodel.load import named_device_map
from tpdist.errors import CheckpointError, SettingsError


class Model(nn.Module):
    """Floats, whole numbers, bools; buffers that are and are not stored; a tie if wanted."""

    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        self.words = nn.Embedding(6, 4)
        self.norm = nn.LayerNorm(4)
        self.out = nn.Linear(4, 6, bias=False)
        self.register_buffer("ids", torch.arange(3))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("scale", torch.ones(1))
        self.register_buffer("temporary", torch.full((2,), 0.5), persistent=False)
        if tied:
            self.out.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.out(self.norm(self.words(x))) * self.scale
        return result


def stored(tmp_path: Path, *, dtype: torch.dtype = torch.float32, without: str = "") -> tuple[Path, dict[str, Tensor]]:
    """A checkpoint of random values, and what is in it."""
    values = {
        "words.weight": torch.rand(6, 4).to(dtype),
        "norm.weight": torch.rand(4).to(dtype),
        "norm.bias": torch.rand(4).to(dtype),
        "out.weight": torch.rand(6, 4).to(dtype),
        "ids": torch.tensor([5, 6, 7]),
        "mask": torch.tensor([False, True]),
        "scale": torch.rand(1).to(dtype),
    }
    values.pop(without, None)
    save_file(values, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path, values


def empty(**options: bool) -> Model:
    with init_empty_weights():
        return Model(**options)


MAPS: list[Any] = [
    None,
    {"": "cpu"},
    {"": "disk"},
    {"words": "cpu", "norm": "disk", "out": "disk", "ids": "cpu", "mask": "disk", "scale": "disk", "temporary": "cpu"},
]


@pytest.mark.parametrize("device_map", MAPS)
@pytest.mark.parametrize("in_memory", [True, False])
def test_a_loaded_model_has_the_values_of_its_checkpoint(tmp_path: Path, device_map: Any, in_memory: bool) -> None:
    folder, values = stored(tmp_path)
    expected = Model()
    expected.load_state_dict(values)
    for checkpoint in (folder, folder / "model.safetensors", str(folder)):
        model = Model() if in_memory else empty()
        loaded = load_checkpoint_and_dispatch(model, checkpoint, device_map)
        assert loaded is model
        x = torch.tensor([1, 2])
        assert torch.equal(model(x), expected(x))
        assert model.ids.tolist() == [5, 6, 7]
        assert model.mask.tolist() == [False, True]
        assert model.temporary.tolist() == [0.5, 0.5]
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_model_in_memory_is_filled_in_place(tmp_path: Path) -> None:
    folder, values = stored(tmp_path)
    model = Model()
    parameter = model.norm.weight
    load_checkpoint_in_model(model, folder)
    assert model.norm.weight is parameter
    assert torch.equal(parameter, values["norm.weight"])


@pytest.mark.parametrize("device_map", MAPS)
@pytest.mark.parametrize(
    ("stored_as", "dtype", "expected"),
    [
        (torch.float32, None, torch.float32),
        (torch.bfloat16, None, torch.float32),
        (torch.bfloat16, "auto", torch.bfloat16),
        (torch.float16, "auto", torch.float16),
        (torch.float32, "float16", torch.float16),
        (torch.float32, "torch.bfloat16", torch.bfloat16),
        (torch.float16, torch.float64, torch.float64),
    ],
)
def test_floats_become_the_wanted_type_and_nothing_else_does(
    tmp_path: Path, device_map: Any, stored_as: torch.dtype, dtype: Any, expected: torch.dtype
) -> None:
    folder, values = stored(tmp_path, dtype=stored_as)
    model = load_checkpoint_and_dispatch(empty(), folder, device_map, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {expected}
    assert (model.scale.dtype, model.ids.dtype, model.mask.dtype) == (expected, torch.int64, torch.bool)
    assert model.temporary.dtype == torch.float32
    seen = []
    model.out.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    with torch.no_grad():
        out = model(torch.tensor([1, 2]))
    assert (seen, out.dtype) == ([expected], expected)
    reference = Model().to(stored_as)
    reference.load_state_dict(values)
    assert torch.allclose(out.float(), reference.to(expected)(torch.tensor([1, 2])).float())


class Counting(nn.Module):
    """Says which types it has while it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(2, 2, bias=False)
        self.register_buffer("mask", torch.ones(2, dtype=torch.bool))
        self.register_buffer("count", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("scale", torch.ones(2))

    def forward(self, x: Tensor) -> dict[str, torch.dtype]:
        return {name: tensor.dtype for name, tensor in (*self.named_parameters(), *self.named_buffers())}


@pytest.mark.parametrize("in_memory", [False, True])
def test_the_types_of_a_model_do_not_depend_on_where_it_is(tmp_path: Path, in_memory: bool) -> None:
    stored = {"lin.weight": torch.arange(4, dtype=torch.int32).view(2, 2), "mask": torch.tensor([1, 0]).byte()}
    stored |= {"count": torch.tensor([5], dtype=torch.int32), "scale": torch.tensor([2, 3])}
    save_file(stored, tmp_path / "model.safetensors")
    own = {"lin.weight": torch.float32, "mask": torch.bool, "count": torch.int64, "scale": torch.float32}
    whole = {name: tensor.dtype for name, tensor in stored.items()}
    for dtype, expected in ((None, own), (torch.float16, whole)):
        for device_map in ({"": "cpu"}, {"": "disk"}):
            with init_empty_weights(include_buffers=not in_memory):
                model = Counting()
            load_checkpoint_and_dispatch(
                model, tmp_path, device_map, dtype=dtype, offload_buffers=True, preload_module_classes=["Counting"]
            )
            assert model(torch.zeros(1)) == expected, (dtype, device_map)
            remove_hook_from_submodules(model)
            assert model.mask.tolist() == [1, 0]
            assert model(torch.zeros(1)) == expected, (dtype, device_map)


@pytest.mark.parametrize("device_map", MAPS)
def test_buffers_that_no_state_dict_holds_are_not_read(
    tmp_path: Path, device_map: Any, caplog: pytest.LogCaptureFixture
) -> None:
    folder, values = stored(tmp_path)
    for given in (torch.full((2,), 7.0), torch.ones(9)):
        save_file(values | {"temporary": given}, folder / "model.safetensors")
        for offload_buffers in (False, True):
            caplog.clear()
            model = load_checkpoint_and_dispatch(
                empty(), folder, device_map, offload_buffers=offload_buffers, dtype="float16"
            )
            assert "1 tensors of the checkpoint are not in the model: temporary" in caplog.text
            assert model.temporary.tolist() == [0.5, 0.5]
            assert model.temporary.dtype == torch.float32
            assert model(torch.tensor([1, 2])).shape == (2, 6)
            with pytest.raises(RuntimeError, match="are not in the model: temporary"):
                load_checkpoint_in_model(empty(), folder, device_map, strict=True)


@pytest.mark.parametrize("device_map", [None, {"": "cpu"}, {"": "disk"}, {"1": "disk", "": "cpu"}])
@pytest.mark.parametrize("offload_buffers", [False, True])
def test_a_buffer_that_state_dicts_hold_under_one_of_its_names_is_read(
    tmp_path: Path, device_map: Any, offload_buffers: bool
) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].register_buffer("scale", torch.zeros(2), persistent=False)
    model[1].register_buffer("scale", model[0].scale)
    values = model.state_dict() | {"1.scale": torch.tensor([3.0, 4.0])}
    assert "0.scale" not in values
    save_file(values, tmp_path / "model.safetensors")
    load_checkpoint_and_dispatch(model, tmp_path, device_map, offload_buffers=offload_buffers, strict=True)
    remove_hook_from_submodules(model)
    assert model[0].scale.tolist() == model[1].scale.tolist() == [3.0, 4.0]


@pytest.mark.parametrize("device_map", [{"0": "disk", "1": "cpu"}, {"0": "disk", "1": "disk"}])
@pytest.mark.parametrize("names", ["ab", "ba"])
def test_a_checkpoint_may_be_loaded_in_two_calls(tmp_path: Path, device_map: Any, names: str) -> None:
    expected = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    values = expected.state_dict()
    for name, start in (("a", "0."), ("b", "1.")):
        save_file({key: values[key] for key in values if key.startswith(start)}, tmp_path / f"{name}.safetensors")
    with init_empty_weights():
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    for name in names:
        load_checkpoint_in_model(model, tmp_path / f"{name}.safetensors", device_map)
    dispatch_model(model, device_map)
    assert torch.equal(model(torch.ones(1, 2)), expected(torch.ones(1, 2)))


def test_what_was_loaded_into_memory_is_on_the_disk_no_more(tmp_path: Path) -> None:
    folder, values = stored(tmp_path)
    model = empty()
    load_checkpoint_in_model(model, folder, {"": "disk"})
    load_checkpoint_in_model(model, folder, {"words": "cpu", "": "disk"})
    assert torch.equal(model.words.weight, values["words.weight"])
    with torch.no_grad():
        model.words.weight.zero_()
    with pytest.raises(DeviceMapError, match=r"1 tensors on the disk that are in memory: words\.weight"):
        dispatch_model(model, {"": "disk"})
    dispatch_model(model, {"": "disk"}, offload_dir=tmp_path / "new")
    assert not model.words(torch.tensor([1])).any()


def test_a_tie_that_is_written_again_is_not_taken_from_the_checkpoint(tmp_path: Path) -> None:
    folder, _ = stored(tmp_path, without="out.weight")
    model = load_checkpoint_and_dispatch(empty(tied=True), folder, {"": "disk"})
    remove_hook_from_submodules(model)
    with torch.no_grad():
        model.words.weight.mul_(3)
    expected = model(torch.tensor([1, 2]))
    dispatch_model(model, {"": "disk"}, offload_dir=tmp_path / "new")
    assert torch.equal(model(torch.tensor([1, 2])), expected)


@pytest.mark.parametrize("dtype", [torch.int8, "int64", torch.bool])
def test_weights_do_not_become_whole_numbers(tmp_path: Path, dtype: Any) -> None:
    folder, _ = stored(tmp_path)
    with pytest.raises(DeviceMapError, match=r"dtype torch\.\w+ cannot hold weights: use a floating type"):
        load_checkpoint_and_dispatch(empty(), folder, device_map={"": "cpu"}, dtype=dtype)


def test_some_modules_may_stay_in_float32(tmp_path: Path) -> None:
    folder, _ = stored(tmp_path)
    model = empty()
    load_checkpoint_in_model(model, folder, {"": "cpu"}, dtype="float16", keep_in_fp32_modules=["norm", "or", "ou"])
    assert (model.norm.weight.dtype, model.words.weight.dtype) == (torch.float32, torch.float16)
    assert model.out.weight.dtype == torch.float16
    model = empty()
    load_checkpoint_in_model(model, folder, {"": "cpu"}, dtype="bfloat16", keep_in_fp32_modules=["norm"])
    assert model.norm.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("kept", ["norm", "layernorm.weight", "layernorm", "inner.norm", "orm", "lin.w", "nor"])
def test_modules_stay_in_float32_by_accelerates_rule(tmp_path: Path, kept: str) -> None:
    def model() -> nn.ModuleDict:
        inner = nn.ModuleDict({"layernorm": nn.LayerNorm(2), "norm": nn.LayerNorm(2)})
        return nn.ModuleDict({"layernorm": nn.LayerNorm(2), "lin": nn.Linear(2, 2), "inner": inner})

    save_file(model().state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    ours, theirs = model(), model()
    for each, load in ((ours, load_checkpoint_in_model), (theirs, reference.load_checkpoint_in_model)):
        load(each, str(tmp_path), device_map={"": "cpu"}, dtype=torch.float16, keep_in_fp32_modules=[kept])
    assert [parameter.dtype for parameter in ours.parameters()] == [each.dtype for each in theirs.parameters()]


@pytest.mark.parametrize("device_map", [*MAPS[:3], {"words": "disk", "": "cpu"}, {"out": "disk", "": "cpu"}])
@pytest.mark.parametrize("without", ["out.weight", "words.weight"])
def test_tied_parameters_are_read_once_and_stay_tied(tmp_path: Path, device_map: Any, without: str) -> None:
    folder, values = stored(tmp_path, without=without)
    model = load_checkpoint_and_dispatch(empty(tied=True), folder, device_map, strict=True)
    expected = Model(tied=True)
    expected.load_state_dict(values, strict=False)
    assert torch.equal(model(torch.tensor([1, 2])), expected(torch.tensor([1, 2])))
    apart = device_map is not None and len(set(device_map.values())) > 1
    assert bool(find_tied_parameters(model)) != apart


def test_ties_over_several_devices_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, _ = stored(tmp_path)
    load_checkpoint_in_model(empty(tied=True), folder, {"words": "disk", "": "cpu"})
    assert "tied parameters are on different devices, each with a copy of its own" in caplog.text


def test_loading_and_dispatching_can_be_two_steps(tmp_path: Path) -> None:
    folder, values = stored(tmp_path)
    model = empty()
    device_map = {"words": "disk", "": "cpu"}
    load_checkpoint_in_model(model, folder, device_map)
    assert model.words.weight.device.type == "meta"
    dispatch_model(model, device_map)
    assert torch.equal(model.words(torch.arange(6)), values["words.weight"])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("device_map", MAPS[2:])
def test_a_model_on_the_disk_moves_once_its_hooks_are_removed(tmp_path: Path, device_map: Any, tied: bool) -> None:
    """What the error of a model that is not to be moved advises."""
    folder, values = stored(tmp_path)
    model = load_checkpoint_and_dispatch(empty(tied=tied), folder, device_map)
    with pytest.raises(DispatchedModelError, match=r"call remove_hook_from_submodules\(model\) first"):
        model.to("cpu")
    remove_hook_from_submodules(model)
    model.to("cpu", torch.float64)
    assert torch.equal(model.norm.bias, values["norm.bias"].double())
    assert torch.equal(model.words.weight, values["words.weight"].double())
    assert all(parameter.dtype == torch.float64 for parameter in model.parameters())
    assert bool(find_tied_parameters(model)) == (tied and len(set(device_map.values())) == 1)


@pytest.mark.parametrize("first", MAPS[1:])
@pytest.mark.parametrize("second", MAPS[1:])
def test_a_dispatched_model_can_be_filled_from_another_checkpoint(tmp_path: Path, first: Any, second: Any) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    model = load_checkpoint_and_dispatch(empty(), stored(tmp_path / "a")[0], first)
    folder, values = stored(tmp_path / "b")
    load_checkpoint_and_dispatch(model, folder, second)
    expected = Model()
    expected.load_state_dict(values)
    assert torch.equal(model(torch.tensor([1, 2])), expected(torch.tensor([1, 2])))


def test_a_tensor_that_was_put_into_a_dispatched_model_stays(tmp_path: Path) -> None:
    model = load_checkpoint_and_dispatch(empty(), stored(tmp_path)[0], {"": "disk"})
    set_module_tensor_to_device(model, "norm.bias", "cpu", torch.full((4,), 7.0))
    remove_hook_from_submodules(model)
    assert model.norm.bias.tolist() == [7.0] * 4


class Leaving(nn.Linear):
    """Has its hooks removed while it runs."""

    def forward(self, x: Tensor) -> Tensor:
        remove_hook_from_submodules(self)
        return super().forward(x)


def test_hooks_can_be_removed_in_a_forward(tmp_path: Path) -> None:
    model = nn.Sequential(Leaving(2, 2))
    expected = nn.functional.linear(torch.ones(1, 2), model[0].weight, model[0].bias)
    dispatch_model(model, {"": "disk"}, offload_dir=tmp_path)
    for _ in range(2):
        assert torch.equal(model(torch.ones(1, 2)), expected)
    assert model[0].weight.device.type == "cpu"


def test_what_does_not_fit_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, values = stored(tmp_path, without="norm.bias")
    save_file(values | {"extra.weight": torch.ones(1)}, folder / "model.safetensors")
    text = (
        r"1 tensors of the model are not in the checkpoint: norm\.bias; "
        r"1 tensors of the checkpoint are not in the model: extra\.weight"
    )
    for device_map in MAPS:
        with pytest.raises(CheckpointError, match=text):
            load_checkpoint_in_model(empty(), folder, device_map, strict=True)
    with caplog.at_level(logging.WARNING):
        load_checkpoint_in_model(Model(), folder)
    assert "norm.bias" in caplog.text
    assert "extra.weight" in caplog.text
    with pytest.raises(
        DeviceMapError, match=r"1 tensors of Model are on the meta device and have no values: norm\.bias"
    ):
        load_checkpoint_and_dispatch(empty(), folder, {"": "cpu"})
    with pytest.raises(DeviceMapError, match=r"1 tensors on the disk that are in no file: norm\.bias"):
        load_checkpoint_and_dispatch(empty(), folder, {"": "disk"})


def test_other_shapes_are_an_error(tmp_path: Path) -> None:
    folder, values = stored(tmp_path)
    save_file(values | {"norm.bias": torch.ones(5)}, folder / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"norm\.bias of .* has shape \[5\], but norm\.bias of the model has shape"
    ):
        load_checkpoint_in_model(empty(), folder)


def test_checkpoints_that_cannot_be_loaded_are_errors_of_both_worlds(tmp_path: Path) -> None:
    """Accelerate raises ValueErrors, and RuntimeErrors where torch compares names and shapes."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "two").mkdir()
    for name in "ab":
        (tmp_path / "two" / f"{name}.index.json").write_text('{"weight_map": {}}')
    folder, values = stored(tmp_path)
    save_file(values | {"norm.bias": torch.ones(5)}, folder / "model.safetensors")
    save_file({"norm.bias": torch.ones(4)}, folder / "part.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"123")
    for name, options in (
        ("absent", {}),
        ("empty", {}),
        ("two", {}),
        ("cut.safetensors", {}),
        ("model.safetensors", {}),
        ("part.safetensors", {"strict": True}),
    ):
        for error in (CheckpointError, ValueError, RuntimeError):
            for device_map in (None, {"": "cpu"}):
                with pytest.raises(error):
                    load_checkpoint_and_dispatch(empty(), tmp_path / name, device_map, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="does not exist"):
        load_checkpoint_and_dispatch(empty(), tmp_path / "absent", "auto")


def test_pickles_are_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    for checkpoint in (tmp_path, tmp_path / "pytorch_model.bin"):
        with pytest.raises(CheckpointError, match="is a pickle"):
            load_checkpoint_and_dispatch(empty(), checkpoint, "auto")


def test_options_that_are_not_supported_are_errors(tmp_path: Path) -> None:
    folder, _ = stored(tmp_path)
    for option in ({"offload_8bit_bnb": True}, {"full_state_dict": False}, {"broadcast_from_rank0": True}):
        with pytest.raises(SettingsError, match="are not supported"):
            load_checkpoint_in_model(empty(), folder, **option)  # type: ignore[arg-type]


def test_sharded_checkpoints_are_read_through_their_index(tmp_path: Path) -> None:
    _, values = stored(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    names = list(values)
    save_file({name: values[name] for name in names[:3]}, tmp_path / "a.safetensors")
    save_file({name: values[name] for name in names[3:]}, tmp_path / "b.safetensors")
    weight_map = {name: "a.safetensors" if name in names[:3] else "b.safetensors" for name in names}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    for checkpoint in (tmp_path, index):
        for device_map in MAPS:
            model = load_checkpoint_and_dispatch(empty(), checkpoint, device_map, strict=True)
            assert torch.equal(model.norm(torch.zeros(4)), values["norm.bias"])


# -- words for device maps --------------------------------------------------------------------------------------------


@pytest.fixture
def _three_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "present_devices", lambda: [0, 1, 2, "cpu"])


def layers(count: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(4, 4, bias=False, device="meta") for _ in range(count)))


def placed(name: str, memory: dict[int | str, int | str], count: int = 6) -> list[int | str]:
    found = named_device_map(layers(count), name, memory, [], None, False)
    return [found.get(str(layer), found.get("", "")) for layer in range(count)]


@pytest.mark.usefixtures("_three_gpus")
def test_words_stand_for_maps() -> None:
    much: dict[int | str, int | str] = {0: 640, 1: 640, 2: 640}
    assert placed("sequential", much) == [0] * 6
    assert placed("balanced", much) == [0, 0, 1, 1, 1, 2]
    assert placed("balanced_low_0", much) == [1, 1, 1, 1, 2, 2]
    assert placed("auto", much) == [0, 0, 0, 1, 1, 1]
    with pytest.raises(
        DeviceMapError, match="device_map is 'fast': use auto, balanced, balanced_low_0, sequential, or"
    ):
        placed("fast", much)


@pytest.mark.usefixtures("_three_gpus")
def test_buffers_without_room_are_said_once_and_of_the_map_that_is_used() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), *(nn.BatchNorm1d(32) for _ in range(3)))
    for offload_buffers, count in ((False, 1), (True, 0)):
        with warnings.catch_warnings(record=True, action="always") as said:
            named_device_map(model, "auto", {0: 600, "cpu": 4000}, [], None, offload_buffers)
        assert [str(each.message)[:32] for each in said] == ["buffers of offloaded layers take"] * count


@pytest.mark.usefixtures("_three_gpus")
def test_auto_is_balanced_only_if_that_spills_nothing() -> None:
    """Where the share of GPU 0 is too small, it takes more."""
    assert placed("auto", {0: 128, 1: 128, 2: 128}) == [0, 0, 1, 1, 2, 2]
    assert placed("auto", {0: 320, 1: 64, 2: 0}) == [0, 0, 0, 0, 0, 1]
    assert placed("auto", {0: 250, 1: 64, "cpu": 10**6}) == [0, 0, 1, "cpu", "cpu", "cpu"]
