"""Random trees of modules for the tests of bigmodel: nested, tied, with buffers, several types and classes."""

import random
from collections.abc import Iterator

import torch
from torch import nn

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int8)


class Leaf(nn.Module):
    """Parameters, and sometimes buffers. Names do not contain one another."""

    def __init__(self, draw: random.Random, *, buffers: bool) -> None:
        super().__init__()
        for index in range(draw.randint(0, 2) or 1):
            self.register_parameter("wuv"[index], parameter(draw))
        if buffers and draw.random() < 0.4:
            self.register_buffer("state", torch.empty(draw.randint(1, 20), dtype=draw.choice(DTYPES), device="meta"))


class Empty(nn.Module):
    """A module without tensors, such as an activation function."""


class Block(nn.Module):
    """Modules inside a module."""


class Layer(Block):
    """A class that tests do not split."""


class Group(Block):
    """Another one, which sometimes is not split."""


def parameter(draw: random.Random) -> nn.Parameter:
    dtype = draw.choice(DTYPES)
    values = torch.empty(draw.randint(1, 60), dtype=dtype, device="meta")
    return nn.Parameter(values, requires_grad=dtype.is_floating_point)


def random_module(
    draw: random.Random, *, depth: int = 3, buffers: bool = True, own_buffers: bool = False, own_parameters: bool = True
) -> nn.Module:
    """A tree of modules. `own_buffers`, `own_parameters`: modules with children may have tensors of their own too."""
    root = _block(draw, depth, buffers=buffers, own_buffers=own_buffers, own_parameters=own_parameters, kind=Block)
    if own_parameters and buffers and draw.random() < 0.3:
        root.register_buffer("top", torch.empty(draw.randint(1, 9), device="meta"))
    return root


def _block(
    draw: random.Random, depth: int, *, buffers: bool, own_buffers: bool, own_parameters: bool, kind: type[Block]
) -> Block:
    block = kind()
    if own_parameters and draw.random() < 0.25:
        block.register_parameter("scale", parameter(draw))
    if own_buffers and draw.random() < 0.5:
        block.register_buffer("mask", torch.empty(draw.randint(1, 9), device="meta"))
    for index in range(draw.randint(1, 4)):
        name, choice = f"{'abcd'[index]}{4 - depth}", draw.random()
        if choice < 0.1:
            child: nn.Module = Empty()
        elif depth and choice < 0.65:
            inner = draw.choice((Block, Layer, Group))
            child = _block(
                draw, depth - 1, buffers=buffers, own_buffers=own_buffers, own_parameters=own_parameters, kind=inner
            )
        else:
            child = Leaf(draw, buffers=buffers)
        block.add_module(name, child)
    return block


def tie_some(draw: random.Random, model: nn.Module, *, groups: int) -> None:
    """Make one parameter of some pairs (or three) of the tree's leaves."""
    leaves = [module for module in model.modules() if isinstance(module, Leaf)]
    for _ in range(groups):
        if len(leaves) < 3:
            return
        first, *others = draw.sample(leaves, draw.choice((2, 2, 3)))
        for other in others:
            other.w = first.w


def random_memory(draw: random.Random, total: float, *, gaps: bool = False) -> dict[int | str, int]:
    """A max_memory for a model of `total` bytes: up to three GPUs, and often a CPU."""
    gpus = sorted(draw.sample(range(5), draw.randint(0, 3))) if gaps else range(draw.randint(0, 3))
    memory: dict[int | str, int] = {gpu: draw.randint(0, max(1, int(total))) for gpu in gpus}
    if draw.random() < 0.8:
        memory["cpu"] = draw.randint(0, max(1, int(2 * total)))
    return memory


def cases(seed: int, count: int) -> Iterator[random.Random]:
    """One generator of random numbers for each case, so that a case can be made again alone."""
    return (random.Random(f"{seed}/{case}") for case in range(count))
