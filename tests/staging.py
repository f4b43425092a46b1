"""Engines over pipeline stages for tests: every rank in a process of its own, plans and results through a store.

A rank knows its place as in tpdist.rank; only the way of plans and results is another, so that no sockets are needed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any

import msgspec
import torch
from ranks import Meeting, open_store

from tpdist.checkpoint.index import CheckpointIndex
from tpdist.checkpoint.load import load_weights
from tpdist.control.messages import StepPlan, StepResult
from tpdist.engine.engine import Engine, Executor, LocalExecutor, PipelineExecutor
from tpdist.engine.kv_cache import allocate
from tpdist.engine.runner import Runner
from tpdist.engine.scheduler import Scheduler
from tpdist.models import registry
from tpdist.models.decoder import Decoder
from tpdist.parallel.pipeline import ProcessPipe
from tpdist.parallel.process_group import connect, disconnect
from tpdist.plan.shards import Partition
from tpdist.plan.stages import stage_weights, stages_of

CPU = torch.device("cpu")
TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Cut:
    """How a model is dealt: layers of each stage, and the shares of its ranks."""

    layers: tuple[int, ...]
    shares: tuple[tuple[int, ...], ...]

    @property
    def tp_size(self) -> int:
        return len(self.shares[0])

    @property
    def world_size(self) -> int:
        return self.tp_size * len(self.layers)

    def __str__(self) -> str:
        return f"{self.layers} x {self.shares}".replace(" ", "")


@dataclass(frozen=True)
class Sizes:
    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int


class StoreChannel:
    """Plans from rank 0 to all others, and results back, as numbered keys of the store."""

    def __init__(self, meeting: Meeting) -> None:
        self._store = open_store(meeting, timeout_s=TIMEOUT_S)
        self._sent, self._received = count(), 0

    def send(self, plan: StepPlan | None) -> None:
        self._store.set(f"plan/{next(self._sent)}", msgspec.msgpack.encode(plan))

    def plans(self) -> Any:
        for number in count():
            self._store.wait([f"plan/{number}"], timedelta(seconds=TIMEOUT_S))
            plan = msgspec.msgpack.decode(self._store.get(f"plan/{number}"), type=StepPlan | None)
            if plan is None:
                return
            yield plan

    def answer(self, result: StepResult) -> None:
        self._store.set(f"result/{result.step}", msgspec.msgpack.encode(result))

    def result(self) -> StepResult | None:
        key = f"result/{self._received + 1}"
        if not self._store.check([key]):
            return None
        self._received += 1
        return msgspec.msgpack.decode(self._store.get(key), type=StepResult)


def run_stage(
    rank: int,
    meeting: Meeting,
    folder: Path,
    cut: Cut,
    sizes: Sizes,
    drive: Callable[..., Any],
    *arguments: Any,
) -> Any:
    """What one rank does: rank 0 returns drive(engine, scheduler, *arguments), the others None."""
    store = open_store(meeting)
    group = connect(
        rank=rank,
        world_size=cut.world_size,
        tp_size=cut.tp_size,
        backend="gloo",
        store=store,
        timeout_s=TIMEOUT_S,
    )
    config = registry.load_config(folder)
    number = rank // cut.tp_size
    stage = stages_of(cut.layers, config.num_hidden_layers)[number]
    partition = Partition(cut.shares[number])
    model = Decoder(config, partition=partition, group=group, dtype=torch.float32, device=CPU, stage=stage)
    load_weights(
        model,
        index=CheckpointIndex.read(folder),
        weights=stage_weights(registry.weights(config), stage),
        partition=partition,
        rank=group.rank,
        threads=1,
        progress=lambda done, total: None,
    )
    pipe = ProcessPipe(
        rank=rank,
        world_size=cut.world_size,
        group=group,
        hidden_size=config.hidden_size,
        dtype=torch.float32,
        device=CPU,
        max_in_flight=len(cut.layers),
        timeout_s=TIMEOUT_S,
    )
    runner = Runner(
        model,
        group=group,
        cache=allocate(
            model.cache_shapes(),
            num_blocks=sizes.num_blocks,
            block_size=sizes.block_size,
            dtype=torch.float32,
            device=CPU,
        ),
        max_num_seqs=sizes.max_num_seqs,
        max_model_len=sizes.max_model_len,
        epoch=1,
        device=CPU,
        pipe=pipe,
    )
    runner.warm_up(3)
    channel = StoreChannel(meeting)
    if rank == 0:
        scheduler = make_scheduler(sizes, vocab_size=config.vocab_size, num_stages=len(cut.layers))
        executor = make_executor(runner, channel, num_stages=len(cut.layers))
        answer = drive(Engine(scheduler, executor), scheduler, *arguments)
        channel.send(None)
        disconnect()
        return answer
    for plan in channel.plans():
        result = runner.execute(plan)
        if result is not None:
            channel.answer(result)
    disconnect()
    return None


def make_executor(runner: Runner, channel: StoreChannel, *, num_stages: int) -> Executor:
    if num_stages == 1:
        return LocalExecutor(runner, send=channel.send)
    return PipelineExecutor(runner, num_stages=num_stages, send=channel.send, receive=channel.result)


def make_scheduler(sizes: Sizes, *, vocab_size: int, num_stages: int) -> Scheduler:
    return Scheduler(
        num_blocks=sizes.num_blocks,
        block_size=sizes.block_size,
        max_num_seqs=sizes.max_num_seqs,
        max_num_batched_tokens=sizes.max_num_batched_tokens,
        max_model_len=sizes.max_model_len,
        vocab_size=vocab_size,
        epoch=1,
        num_stages=num_stages,
    )
