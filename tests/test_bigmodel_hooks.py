"""Hooks around a forward, and moving what goes in and comes out through every structure.

GPUs are imagined: FakeTensorMode follows devices through every operation.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.rnn import PackedSequence
from transformers.modeling_outputs import BaseModelOutput

from tpdist.bigmodel import (
    AlignDevicesHook,
    ModelHook,
    add_hook_to_module,
    cpu_offload_with_hook,
    devices,
    dispatch_model,
    remove_hook_from_module,
    send_to_device,
)
from tpdist.bigmodel.align import like, slots


@pytest.fixture
def _imagined_gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(devices, "present_devices", lambda: [0, 1, 2, "cpu"])
    with FakeTensorMode(), torch.no_grad():
        yield


class Echo(nn.Module):
    """Returns what it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.seen: Any = None

    def forward(self, value: Any = None, **options: Any) -> Any:
        self.seen = (value, options)
        return options if value is None else value


@pytest.mark.usefixtures("_imagined_gpus")
def test_skipped_keys_stay_where_they_are() -> None:
    model = dispatch_model(Echo(), {"": 0}, force_hooks=True, skip_keys="cache")
    out = model(x=torch.zeros(1), cache=[torch.zeros(1)])
    assert model.seen[1]["x"].device.type == "cuda"
    assert model.seen[1]["cache"][0].device.type == "cpu"
    assert out["x"].device.type == "cpu"


class Pair(NamedTuple):
    first: Any
    second: Any


@dataclass
class Record:
    values: list[Tensor]
    name: str = "x"
    count: int = field(init=False, default=3)


@pytest.mark.usefixtures("_imagined_gpus")
def test_all_structures_are_moved_and_keep_their_kind() -> None:
    home, away = torch.device("cpu"), torch.device("cuda:1")
    here = torch.zeros(2)
    for data in (
        here,
        [here, (here, 3)],
        Pair(here, {"a": here, "b": "text"}),
        BaseModelOutput(last_hidden_state=here, hidden_states=(here, here)),
        Record([here]),
    ):
        assert send_to_device(data, home) is data
        moved = send_to_device(data, away)
        assert type(moved) is type(data)
        back = send_to_device(moved, home)
        assert repr(back) == repr(data)
    output = send_to_device(BaseModelOutput(last_hidden_state=here), away)
    assert output.last_hidden_state.device == output["last_hidden_state"].device == output[0].device == away
    record = send_to_device(Record([here]), away)
    assert (record.values[0].device, record.count) == (away, 3)
    module = nn.Linear(1, 1)
    assert send_to_device([module, None, "text", 1], away) == [module, None, "text", 1]
    assert module.weight.device == home


@pytest.mark.usefixtures("_imagined_gpus")
def test_what_can_move_itself_is_moved_by_that() -> None:
    packed = PackedSequence(torch.zeros(5, 1), torch.tensor([2, 2, 1]), torch.tensor([1, 0]))
    moved = send_to_device({"x": [packed]}, torch.device("cuda:1"))["x"][0]
    assert isinstance(moved, PackedSequence)
    assert (moved.data.device.type, moved.batch_sizes.device.type) == ("cuda", "cpu")
    assert moved.sorted_indices.device.type == "cuda"
    assert send_to_device(packed, torch.device("cpu")) is packed


class Edge(NamedTuple):
    source: Tensor
    to: Tensor


@pytest.mark.usefixtures("_imagined_gpus")
def test_a_field_of_the_name_to_moves_nothing() -> None:
    moved = send_to_device(Edge(torch.zeros(1), torch.zeros(1)), torch.device("cuda:1"))
    assert (moved.source.device, moved.to.device) == (torch.device("cuda:1"),) * 2


class Movable(nn.Linear):
    """Moves as a model does that holds imagined tensors, which Module.to cannot move."""

    def to(self, device: Any) -> "Movable":  # type: ignore[override]
        for slot in slots(self):
            slot.put(like(slot.tensor.detach().to(device), slot.tensor))
        return self


@pytest.mark.usefixtures("_imagined_gpus")
def test_whole_models_wait_on_the_cpu_until_they_are_called() -> None:
    first, first_hook = cpu_offload_with_hook(Movable(2, 2), 0)
    second, second_hook = cpu_offload_with_hook(Movable(2, 2), 0, prev_module_hook=first_hook)
    assert first.weight.device.type == "cpu"
    x = first(torch.zeros(1, 2))
    assert first.weight.device == x.device == torch.device("cuda:0")
    second(x)
    assert (first.weight.device.type, second.weight.device.type) == ("cpu", "cuda")
    second_hook.offload()
    assert second.weight.device.type == "cpu"
    second_hook.remove()
    assert second(torch.zeros(1, 2)).device.type == "cpu"


# -- hooks ------------------------------------------------------------------------------------------------------------


class Adding(ModelHook):
    def __init__(self, number: int) -> None:
        self.number = number

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (args[0] + self.number, *args[1:]), kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        return output * 10


def test_hooks_are_added_replaced_chained_and_removed() -> None:
    module = nn.Identity()
    add_hook_to_module(module, Adding(1))
    assert module(1) == 20
    add_hook_to_module(module, Adding(2))
    assert module(1) == 30
    add_hook_to_module(module, Adding(3), append=True)
    assert module(1) == 600
    remove_hook_from_module(module)
    assert module(1) == 1
    assert "forward" not in module.__dict__


def test_a_forward_that_was_set_before_comes_back() -> None:
    module = nn.Identity()
    module.forward = lambda x: x + 100
    add_hook_to_module(module, Adding(1))
    assert module(1) == 1020
    remove_hook_from_module(module)
    assert module(1) == 101


def test_hooks_of_modules_inside_are_removed_too() -> None:
    model = nn.Sequential(nn.Identity(), nn.Sequential(nn.Identity()))
    for module in model.modules():
        add_hook_to_module(module, AlignDevicesHook())
    remove_hook_from_module(model, recurse=True)
    assert not any("_hf_hook" in module.__dict__ for module in model.modules())
