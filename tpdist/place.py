"""Where a node stands in its cluster, from its own settings or from torchrun's variables."""

from dataclasses import dataclass

from tpdist.settings import HostPort, Role, Settings


@dataclass(frozen=True)
class Place:
    """Where this node stands in its cluster, from variables or from torchrun. A standby has no worker id, as the head
    has none."""

    name: str
    is_head: bool
    standby: bool
    worker_id: int | None
    num_workers: int
    head: HostPort | None
    control_port: int | None
    global_world_size: int | None
    local_world_size: int | None


def place_of(settings: Settings) -> Place:
    if settings.torchrun is not None:
        return _under_torchrun(settings)
    local_world_size = settings.local_world_size
    if settings.one_process:
        local_world_size = 1
    elif settings.role is Role.SINGLE:
        local_world_size = settings.world_size
    is_head = settings.worker_id is None and not settings.standby
    return Place(
        name="standby" if settings.standby else "head" if is_head else f"worker {settings.worker_id}",
        is_head=is_head,
        standby=settings.standby,
        worker_id=settings.worker_id,
        num_workers=settings.head_num_workers or 0,
        head=settings.head_address,
        control_port=settings.head_port,
        global_world_size=settings.global_world_size,
        local_world_size=local_world_size,
    )


def _under_torchrun(settings: Settings) -> Place:
    """torchrun's group 0 is the head. Agents of several groups meet on the port after torchrun's own."""
    run = settings.torchrun
    assert run is not None
    several = run.group_world_size > 1
    control_port = run.master_port + 1
    is_head = run.group_rank == 0
    return Place(
        name="head" if is_head else f"worker {run.group_rank - 1}",
        is_head=is_head,
        standby=False,
        worker_id=None if is_head else run.group_rank - 1,
        num_workers=run.group_world_size - 1,
        head=None if is_head else HostPort(run.master_addr, control_port),
        control_port=control_port if is_head and several else None,
        global_world_size=run.world_size,
        local_world_size=run.local_world_size,
    )
