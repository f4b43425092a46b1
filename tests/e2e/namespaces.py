"""Network namespaces as machines: each with an address of its own, joined by a bridge in one more namespace."""

import ctypes
import os
import shutil
import subprocess
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SUBNET = "10.213.77"
CLONE_NEWNET = 0x40000000


@dataclass(frozen=True)
class Machine:
    """One namespace. `prefix` before a command runs it there."""

    name: str
    address: str
    hub: str

    @property
    def prefix(self) -> tuple[str, ...]:
        return ("ip", "netns", "exec", self.name)

    def link(self, state: str) -> None:
        """Pull the cable ("down") or plug it in ("up"), at the other end: this machine's interface stays as it is."""
        _ip("-n", self.hub, "link", "set", _port(self.address), state)

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """What `function` returns when its sockets are those of this machine."""
        with ThreadPoolExecutor(1, initializer=_enter, initargs=(self.name,)) as pool:
            return pool.submit(function, *args).result()


def why_not() -> str:
    """Why namespaces cannot be made here; empty if they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need `ip` (Debian: iproute2)"
    trial = f"tpdist-trial-{uuid.uuid4().hex[:8]}"
    made = subprocess.run(["ip", "netns", "add", trial], capture_output=True, text=True, check=False)
    if made.returncode != 0:
        return f"no network namespaces here: {made.stderr.strip()}"
    _ip("netns", "del", trial)
    return ""


@contextmanager
def machines(count: int, *, visible: bool = False) -> Iterator[list[Machine]]:
    """`count` namespaces that reach each other; this process reaches them too if they are `visible`. They go
    afterwards, and their interfaces with them."""
    run = uuid.uuid4().hex[:6]
    hub = f"tpd-{run}-hub"
    made = [Machine(f"tpd-{run}-{index}", f"{SUBNET}.{index + 1}", hub) for index in range(count)]
    try:
        _ip("netns", "add", hub)
        _ip("-n", hub, "link", "add", "bridge0", "type", "bridge")
        _ip("-n", hub, "link", "set", "bridge0", "up")
        for machine in made:
            _plug_in(machine, hub)
        if visible:
            _plug_in_this(run, hub)
        yield made
    finally:
        for name in (*(machine.name for machine in made), hub):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _plug_in_this(run: str, hub: str) -> None:
    """Give the namespace of this process an address on the bridge; the interface goes with the hub."""
    _ip("link", "add", f"tpd-{run}", "type", "veth", "peer", "name", "this", "netns", hub)
    _ip("-n", hub, "link", "set", "this", "master", "bridge0", "up")
    _ip("address", "add", f"{SUBNET}.254/24", "dev", f"tpd-{run}")
    _ip("link", "set", f"tpd-{run}", "up")


def _port(address: str) -> str:
    """The bridge's end of a machine's cable."""
    return f"p{address.rsplit('.', 1)[1]}"


def _plug_in(machine: Machine, hub: str) -> None:
    port = _port(machine.address)
    _ip("netns", "add", machine.name)
    _ip("-n", machine.name, "link", "add", "eth0", "type", "veth", "peer", "name", port, "netns", hub)
    _ip("-n", hub, "link", "set", port, "master", "bridge0", "up")
    _ip("-n", machine.name, "address", "add", f"{machine.address}/24", "dev", "eth0")
    _ip("-n", machine.name, "link", "set", "eth0", "up")
    _ip("-n", machine.name, "link", "set", "lo", "up")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=30)


def _enter(name: str) -> None:
    """Move this thread into a namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    with Path("/run/netns", name).open("rb") as namespace:
        if libc.setns(namespace.fileno(), CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"cannot enter the network namespace {name}")
