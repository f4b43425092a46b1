"""Which part a node plays: the cluster's options, the role that follows from them, and what contradicts what.

Knows only what one node can see by itself. What needs the other nodes (sizes that do not add up, worker ids taken
twice) is for the head to find.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

from pydantic import field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from tpdist.settings_options import option, options_of
from tpdist.settings_roles import MAX_PORT, HostPort, Role, Torchrun

HEAD = ("head_num_workers", "head_port")
WORKER = ("worker_id", "worker_server_addr")
MULTI_NODE = ("global_world_size", "local_world_size", *HEAD, *WORKER)


class ClusterSettings(BaseSettings):
    """The options that say which nodes and ranks there are, and the role of this node."""

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", env_prefix="TPDIST_", populate_by_name=True, enable_decoding=False
    )

    global_world_size: int | None = option(
        None,
        "Ranks on all nodes together; setting it means multi-node.",
        section="cluster",
        metavar="N",
        variables="MISTRALRS_MN_GLOBAL_WORLD_SIZE",
        ge=1,
    )
    local_world_size: int | None = option(
        None,
        "Ranks on this node; default: one for each visible CUDA device, or on a node without a GPU "
        "its share of the cluster (a single node: 1).",
        section="cluster",
        metavar="N",
        variables="MISTRALRS_MN_LOCAL_WORLD_SIZE",
        ge=1,
    )
    head_num_workers: int | None = option(
        None,
        "Number of worker nodes; makes this node the head.",
        section="cluster",
        metavar="N",
        variables="MISTRALRS_MN_HEAD_NUM_WORKERS",
        ge=0,
    )
    head_port: int | None = option(
        None,
        "The head's control port.",
        section="cluster",
        metavar="PORT",
        variables="MISTRALRS_MN_HEAD_PORT",
        ge=1,
        le=MAX_PORT,
    )
    worker_id: int | None = option(
        None,
        "Number of this worker node, from 0; makes this node a worker.",
        section="cluster",
        metavar="N",
        variables="MISTRALRS_MN_WORKER_ID",
        ge=0,
    )
    worker_server_addr: str | None = option(
        None,
        "Where the head of this worker listens.",
        section="cluster",
        metavar="HOST:PORT",
        variables="MISTRALRS_MN_WORKER_SERVER_ADDR MISTRALRS_WORKER_SERVER_ADDR",
    )
    standby: bool = option(
        False,
        "Be a worker without a place, that takes the place of a node that is lost.",
        section="cluster",
        metavar="",
    )
    no_nccl: bool = option(
        False,
        "No tensor parallelism: place the layers over the devices of one process.",
        section="cluster",
        metavar="",
        variables="MISTRALRS_NO_NCCL",
    )
    tensor_parallel_size: int | None = option(
        None,
        "Ranks that share each layer; default: all ranks of a stage.",
        section="cluster",
        metavar="N",
        ge=1,
    )
    pipeline_parallel_size: int | None = option(
        None,
        "Pipeline stages; default: 1, or the fewest that the model's heads can be shared in.",
        section="cluster",
        metavar="N",
        variables="MISTRALRS_PIPELINE_PARALLEL",
        ge=1,
    )
    key_file: Path | None = option(
        None, "Cluster key (mode 0600), made by `tpdist keygen`.", section="cluster", metavar="FILE"
    )
    insecure: bool = option(
        False,
        "Allow a control plane without a key on addresses other than loopback.",
        section="cluster",
        metavar="",
    )
    store_port: int = option(
        0,
        "Port of the rendezvous store on the head; 0: the head picks one. Fix it for a firewall.",
        section="cluster",
        metavar="PORT",
        ge=0,
        le=MAX_PORT,
    )
    threads: int | None = option(
        None,
        "Threads of each rank; default: the node's CPUs divided by its ranks.",
        section="cluster",
        metavar="N",
        ge=1,
    )

    torchrun: Torchrun | None = None

    @field_validator("worker_server_addr")
    @classmethod
    def _check_address(cls, value: str | None) -> str | None:
        if value is not None:
            HostPort.parse(value)
        return value

    @property
    def role(self) -> Role:
        if self.torchrun is not None:
            return Role.TORCHRUN
        if self.head_num_workers is not None:
            return Role.HEAD
        return Role.WORKER if self.worker_id is not None or self.standby else Role.SINGLE

    @property
    def head_address(self) -> HostPort | None:
        """Where a worker finds its head; None on other roles."""
        return None if self.worker_server_addr is None else HostPort.parse(self.worker_server_addr)

    @property
    def world_size(self) -> int | None:
        """Ranks on all nodes, as far as settings alone fix it; None: the visible devices decide."""
        if self.torchrun is not None:
            return self.torchrun.world_size
        if self.global_world_size is not None or self.local_world_size is not None:
            return self.global_world_size or self.local_world_size
        if self.tensor_parallel_size is None:
            return None
        return self.tensor_parallel_size * (self.num_stages or 1)

    @property
    def num_stages(self) -> int | None:
        """Pipeline stages, as far as somebody asked for them."""
        return self.pipeline_parallel_size

    def contradictions(self) -> Iterator[str]:
        """Everything in these settings that cannot be meant, one message each, with the variables and the numbers."""
        multi_node = self._set_among(MULTI_NODE)
        if self.torchrun is not None and multi_node:
            yield (
                f"{', '.join(multi_node)} set under torchrun, which assigns the ranks itself "
                f"(TORCHELASTIC_RUN_ID={self.torchrun.run_id}); unset them, or start `tpdist serve` without torchrun"
            )
            return
        yield from self._role_contradictions()
        yield from self._one_process_contradictions()
        yield from self._size_contradictions()

    def _role_contradictions(self) -> Iterator[str]:
        head, worker = self._set_among(HEAD), self._set_among(WORKER)
        if self.standby:
            yield from self._standby_contradictions(head)
        elif head and worker:
            yield f"a node is either the head ({', '.join(head)}) or a worker ({', '.join(worker)}); unset one side"
        elif head:
            yield from self._missing("the head", head, ("global_world_size", *HEAD))
        elif worker:
            yield from self._missing("a worker", worker, ("global_world_size", *WORKER))
        elif self.global_world_size is not None:
            yield (
                f"{self._named('global_world_size')} means multi-node, but this node has no role: set "
                f"{_variables(HEAD)} on the head, {_variables(WORKER)} on a worker"
            )

    def _standby_contradictions(self, head: list[str]) -> Iterator[str]:
        name = f"{CLUSTER_OPTIONS['standby'].variable}=1"
        others = [*head, *self._set_among(("worker_id",))]
        if others:
            yield f"{name} makes this node a worker without a place, which contradicts {', '.join(others)}"
        yield from self._missing("a standby", [name], ("global_world_size", "worker_server_addr"))

    def _missing(self, role: str, given: list[str], needed: tuple[str, ...]) -> Iterator[str]:
        missing = [name for name in needed if getattr(self, name) is None]
        if missing:
            yield f"{', '.join(given)} makes this node {role}, which also needs {_variables(missing)}"

    @property
    def one_process(self) -> str:
        """What asks for all layers in one process, as its user wrote it; empty if nothing does."""
        return "MISTRALRS_NO_NCCL=1" if self.no_nccl else ""

    def _one_process_contradictions(self) -> Iterator[str]:
        if not self.one_process:
            return
        multi_node = self._set_among(("global_world_size", *HEAD, *WORKER))
        ranks = self.world_size or self.num_stages or 1
        if multi_node:
            yield (
                f"{self.one_process} places the layers over the devices of one process, which contradicts "
                f"{', '.join(multi_node)}; unset one side"
            )
        sizes = self._set_among(("local_world_size", "tensor_parallel_size", "pipeline_parallel_size"))
        if self.torchrun is not None and not sizes:
            sizes = ["torchrun"]
        if ranks > 1 and sizes and not multi_node:
            yield f"{self.one_process} means one rank, but {', '.join(sizes)} asks for {ranks}"

    def _size_contradictions(self) -> Iterator[str]:
        total, local, workers = self.global_world_size, self.local_world_size, self.head_num_workers
        if total is not None and local is not None and local > total:
            yield f"{self._named('local_world_size')} is more than {self._named('global_world_size')}"
        elif total is not None and workers is not None:
            yield from self._head_share(total=total, local=local, workers=workers)
        yield from self._parallel_contradictions()

    def _head_share(self, *, total: int, local: int | None, workers: int) -> Iterator[str]:
        left = total - (local or 1)
        given = ", ".join(self._set_among(("global_world_size", "local_world_size", "head_num_workers")))
        if left < workers:
            yield f"{given}: {left} ranks are left for {workers} worker nodes, and each needs at least one"
        elif workers == 0 and local is not None and left > 0:
            yield f"{given}: {left} ranks are left, but there are no worker nodes to run them"

    def _parallel_contradictions(self) -> Iterator[str]:
        world_size = self.world_size
        asked = (self.tensor_parallel_size or 1) * (self.num_stages or 1)
        names = self._set_among(("tensor_parallel_size", "pipeline_parallel_size"))
        if world_size is None or not names:
            return
        if world_size != asked if len(names) == 2 else world_size % asked:
            expected = f"{asked} ranks" if len(names) == 2 else f"a multiple of {asked} ranks"
            yield f"{' times '.join(names)} needs {expected}, but {self._world_size_source()} gives {world_size}"

    def _world_size_source(self) -> str:
        if self.torchrun is not None:
            return f"torchrun's WORLD_SIZE={self.torchrun.world_size}"
        name = "local_world_size" if self.global_world_size is None else "global_world_size"
        return self._named(name)

    def _set_among(self, names: tuple[str, ...]) -> list[str]:
        return [self._named(name) for name in names if getattr(self, name) is not None]

    def _named(self, name: str) -> str:
        return f"{CLUSTER_OPTIONS[name].variable}={getattr(self, name)}"


CLUSTER_OPTIONS = options_of(ClusterSettings.model_fields)


def _variables(names: Iterable[str]) -> str:
    return " and ".join(CLUSTER_OPTIONS[name].variable for name in names)
