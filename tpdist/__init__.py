"""tpdist serves one language model from many GPUs on one or many machines."""

from importlib import import_module
from typing import TYPE_CHECKING

from tpdist.sampling_params import SamplingParams

if TYPE_CHECKING:
    from tpdist.llm import LLM

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "__version__"]


def __getattr__(name: str) -> object:
    """`LLM` on first use: ranks and quick commands import this package and must not pay for the launcher."""
    if name == "LLM":
        return import_module("tpdist.llm").LLM
    raise AttributeError(f"module 'tpdist' has no attribute {name!r}")
