"""Big-model loading for any torch module, with the names, signatures and results of Hugging Face Accelerate.

    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    model = load_checkpoint_and_dispatch(model, folder, device_map="auto", max_memory={0: "20GiB", "cpu": "60GiB"})

A model skeleton takes no memory; each weight is read straight to its device; what does not fit on the GPUs stays in CPU
memory, or in the checkpoint's own files, and comes while it is needed. Checkpoints are safetensors, never pickles.
"""

from tpdist.bigmodel.align import AlignDevicesHook
from tpdist.bigmodel.auto import auto_device_map
from tpdist.bigmodel.device_map import check_device_map
from tpdist.bigmodel.devices import DeviceMapError
from tpdist.bigmodel.dispatch import cpu_offload, disk_offload, dispatch_model
from tpdist.bigmodel.empty import init_empty_weights, init_on_device
from tpdist.bigmodel.greedy import infer_auto_device_map
from tpdist.bigmodel.guard import DispatchedModelError
from tpdist.bigmodel.hooks import (
    ModelHook,
    SequentialHook,
    add_hook_to_module,
    remove_hook_from_module,
    remove_hook_from_submodules,
)
from tpdist.bigmodel.load import load_checkpoint_and_dispatch, load_checkpoint_in_model
from tpdist.bigmodel.memory import get_balanced_memory, get_max_memory
from tpdist.bigmodel.move import find_device, send_to_device
from tpdist.bigmodel.sizes import (
    calculate_maximum_sizes,
    compute_module_sizes,
    convert_file_size_to_int,
    dtype_byte_size,
    get_max_layer_size,
    named_module_tensors,
)
from tpdist.bigmodel.tied import (
    check_tied_parameters_in_config,
    check_tied_parameters_on_same_device,
    find_tied_parameters,
    retie_parameters,
)
from tpdist.bigmodel.whole import UserCpuOffloadHook, cpu_offload_with_hook

__all__ = [
    "AlignDevicesHook",
    "DeviceMapError",
    "DispatchedModelError",
    "ModelHook",
    "SequentialHook",
    "UserCpuOffloadHook",
    "add_hook_to_module",
    "auto_device_map",
    "calculate_maximum_sizes",
    "check_device_map",
    "check_tied_parameters_in_config",
    "check_tied_parameters_on_same_device",
    "compute_module_sizes",
    "convert_file_size_to_int",
    "cpu_offload",
    "cpu_offload_with_hook",
    "disk_offload",
    "dispatch_model",
    "dtype_byte_size",
    "find_device",
    "find_tied_parameters",
    "get_balanced_memory",
    "get_max_layer_size",
    "get_max_memory",
    "infer_auto_device_map",
    "init_empty_weights",
    "init_on_device",
    "load_checkpoint_and_dispatch",
    "load_checkpoint_in_model",
    "named_module_tensors",
    "remove_hook_from_module",
    "remove_hook_from_submodules",
    "retie_parameters",
    "send_to_device",
]
