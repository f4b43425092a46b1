"""The words that settings speak of nodes: roles, the head's address, and a process's place under torchrun.

Knows nothing of options or of where values come from.
"""

import enum
import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Self

from tpdist.errors import SettingsError

MAX_PORT = 65535
AGENT_VARIABLE = "TPDIST_TORCHRUN_AGENT"


class Role(enum.Enum):
    """What `tpdist serve` starts on this node."""

    SINGLE = "single"
    HEAD = "head"
    WORKER = "worker"
    TORCHRUN = "torchrun"


class HostPort(NamedTuple):
    """Where the head listens. `host` is a name, an IPv4 address, or an IPv6 address without its brackets."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read HOST:PORT or [IPv6]:PORT. Raises ValueError."""
        parts = re.fullmatch(r"(?:\[(?P<v6>[^\[\]]+)\]|(?P<host>[^\s:/\[\]@]+)):(?P<port>[0-9]{1,5})", text.strip())
        if parts is None or not 1 <= int(parts["port"]) <= MAX_PORT:
            raise ValueError(f"must be HOST:PORT or [IPv6]:PORT with a port from 1 to {MAX_PORT}")
        if parts["v6"]:
            ipaddress.IPv6Address(parts["v6"].partition("%")[0])
        return cls(parts["v6"] or parts["host"], int(parts["port"]))


@dataclass(frozen=True, kw_only=True)
class Torchrun:
    """This process's place among those that torchrun started, from the variables that it sets."""

    run_id: str
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    group_rank: int
    group_world_size: int
    master_addr: str
    master_port: int
    restart_count: int
    agent_run_dir: str | None = None
    """Set in the agent that local rank 0 starts: the folder of its sockets."""

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> Self | None:
        """None outside torchrun. Raises SettingsError that names a variable of torchrun's that is missing or wrong."""
        run_id = environ.get("TORCHELASTIC_RUN_ID")
        if not run_id:
            return None
        return cls(
            run_id=run_id,
            rank=_torchrun_number(environ, "RANK"),
            world_size=_torchrun_number(environ, "WORLD_SIZE"),
            local_rank=_torchrun_number(environ, "LOCAL_RANK"),
            local_world_size=_torchrun_number(environ, "LOCAL_WORLD_SIZE"),
            group_rank=_torchrun_number(environ, "GROUP_RANK"),
            group_world_size=_torchrun_number(environ, "GROUP_WORLD_SIZE"),
            master_addr=environ.get("MASTER_ADDR") or "127.0.0.1",
            master_port=_torchrun_number(environ, "MASTER_PORT"),
            restart_count=_torchrun_number(environ, "TORCHELASTIC_RESTART_COUNT", default="0"),
            agent_run_dir=environ.get(AGENT_VARIABLE),
        )


def _torchrun_number(environ: Mapping[str, str], name: str, *, default: str = "") -> int:
    text = environ.get(name, default)
    if not text.isdecimal():
        run_id = environ["TORCHELASTIC_RUN_ID"]
        raise SettingsError(
            f"{name}={text!r} must be a whole number: TORCHELASTIC_RUN_ID={run_id} says that torchrun started this "
            f"process, and torchrun sets {name}; start it with torchrun, or unset TORCHELASTIC_RUN_ID"
        )
    return int(text)
