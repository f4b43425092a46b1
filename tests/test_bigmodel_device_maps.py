"""Device maps and memory as users write them: what is understood, and what is an error that says why."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tpdist.bigmodel import (
    DeviceMapError,
    auto_device_map,
    check_device_map,
    convert_file_size_to_int,
    cpu_offload,
    devices,
    dispatch_model,
    get_balanced_memory,
    get_max_memory,
    infer_auto_device_map,
)
from tpdist.bigmodel.device_map import clean_device_map, device_of
from tpdist.bigmodel.devices import torch_device
from tpdist.errors import SettingsError, TpdistError


@pytest.fixture(autouse=True)
def _two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "present_devices", lambda: [0, 1, "cpu"])
    monkeypatch.setattr(devices, "free_memory", lambda among=None: {0: 1000, 1: 2000, "cpu": 3000})


def model() -> nn.Sequential:
    found = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    found.register_buffer("offset", torch.zeros(1), persistent=False)
    return found


def test_errors_are_those_of_both_worlds() -> None:
    assert issubclass(DeviceMapError, SettingsError)
    assert issubclass(DeviceMapError, TpdistError)
    assert issubclass(DeviceMapError, ValueError)


def test_everything_must_have_a_device() -> None:
    check_device_map(model(), {"": "cpu"})
    check_device_map(model(), {"0": 0, "1": 1, "offset": 0})
    with pytest.raises(DeviceMapError, match=r"no device to 3 of 5 .*: 1\.weight, 1\.bias, offset; add them"):
        check_device_map(model(), {"0": "cpu"})
    with pytest.raises(
        DeviceMapError, match=r"12 of 12 .*: 0\.weight, 0\.bias, 1\.weight, 1\.bias, 2\.weight, \.\.\.;"
    ):
        check_device_map(nn.Sequential(*(nn.Linear(1, 1) for _ in range(6))), {})


def test_a_name_is_no_prefix_of_a_longer_one() -> None:
    layers = nn.ModuleDict({"a": nn.Linear(1, 1), "ab": nn.Linear(1, 1)})
    with pytest.raises(DeviceMapError, match=r"2 of 4 .*: ab\.weight, ab\.bias"):
        check_device_map(layers, {"a": "cpu"})


@pytest.mark.parametrize("device", [2, -1, "cuda:7", "meta", "cpu:x", "gpu", "hdd", True, None, 1.5, "mps"])
def test_a_device_that_does_not_exist_is_an_error_that_names_those_that_do(device: Any) -> None:
    expected = r"'0' in the device map is .* no device of this machine; there are 0 \(cuda:0\), 1 \(cuda:1\), cpu, disk"
    with pytest.raises(DeviceMapError, match=expected):
        check_device_map(model(), {"0": device, "": "cpu"})


@pytest.mark.parametrize(
    "device", [0, 1, "cuda:1", "cuda", torch.device("cuda", 1), "cpu", torch.device("cpu"), "disk"]
)
def test_devices_that_exist_are_taken(device: Any) -> None:
    check_device_map(model(), {"0": device, "": "cpu"})


def test_whole_numbers_are_gpus() -> None:
    assert torch_device(1) == torch.device("cuda:1")
    assert torch_device("cuda") == torch.device("cuda:0")
    assert torch_device("cpu") == torch.device("cpu")


def test_keys_that_name_nothing_are_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"name nothing in Sequential: \['layers\.9'\]"):
        check_device_map(model(), {"": "cpu", "layers.9": 0})


def test_the_longest_key_decides() -> None:
    device_map = {"": "cpu", "a": 0, "a.b": 1}
    assert [device_of(name, device_map) for name in ("a.b.c", "a.bc", "a", "c")] == [1, 0, 0, "cpu"]
    with pytest.raises(DeviceMapError, match="says nothing of c"):
        device_of("c", {"a": 0})


def test_modules_are_joined_where_all_is_on_one_device() -> None:
    assert clean_device_map({"a": 0, "b.x": 1, "b.y": 1, "c": "cpu"}) == {"a": 0, "c": "cpu", "b": 1}
    assert clean_device_map({"a.x": 0, "a.y": 0}) == {"": 0}
    assert clean_device_map({"ab.x": 0, "ab.y": 1, "a.x": 0, "a.y": 0}) == {"ab.x": 0, "ab.y": 1, "a": 0}
    assert clean_device_map({}) == {}
    assert clean_device_map({"": 0}) == {"": 0}


def test_memory_is_what_is_free_unless_it_is_given() -> None:
    assert get_max_memory() == {0: 1000, 1: 2000, "cpu": 3000}
    given: dict[int | str, int | str] = {"disk": "1GB", "cpu": "auto", 1: "auto", 0: "2KiB"}
    assert list(get_max_memory(given).items()) == [(0, 2048), (1, 2000), ("cpu", 3000), ("disk", 10**9)]


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        ({"gpu": 1}, "names 'gpu', which is no device"),
        ({"cuda:0": 1}, "names 'cuda:0', which is no device"),
        ({4: "auto"}, "max_memory of 4 is 'auto'"),
        ({"disk": "auto"}, "max_memory of 'disk' is 'auto'"),
        ({True: 1}, "names True, which is no device"),
        ({-1: 1}, "names -1, which is no device"),
        ({0: None}, "max_memory of 0 is None: give bytes as a number of 0 or more"),
        ({0: -5}, "max_memory of 0 is -5: give bytes"),
        ({"cpu": True}, "max_memory of 'cpu' is True: give bytes"),
        ({"cpu": -1.5}, "max_memory of 'cpu' is -1.5: give bytes"),
        ({"cpu": float("nan")}, "max_memory of 'cpu' is nan: give bytes"),
        ({"cpu": float("inf")}, "max_memory of 'cpu' is inf: give bytes"),
        ({"cpu": "10XB"}, "max_memory of 'cpu' is '10XB': give bytes as .* a size such as '10GiB'"),
    ],
)
def test_memory_of_unknown_devices_and_no_sizes_are_errors(memory: dict[int | str, Any], message: str) -> None:
    with pytest.raises(DeviceMapError, match=message):
        get_max_memory(memory)


@pytest.mark.parametrize("size", ["10", "GB", "-1GB", "1 TB", "x", "", "infGB", "nanGB", -3])
def test_what_is_no_size_is_an_error(size: int | str) -> None:
    with pytest.raises(DeviceMapError, match="is no size: give bytes"):
        convert_file_size_to_int(size)


@pytest.mark.parametrize("plan", [infer_auto_device_map, auto_device_map, get_balanced_memory])
def test_a_word_that_names_no_type_is_an_error(plan: Any) -> None:
    with pytest.raises(DeviceMapError, match="'foo' is no type of tensors: use for example 'float16'"):
        plan(model(), {0: 500}, dtype="foo")


def test_any_number_of_bytes_is_taken() -> None:
    """Accelerate's own balanced memory has floats."""
    given: dict[int | str, Any] = {0: 500.7, 1: np.int64(3), "cpu": np.float32(1e9)}
    memory = get_max_memory(given)
    assert memory == {0: 500, 1: 3, "cpu": 10**9}
    assert {type(size) for size in memory.values()} == {int}
    assert infer_auto_device_map(model(), {0: 1e3}) == {"": 0}


