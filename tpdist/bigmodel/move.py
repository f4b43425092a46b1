"""Moving what goes into a forward and comes out of it to a device, through whatever structure it is in."""

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def send_to_device(data: Any, device: torch.device, skip_keys: str | Sequence[str] | None = None) -> Any:
    """`data` with all its tensors on `device`; the very same object if they are there already.

    Whatever has a method `to` moves itself by it (a PackedSequence, for example), except modules. Looks into other
    lists, tuples, mappings (among them the outputs of transformers) and dataclasses. Values at `skip_keys` of mappings
    stay where they are.
    """
    if isinstance(data, Tensor):
        return data if data.device == device else data.to(device)
    skipped = (skip_keys,) if isinstance(skip_keys, str) else tuple(skip_keys or ())
    return _send(data, device, skipped)


def _send(data: Any, device: torch.device, skipped: tuple[str, ...]) -> Any:
    if data is None or isinstance(data, str | bytes | int | float | nn.Module):
        return data
    if isinstance(data, Tensor):
        return data if data.device == device else data.to(device)
    if callable(getattr(data, "to", None)) and not isinstance(data, type):
        return data.to(device)
    if isinstance(data, Mapping):
        moved = {key: value if key in skipped else _send(value, device, skipped) for key, value in data.items()}
        return data if _is_same(moved.values(), data.values()) else _like_mapping(data, moved)
    if isinstance(data, list | tuple):
        items = [_send(item, device, skipped) for item in data]
        return data if _is_same(items, data) else _like_sequence(data, items)
    if dataclasses.is_dataclass(data) and not isinstance(data, type):
        return _send_fields(data, device, skipped)
    return data


def _is_same(moved: Any, data: Any) -> bool:
    return all(left is right for left, right in zip(moved, data, strict=True))


def _like_mapping(data: Mapping[Any, Any], moved: dict[Any, Any]) -> Any:
    """A mapping of the same type. A dataclass too (an output of transformers) takes its entries as fields."""
    return type(data)(**moved) if dataclasses.is_dataclass(data) else type(data)(moved)  # type: ignore[call-arg]


def _like_sequence(data: Sequence[Any], items: list[Any]) -> Any:
    return type(data)(*items) if hasattr(data, "_fields") else type(data)(items)  # type: ignore[call-arg]


def _send_fields(data: Any, device: torch.device, skipped: tuple[str, ...]) -> Any:
    """A copy of a dataclass whose constructor is not called: its fields may not all be arguments."""
    values = {field.name: getattr(data, field.name, None) for field in dataclasses.fields(data)}
    moved = {name: value if name in skipped else _send(value, device, skipped) for name, value in values.items()}
    if _is_same(moved.values(), values.values()):
        return data
    copied = copy.copy(data)
    for name, value in moved.items():
        object.__setattr__(copied, name, value)
    return copied


def find_device(data: Any) -> torch.device | None:
    """The device of the first tensor in lists, tuples and mappings; None if there is none."""
    if isinstance(data, Tensor):
        return data.device
    items = data.values() if isinstance(data, Mapping) else data if isinstance(data, list | tuple) else ()
    return next((found for found in map(find_device, items) if found is not None), None)
