"""Offloading a model as a whole: it comes to its device when it is called, and stays until it is sent back."""

from typing import Any

import torch
from torch import nn

from tpdist.bigmodel.devices import Device, present_devices, torch_device
from tpdist.bigmodel.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from tpdist.bigmodel.move import send_to_device


class CpuOffload(ModelHook):
    """Brings a model to `execution_device` before its forward, and sends the previous one of a chain away."""

    def __init__(self, execution_device: torch.device, prev_module_hook: "UserCpuOffloadHook | None" = None) -> None:
        self.execution_device = execution_device
        self.prev_module_hook = prev_module_hook

    def init_hook(self, module: nn.Module) -> nn.Module:
        return module.to("cpu")

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self.prev_module_hook is not None:
            self.prev_module_hook.offload()
        module.to(self.execution_device)
        return send_to_device(args, self.execution_device), send_to_device(kwargs, self.execution_device)


class UserCpuOffloadHook:
    """What cpu_offload_with_hook returns: sends the model back to the CPU, or removes the hook."""

    def __init__(self, model: nn.Module, hook: CpuOffload) -> None:
        self.model = model
        self.hook = hook

    def offload(self) -> None:
        self.hook.init_hook(self.model)

    def remove(self) -> None:
        remove_hook_from_module(self.model)


def cpu_offload_with_hook(
    model: nn.Module,
    execution_device: Device | torch.device | None = None,
    prev_module_hook: UserCpuOffloadHook | None = None,
) -> tuple[nn.Module, UserCpuOffloadHook]:
    """Keep a model on the CPU until its forward brings it to `execution_device` (the first GPU, or the CPU), where it
    stays until the returned hook's offload() is called, or the forward of a model whose previous hook that is."""
    device = torch_device(present_devices()[0] if execution_device is None else execution_device)
    hook = CpuOffload(device, prev_module_hook)
    add_hook_to_module(model, hook, append=True)
    return model, UserCpuOffloadHook(model, hook)
