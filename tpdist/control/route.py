"""Which of this machine's addresses and interfaces leads to another machine. Asks the kernel, sends nothing."""

import ipaddress
import socket

import psutil

from tpdist.errors import JoinError

LOOPBACK = "127.0.0.1"


def addresses_towards(host: str, port: int) -> tuple[str, str]:
    """(this node's address, the other's address) on the route to `host`. Raises JoinError when there is no route.

    Connecting a UDP socket makes the kernel choose the route and the source address; no packet leaves. Of a name with
    several addresses the first IPv4 one is taken, as the control plane's sockets do.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
        family, kind, proto, _, target = min(found, key=lambda entry: entry[0] != socket.AF_INET)
        with socket.socket(family, kind, proto) as probe:
            probe.connect(target)
            return str(probe.getsockname()[0]), str(target[0])
    except OSError as error:
        raise JoinError(f"no route to the head {host}:{port}: {error}") from error


def interface_of(address: str) -> str | None:
    """Name of the network interface that has `address`, for GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME; None if this
    machine does not have it. All of 127.0.0.0/8 is the loopback interface's, though it lists one address."""
    bare = without_zone(address)
    wanted = LOOPBACK if is_loopback(bare) and ":" not in bare else bare
    for name, entries in psutil.net_if_addrs().items():
        if any(without_zone(entry.address) == wanted for entry in entries):
            return name
    return None


def is_loopback(address: str) -> bool:
    return ipaddress.ip_address(without_zone(address)).is_loopback


def is_link_local(address: str) -> bool:
    return ipaddress.ip_address(without_zone(address)).is_link_local


def without_zone(address: str) -> str:
    """An IPv6 address without its `%eth0`, which means something on one machine only."""
    return address.split("%")[0]
