"""Reaching single tensors of a module, wherever they are."""

from pathlib import Path

import pytest
import torch
from torch import nn

from tpdist.bigmodel import (
    DeviceMapError,
    align_module_device,
    disk_offload,
    has_offloaded_params,
    init_empty_weights,
    set_module_tensor_to_device,
)


def test_a_tensor_is_set_with_a_value_of_the_right_type() -> None:
    with init_empty_weights():
        model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    set_module_tensor_to_device(model, "0.weight", "cpu", torch.ones(3, 2, dtype=torch.float16))
    assert model[0].weight.dtype == torch.float32
    assert isinstance(model[0].weight, nn.Parameter)
    assert model[0].weight.requires_grad
    set_module_tensor_to_device(model, "0.weight", "cpu", torch.ones(3, 2), dtype="float16")
    assert model[0].weight.dtype == torch.float16
    set_module_tensor_to_device(model, "1.num_batches_tracked", "cpu", torch.tensor(5), dtype="float16")
    assert model[1].num_batches_tracked.dtype == torch.int64
    set_module_tensor_to_device(model, "0.weight", "meta")
    assert model[0].weight.device.type == "meta"


def test_what_cannot_be_set_is_an_error() -> None:
    with init_empty_weights():
        model = nn.Sequential(nn.Linear(2, 3))
    with pytest.raises(DeviceMapError, match=r"has no parameter or buffer 0\.scale: give one of its names, .* 0\."):
        set_module_tensor_to_device(model, "0.scale", "cpu")
    with pytest.raises(DeviceMapError, match=r"has no parameter or buffer 7\.x: give one of its names"):
        set_module_tensor_to_device(model, "7.x", "cpu")
    with pytest.raises(DeviceMapError, match=r"0\.weight is on the meta device and has no values to put on cpu"):
        set_module_tensor_to_device(model, "0.weight", "cpu")
    with pytest.raises(DeviceMapError, match=r"value for 0\.bias has shape \[2\], it has \[3\]"):
        set_module_tensor_to_device(model, "0.bias", "cpu", torch.ones(2))


def test_offloaded_tensors_can_be_looked_at(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    weight = model[0].weight.detach().clone()
    with align_module_device(model[0], "cpu"):
        assert torch.equal(model[0].weight, weight)
    assert not has_offloaded_params(model[0])
    disk_offload(model, tmp_path)
    assert has_offloaded_params(model[0])
    assert not has_offloaded_params(model)
    for device in (None, "cpu"):
        with align_module_device(model[0], device):
            assert torch.equal(model[0].weight, weight)
        assert model[0].weight.device.type == "meta"
    with pytest.raises(ZeroDivisionError), align_module_device(model[0]):
        raise ZeroDivisionError
    assert model[0].weight.device.type == "meta"
