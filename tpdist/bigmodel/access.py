"""Reaching single tensors of a module: setting one on a device, and looking at what is offloaded."""

from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches

from torch import Tensor, nn

from tpdist.bigmodel.align import AlignDevicesHook, Slot, like, slots
from tpdist.bigmodel.device_map import NUM_SHOWN, Placed
from tpdist.bigmodel.devices import DeviceMapError, torch_device
from tpdist.bigmodel.sizes import Dtype, as_dtype, is_cast


def set_module_tensor_to_device(
    module: nn.Module,
    tensor_name: str,
    device: Placed,
    value: Tensor | None = None,
    dtype: Dtype | None = None,
    non_blocking: bool = False,
) -> None:
    """Put a parameter or buffer on a device ("meta" too), with `value` if that is given.

    The value becomes `dtype`, unless it holds whole numbers or bools, or else the type of the tensor that it replaces.
    Raises DeviceMapError if there is no such tensor, it has another shape, or it is on meta and has no value.
    """
    slot = next((slot for slot in _named_slots(module, tensor_name) if slot.name == tensor_name), None)
    if slot is None:
        raise _unknown(module, tensor_name)
    old, target = slot.tensor, torch_device(device)
    if value is None and old.device.type == "meta" and target.type != "meta":
        raise DeviceMapError(f"{tensor_name} is on the meta device and has no values to put on {target}: give a value")
    if value is not None and value.shape != old.shape:
        raise DeviceMapError(f"the value for {tensor_name} has shape {list(value.shape)}, it has {list(old.shape)}")
    values = old if value is None else value
    if dtype is None:
        values = values.to(old.dtype)
    elif is_cast(values.dtype):
        values = values.to(as_dtype(dtype))
    slot.put(like(values.detach().to(target, non_blocking=non_blocking), old))


def _named_slots(module: nn.Module, tensor_name: str) -> Iterator[Slot]:
    """The places beside this one, if there is a module around it."""
    path, _, _ = tensor_name.rpartition(".")
    try:
        owner = module.get_submodule(path)
    except AttributeError:
        return
    yield from slots(owner, prefix=path, recurse=False)


def _unknown(module: nn.Module, tensor_name: str) -> DeviceMapError:
    names = [slot.name for slot in slots(module)]
    near = get_close_matches(tensor_name, names, n=NUM_SHOWN, cutoff=0) or ["nothing"]
    return DeviceMapError(
        f"{type(module).__name__} has no parameter or buffer {tensor_name}: give one of its names, which are like "
        f"{', '.join(near)}"
    )


def has_offloaded_params(module: nn.Module) -> bool:
    """Whether a module has a hook that brings tensors of it while it runs."""
    hook = module.__dict__.get("_hf_hook")
    return isinstance(hook, AlignDevicesHook) and hook.offload


@contextmanager
def align_module_device(module: nn.Module, execution_device: Placed | None = None) -> Iterator[None]:
    """Within this context the tensors of a module itself, offloaded or not, are on `execution_device`: if it is not
    given, those that are offloaded on the device of its hook, and the others where they are."""
    hook = module.__dict__.get("_hf_hook")
    if isinstance(hook, AlignDevicesHook) and hook.offload:
        usual = hook.execution_device
        hook.execution_device = usual if execution_device is None else torch_device(execution_device)
        try:
            hook.pre_forward(module)
            yield
        finally:
            hook.release(module)
            hook.execution_device = usual
        return
    own = [] if execution_device is None else [(slot, slot.tensor) for slot in slots(module, recurse=False)]
    for slot, tensor in own:
        if execution_device is not None:
            slot.put(like(tensor.detach().to(torch_device(execution_device)), tensor))
    try:
        yield
    finally:
        for slot, tensor in own:
            slot.put(tensor)
