"""Parameters that stand in a model under several names: finding them, keeping them one, saying when they are not."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from tpdist.bigmodel.device_map import Placed, device_of
from tpdist.bigmodel.sizes import joined

log = logging.getLogger(__name__)


def find_tied_parameters(model: nn.Module) -> list[list[str]]:
    """Groups of names, sorted, each of one parameter; groups in the order in which their second names come."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    order = {name: place for place, (name, _) in enumerate(model.named_parameters(remove_duplicate=False))}
    tied = [group for group in names.values() if len(group) > 1]
    return [sorted(group) for group in sorted(tied, key=lambda group: order[group[1]])]


def retie_parameters(model: nn.Module, tied_params: Sequence[Sequence[str]]) -> None:
    """Make each group one parameter again: the first of the group that is not on the meta device, if there is one."""
    for group in tied_params:
        parameters = (_owner(model, name)._parameters[name.rpartition(".")[2]] for name in group)
        kept = next((found for found in parameters if found is not None and found.device.type != "meta"), None)
        if kept is not None:
            for name in group:
                _owner(model, name)._parameters[name.rpartition(".")[2]] = kept


def _owner(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def is_within(name: str, module_name: str) -> bool:
    """Whether a dotted name is a module's, or of something in it: "a.b" is in "a", "ab" and "c.a" are not."""
    return name == module_name or name.startswith(module_name + ".") or not module_name


def check_tied_parameters_in_config(model: nn.Module) -> bool:
    """Whether a transformers model says that some of its parameters are tied."""
    if "PreTrainedModel" not in {base.__name__ for base in type(model).__mro__}:
        return False
    config: Any = getattr(model, "config", None)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    words = bool(getattr(text, "tie_word_embeddings", False)) and _has_output_embeddings(model)
    encoder = bool(getattr(config, "is_encoder_decoder", False)) and bool(getattr(config, "tie_encoder_decoder", False))
    return words or encoder or any(hasattr(module, "_tie_weights") for module in model.modules())


def _has_output_embeddings(model: nn.Module) -> bool:
    found = getattr(model, "get_output_embeddings", None)
    return bool(callable(found) and found() is not None)


def warn_if_not_tied(model: nn.Module, tied: Sequence[Sequence[str]]) -> None:
    if not tied and check_tied_parameters_in_config(model):
        log.warning(
            "the config of %s ties parameters, but none are tied: call tie_weights() first", type(model).__name__
        )


def check_tied_parameters_on_same_device(
    tied_params: Sequence[Sequence[str]], device_map: Mapping[str, Placed]
) -> None:
    """Warn of each group that the map puts on several devices, each of which will hold a copy."""
    for group in tied_params:
        devices = {name: device_of(name, device_map) for name in group}
        if len({str(device) for device in devices.values()}) > 1:
            log.warning("tied parameters are on different devices, each with a copy of its own: %s", devices)


def report_ties(model: nn.Module, device_map: Mapping[str, Placed]) -> None:
    """Say in the log what a map tears apart: tied parameters, and names of one module, which goes by the first only."""
    first_names = {id(module): name for name, module in model.named_modules()}
    groups: list[list[str]] = []
    for group in find_tied_parameters(model):
        places: dict[str, list[str]] = {}
        for name in group:
            owner, _, leaf = name.rpartition(".")
            first = first_names[id(model.get_submodule(owner))]
            places.setdefault(joined(first, leaf), []).append(name)
        groups.append(list(places))
        for first, names in places.items():
            others = {name: device_of(name, device_map) for name in names if name != first}
            device = device_of(first, device_map)
            if elsewhere := [name for name, other in others.items() if str(other) != str(device)]:
                log.warning("%s is also %s, of the same module: it is on %s alone", first, ", ".join(elsewhere), device)
    check_tied_parameters_on_same_device(groups, device_map)
