"""Checkpoints of any size that take no room: config.json, true headers, and files that are holes behind them."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tpdist.models import registry

LLAMA_70B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "torch_dtype": "bfloat16",
    "num_hidden_layers": 80,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
}
LLAMA_1B: dict[str, Any] = {
    **LLAMA_70B,
    "num_hidden_layers": 16,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "max_position_embeddings": 8192,
}
VISION: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "patch_size": 14,
    "image_size": 336,
}
LLAVA: dict[str, Any] = {
    "architectures": ["LlavaForConditionalGeneration"],
    "model_type": "llava",
    "torch_dtype": "bfloat16",
    "text_config": {**LLAMA_1B, "architectures": ["LlamaForCausalLM"]},
    "vision_config": VISION,
}
# A tower and a projector, as they are called in a Llava checkpoint.
TOWER: dict[str, tuple[int, ...]] = {
    "vision_tower.vision_model.embeddings.patch_embedding.weight": (1024, 3, 14, 14),
    "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight": (1024, 1024),
    "vision_tower.vision_model.encoder.layers.0.layer_norm1.weight": (1024,),
    "multi_modal_projector.linear_1.weight": (2048, 1024),
}


def write_config(folder: Path, config: Mapping[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def text_shapes(folder: Path, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors that a checkpoint with this config.json has."""
    write_config(folder, config)
    return {spec.name: spec.shape for spec in registry.weights(registry.load_config(folder)).specs}


def make_sparse(folder: Path, config: Mapping[str, Any], *, num_files: int = 1, dtype: str = "BF16") -> Path:
    """A checkpoint of a text model, in that many files with an index."""
    return write_sparse(folder, text_shapes(folder, config), num_files=num_files, dtype=dtype)


def make_sparse_llava(folder: Path) -> Path:
    """A checkpoint of a vision model, with the names that Llava has."""
    shapes = text_shapes(folder, LLAVA["text_config"])
    write_config(folder, LLAVA)
    renamed = {"language_model." + name: shape for name, shape in shapes.items()}
    return write_sparse(folder, {**TOWER, **renamed})


def write_sparse(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], *, num_files: int = 1, dtype: str = "BF16"
) -> Path:
    """Weight files with these tensors, about equally large."""
    item_bytes = {"BF16": 2, "F32": 4}[dtype]
    sizes = {name: math.prod(shape) * item_bytes for name, shape in shapes.items()}
    part = math.ceil(sum(sizes.values()) / num_files)
    files: list[list[str]] = [[] for _ in range(num_files)]
    seen = 0
    for name, size in sizes.items():
        files[min(seen // part, num_files - 1)].append(name)
        seen += size
    weight_map = {}
    for number, names in enumerate(files, start=1):
        file = folder / f"model-{number:05}-of-{num_files:05}.safetensors"
        _write_file(file, {name: shapes[name] for name in names}, sizes, dtype)
        weight_map |= dict.fromkeys(names, file.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def _write_file(file: Path, shapes: Mapping[str, tuple[int, ...]], sizes: Mapping[str, int], dtype: str) -> None:
    header, stop = {}, 0
    for name, shape in shapes.items():
        start, stop = stop, stop + sizes[name]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}
    text = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + stop)
