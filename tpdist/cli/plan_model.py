"""The model that `tpdist plan` places, from config.json and the headers of its files: no weights are read.

Knows how a vision model is taken apart; where its parts go is the planner's.
"""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from tpdist.checkpoint.header import TensorEntry
from tpdist.checkpoint.index import INDEX_NAME, CheckpointIndex, check_names
from tpdist.checkpoint.resolve import resolve_model
from tpdist.cli.sizes import size
from tpdist.models import registry
from tpdist.plan import vision
from tpdist.plan.config_file import ConfigFile
from tpdist.plan.costs import VisionTower
from tpdist.plan.memory import DTYPE_BYTES
from tpdist.plan.model_config import ModelConfig
from tpdist.plan.parse_config import eos_token_ids, parse
from tpdist.plan.shards import Weights
from tpdist.settings import Settings

NO_HEADERS = "no *.safetensors is in the folder: planned from config.json alone, tensor names and shapes not checked"
ESTIMATED = "the size of the vision tower is an estimate from vision_config"


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What people are told of a model beside where it goes. `checkpoint_bytes` is None without weight files;
    `vision_bytes` are those of all that is not the text model."""

    name: str
    architecture: str
    num_parameters: int
    checkpoint_bytes: int | None
    dtype: str
    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    max_model_len: int
    vision_bytes: int = 0
    can_be_served: bool = True


@dataclass(frozen=True, kw_only=True)
class PlannedModel:
    """`dtype` is that of a run: what was asked for, or else the checkpoint's. `notes`: a sentence each."""

    facts: ModelFacts
    config: ModelConfig
    weights: Weights
    dtype: str
    tower: VisionTower | None = None
    notes: tuple[str, ...] = ()


def facts_of(
    config: ModelConfig, weights: Weights, *, name: str, dtype: str, checkpoint_bytes: int | None = None
) -> ModelFacts:
    """The facts of a model whose checkpoint is of type `dtype`."""
    return ModelFacts(
        name=name,
        architecture=config.architecture,
        num_parameters=sum(math.prod(spec.shape) for spec in weights.specs),
        checkpoint_bytes=checkpoint_bytes,
        dtype=dtype,
        num_hidden_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        vocab_size=config.vocab_size,
        max_model_len=config.max_model_len,
    )


def read_model(name: str, settings: Settings) -> PlannedModel:
    """Read what there is to read of MODEL without its weights. Raises CheckpointError or PlanError."""
    folder = resolve_model(name, revision=settings.revision, progress=sys.stderr.isatty())
    file = ConfigFile.read(folder / "config.json")
    index = CheckpointIndex.read(folder) if _has_weights(folder) else None
    named = file.texts("architectures") if file.has("architectures") else ()
    if vision.is_vision(file) and not set(named) & set(registry.FAMILIES):
        model = _vision_model(name, file, index, settings)
    else:
        model = _text_model(name, folder, index, settings)
    return model if index is not None else replace(model, notes=(NO_HEADERS, *model.notes))


def _has_weights(folder: Path) -> bool:
    return (folder / INDEX_NAME).exists() or any(folder.glob("*.safetensors"))


def _text_model(name: str, folder: Path, index: CheckpointIndex | None, settings: Settings) -> PlannedModel:
    config = registry.load_config(folder)
    weights = registry.weights(config)
    if index is not None:
        check_names(index, weights)
    dtype = _checkpoint_dtype(config, index)
    total = None if index is None else index.total_bytes
    facts = facts_of(config, weights, name=name, dtype=dtype, checkpoint_bytes=total)
    return PlannedModel(facts=facts, config=config, weights=weights, dtype=_run_dtype(settings, dtype))


def _vision_model(name: str, file: ConfigFile, index: CheckpointIndex | None, settings: Settings) -> PlannedModel:
    config = _text_config(file)
    weights = registry.weights(config)
    checkpoint_dtype = _checkpoint_dtype(config, index)
    dtype = _run_dtype(settings, checkpoint_dtype)
    if index is None:
        elements = vision.estimated_elements(file, text_hidden_size=config.hidden_size)
    else:
        text, others = _split(index, weights)
        check_names(CheckpointIndex(index.folder, text), weights)
        elements = sum(math.prod(entry.shape) for entry in others.values())
    total = None if index is None else index.total_bytes
    facts = facts_of(config, weights, name=name, dtype=checkpoint_dtype, checkpoint_bytes=total)
    tower = vision.tower_of(file, parameter_bytes=elements * DTYPE_BYTES[dtype])
    facts = replace(
        facts,
        architecture=", ".join(file.texts("architectures")) if file.has("architectures") else config.architecture,
        num_parameters=facts.num_parameters + elements,
        vision_bytes=tower.parameter_bytes,
        can_be_served=False,
    )
    notes = (_not_served(facts.architecture, tower), *((ESTIMATED,) if index is None else ()))
    return PlannedModel(facts=facts, config=config, weights=weights, dtype=dtype, tower=tower, notes=notes)


def _text_config(file: ConfigFile) -> ModelConfig:
    text = vision.text_file(file)
    architecture = vision.text_architecture(text, tuple(registry.FAMILIES))
    family = registry.FAMILIES[architecture]
    text = text.with_defaults(family.defaults)
    config = family.configure(parse(text, architecture=architecture), text)
    return replace(config, eos_token_ids=eos_token_ids(file.path.parent, config))


def _split(index: CheckpointIndex, weights: Weights) -> tuple[Mapping[str, TensorEntry], Mapping[str, TensorEntry]]:
    """The text model's tensors by the names of a checkpoint of its own, and the others."""
    shapes = {name: entry.shape for name, entry in index.tensors.items()}
    text, others = vision.split_text(shapes, weights, where=str(index.folder))
    own = {mine: replace(index.tensors[name], name=mine) for name, mine in text.items()}
    return own, {name: index.tensors[name] for name in others}


def _not_served(architecture: str, tower: VisionTower) -> str:
    return (
        f"serving {architecture} is not supported yet: this shows where its parts would go, all that is no part of the "
        f"text model ({size(tower.parameter_bytes)}) on the first device, or on each rank of the first stage"
    )


def _checkpoint_dtype(config: ModelConfig, index: CheckpointIndex | None) -> str:
    return config.dtype or (index and index.dtype) or "float32"


def _run_dtype(settings: Settings, checkpoint_dtype: str) -> str:
    return checkpoint_dtype if settings.dtype == "auto" else settings.dtype
