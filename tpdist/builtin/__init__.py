"""A tiny model that adds two numbers, shipped with the package so that a cluster can be tried without a download.

`path()` is a folder like that of any downloaded model; README.md there says what it holds and how well it adds. This
module knows nothing of how the model was trained (see `tpdist.builtin.train`) and imports no torch.
"""

from pathlib import Path

__all__ = ["path"]


def path() -> Path:
    """Return the folder with the built-in model: config.json, model.safetensors and the tokenizer's files."""
    return Path(__file__).resolve().parent
