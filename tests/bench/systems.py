"""One system under test in a process of its own: `python systems.py tpdist|transformers|machine ...`.

Reads commands from stdin, one JSON object a line, and answers each with one line on stdout; ends when stdin does. The
benchmarks start it and speak to it through measuring.System:

    warm up                                            all
    load      LoadGenerator.measure's options          tpdist
    facts     bytes, limits and ranks                  tpdist
    decode    batch, prompt_tokens, max_tokens         transformers
    prefill   prompt_tokens                            transformers
    read, matmul                                       machine: its limits
    layers    rows, shapes                             machine: the products of a step, with packed weights
"""

import argparse
import asyncio
import functools
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from measuring import LoadGenerator
from transformers import AutoModelForCausalLM

from tpdist.bench.in_process import RunningModel, running_model
from tpdist.bench.read_rate import NUM_BYTES, read_rate
from tpdist.layers.packed import PackableLinear
from tpdist.plan.memory import DTYPE_BYTES
from tpdist.settings import Settings

MATRIX = 4096
PASSES = 3
WARM_UP = {"concurrency": 1, "num_requests": 1, "prompt_tokens": 16, "max_tokens": 4}
Command = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("system", choices=("tpdist", "transformers", "machine"))
    parser.add_argument("--model")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--stages", type=int, default=1, help="that the ranks are dealt to")
    parser.add_argument("--threads", type=int, default=1, help="of each rank")
    parser.add_argument("--kv-cache", default="512MiB")
    arguments = parser.parse_args()
    if arguments.system == "tpdist":
        asyncio.run(serve_tpdist(arguments))
        return
    torch.set_num_threads(arguments.threads)
    answer = Transformers(arguments.model).answer if arguments.system == "transformers" else machine
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


# -- tpdist -----------------------------------------------------------------------------------------------------------


async def serve_tpdist(arguments: argparse.Namespace) -> None:
    options = {
        "tensor_parallel_size": arguments.ranks // arguments.stages,
        "pipeline_parallel_size": arguments.stages,
        "threads": arguments.threads,
        "kv_cache_memory_bytes": arguments.kv_cache,
        "log_level": "WARNING",
    }
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    async with running_model(Settings.load(options), arguments.model, environ=os.environ) as running:
        generator = LoadGenerator(running.target, vocab_size=running.config.vocab_size)
        while line := await running.measure(reader.readline()):
            answer = await running.measure(answer_tpdist(running, generator, json.loads(line)))
            print(json.dumps(answer), flush=True)


async def answer_tpdist(running: RunningModel, generator: LoadGenerator, command: Command) -> Any:
    match command.pop("do"):
        case "warm up":
            return await generator.measure(**WARM_UP)
        case "load":
            return await generator.measure(**command)
        case "facts":
            return facts(running)
        case unknown:
            raise ValueError(unknown)


def facts(running: RunningModel) -> dict[str, Any]:
    """Bytes that decoding reads, and for each rank its process, its weights and its share of the KV cache.

    `layer_weights`: the number of weights without the embedding table and without the output layer."""
    tokens = running.limits.num_kv_blocks * running.limits.block_size
    plans, dtype_bytes = running.plan["ranks"], DTYPE_BYTES[running.plan["dtype"]]
    table = running.config.vocab_size * running.config.hidden_size
    return {
        "weight_bytes": running.traffic.weight_bytes,
        "kv_bytes_per_token": running.traffic.kv_bytes_per_token,
        "layer_weights": running.traffic.weight_bytes // dtype_bytes - table,
        "kv_tokens": tokens,
        "max_tokens": running.limits.max_tokens,
        "ranks": [
            {"pid": rank.pid, "weight_bytes": rank.weight_bytes, "kv_bytes": tokens * plan["kv_bytes_per_token"]}
            for rank, plan in zip(running.ranks, plans, strict=True)
        ],
    }


# -- transformers -----------------------------------------------------------------------------------------------------


class Transformers:
    """The same checkpoint in transformers, decoded greedily by the shortest loop that its API allows."""

    def __init__(self, folder: str) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()

    def answer(self, command: Command) -> dict[str, Any]:
        actions: dict[str, Callable[..., dict[str, Any]]] = {"decode": self.decode, "prefill": self.prefill}
        name = command.pop("do")
        return self.decode(batch=1, prompt_tokens=16, max_tokens=4) if name == "warm up" else actions[name](**command)

    @torch.inference_mode()
    def decode(self, *, batch: int, prompt_tokens: int, max_tokens: int) -> dict[str, Any]:
        token_ids = self._prompt(batch, prompt_tokens)
        cache, times = None, []
        for _ in range(max_tokens):
            output = self._model(input_ids=token_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            token_ids, cache = output.logits[:, -1:].argmax(dim=-1), output.past_key_values
            times.append(time.perf_counter())
        return {"decode_tokens_per_s": batch * (max_tokens - 1) / (times[-1] - times[0])}

    @torch.inference_mode()
    def prefill(self, *, prompt_tokens: int) -> dict[str, Any]:
        token_ids = self._prompt(1, prompt_tokens)
        started = time.perf_counter()
        self._model(input_ids=token_ids, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(dim=-1)
        return {"ttft_s": [time.perf_counter() - started]}

    def _prompt(self, batch: int, num_tokens: int) -> torch.Tensor:
        """Random token ids: [batch, num_tokens]."""
        return torch.randint(0, self._model.config.vocab_size, (batch, num_tokens))


# -- the machine itself -----------------------------------------------------------------------------------------------


def machine(command: Command) -> dict[str, Any]:
    match command["do"]:
        case "warm up":
            return {}
        case "read":
            return {"bytes_per_s": read_rate(device="cpu", num_bytes=NUM_BYTES["cpu"], passes=PASSES)}
        case "matmul":
            return {"flop_per_s": max(matmul_flop_per_s() for _ in range(PASSES))}
        case "layers":
            return {"step_s": {str(rows): layers_s(rows, command["shapes"]) for rows in command["rows"]}}
        case unknown:
            raise ValueError(unknown)


def matmul_flop_per_s() -> float:
    """One product of two large bfloat16 matrices: [MATRIX, MATRIX] each."""
    left, right = (torch.randn(MATRIX, MATRIX, dtype=torch.bfloat16) for _ in range(2))
    started = time.perf_counter()
    torch.mm(left, right)
    return 2 * MATRIX**3 / (time.perf_counter() - started)


@functools.cache
def packed_layers(shapes: tuple[tuple[int, int], ...]) -> list[PackableLinear]:
    """Linear layers [out_features, in_features] with random bfloat16 weights, packed as tpdist packs its own."""
    layers = []
    for shape in shapes:
        layer = PackableLinear(torch.nn.Parameter(torch.randn(shape, dtype=torch.bfloat16), requires_grad=False))
        layer.finish_loading("weight")
        layers.append(layer)
    return layers


@torch.inference_mode()
def layers_s(rows: int, shapes: list[list[int]]) -> float:
    """Seconds of the products of one step with so many rows: the best of a few passes over all layers."""
    layers = packed_layers(tuple((height, width) for height, width in shapes))
    inputs = {width: torch.randn(rows, width, dtype=torch.bfloat16) for _, width in shapes}
    passes = []
    for _ in range(PASSES):
        started = time.perf_counter()
        for layer, (_, width) in zip(layers, shapes, strict=True):
            layer.product(inputs[width])
        passes.append(time.perf_counter() - started)
    return min(passes)


if __name__ == "__main__":
    main()
