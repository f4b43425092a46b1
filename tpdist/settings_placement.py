"""Where the layers go: the options of stages, shares, and placement over the devices of one process.

Knows how they are written and which contradict each other, neither devices nor models.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import field_validator

from tpdist.settings_cluster import ClusterSettings
from tpdist.settings_options import MAX_COUNT, option
from tpdist.settings_values import parse_counts, parse_device_map, parse_sizes

# What makes one process of a node, placement too if it is given; what means nothing then.
ONE_PROCESS = ("device_layers", "device_map", "max_memory", "offload_folder")
OF_RANKS = ("pipeline_layers", "tensor_shares")


class PlacementSettings(ClusterSettings):
    """The options that say which part of the model is where."""

    max_seq_len: int = option(
        4096,
        "Tokens of one sequence that a placement must have room for.",
        section="placement",
        metavar="N",
        ge=1,
        le=MAX_COUNT,
    )
    max_batch_size: int = option(
        1, "Sequences that a placement must have room for.", section="placement", metavar="N", ge=1, le=MAX_COUNT
    )
    max_image_length: int = option(
        1024,
        "Pixels of an image's edge, for placements of vision models.",
        section="placement",
        metavar="N",
        ge=1,
        le=MAX_COUNT,
    )
    max_num_images: int = option(
        1, "Images of a prompt, for placements of vision models.", section="placement", metavar="N", ge=0, le=MAX_COUNT
    )
    optimize: Literal["throughput", "latency"] | None = option(
        None,
        "What the layers are dealt for: the slowest stage, or one sequence; default: throughput for ranks, latency in "
        "one process.",
        section="placement",
        metavar="throughput|latency",
    )
    pipeline_layers: tuple[int, ...] | None = option(
        None,
        "Layers of each pipeline stage, as 10,12; default: the planner's.",
        section="placement",
        metavar="N,N,...",
    )
    tensor_shares: Literal["auto"] | tuple[int, ...] | None = option(
        None,
        "Parts of each layer, as 1,2,1 for the ranks of a stage or of all stages; auto: by memory; default: even.",
        section="placement",
        metavar="auto|N,N,...",
    )
    device_layers: str | None = option(
        None,
        "With one rank: layers of each GPU, as 0:16;1:16 or 16 for GPU 0, the rest on the CPU. Deprecated: "
        "without it they are placed by what fits.",
        section="placement",
        metavar="ORD:NUM;...",
        short="-n",
    )
    placement: Literal["exact", "first-fit"] = option(
        "exact",
        "With one rank: how layers are placed over the devices.",
        section="placement",
        metavar="exact|first-fit",
    )
    device_map: str | dict[str, int | str] | None = option(
        None,
        "With one rank: auto, balanced, balanced_low_0, sequential, or a JSON object of module names and devices.",
        section="placement",
        metavar="MAP",
    )
    max_memory: dict[str, int | None] | None = option(
        None,
        "With one rank: most bytes on each device, as 0=20GiB,cpu=auto; what is not named takes nothing.",
        section="placement",
        metavar="DEVICE=SIZE,...",
    )
    offload_folder: Path | None = option(
        None,
        "With one rank: allows layers on disk. They are read from the checkpoint itself; nothing is written here.",
        section="placement",
        metavar="FOLDER",
    )

    @field_validator("pipeline_layers", "tensor_shares", mode="before")
    @classmethod
    def _accept_counts(cls, value: object) -> object:
        return parse_counts(value)

    @field_validator("device_map", mode="before")
    @classmethod
    def _accept_map(cls, value: object) -> object:
        return parse_device_map(value)

    @field_validator("max_memory", mode="before")
    @classmethod
    def _accept_sizes(cls, value: object) -> object:
        return parse_sizes(value)

    @field_validator("device_layers", mode="before")
    @classmethod
    def _accept_list(cls, value: object) -> object:
        return ";".join(map(str, value)) if isinstance(value, list | tuple) else value

    @property
    def one_process(self) -> str:
        given = [name for name in ONE_PROCESS if getattr(self, name) is not None]
        given += {"placement"} & self.model_fields_set
        asked = [f"{_variable(name)}={getattr(self, name)}" for name in given]
        return super().one_process or ", ".join(asked)

    @property
    def num_stages(self) -> int | None:
        return super().num_stages or (None if self.pipeline_layers is None else len(self.pipeline_layers))

    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        yield from self._placement_contradictions()
        for name in OF_RANKS if self.one_process else ():
            if getattr(self, name) is not None:
                yield f"{self.one_process} means one rank, for which {_variable(name)} means nothing; unset one"

    def _placement_contradictions(self) -> Iterator[str]:
        by_hand = [name for name in ("device_map", "device_layers") if getattr(self, name) is not None]
        if by_hand and "placement" in self.model_fields_set:
            yield (
                f"{_variable(by_hand[0])}={getattr(self, by_hand[0])} says how layers are placed, and so does "
                f"TPDIST_PLACEMENT={self.placement}; unset one"
            )
        if self.device_layers is not None and (self.device_map is not None or self.max_memory is not None):
            yield "--device-layers says where each layer is, and so does --device-map (with --max-memory); unset one"
        if self.pipeline_layers is not None and self.pipeline_parallel_size not in (None, len(self.pipeline_layers)):
            yield (
                f"TPDIST_PIPELINE_LAYERS={','.join(map(str, self.pipeline_layers))} names "
                f"{len(self.pipeline_layers)} stages, but MISTRALRS_PIPELINE_PARALLEL={self.pipeline_parallel_size}"
            )


def _variable(name: str) -> str:
    return f"TPDIST_{name.upper()}"
