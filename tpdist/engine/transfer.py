"""Small arrays on their way from the host to the device, without a wait.

A plain copy from pageable memory makes the host wait for all that the device has yet to do; from pinned memory it is
only queued. torch keeps pinned blocks for reuse and gives none out again before the copy that reads it has run.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """`array` as a tensor on `device`. On a CPU both share memory: the array is given away."""
    tensor = torch.from_numpy(array)
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def rows_of(x: Tensor, positions: Sequence[int]) -> Tensor | slice:
    """What picks these rows of x, in ascending order: a slice, which copies nothing, if they are consecutive."""
    first, last = positions[0], positions[-1]
    if last - first == len(positions) - 1:
        return slice(first, last + 1)
    return to_device(np.array(positions), x.device)
