"""How many bytes a module and each of its parts take: the figures that every placement starts from.

Names and results are Accelerate's. Sizes are keyed by dotted name, "" for the whole; a tensor that stands in a model
under several names counts at the first. Knows no device.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from tpdist.bigmodel.devices import DeviceMapError

Dtype = str | torch.dtype
Part = tuple[str, nn.Module | Tensor]

# Of a size with a unit; the longest units first, since "GiB" ends with "B" too. Units ending with a small b are bits.
_UNITS = {"GIB": 2**30, "MIB": 2**20, "KIB": 2**10, "GB": 10**9, "MB": 10**6, "KB": 10**3}


def convert_file_size_to_int(size: int | str) -> int:
    """Bytes of a size such as 1024, "10GiB" or "500MB"; "Gb", with a small b, are gigabits.

    Raises DeviceMapError for anything else, and for a negative size.
    """
    num_bytes = size if isinstance(size, int) else _parse_size(size)
    if num_bytes is None or num_bytes < 0:
        raise DeviceMapError(
            f"{size!r} is no size: give bytes as a whole number, or a number with a unit such as '5.0GB'"
        )
    return num_bytes


def _parse_size(size: str) -> int | None:
    for unit, factor in _UNITS.items():
        if size.upper().endswith(unit):
            try:
                num_bytes = int(float(size[: -len(unit)]) * factor)
            except (ValueError, OverflowError):
                return None
            return num_bytes // 8 if len(unit) == 2 and size.endswith("b") else num_bytes
    return None


def joined(*parts: str) -> str:
    """A dotted name; the top module's is empty."""
    return ".".join(filter(None, parts))


