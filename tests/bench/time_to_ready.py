"""Time from the start of `tpdist serve` until /readyz answers 200, on a random 1.1B bfloat16 checkpoint.

    python tests/bench/time_to_ready.py [--runs 3] [--keep FOLDER]

Each run also measures a plain read of the same file into new memory, so that the time can be compared with a limit of
the same machine at the same moment. The page cache is warm: the file is read once before.
"""

import argparse
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.error import URLError
from urllib.request import urlopen

import torch
from safetensors.torch import save_file

from tpdist import builtin

HIDDEN, INNER, VOCAB, NUM_LAYERS = 2048, 5632, 32000, 22
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "num_hidden_layers": NUM_LAYERS,
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
KEY_VALUE_SIZE = 256
LIMIT_S = 120.0
POLL_S = 0.02


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--keep", type=Path, help="make the checkpoint in this folder and leave it there")
    arguments = parser.parse_args()
    with _folder(arguments.keep) as folder:
        if not (folder / "model.safetensors").exists():
            make_checkpoint(folder)
        plain_read_s(folder / "model.safetensors")
        for run in range(1, arguments.runs + 1):
            read_s = plain_read_s(folder / "model.safetensors")
            ready_s = time_to_ready_s(folder)
            ratio = ready_s / read_s
            print(
                f"run {run}: ready after {ready_s:.1f} s; a plain read of the file took {read_s:.2f} s ({ratio:.1f}x)"
            )


def make_checkpoint(folder: Path) -> None:
    """A llama of 1.1 billion random bfloat16 weights, with the built-in model's tokenizer."""
    hidden, inner, vocab = HIDDEN, INNER, VOCAB
    weights: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, hidden),
        "lm_head.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
    }
    for layer in range(NUM_LAYERS):
        path = f"model.layers.{layer}"
        weights |= {
            f"{path}.self_attn.q_proj.weight": (hidden, hidden),
            f"{path}.self_attn.k_proj.weight": (KEY_VALUE_SIZE, hidden),
            f"{path}.self_attn.v_proj.weight": (KEY_VALUE_SIZE, hidden),
            f"{path}.self_attn.o_proj.weight": (hidden, hidden),
            f"{path}.mlp.gate_proj.weight": (inner, hidden),
            f"{path}.mlp.up_proj.weight": (inner, hidden),
            f"{path}.mlp.down_proj.weight": (hidden, inner),
            f"{path}.input_layernorm.weight": (hidden,),
            f"{path}.post_attention_layernorm.weight": (hidden,),
        }
    tensors = {name: torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02) for name, shape in weights.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((builtin.path() / name).read_bytes())


def plain_read_s(file: Path) -> float:
    """Seconds to read the file into newly allocated memory with one thread."""
    started = time.monotonic()
    file.read_bytes()
    return time.monotonic() - started


def time_to_ready_s(folder: Path) -> float:
    """Start one node, wait for it, stop it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = time.monotonic()
    node = subprocess.Popen([sys.executable, "-m", "tpdist", "serve", str(folder), "--port", str(port)])
    try:
        while not is_ready(f"http://127.0.0.1:{port}/readyz"):
            if node.poll() is not None or time.monotonic() - started > LIMIT_S:
                raise SystemExit(f"not ready within {LIMIT_S:g} s, exit code {node.returncode}")
            time.sleep(POLL_S)
        return time.monotonic() - started
    finally:
        node.send_signal(signal.SIGTERM)
        node.wait(LIMIT_S)


def is_ready(url: str) -> bool:
    try:
        with urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except (URLError, OSError):
        return False


@contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        yield keep
        return
    with TemporaryDirectory(prefix="tpdist-bench-") as folder:
        yield Path(folder)


if __name__ == "__main__":
    main()
