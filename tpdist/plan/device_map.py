"""A device map, as Accelerate writes it, for one of our own models: names of modules and devices to layers on devices.

    {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": "cpu", "model.norm": "cpu", "lm_head": "cpu"}

A name stands for all that is below it, and the longest name that fits a module decides; "" stands for all. A layer lies
on one device, and the layers of a device follow each other. Embedding, final norm and output go with the first or the
last layers. `balanced` gives each GPU as many layers as the others, `balanced_low_0` none to the first of several,
and `sequential` fills one after the other. Knows no bytes.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

from tpdist.errors import PlanError
from tpdist.plan.placement import Method

ENDS = ("model.embed_tokens", "model.norm", "lm_head")
DeviceLayers = tuple[tuple[str, int], ...]


class MappedLayers(NamedTuple):
    """The planner's `method`; for `manual`, (device, number of layers) for each device in the order of layers, and
    whether final norm and output go with the first layers and not with the last."""

    method: Method
    layers: DeviceLayers | None = None
    head_first: bool = False


def mapped_layers(device_map: str | Mapping[str, int | str], *, num_layers: int, gpus: Sequence[str]) -> MappedLayers:
    """What a device map says to the planner. Raises PlanError."""
    if device_map == "auto":
        return MappedLayers("exact")
    if device_map == "sequential":
        return MappedLayers("first-fit")
    if device_map in ("balanced", "balanced_low_0"):
        return MappedLayers("manual", _balanced(num_layers, (device_map == "balanced_low_0" and gpus[1:]) or gpus))
    if isinstance(device_map, str):
        raise PlanError(f"device_map {device_map!r} is not auto, balanced, balanced_low_0, sequential, or a dict")
    return _from_names(device_map, num_layers=num_layers, gpus=gpus)


def _balanced(num_layers: int, gpus: Sequence[str]) -> DeviceLayers:
    """As many layers on each, the earlier ones first; all on the CPU without a GPU."""
    counts = [num_layers // len(gpus) + (index < num_layers % len(gpus)) for index in range(len(gpus))]
    return tuple((gpu, count) for gpu, count in zip(gpus, counts, strict=True) if count)  # the rest is the CPU's


def _from_names(device_map: Mapping[str, int | str], *, num_layers: int, gpus: Sequence[str]) -> MappedLayers:
    _check_names(device_map, num_layers)
    devices = [_device_of(f"model.layers.{index}", device_map, gpus) for index in range(num_layers)]
    runs = [(device, len(list(run))) for device, run in groupby(devices)]
    if len({device for device, _ in runs}) < len(runs):
        listed = ", ".join(f"{device}: {count}" for device, count in runs)
        raise PlanError(f"device_map interleaves devices ({listed}): the layers of a device must follow each other")
    embedding, norm, output = (_device_of(name, device_map, gpus) for name in ENDS)
    if embedding != devices[0] or norm != output or output not in (devices[0], devices[-1]):
        raise PlanError(
            f"device_map has model.embed_tokens on {embedding}, model.norm on {norm} and lm_head on {output}: the "
            f"first goes with the first layer ({devices[0]}), the others together with the last ({devices[-1]}) or "
            "the first"
        )
    return MappedLayers("manual", tuple(runs), head_first=output != devices[-1])


def _device_of(module: str, device_map: Mapping[str, int | str], gpus: Sequence[str]) -> str:
    """By the longest name that is the module's or stands above it."""
    names = [name for name in device_map if name in ("", module) or module.startswith(name + ".")]
    if not names:
        raise PlanError(f"device_map has no device for {module}; name it, or something above it")
    device = device_map[max(names, key=len)]
    name = f"cuda:{device}" if isinstance(device, int) or str(device).isdecimal() else str(device)
    if name not in (*gpus, "cpu", "disk"):
        raise PlanError(f"device_map has {module} on {device}, but the devices are {', '.join((*gpus, 'cpu', 'disk'))}")
    return name


def _check_names(device_map: Mapping[str, int | str], num_layers: int) -> None:
    known = ("", "model", "model.layers", *ENDS)
    layers = {f"model.layers.{index}" for index in range(num_layers)}
    if wrong := [name for name in device_map if name not in known and name not in layers]:
        raise PlanError(
            f"device_map names {', '.join(wrong[:3])}, which the model does not have, or which is a part of a layer; "
            f"it has {', '.join(ENDS)} and model.layers.0 to model.layers.{num_layers - 1}"
        )
