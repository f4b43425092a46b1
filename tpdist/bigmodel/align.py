"""The hook that gives a module its inputs, and what was offloaded of it, on the device that it runs on."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tpdist.bigmodel.hooks import ModelHook
from tpdist.bigmodel.move import find_device, send_to_device
from tpdist.bigmodel.sources import Source, cast


@dataclass(frozen=True)
class Slot:
    """Where a tensor stands in a model: `leaf` of `owner`. `name` is its dotted name from the top."""

    name: str
    owner: nn.Module
    leaf: str

    @property
    def is_buffer(self) -> bool:
        return self.leaf in self.owner._buffers

    @property
    def tensor(self) -> Tensor:
        found = (self.owner._buffers if self.is_buffer else self.owner._parameters)[self.leaf]
        assert found is not None, self.name
        return found

    def put(self, tensor: Tensor) -> None:
        if self.is_buffer:
            self.owner._buffers[self.leaf] = tensor
        else:
            assert isinstance(tensor, nn.Parameter), self.name
            self.owner._parameters[self.leaf] = tensor


def slots(model: nn.Module, *, prefix: str = "", recurse: bool = True) -> Iterator[Slot]:
    """Every place of a parameter or buffer, also where one tensor stands at several; a module once."""
    modules = model.named_modules() if recurse else iter([("", model)])
    for path, owner in modules:
        start = ".".join(filter(None, (prefix, path)))
        for leaf, tensor in (*owner._parameters.items(), *owner._buffers.items()):
            if tensor is not None:
                yield Slot(f"{start}.{leaf}" if start else leaf, owner, leaf)


def like(values: Tensor, old: Tensor) -> Tensor:
    """`values` as the kind of tensor that `old` is: a parameter of its class and its requires_grad, or a plain one."""
    if not isinstance(old, nn.Parameter):
        return values
    trainable = old.requires_grad and values.is_floating_point()
    # A parameter of a special kind of tensor is no instance of a subclass of Parameter.
    kind = type(old) if issubclass(type(old), nn.Parameter) else nn.Parameter
    return kind(values.detach(), requires_grad=trainable)


@dataclass(frozen=True)
class Offloaded:
    """A place whose tensor comes from a source; `placeholder` (on meta) stands there otherwise, and `memory`, if the
    tensor was in memory before, comes back when the hook goes."""

    slot: Slot
    source: Source
    placeholder: Tensor
    memory: Tensor | None


class AlignDevicesHook(ModelHook):
    """Moves inputs to `execution_device`, and what is offloaded too while the module runs.

    With `io_same_device`, the output goes back to where the input was. A module that calls itself keeps what it has.
    """

    def __init__(
        self,
        execution_device: torch.device | None = None,
        offloaded: Sequence[Offloaded] = (),
        io_same_device: bool = False,
        skip_keys: str | Sequence[str] | None = None,
    ) -> None:
        self.execution_device = execution_device
        self.offloaded = tuple(offloaded)
        self.io_same_device = io_same_device
        self.skip_keys = skip_keys
        self.input_device: torch.device | None = None
        self._depth = 0
        by_source: dict[int, list[Offloaded]] = {}
        for item in self.offloaded:
            by_source.setdefault(id(item.source), []).append(item)
        self._by_source = list(by_source.values())

    @property
    def offload(self) -> bool:
        return bool(self.offloaded)

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self._depth += 1
        if self.io_same_device and self._depth == 1:
            self.input_device = find_device((args, kwargs))
        if self._depth == 1 and self.offloaded:
            self._load()
        if self.execution_device is None:
            return args, kwargs
        return (
            send_to_device(args, self.execution_device, self.skip_keys),
            send_to_device(kwargs, self.execution_device, self.skip_keys),
        )

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        if self.io_same_device and self.input_device is not None and self._depth == 1:
            return send_to_device(output, self.input_device, self.skip_keys)
        return output

    def release(self, module: nn.Module) -> None:
        self._depth = max(0, self._depth - 1)
        if self._depth == 0:
            self.input_device = None
            for item in self.offloaded:
                item.slot.put(item.placeholder)

    def detach_hook(self, module: nn.Module) -> nn.Module:
        for item in self.offloaded:
            if item.memory is not None:
                item.slot.put(item.memory)
        return module

    def _load(self) -> None:
        for items in self._by_source:
            values = items[0].source.fetch([item.slot.name for item in items])
            for item in items:
                item.slot.put(like(self._moved(values[item.slot.name], item.placeholder), item.placeholder))

    def _moved(self, values: Tensor, placeholder: Tensor) -> Tensor:
        values = cast(values, placeholder.dtype)
        # Asynchronous only from pinned memory, whose owner keeps it until the copy is done.
        return values if self.execution_device is None else values.to(self.execution_device, non_blocking=True)