def test_memory_for_gpus_that_are_not_there_is_allowed_for_planning(caplog: pytest.LogCaptureFixture) -> None:
    assert infer_auto_device_map(model(), {7: 10**6}) == {"": 7}
    assert "GPUs [7], which are not available; there are [0, 1]" in caplog.text


def test_a_single_gpu_keeps_a_tenth_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "free_memory", lambda among=None: {0: 1000, "cpu": 3000})
    assert get_balanced_memory(model()) == {0: 900, "cpu": 3000}
    assert get_balanced_memory(model(), {0: 1000}) == {0: 1000}


def test_the_disk_needs_a_place() -> None:
    with pytest.raises(
        DeviceMapError, match=r"2 tensors on the disk that are in memory: 1\.weight, 1\.bias; give a folder"
    ):
        dispatch_model(model(), {"0": "cpu", "1": "disk", "offset": "cpu"})


def test_a_model_without_values_is_not_dispatched() -> None:
    empty = model().to("meta")
    for device_map, count in (({"": "cpu"}, 5), ({"0": 0, "": "cpu"}, 2)):
        with pytest.raises(
            DeviceMapError, match=rf"{count} tensors of Sequential are on the meta device .*load a checkpoint"
        ):
            dispatch_model(empty, device_map)
    empty.offset = torch.zeros(1)
    with pytest.raises(DeviceMapError, match=r"4 tensors on the disk that are in no file: 0\.weight"):
        dispatch_model(empty, {"": "disk"}, offload_dir="nowhere")


def test_only_gpus_whose_memory_is_wanted_are_asked_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is asked makes a context for this process, which takes some hundred megabytes of it."""
    monkeypatch.undo()
    asked: list[int] = []

    def mem_get_info(gpu: int) -> tuple[int, int]:
        asked.append(gpu)
        return 1000, 2000

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda gpu: None)
    assert get_max_memory({0: "1KB", "cpu": "1GB"}) == {0: 1000, "cpu": 10**9}
    infer_auto_device_map(model(), {1: 10**6})
    dispatch_model(model(), {"": "cpu"})
    cpu_offload(model(), "cpu")
    check_device_map(model(), {"": 3})
    with pytest.raises(DeviceMapError, match="is 4, which is no device of this machine"):
        check_device_map(model(), {"": 4})
    assert asked == []
    assert get_max_memory({0: 5, 2: "auto"}) == {0: 5, 2: 1000}
    assert asked == [2]
    assert set(get_max_memory()) == {0, 1, 2, 3, "cpu"}
    assert asked == [2, 0, 1, 2, 3]
