"""Hooks around the forward of a module, with Accelerate's names: attach one, chain several, take them away again.

A hook is the module's attribute `_hf_hook`, which transformers looks at too; the module's own forward, if it was set on
the instance before, waits in `_old_forward`.
"""

import functools
from typing import Any

from torch import nn

# Methods that dispatch_model replaces on a model, so that nobody moves it by mistake.
GUARDED_METHODS = ("to", "cuda", "cpu", "half", "float", "double", "bfloat16")


class ModelHook:
    """What runs around a forward. Override what you need."""

    def init_hook(self, module: nn.Module) -> nn.Module:
        """When the hook is attached."""
        return module

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Before the forward; returns the arguments that it gets."""
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        """After the forward; returns what the caller gets."""
        return output

    def release(self, module: nn.Module) -> None:
        """After the forward, and also when it, or a hook, has failed: let go of what pre_forward took."""

    def detach_hook(self, module: nn.Module) -> nn.Module:
        """When the hook is taken away."""
        return module


class SequentialHook(ModelHook):
    """Several hooks, each before the next one at every event."""

    def __init__(self, *hooks: ModelHook) -> None:
        self.hooks = hooks

    def init_hook(self, module: nn.Module) -> nn.Module:
        for hook in self.hooks:
            module = hook.init_hook(module)
        return module

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        for hook in self.hooks:
            args, kwargs = hook.pre_forward(module, *args, **kwargs)
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        for hook in self.hooks:
            output = hook.post_forward(module, output)
        return output

    def release(self, module: nn.Module) -> None:
        for hook in self.hooks:
            hook.release(module)

    def detach_hook(self, module: nn.Module) -> nn.Module:
        for hook in self.hooks:
            module = hook.detach_hook(module)
        return module


def add_hook_to_module(module: nn.Module, hook: ModelHook, append: bool = False) -> nn.Module:
    """Run `hook` around the forward of `module`, which is changed and returned. It replaces a hook that is there, or
    follows it if `append`."""
    present = module.__dict__.get("_hf_hook")
    if append and present is not None:
        hook.init_hook(module)
        module.__dict__["_hf_hook"] = SequentialHook(present, hook)
        return module
    if present is not None:
        remove_hook_from_module(module)
    own_forward = module.__dict__.get("forward")
    hook.init_hook(module)
    module.__dict__["_hf_hook"] = hook
    if own_forward is not None:
        module.__dict__["_old_forward"] = own_forward
    original = module.forward
    # A partial over the module, and no closure, so that a deep copy of the module runs its own forward.
    module.forward = functools.update_wrapper(functools.partial(_hooked_forward, module), original)
    return module


def _hooked_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    hook: ModelHook = module.__dict__["_hf_hook"]
    try:
        args, kwargs = hook.pre_forward(module, *args, **kwargs)
        own_forward = module.__dict__.get("_old_forward")
        output = type(module).forward(module, *args, **kwargs) if own_forward is None else own_forward(*args, **kwargs)
        return hook.post_forward(module, output)
    finally:
        hook.release(module)


def remove_hook_from_module(module: nn.Module, recurse: bool = False) -> nn.Module:
    """Undo add_hook_to_module, in all submodules too if `recurse`; what a hook had offloaded comes back into memory.

    A hook that cannot bring it back (a file is broken) stays, and so do those of the modules around it.
    """
    if recurse:
        for child in module.children():
            remove_hook_from_module(child, recurse)
    hook = module.__dict__.get("_hf_hook")
    if hook is not None:
        hook.detach_hook(module)
        del module.__dict__["_hf_hook"]
        module.__dict__.pop("forward", None)
        if (own_forward := module.__dict__.pop("_old_forward", None)) is not None:
            module.forward = own_forward
    for method in GUARDED_METHODS:
        module.__dict__.pop(method, None)
    return module


def remove_hook_from_submodules(module: nn.Module) -> None:
    """Undo all hooks of a module and of everything in it."""
    remove_hook_from_module(module, recurse=True)
