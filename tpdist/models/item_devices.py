"""Where the parts of a model lie in one process: embedding, layers, and output with the final norm."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

DISK = "disk"


@dataclass(frozen=True)
class ItemDevices:
    """Names of devices, as torch has them, or `disk`: weights that stay in the checkpoint's files. What lies there is
    computed on the CPU."""

    embedding: str
    layers: tuple[str, ...]
    head: str

    @classmethod
    def of(cls, names: Sequence[str]) -> "ItemDevices":
        """From the names of all parts in their order."""
        return cls(names[0], tuple(names[1:-1]), names[-1])

    @classmethod
    def same(cls, device: torch.device, *, num_layers: int) -> "ItemDevices":
        """All parts on one device."""
        return cls(str(device), (str(device),) * num_layers, str(device))

    @property
    def on_disk(self) -> tuple[int, ...]:
        """Numbers of the layers that lie on the disk."""
        return tuple(index for index, name in enumerate(self.layers) if name == DISK)


def computing_device(name: str) -> torch.device:
    """Where something that lies on `name` is computed."""
    return torch.device("cpu" if name == DISK else name)
