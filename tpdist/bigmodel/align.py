"""The hook that gives a module its inputs, and what was offloaded of it, on the device that it runs on."""

import copy
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tpdist.bigmodel.hooks import ModelHook, SequentialHook
from tpdist.bigmodel.move import find_device, send_to_device
from tpdist.bigmodel.sizes import joined
from tpdist.bigmodel.sources import Source
from tpdist.errors import TpdistError

# How long a thread waits for another that runs the same offloaded module.
TURN_S = 600.0


@dataclass(frozen=True)
class Slot:
    """Where a tensor stands in a model: `leaf` of `owner`. `name` is its dotted name from the top."""

    name: str
    owner: nn.Module
    leaf: str

    @property
    def is_buffer(self) -> bool:
        return self.leaf in self.owner._buffers

    @property
    def is_stored(self) -> bool:
        """Whether state dicts hold it: not if it is a non-persistent buffer."""
        return self.leaf not in self.owner._non_persistent_buffers_set

    @property
    def tensor(self) -> Tensor:
        found = (self.owner._buffers if self.is_buffer else self.owner._parameters)[self.leaf]
        assert found is not None, self.name
        return found

    def put(self, tensor: Tensor) -> None:
        if self.is_buffer:
            self.owner._buffers[self.leaf] = tensor
        else:
            assert isinstance(tensor, nn.Parameter), self.name
            self.owner._parameters[self.leaf] = tensor


def slots(model: nn.Module, *, prefix: str = "", recurse: bool = True) -> Iterator[Slot]:
    """Every place of a parameter or buffer, also where one tensor stands at several; a module once."""
    modules = model.named_modules() if recurse else iter([("", model)])
    for path, owner in modules:
        start = joined(prefix, path)
        for leaf, tensor in (*owner._parameters.items(), *owner._buffers.items()):
            if tensor is not None:
                yield Slot(f"{start}.{leaf}" if start else leaf, owner, leaf)


def like(values: Tensor, old: Tensor) -> Tensor:
    """`values` as the kind of tensor that `old` is: a parameter of its class and its requires_grad, or a plain one."""
    if not isinstance(old, nn.Parameter):
        return values
    trainable = old.requires_grad and values.is_floating_point()
    # A parameter of a special kind of tensor is no instance of a subclass of Parameter.
    kind = type(old) if issubclass(type(old), nn.Parameter) else nn.Parameter
    return kind(values.detach(), requires_grad=trainable)


@dataclass
class Parked:
    """A tensor that is offloaded, at all its places: `placeholder` (on meta) stands there meanwhile, and when the hooks
    go it is on `home` again. `memory` is the tensor itself, and is only kept where its source holds the same memory."""

    placeholder: Tensor
    home: torch.device
    memory: Tensor | None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Parked":
        # A source is shared by copies of a model, but a copy takes memory of its own when its hooks go.
        return Parked(copy.deepcopy(self.placeholder, memo), self.home, None)


@dataclass(frozen=True)
class Offloaded:
    """A place whose tensor comes from a source, where it has the name of `slot`."""

    slot: Slot
    source: Source
    parked: Parked

    @property
    def placeholder(self) -> Tensor:
        return self.parked.placeholder

    @property
    def is_away(self) -> bool:
        """Whether the placeholder stands there now: not while the module runs, nor once a user has put a tensor."""
        return self.standing is self.placeholder

    @property
    def standing(self) -> Tensor | None:
        """What is at the place now; None if a user has deleted it."""
        found = self.slot.owner._buffers if self.slot.is_buffer else self.slot.owner._parameters
        return found.get(self.slot.leaf)

    @torch.inference_mode(False)
    def restored(self, device: torch.device) -> Tensor:
        """The tensor that was there before, or else one on `device` with memory of its own."""
        if self.parked.memory is not None:
            return self.parked.memory
        values = self.source.fetch([self.slot.name])[self.slot.name].detach()
        return like(values.to(self.placeholder.dtype).to(device, copy=True), self.placeholder)


@dataclass
class _Call:
    """One thread's forward of a module, that may call itself: `turn` is the lock that it holds, `loaded` has the places
    that it brought tensors to, and what stood there."""

    depth: int = 0
    input_device: torch.device | None = None
    turn: Any = None
    loaded: list[tuple[Slot, Tensor]] = field(default_factory=list)


class Turns:
    """Whose turn it is among threads; a thread that has it may take it again. Copies, pickles and forked processes
    start with nobody's."""

    def __init__(self) -> None:
        self._lock, self._pid = threading.RLock(), os.getpid()

    def take(self, module: nn.Module) -> Any:
        """Wait until no other thread has the turn; what is returned must be released."""
        if os.getpid() != self._pid:
            self.__init__()  # type: ignore[misc]
        lock = self._lock
        if not lock.acquire(timeout=TURN_S):
            raise TpdistError(
                f"{type(module).__name__} is offloaded, and another thread has been running it for {TURN_S} s: run the "
                f"model in one thread at a time, or give each thread a copy (copy.deepcopy shares what is offloaded)"
            )
        return lock

    def __reduce__(self) -> tuple[type["Turns"], tuple[()]]:
        return Turns, ()


