"""Keeps a dispatched model where it is: moving it by hand would take its modules from where their hooks expect them."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tpdist.bigmodel.hooks import GUARDED_METHODS
from tpdist.errors import SettingsError

MOVES = ("cuda", "cpu")


class DispatchedModelError(SettingsError, RuntimeError):
    """A dispatched model was asked to move; a RuntimeError too, as Accelerate raises."""


def guard_against_moves(model: nn.Module) -> None:
    """Make model.to(device), cuda() and cpu() an error, and changes of the type too if parts of it are offloaded, whose
    values would not change. remove_hook_from_module takes this away again."""
    for name in GUARDED_METHODS:
        method = getattr(model, name, None)
        if method is not None:
            model.__dict__[name] = functools.update_wrapper(functools.partial(_guarded, model, name), method)


def _guarded(model: nn.Module, name: str, *args: Any, **kwargs: Any) -> Any:
    # The class's own method, and no bound one that is kept: a deep copy of the model guards itself.
    method: Callable[..., Any] = getattr(type(model), name)
    moves = name in MOVES or (name == "to" and torch._C._nn._parse_to(*args, **kwargs)[0] is not None)
    if moves:
        raise DispatchedModelError(
            f"{type(model).__name__}.{name}() would move a model that is dispatched over {_devices(model)}: call "
            f"remove_hook_from_submodules(model) first, or dispatch it with another device map"
        )
    if any(parameter.device.type == "meta" for parameter in model.parameters()):
        raise DispatchedModelError(
            f"{type(model).__name__}.{name}() cannot change parameters that are offloaded: give the type as `dtype` "
            f"when the model is loaded"
        )
    return method(model, *args, **kwargs)


def _devices(model: nn.Module) -> str:
    device_map = getattr(model, "hf_device_map", {"": "several devices"})
    return ", ".join(dict.fromkeys(str(device) for device in device_map.values()))
