"""The model families, by the architecture that config.json names.

A family says how its config.json maps onto the flags of the decoder and which tensors its checkpoints hold. No torch
here: the same functions serve `tpdist plan`, the launcher and every rank.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tpdist.errors import PlanError
from tpdist.models import llama, mistral, qwen2, qwen3
from tpdist.plan.config_file import ConfigFile
from tpdist.plan.decoder_weights import decoder_weights
from tpdist.plan.model_config import ModelConfig
from tpdist.plan.parse_config import eos_token_ids, parse
from tpdist.plan.shards import Weights


@dataclass(frozen=True, kw_only=True)
class Family:
    """`defaults`: for keys that config.json leaves out. `configure`: sets what only this family has, given the
    configuration common to all and the file. `weights`: the tensors of its checkpoints."""

    defaults: Mapping[str, Any]
    configure: Callable[[ModelConfig, ConfigFile], ModelConfig]
    weights: Callable[[ModelConfig], Weights] = decoder_weights


FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": Family(defaults=llama.DEFAULTS, configure=llama.configure),
    "MistralForCausalLM": Family(defaults=mistral.DEFAULTS, configure=mistral.configure),
    "Qwen2ForCausalLM": Family(defaults=qwen2.DEFAULTS, configure=qwen2.configure),
    "Qwen3ForCausalLM": Family(defaults=qwen3.DEFAULTS, configure=qwen3.configure),
}


def load_config(folder: Path) -> ModelConfig:
    """Read config.json, and the eos ids of generation_config.json, of a model folder.

    Raises CheckpointError for a missing or malformed file or key, and PlanError for a kind of model that is not
    supported: its architecture, rope type, activation or quantization.
    """
    file = ConfigFile.read(folder / "config.json")
    architecture = _architecture(file)
    family = FAMILIES[architecture]
    file = file.with_defaults(family.defaults)
    config = family.configure(parse(file, architecture=architecture), file)
    return replace(config, eos_token_ids=eos_token_ids(folder, config))


def weights(config: ModelConfig) -> Weights:
    """All tensors of a checkpoint of this model."""
    return FAMILIES[config.architecture].weights(config)


def _architecture(file: ConfigFile) -> str:
    """The first of config.json's architectures that is supported."""
    named = file.texts("architectures")
    for architecture in named:
        if architecture in FAMILIES:
            return architecture
    raise PlanError(
        f"{file.path}: architecture {', '.join(named) or '(none)'} is not supported; "
        f"supported are {', '.join(FAMILIES)}"
    )
