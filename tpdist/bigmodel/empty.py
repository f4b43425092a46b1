"""Building a module without its memory: every parameter goes to another device, such as meta, as soon as it is made."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.weak import WeakTensorKeyDictionary


@contextmanager
def init_empty_weights(include_buffers: bool | None = None) -> Iterator[None]:
    """Within this context the parameters of new modules have no values and take no memory: they are on the meta device.

    Buffers too with `include_buffers`; they are left alone otherwise, since those that no checkpoint holds (of rotary
    embeddings, for example) could not be filled later. A module that ties parameters as it is built stays tied.
    """
    with init_on_device(torch.device("meta"), include_buffers=include_buffers):
        yield


@contextmanager
def init_on_device(device: torch.device, include_buffers: bool | None = None) -> Iterator[None]:
    """Within this context the parameters of new modules go to `device`, buffers too with `include_buffers`.

    It changes nn.Module for the whole process while it lasts, as Accelerate does: build modules in one thread.
    """
    register_parameter, register_buffer = nn.Module.register_parameter, nn.Module.register_buffer
    moved = _MovedParameters(torch.device(device))

    def parameter_on_device(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register_parameter(module, name, param)
        if param is not None:
            module._parameters[name] = moved.of(param)

    def buffer_on_device(module: nn.Module, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        register_buffer(module, name, tensor, persistent=persistent)
        if tensor is not None:
            module._buffers[name] = tensor.to(device)

    with ExitStack() as stack:
        stack.callback(_set_methods, register_parameter, register_buffer)
        _set_methods(parameter_on_device, buffer_on_device if include_buffers else register_buffer)
        if include_buffers:
            stack.enter_context(torch.device(device))
        yield


def _set_methods(register_parameter: Any, register_buffer: Any) -> None:
    nn.Module.register_parameter = register_parameter  # type: ignore[method-assign]
    nn.Module.register_buffer = register_buffer  # type: ignore[method-assign]


class _MovedParameters:
    """One new parameter for each old one, so that a parameter that is registered twice stays one.

    Old parameters are held weakly: their memory goes as soon as the module that made them lets go.
    """

    def __init__(self, device: torch.device) -> None:
        # As tensors name it: torch.device("cuda") is the device of no tensor, nor is torch.device("cpu", 0).
        self._device = torch.empty(0, device=device).device
        self._moved = WeakTensorKeyDictionary()

    def of(self, parameter: nn.Parameter) -> nn.Parameter:
        if parameter.device == self._device or is_lazy(parameter):
            return parameter
        found: nn.Parameter | None = self._moved.get(parameter)  # type: ignore[no-untyped-call]
        if found is None:
            found = type(parameter)(parameter.detach().to(self._device), requires_grad=parameter.requires_grad)
            found.__dict__.update(parameter.__dict__)
            self._moved[parameter] = found
        return found