class AlignDevicesHook(ModelHook):
    """Moves inputs to `execution_device`, and what is offloaded too while the module runs.

    With `io_same_device`, the output goes back to where the input was. A module that calls itself keeps what it has,
    and one that runs in a module that has brought its tensors already (a preloaded one) runs where they are. Threads
    that run one module take turns if anything of it is offloaded; hooks that offload the same must share `turns`.
    """

    def __init__(
        self,
        execution_device: torch.device | None = None,
        offloaded: Sequence[Offloaded] = (),
        io_same_device: bool = False,
        skip_keys: str | Sequence[str] | None = None,
        turns: Turns | None = None,
    ) -> None:
        self.execution_device = execution_device
        self.io_same_device = io_same_device
        self.skip_keys = skip_keys
        self.offloaded = tuple(offloaded)
        self._calls: dict[int, _Call] = {}
        self._turns = Turns() if turns is None else turns

    @property
    def offload(self) -> bool:
        return bool(self.offloaded)

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        call = self._calls.setdefault(threading.get_ident(), _Call())
        call.depth += 1
        if self.io_same_device and call.depth == 1:
            call.input_device = find_device((args, kwargs))
        if call.depth == 1 and self.offloaded:
            call.turn = self._turns.take(module)
            self._load(call)
        device = self._device(call)
        if device is None:
            return args, kwargs
        return send_to_device(args, device, self.skip_keys), send_to_device(kwargs, device, self.skip_keys)

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        call = self._calls.get(threading.get_ident())
        if self.io_same_device and call is not None and call.input_device is not None and call.depth == 1:
            return send_to_device(output, call.input_device, self.skip_keys)
        return output

    def release(self, module: nn.Module) -> None:
        call = self._calls.get(threading.get_ident())
        if call is None:
            return
        call.depth -= 1
        if call.depth:
            return
        del self._calls[threading.get_ident()]
        if call.turn is not None:
            # What was brought back for good meanwhile, since the hook was removed, stays.
            for slot, stood in call.loaded if self.offloaded else ():
                slot.put(stood)
            call.turn.release()

    def detach_hook(self, module: nn.Module) -> nn.Module:
        """Bring everything back to where it was, and to the CPU what was never in memory. Nothing changes on errors."""
        restored: dict[int, Tensor] = {}
        # While the module runs, what stands there is the hook's; at other times a user may have put it there.
        items = [item for item in self.offloaded if item.is_away or self._calls]
        for item in items:
            if id(item.parked) not in restored:
                restored[id(item.parked)] = item.restored(item.parked.home)
        for item in items:
            item.parked.memory = restored[id(item.parked)]  # for its other places, so that it stays one
            item.slot.put(item.parked.memory)
        self.forget()
        return module

    def forget(self) -> None:
        """Offload nothing any more, and leave the placeholders where they are."""
        self.offloaded = ()

    def _device(self, call: _Call) -> torch.device | None:
        if self.execution_device is None or not self.offloaded or call.loaded:
            return self.execution_device
        there = self.offloaded[0].standing
        return self.execution_device if there is None else there.device

    def _load(self, call: _Call) -> None:
        by_source: dict[int, list[tuple[Offloaded, Tensor]]] = {}
        for item in self.offloaded:
            stands = item.standing
            if stands is not None and stands.device.type == "meta":
                by_source.setdefault(id(item.source), []).append((item, stands))
        for items in by_source.values():
            values = items[0][0].source.fetch([item.slot.name for item, _ in items])
            for item, stands in items:
                call.loaded.append((item.slot, stands))
                item.slot.put(like(self._moved(values[item.slot.name], item.placeholder), item.placeholder))

    def _moved(self, values: Tensor, placeholder: Tensor) -> Tensor:
        values = values.to(placeholder.dtype)
        # Asynchronous only from pinned memory, whose owner keeps it until the copy is done.
        return values if self.execution_device is None else values.to(self.execution_device, non_blocking=True)


def offloaded_in(model: nn.Module) -> tuple[list[AlignDevicesHook], dict[tuple[int, str], Offloaded]]:
    """The hooks in a model that move tensors, and what they offload by its owner's id and leaf.

    Where somebody has put another tensor, that counts, and nothing is offloaded any more.
    """
    hooks: list[AlignDevicesHook] = []
    for module in model.modules():
        pending = [module.__dict__.get("_hf_hook")]
        while pending:
            hook = pending.pop()
            if isinstance(hook, SequentialHook):
                pending.extend(hook.hooks)
            elif isinstance(hook, AlignDevicesHook):
                hooks.append(hook)
    items = [item for hook in hooks for item in hook.offloaded if item.is_away]
    return hooks, {(id(item.slot.owner), item.slot.leaf): item for item in items}
