"""The checkpoint that the benchmarks share: a llama of 1.1 billion random bfloat16 weights."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file

from tpdist import builtin

HIDDEN, INNER, VOCAB, NUM_LAYERS = 2048, 5632, 32000, 22
KEY_VALUE_SIZE = 256
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "vocab_size": VOCAB,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@contextmanager
def checkpoint(keep: Path | None, *, num_layers: int = NUM_LAYERS) -> Iterator[Path]:
    """A folder with the checkpoint: `keep`, where it stays for the next time, or one that goes afterwards.

    A checkpoint of any kind that stands in `keep` is taken as it is."""
    if keep is None:
        with TemporaryDirectory(prefix="tpdist-bench-") as folder:
            make_checkpoint(Path(folder), num_layers=num_layers)
            yield Path(folder)
        return
    if not (keep / "config.json").exists():
        make_checkpoint(keep, num_layers=num_layers)
    yield keep


def make_checkpoint(folder: Path, *, num_layers: int = NUM_LAYERS) -> None:
    """Random weights, and the built-in model's tokenizer."""
    tensors = {
        name: torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02) for name, shape in _shapes(num_layers).items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((builtin.path() / name).read_bytes())
    (folder / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": num_layers}))


def _shapes(num_layers: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "lm_head.weight": (VOCAB, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    for layer in range(num_layers):
        path = f"model.layers.{layer}"
        shapes |= {
            f"{path}.self_attn.q_proj.weight": (HIDDEN, HIDDEN),
            f"{path}.self_attn.k_proj.weight": (KEY_VALUE_SIZE, HIDDEN),
            f"{path}.self_attn.v_proj.weight": (KEY_VALUE_SIZE, HIDDEN),
            f"{path}.self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            f"{path}.mlp.gate_proj.weight": (INNER, HIDDEN),
            f"{path}.mlp.up_proj.weight": (INNER, HIDDEN),
            f"{path}.mlp.down_proj.weight": (HIDDEN, INNER),
            f"{path}.input_layernorm.weight": (HIDDEN,),
            f"{path}.post_attention_layernorm.weight": (HIDDEN,),
        }
    return shapes
