"""What torch sees of this machine's NVIDIA devices.

Imports torch and makes a CUDA context on each device: only for a short-lived process on a machine with a driver.
"""

import torch

from tpdist.control.messages import DeviceInfo


def devices() -> tuple[DeviceInfo, ...]:
    """All visible CUDA devices, with the memory that is free now."""
    return tuple(_device(index) for index in range(torch.cuda.device_count()))


def nccl_version() -> str | None:
    """As in "2.27.3"; None if this build of torch has no NCCL."""
    if not hasattr(torch._C, "_nccl_version"):
        return None
    version: tuple[int, ...] = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
    return ".".join(str(part) for part in version)


def _device(index: int) -> DeviceInfo:
    free, total = torch.cuda.mem_get_info(index)
    return DeviceInfo(
        kind="cuda", index=index, name=torch.cuda.get_device_name(index), total_bytes=total, free_bytes=free
    )
