"""How a rank's model gets its weights, and what each device then holds.

    memory   read once, each rank its slices (checkpoint/load.py)
    disk     layers are read anew whenever they are needed, into buffers; embedding and output are used where they lie
             in the mapped file, or copied to memory if they are of another type. Nothing is written

It knows neither the other ranks nor what the model computes.
"""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from tpdist.checkpoint.index import CheckpointIndex
from tpdist.checkpoint.load import Progress, load_weights, mapped_tensor
from tpdist.control.messages import HeldBytes
from tpdist.engine.kv_cache import KVCache
from tpdist.layers.packed import PackableLinear
from tpdist.models import registry
from tpdist.models.decoder import Decoder
from tpdist.models.decoder_layer import DecoderLayer
from tpdist.models.item_devices import DISK
from tpdist.plan.model_config import ModelConfig
from tpdist.plan.shards import Partition, Weights
from tpdist.plan.stages import EMBEDDING, OUTPUT, stage_weights


def load(
    model: Decoder,
    *,
    config: ModelConfig,
    folder: Path,
    partition: Partition,
    rank: int,
    threads: int,
    progress: Progress,
) -> int:
    """Give a stage its weights; `rank` is that in its tensor-parallel group. Returns the bytes read. Raises
    CheckpointError."""
    items, index = model.items, CheckpointIndex.read(folder)
    weights = stage_weights(registry.weights(config), model.stage, output_apart=items.embedding != items.head)
    streamed = tuple(_layer_path(number) for number in items.on_disk)
    mapped = [name for name, place in ((EMBEDDING, items.embedding), (OUTPUT, items.head)) if place == DISK]
    for spec in weights.specs:
        if spec.parameter in mapped:
            _use_mapped(model, spec.parameter, mapped_tensor(index.tensors[spec.name], _dtype_of(model)))
    resident = [
        spec for spec in weights.specs if not spec.parameter.startswith(streamed) and spec.parameter not in mapped
    ]
    read = load_weights(
        model,
        index=index,
        weights=replace(weights, specs=tuple(resident)),
        partition=partition,
        rank=rank,
        threads=threads,
        progress=progress,
        elsewhere=mapped,
    )

    def read_layer(layer: DecoderLayer, number: int) -> None:
        load_weights(
            layer,
            index=index,
            weights=_of_layer(weights, number),
            partition=partition,
            rank=rank,
            threads=threads,
            progress=lambda done, total: None,
            finish=False,
        )

    model.stream(read_layer)
    return read


def held_bytes(model: Decoder, cache: KVCache) -> tuple[HeldBytes, ...]:
    """What lies on each device by torch's own count: parameters, buffers and packed weights, and the cache. Of layers
    on the disk, what their weights take in memory while they are used is not counted, but what they would take."""
    held: dict[str, list[int]] = {}
    for place, num_bytes in _weights_by_place(model):
        held.setdefault(place, [0, 0])[0] += num_bytes
    places = model.items.layers[slice(*model.stage.layers)]
    for place, layer in zip(places, cache.layers, strict=True):
        held.setdefault(place, [0, 0])[1] += sum(tensor.nbytes for tensor in layer)
    return tuple(HeldBytes(device=name, weight_bytes=w, kv_cache_bytes=kv) for name, (w, kv) in sorted(held.items()))


def _weights_by_place(model: Decoder) -> Iterable[tuple[str, int]]:
    items = model.items
    ends = {EMBEDDING: items.embedding, OUTPUT: items.head}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        place = ends.get(name, str(tensor.device))
        yield place, tensor.nbytes
    for name, module in model.named_modules():
        if isinstance(module, PackableLinear):
            yield ends.get(f"{name}.weight", "cpu"), module.packed_bytes
    if model.model.streamed is not None:
        layer_bytes = sum(tensor.nbytes for tensor in _tensors(model.model.streamed.buffers[0]))
        yield DISK, layer_bytes * len(items.on_disk)


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _use_mapped(model: Decoder, parameter: str, weight: Tensor) -> None:
    """In every module that shares the parameter: a tied output has the embedding's."""
    shared, mapped = model.get_parameter(parameter), nn.Parameter(weight, requires_grad=False)
    for module in (model.model.embed_tokens, model.lm_head):
        if module is not None and module.weight is shared:
            module.weight = mapped


def _dtype_of(model: Decoder) -> torch.dtype:
    return next(model.parameters()).dtype


def _layer_path(number: int) -> str:
    return f"model.layers.{number}."


def _of_layer(weights: Weights, number: int) -> Weights:
    """The weights of one layer, by their names in the layer."""
    path = _layer_path(number)
    own = [spec for spec in weights.specs if spec.parameter.startswith(path)]
    return Weights(specs=tuple(replace(spec, parameter=spec.parameter.removeprefix(path)) for spec in own))
