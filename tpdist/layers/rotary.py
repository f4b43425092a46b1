"""Rotary position embedding (https://arxiv.org/abs/2104.09864) with the context-extension rules of Hugging Face's
config.json: default, linear, dynamic, llama3 and yarn.

Angles are computed in float32 for the positions at hand, once per step and not per layer; there is no table whose
length would have to be known. Frequencies follow transformers operation by operation, so that bits agree.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from tpdist.errors import PlanError
from tpdist.plan.model_config import RopeConfig


class Rotary(nn.Module):
    """Rotates the first `rotary_dim` of `head_dim` dims, in halves (dim i with dim i + rotary_dim / 2)."""

    def __init__(self, rope: RopeConfig, *, head_dim: int, device: torch.device) -> None:
        super().__init__()
        self.rotary_dim = int(head_dim * rope.partial_rotary_factor)
        self.scale = attention_factor(rope)
        self.inv_freq: Tensor
        self.register_buffer("inv_freq", inverse_frequencies(rope, self.rotary_dim).to(device), persistent=False)

    def forward(self, positions: Tensor, *, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """positions: [num_tokens]; returns cosines and signed sines for `rotate`, each [num_tokens, 1, rotary_dim]."""
        angles = positions[:, None, None].float() * self.inv_freq
        cos, sin = angles.cos() * self.scale, angles.sin() * self.scale
        return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate heads by their position.

    x: [num_tokens, num_heads, head_dim]; cos, sin: from Rotary, sin negative in its first half. Returns x's shape:
    (x1 * cos - x2 * sin, x2 * cos + x1 * sin) for the halves x1, x2 of the rotary dims, the other dims as they are.
    """
    rotary_dim = cos.shape[-1]
    if rotary_dim < x.shape[-1]:
        return torch.cat((rotate(x[..., :rotary_dim], cos, sin), x[..., rotary_dim:]), dim=-1)
    return (x * cos).add_(x.roll(rotary_dim // 2, dims=-1).mul_(sin))


def inverse_frequencies(rope: RopeConfig, dim: int) -> Tensor:
    """[dim / 2] float32 on the CPU: the angle per position of each pair of dims. Raises PlanError."""
    if rope.rope_type not in _RULES:
        raise PlanError(f"rope_type {rope.rope_type!r} is not supported; supported are {', '.join(_RULES)}")
    return _RULES[rope.rope_type](rope, dim)


def attention_factor(rope: RopeConfig) -> float:
    """What cosines and sines are multiplied by: yarn's temperature (https://arxiv.org/abs/2309.00071), else 1."""
    if rope.rope_type != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return _mscale(rope.factor, rope.mscale) / _mscale(rope.factor, rope.mscale_all_dim)
    return _mscale(rope.factor, 1.0)


def _mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _exponents(dim: int) -> Tensor:
    return torch.arange(0, dim, 2, dtype=torch.float32) / dim


def _default(rope: RopeConfig, dim: int) -> Tensor:
    return 1.0 / torch.pow(rope.rope_theta, _exponents(dim))


def _linear(rope: RopeConfig, dim: int) -> Tensor:
    """Position interpolation (https://arxiv.org/abs/2306.15595)."""
    return _default(rope, dim) / rope.factor


def _dynamic(rope: RopeConfig, dim: int) -> Tensor:
    """NTK-aware scaling as it is up to the original length, beyond which the plan does not let sequences grow: past it
    the frequencies of all cached keys would change with each token. The correction is 1 but for rounding."""
    base = rope.rope_theta * (rope.factor - (rope.factor - 1)) ** (dim / (dim - 2))
    return 1.0 / torch.pow(base, _exponents(dim))


def _llama3(rope: RopeConfig, dim: int) -> Tensor:
    """Llama 3.1: long wavelengths are divided by `factor`, short ones kept, those between interpolated.
    https://github.com/meta-llama/llama-models/blob/main/models/llama3/reference_impl/model.py"""
    length, low, high = _required(rope, "original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    frequencies = _default(rope, dim)
    wavelengths = 2 * math.pi / frequencies
    kept = (length / wavelengths - low) / (high - low)
    between = (1 - kept) * frequencies / rope.factor + kept * frequencies
    scaled = torch.where(wavelengths > length / low, frequencies / rope.factor, between)
    return torch.where(wavelengths < length / high, frequencies, scaled)


def _yarn(rope: RopeConfig, dim: int) -> Tensor:
    """NTK by parts: dims that turn more than beta_fast times within the original length are kept, those that turn less
    than beta_slow times are divided by `factor`, with a linear ramp between (https://arxiv.org/abs/2309.00071, 3.2)."""
    (length,) = _required(rope, "original_max_position_embeddings")
    first = _dim_that_turns(rope.beta_fast or 32, rope=rope, dim=dim, length=length)
    last = _dim_that_turns(rope.beta_slow or 1, rope=rope, dim=dim, length=length)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    last = last + 0.001 if first == last else last
    kept = 1 - ((torch.arange(dim // 2, dtype=torch.float32) - first) / (last - first)).clamp(0, 1)
    powers = torch.pow(rope.rope_theta, _exponents(dim))
    return (1.0 / (rope.factor * powers)) * (1 - kept) + (1.0 / powers) * kept


def _dim_that_turns(times: float, *, rope: RopeConfig, dim: int, length: float) -> float:
    """The (fractional) dim whose angle makes this many turns over `length` positions."""
    return dim * math.log(length / (times * 2 * math.pi)) / (2 * math.log(rope.rope_theta))


def _required(rope: RopeConfig, *names: str) -> list[float]:
    values = [getattr(rope, name) for name in names]
    missing = [name for name, value in zip(names, values, strict=True) if value is None]
    if missing:
        raise PlanError(f"rope_type {rope.rope_type!r} needs {', '.join(missing)} in config.json's rope parameters")
    return values


_RULES: dict[str, Callable[[RopeConfig, int], Tensor]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
}
