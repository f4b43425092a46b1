"""Which part of a model each pipeline stage holds: consecutive layers, the first with the embedding, the last with the
final norm and the output layer. Knows nothing of ranks, bytes or speeds.
"""

import re
from dataclasses import dataclass, replace

from tpdist.errors import PlanError
from tpdist.plan.shards import Interval, Weights, WeightSpec

EMBEDDING = "model.embed_tokens.weight"
OUTPUT = "lm_head.weight"
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Stage:
    """`layers` of a model that has `num_layers` of them."""

    layers: Interval
    num_layers: int

    @property
    def is_first(self) -> bool:
        return self.layers.start == 0

    @property
    def is_last(self) -> bool:
        return self.layers.stop == self.num_layers

    def holds(self, spec: WeightSpec) -> bool:
        """Whether this stage has the parameter of `spec`."""
        if layer := _LAYER.match(spec.parameter):
            return self.layers.start <= int(layer[1]) < self.layers.stop
        return self.is_first if spec.parameter == EMBEDDING else self.is_last


def whole(num_layers: int) -> Stage:
    """The one stage of a model that is not cut."""
    return Stage(Interval(0, num_layers), num_layers)


def stage_weights(weights: Weights, stage: Stage, *, output_apart: bool = False) -> Weights:
    """What a stage takes from the checkpoint. Where the output layer is tied to the embedding, and the embedding is on
    another stage, or on another device (`output_apart`), the last stage has a copy of it of its own."""
    specs = [spec for spec in weights.specs if stage.holds(spec)]
    tied = not any(spec.parameter == OUTPUT for spec in weights.specs)
    if tied and stage.is_last and (output_apart or not stage.is_first):
        specs += [replace(spec, parameter=OUTPUT) for spec in weights.specs if spec.parameter == EMBEDDING]
    return replace(weights, specs=tuple(specs))


def stages_of(counts: tuple[int, ...], num_layers: int) -> tuple[Stage, ...]:
    """Stages with these numbers of layers, one after another. Raises PlanError unless they are the model's layers, at
    least one each."""
    if min(counts, default=0) < 1 or sum(counts) != num_layers:
        listed = ", ".join(map(str, counts))
        raise PlanError(
            f"the stages' layers ({listed}) must be at least one each and add up to the model's {num_layers} layers"
        )
    stops = [sum(counts[: index + 1]) for index in range(len(counts))]
    return tuple(Stage(Interval(stop - count, stop), num_layers) for count, stop in zip(counts, stops, strict=True))
