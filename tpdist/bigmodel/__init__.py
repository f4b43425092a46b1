"""Big-model loading for any torch module, with the names, signatures and results of Hugging Face Accelerate.

    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    model = load_checkpoint_and_dispatch(model, folder, device_map="auto", max_memory={0: "20GiB", "cpu": "60GiB"})

A model skeleton takes no memory; each weight is read straight to its device; what does not fit on the GPUs stays in CPU
memory, or in the checkpoint's own files, and comes while it is needed. Checkpoints are safetensors, never pickles.

What differs from Accelerate 1.15, beside the faults that greedy.py and memory.py list:

- device_map="auto" is planned exactly (auto.py has what is guaranteed); the other words, and infer_auto_device_map, as
  there.
- Modules on the disk are read from the checkpoint itself, and nothing is written, unless they were in memory. Without a
  `dtype` they have the model's type, as modules on other devices have, and not the checkpoint's.
- Removing the hooks of a dispatched model brings everything back into memory, also what was never there: from a
  checkpoint to the CPU. A dispatched model can be dispatched again. Threads that run one offloaded module take turns.
- Buffers of modules on the disk are loaded. Parameters that a module ties as it is built stay tied on the meta device.
- A device map must cover all buffers and name devices that exist; "meta" is none. A model that is dispatched refuses to
  be moved. Errors are TpdistErrors, and ValueErrors or RuntimeErrors too.
- `no_split_module_classes` and `skip_keys` come from the model (transformers' names for them) where they are not given,
  except in infer_auto_device_map and get_balanced_memory. Environment variables change nothing.
"""

from tpdist.bigmodel.access import align_module_device, has_offloaded_params, set_module_tensor_to_device
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
    "align_module_device",
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
    "has_offloaded_params",
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
    "set_module_tensor_to_device",
]
