"""First-fit placement: layers in order on the devices of one process, each taking as many as it has room for, CPU last.

What is reserved where, in bytes:

    usable       9/10 of what is free on an accelerator, unless the caller knows better; the CPU has no limit, since it
                 can swap
    first        non-mapped parts (embedding, output, encoders) + max(mapped, non-mapped activations)
    others       mapped activations
    each layer   its weights + its KV cache

First is the first device that takes a layer, so that the non-mapped parts are on exactly one device and in front of the
layers. A device that has no room for its reserve and one layer takes none and is passed over with a warning.

Order and 9/10 are those of mistral.rs' automatic device mapping. It asks first whether all that is left fits on a
device; here that is no case of its own, since the device then takes all of it. Knows no torch, and nothing of speed.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from tpdist.errors import DoesNotFitError, PlanError

CPU = "cpu"
MB = 1024 * 1024


class _Memory(NamedTuple):
    """A device that is not the CPU."""

    name: str
    free_bytes: int
    usable_bytes: int


@dataclass(frozen=True)
class FirstFit:
    """`layers`: (device, number of layers) in the order of the layers; devices without any are left out. `warnings`: a
    sentence for each device that was passed over."""

    layers: tuple[tuple[str, int], ...]
    warnings: tuple[str, ...]

    @property
    def non_mapped_device(self) -> str:
        """The device that holds what is not a layer."""
        return self.layers[0][0]


def first_fit(
    layer_bytes: Sequence[int],
    *,
    non_mapped_bytes: int,
    mapped_activation_bytes: int,
    non_mapped_activation_bytes: int,
    kv_bytes_per_layer: int,
    devices: Sequence[tuple[str, int]],
    cpu: bool,
    parameters: str,
    usable: Sequence[int] | None = None,
) -> FirstFit:
    """Place layers of `layer_bytes` on `devices`, (name, free bytes) in the order of use, and what is left on the CPU.

    `usable`: how many bytes of each device may be filled, if it is not 9/10 of what is free. `parameters`: what decided
    the activations and the cache, in words for messages. Raises PlanError if the model has no layer, or if layers are
    left and the CPU may not take them.
    """
    if not layer_bytes:
        raise PlanError("the model has no layers to place; check config.json")
    needs = [size + kv_bytes_per_layer for size in layer_bytes]
    first_reserve = non_mapped_bytes + max(mapped_activation_bytes, non_mapped_activation_bytes)
    placed: list[tuple[str, int]] = []
    warnings: list[str] = []
    next_layer = 0
    rooms = [usable_bytes(free_bytes) for _, free_bytes in devices] if usable is None else usable
    memories = [_Memory(name, free, room) for (name, free), room in zip(devices, rooms, strict=True)]
    for memory in memories:
        if next_layer == len(needs):
            break
        reserve = mapped_activation_bytes if placed else first_reserve
        if count := _count_within(needs[next_layer:], memory.usable_bytes - reserve):
            placed.append((memory.name, count))
            next_layer += count
        else:
            warnings.append(_passed_over(memory, reserve + needs[next_layer], parameters))
    if left := needs[next_layer:]:
        if not cpu:
            raise DoesNotFitError(
                _excess(sum(left) + (0 if placed else first_reserve), len(left), memories, parameters)
            )
        placed.append((CPU, len(left)))
    return FirstFit(tuple(placed), tuple(warnings))


def usable_bytes(free_bytes: int) -> int:
    """What of an accelerator's free memory is filled: 9/10, the rest is for what nobody counts."""
    return free_bytes * 9 // 10


def _count_within(needs: Sequence[int], room: int) -> int:
    """How many of the first layers fit into `room` bytes together."""
    return bisect_right(list(accumulate(needs)), room)


def _passed_over(memory: _Memory, needed_bytes: int, parameters: str) -> str:
    return (
        f"{memory.name} takes no layer: one needs {_up(needed_bytes)} MB there with what is reserved, and "
        f"{memory.usable_bytes // MB} MB of the {memory.free_bytes // MB} MB that are free may be used; lower the "
        f"parameters ({parameters}) to use it"
    )


def _excess(excess_bytes: int, num_layers: int, memories: Sequence[_Memory], parameters: str) -> str:
    listed = ", ".join(
        f"{each.name} ({each.usable_bytes // MB} of {each.free_bytes // MB} MB usable)" for each in memories
    )
    return (
        f"the model exceeds its devices by {_up(excess_bytes)} MB: there is no room for {num_layers} of its layers on "
        f"{listed or 'any device'}; lower the parameters ({parameters}), use more devices, or let the CPU take what is "
        f"left"
    )


def _up(size_bytes: int) -> int:
    """In MB, rounded up: what lacks is never 0."""
    return -(-size_bytes // MB)