def as_dtype(dtype: Dtype) -> torch.dtype:
    """The type of "float16", "torch.float16" or torch.float16 itself. Raises DeviceMapError for another word."""
    if isinstance(dtype, torch.dtype):
        return dtype
    found = getattr(torch, dtype.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise DeviceMapError(f"{dtype!r} is no type of tensors: use for example 'float16', 'bfloat16' or torch.float32")
    return found


def dtype_byte_size(dtype: torch.dtype) -> int | float:
    """Bytes of one element. A bool counts as one bit, as Accelerate has it; the exact planner counts its real byte."""
    if dtype == torch.bool:
        return 1 / 8
    if re.search(r"[^\d]\d+(_|$)", str(dtype)) is None:
        raise DeviceMapError(f"{dtype} is no type whose size is known")
    return dtype.itemsize


def is_cast(dtype: torch.dtype) -> bool:
    """Whether a `dtype` option converts tensors of this type: whole numbers and bools always stay what they are."""
    return dtype.is_floating_point or dtype.is_complex


def loaded_byte_size(
    tensor: Tensor, *, name: str, dtype: torch.dtype | None, special_dtypes: Mapping[str, torch.dtype]
) -> int | float:
    """Bytes of one element of a tensor that is loaded as `dtype`: never more than it has now, except by a special
    dtype of its own name."""
    if name in special_dtypes:
        return dtype_byte_size(special_dtypes[name])
    own = dtype_byte_size(tensor.dtype)
    return own if dtype is None or not is_cast(tensor.dtype) else min(dtype_byte_size(dtype), own)


def special_types(special_dtypes: Mapping[str, Dtype] | None) -> dict[str, torch.dtype]:
    return {name: as_dtype(dtype) for name, dtype in (special_dtypes or {}).items()}


def named_module_tensors(
    module: nn.Module, include_buffers: bool = True, recurse: bool = False, remove_non_persistent: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """The parameters of a module, then its buffers, by name."""
    yield from module.named_parameters(recurse=recurse)
    if include_buffers:
        left_out = get_non_persistent_buffers(module, recurse=recurse, fqns=True) if remove_non_persistent else set()
        yield from (named for named in module.named_buffers(recurse=recurse) if named[0] not in left_out)


def get_non_persistent_buffers(module: nn.Module, recurse: bool = False, fqns: bool = False) -> set[str]:
    """Names of the buffers that no state dict holds; dotted from `module` on if `fqns`."""
    modules = module.named_modules() if recurse else iter([("", module)])
    return {
        f"{path}.{name}" if fqns and path else name
        for path, owner in modules
        for name in owner._non_persistent_buffers_set
    }


def compute_module_sizes(
    model: nn.Module,
    dtype: Dtype | None = None,
    special_dtypes: Mapping[str, Dtype] | None = None,
    buffers_only: bool = False,
) -> dict[str, int]:
    """Bytes of every module, parameter and buffer by dotted name; names without any tensor read as 0."""
    tensors = model.named_buffers(recurse=True) if buffers_only else named_module_tensors(model, recurse=True)
    kind = None if dtype is None else as_dtype(dtype)
    special = special_types(special_dtypes)
    sizes: dict[str, int] = defaultdict(int)
    for name, tensor in tensors:
        size = tensor.numel() * loaded_byte_size(tensor, name=name, dtype=kind, special_dtypes=special)
        for prefix in prefixes(name):
            sizes[prefix] += size  # type: ignore[assignment]  # a fraction where there are bools
    return sizes


def prefixes(name: str) -> Iterator[str]:
    """A dotted name's ancestors from the root "" on, and itself: "", "a", "a.b"."""
    yield ""
    parts = name.split(".") if name else []
    yield from (".".join(parts[: count + 1]) for count in range(len(parts)))


def compute_module_total_buffer_size(
    model: nn.Module, dtype: Dtype | None = None, special_dtypes: Mapping[str, Dtype] | None = None
) -> int:
    """Bytes of all buffers of a module."""
    sizes = compute_module_sizes(model, dtype=dtype, special_dtypes=special_dtypes, buffers_only=True)
    return sizes.get("", 0)


def class_names(classes: str | Iterable[str] | None) -> list[str]:
    """A `no_split_module_classes` argument as a list."""
    if classes is None:
        return []
    return [classes] if isinstance(classes, str) else list(classes)


def is_whole(module: nn.Module | Tensor, no_split: Sequence[str]) -> bool:
    """Whether a part is never split over devices: a tensor, a module without children, or one of a no-split class."""
    if not isinstance(module, nn.Module):
        return True
    return next(module.children(), None) is None or type(module).__name__ in no_split


def direct_parts(name: str, module: nn.Module) -> list[Part]:
    """What a module is split into, with dotted names: its own parameters, its children, its own buffers."""
    parts: list[Part] = [
        *module.named_parameters(recurse=False),
        *module.named_children(),
        *module.named_buffers(recurse=False),
    ]
    return [(joined(name, leaf), part) for leaf, part in parts]


def get_max_layer_size(
    modules: Sequence[Part], module_sizes: Mapping[str, int], no_split_module_classes: Sequence[str]
) -> tuple[int, list[str]]:
    """The bytes of the largest layer in these named parts, and the names of all layers that have them.

    A layer is what is never split: see is_whole. A tensor of a module that has children is no layer, unless it stands
    in `modules` itself.
    """
    largest, names = 0, list[str]()
    pending = list(reversed(modules))
    while pending:
        name, module = pending.pop()
        if isinstance(module, nn.Module) and not is_whole(module, no_split_module_classes):
            pending.extend(reversed([(f"{name}.{leaf}", child) for leaf, child in module.named_children()]))
            continue
        size = module_sizes[name]
        if size > largest:
            largest, names = size, [name]
        elif size == largest:
            names.append(name)
    return largest, names


def calculate_maximum_sizes(model: nn.Module) -> tuple[int, tuple[int, list[str]]]:
    """Bytes of the whole model, and its largest layer (see get_max_layer_size); no-split classes are the model's."""
    sizes = compute_module_sizes(model)
    no_split = class_names(getattr(model, "_no_split_modules", None))
    return sizes[""], get_max_layer_size(direct_parts("", model), sizes, no_split)


def get_module_leaves(module_sizes: Mapping[str, int]) -> list[str]:
    """The names that are no other name's parent, without the root."""
    parents = {name.rpartition(".")[0] for name in module_sizes if "." in name}
    return [name for name in module_sizes if name and name not in parents]
