"""What a node says first of itself, and where its control plane listens: the same for `serve` and for `doctor`."""

import os

from tpdist.control.messages import Register
from tpdist.control.route import LOOPBACK, addresses_towards, interface_of, is_loopback
from tpdist.errors import SettingsError
from tpdist.place import Place
from tpdist.settings import HostPort, Settings


def control_host(settings: Settings) -> str:
    """Where a head listens: on all interfaces with a key, on this machine alone without."""
    return "*" if settings.key_file is not None or settings.insecure else LOOPBACK


def introduce(settings: Settings, place: Place, *, instance: str, head: HostPort | None) -> Register:
    """A node's first word to the head, None: of the head's own node. Raises JoinError without a route, SettingsError
    when the control plane would leave this machine without a key."""
    address, head_address = (LOOPBACK, LOOPBACK) if head is None else addresses_towards(*head)
    if head is not None and not is_loopback(head_address) and settings.key_file is None and not settings.insecure:
        name = head.host if head.host == head_address else f"{head.host} ({head_address})"
        raise SettingsError(
            f"the head {name} is not this machine: set TPDIST_KEY_FILE to the key that `tpdist keygen` made for the "
            "cluster (or TPDIST_INSECURE=1 on a trusted network)"
        )
    return Register(
        instance=instance,
        worker_id=place.worker_id,
        hostname=os.uname().nodename,
        pid=os.getpid(),
        address=address,
        head_address=head_address,
        interface=interface_of(address),
        global_world_size=place.global_world_size,
        local_world_size=place.local_world_size,
        standby=place.standby,
    )
