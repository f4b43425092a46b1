"""Vision models: where the text model is in their config.json and checkpoint, and what the rest of them takes.

The text model is placed layer by layer; the vision tower and the projector stand whole on the first device. Knows
config.json's text_config and vision_config, and tensors by name and shape only.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

from tpdist.errors import CheckpointError, PlanError
from tpdist.plan.config_file import ConfigFile
from tpdist.plan.costs import VisionTower
from tpdist.plan.shards import Weights

# What the text model takes from the top of config.json if its own part does not say.
INHERITED = ("dtype", "torch_dtype", "tie_word_embeddings", "quantization_config", "compression_config")
PROBE = "layers.0.input_layernorm.weight"
# What transformers' towers take for keys that vision_config leaves out, nearly all being CLIP's large one.
DEFAULT_IMAGE_SIZE, DEFAULT_PATCH_SIZE, DEFAULT_HIDDEN_SIZE, DEFAULT_NUM_LAYERS = 336, 14, 1024, 24
NUM_CHANNELS = 3


def is_vision(file: ConfigFile) -> bool:
    return file.has("text_config") and file.has("vision_config")


def text_file(file: ConfigFile) -> ConfigFile:
    """The text model's part of config.json, as a file of its own."""
    text = file.section("text_config")
    assert text is not None, "only for files that is_vision() holds for"
    inherited = {key: file.values[key] for key in INHERITED if file.has(key)}
    return replace(text, values={**inherited, **text.values})


def text_architecture(text: ConfigFile, known: Iterable[str]) -> str:
    """The architecture of the text model: the one it names, or else that of its model_type. Raises PlanError for one
    that is not among `known`."""
    named = text.texts("architectures") if text.has("architectures") else ()
    model_type = text.text("model_type", "llama")
    of_type = [each for each in known if each.removesuffix("ForCausalLM").lower() == model_type]
    for architecture in (*named, *of_type):
        if architecture in known:
            return architecture
    raise PlanError(
        f"{text.path}: text_config is of model_type {model_type}, which is not supported; "
        f"supported are {', '.join(known)}"
    )


def split_text(
    shapes: Mapping[str, tuple[int, ...]], weights: Weights, *, where: str
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Of a vision checkpoint's tensors by `shapes`: the text model's, with the names that they have in a checkpoint of
    its own; and the names of all others. Raises CheckpointError if no text layer is there."""
    prefix = _prefix(shapes, weights, where=where)
    known = {spec.name for spec in weights.specs}
    text: dict[str, str] = {}
    for name in shapes:
        own = _own_name(name, prefix)
        if own in known or own.startswith("model.layers.") or any(re.fullmatch(p, own) for p in weights.ignorable):
            text[name] = own
    return text, tuple(name for name in shapes if name not in text)


def _prefix(shapes: Mapping[str, tuple[int, ...]], weights: Weights, *, where: str) -> str:
    """What stands before layers.N. in the names of the text model's layers: the one that has the right shapes."""
    expected = {spec.name.removeprefix("model."): spec.shape for spec in weights.specs}
    layers = [name for name in expected if name.startswith("layers.") and name.endswith("input_layernorm.weight")]
    found = [name.removesuffix(PROBE) for name in shapes if name.endswith(PROBE)]
    for prefix in found:
        if all(shapes.get(prefix + name) == expected[name] for name in layers):
            return prefix
    raise CheckpointError(
        f"{where} does not match its config.json: no {len(layers)} text layers of hidden size "
        f"{expected[PROBE][0]} (a tensor ...{PROBE}) are in its files"
    )


def _own_name(name: str, prefix: str) -> str:
    """The name that a tensor would have in a checkpoint of the text model alone."""
    if name.endswith("lm_head.weight"):
        return "lm_head.weight"
    return "model." + name.removeprefix(prefix) if name.startswith(prefix) else name


def tower_of(file: ConfigFile, *, parameter_bytes: int) -> VisionTower:
    """The sizes of the vision tower that decide what images take."""
    vision = _vision(file)
    hidden, inner = _sizes(vision)
    patch = vision.positive("patch_size", DEFAULT_PATCH_SIZE)
    return VisionTower(parameter_bytes=parameter_bytes, hidden_size=hidden, intermediate_size=inner, patch_size=patch)


def estimated_elements(file: ConfigFile, *, text_hidden_size: int) -> int:
    """Parameters of the vision tower and a two-layer projector, from config.json alone."""
    vision = _vision(file)
    hidden, inner = _sizes(vision)
    patch = vision.positive("patch_size", DEFAULT_PATCH_SIZE)
    image = vision.positive("image_size", DEFAULT_IMAGE_SIZE)
    layers = vision.positive("num_hidden_layers", vision.positive("depth", DEFAULT_NUM_LAYERS))
    embeddings = hidden * (NUM_CHANNELS * patch**2 + (image // patch) ** 2 + 1)
    tower = layers * (4 * hidden**2 + 2 * hidden * inner)
    return embeddings + tower + text_hidden_size * (hidden + text_hidden_size)


def _vision(file: ConfigFile) -> ConfigFile:
    vision = file.section("vision_config")
    assert vision is not None, "only for files that is_vision() holds for"
    return vision


def _sizes(vision: ConfigFile) -> tuple[int, int]:
    """Hidden and inner size of the tower; some call the hidden size embed_dim."""
    hidden = vision.positive("hidden_size", vision.positive("embed_dim", DEFAULT_HIDDEN_SIZE))
    return hidden, vision.positive("intermediate_size", 4 * hidden)
