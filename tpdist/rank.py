"""The life of one rank in one epoch: it meets its peers, loads its shard, and runs step plans until told to stop.

    connect  rank 0 listens and says where; everybody connects
    load     this rank's slices of the checkpoint
    warmup   a KV cache of the size that all ranks can hold, one forward
    ready    rank 0 runs the engine, the others run the plans that it sends

It imports neither transformers nor fastapi, and knows nothing of processes: worker.py and torchrun.py start it.
"""

import logging
import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import msgspec
import torch

from tpdist.cache_room import blocks_with_room
from tpdist.control.channel import ClusterKeys, Codec, Dealer, Router, wait_any
from tpdist.control.messages import (
    ENGINE_IDENTITY,
    Abort,
    Envelope,
    Generate,
    Heartbeat,
    RankStart,
    RankStop,
    RankUpdate,
    RequestFailed,
    StepOutputs,
    StepPlan,
    StepResult,
)
from tpdist.control.progress import Watch
from tpdist.engine.engine import Engine, LocalExecutor, PipelineExecutor
from tpdist.engine.kv_cache import allocate
from tpdist.engine.runner import Runner
from tpdist.engine.scheduler import Scheduler
from tpdist.engine.trace import Trace
from tpdist.errors import RequestError
from tpdist.loading import held_bytes, load
from tpdist.meeting import MakeStore, expect, meet, plan_identity
from tpdist.models import registry
from tpdist.models.decoder import Decoder
from tpdist.models.item_devices import ItemDevices, computing_device
from tpdist.parallel.group import RankGroup
from tpdist.parallel.pipeline import Alone, Pipe, ProcessPipe
from tpdist.parallel.store import agree_minimum, wait_for_all
from tpdist.parallel.watched import WatchedGroup
from tpdist.plan.model_config import ModelConfig
from tpdist.plan.shards import Interval, Partition
from tpdist.plan.stages import Stage

logger = logging.getLogger(__name__)

IDLE_POLL_S = 1.0
PROGRESS_INTERVAL_S = 0.2
WARM_UP_TOKENS = 8


class Rank:
    """The life of one rank in one epoch."""

    def __init__(self, link: Dealer, start: RankStart, *, make_store: MakeStore) -> None:
        self._link = link
        self._start = start
        self._assign = start.assign
        self._settings = start.assign.settings
        self._make_store = make_store
        self._keys = ClusterKeys.read(Path(start.key_file)) if start.key_file else None
        self._device = _device(start)
        self._update = RankUpdate(rank=start.rank, pid=os.getpid(), device=str(self._device), phase="start")
        self._next_report = 0.0
        self._watch = Watch(Path(start.progress_file), local_rank=start.local_rank)
        self._results: deque[StepResult] = deque()

    def run(self) -> None:
        """Until RankStop. Raises what ends this rank otherwise."""
        torch.set_num_threads(self._assign.threads)
        self._report(phase="connect")
        self._peers = meet(self._link, self._start, keys=self._keys, make_store=self._make_store, device=self._device)
        self._group: RankGroup = WatchedGroup(self._peers.group, self._watch)
        config = registry.load_config(Path(self._start.model))
        mine = self._assign.stages[self._start.rank // self._assign.tp_size]
        partition = Partition(mine.shares)
        model = Decoder(
            config,
            partition=partition,
            group=self._group,
            dtype=_dtype(self._settings["dtype"]),
            device=self._device,
            stage=Stage(Interval(mine.start, mine.stop), config.num_hidden_layers),
            items=ItemDevices.of(self._assign.item_devices) if self._assign.item_devices else None,
        )
        self._load(model, config, partition)
        runner, num_blocks = self._warm_up(model)
        if self._start.rank == 0:
            engine = self._make_engine(runner, num_blocks=num_blocks, vocab_size=config.vocab_size)
            requests = self._open_requests()
            self._report(phase="ready", kv_blocks=num_blocks)
            self._run_engine(engine, requests, runner)
        else:
            self._report(phase="ready", kv_blocks=num_blocks)
            self._run_plans(runner)

    # -- phases -------------------------------------------------------------------------------------------------------

    def _load(self, model: Decoder, config: ModelConfig, partition: Partition) -> None:
        self._report(phase="load")
        started = time.monotonic()
        read = load(
            model,
            config=config,
            folder=Path(self._start.model),
            partition=partition,
            rank=self._group.rank,
            threads=max(2, self._assign.threads),
            progress=self._report_load,
        )
        seconds = time.monotonic() - started
        logger.info("read %.2f GB in %.1f s (%.2f GB/s)", read / 1e9, seconds, read / 1e9 / max(seconds, 1e-9))
        self._report(phase="warmup", done=read, total=read, load_s=round(seconds, 3))

    def _warm_up(self, model: Decoder) -> tuple[Runner, int]:
        """Size the KV cache to what every rank can hold, and run once."""
        settings, assign, store = self._settings, self._assign, self._peers.store
        num_blocks = blocks_with_room(model, assign)
        if store is not None:
            rank, world_size, timeout_s = self._start.rank, assign.world_size, assign.load_timeout_s
            num_blocks = agree_minimum(
                store, key="kv_blocks", value=num_blocks, rank=rank, world_size=world_size, timeout_s=timeout_s
            )
        cache = allocate(
            model.cache_shapes(),
            num_blocks=num_blocks,
            block_size=settings["block_size"],
            dtype=_dtype(settings["dtype"]),
            device=model.cache_devices(),
        )
        held = held_bytes(model, cache)
        self._report(weight_bytes=sum(each.weight_bytes for each in held), held=held)
        trace_folder = self._start.trace_folder
        runner = Runner(
            model,
            group=self._group,
            pipe=self._open_pipe(model),
            trace=Trace(Path(trace_folder) if trace_folder else None, rank=self._start.rank),
            watch=self._watch,
            cache=cache,
            max_num_seqs=settings["max_num_seqs"],
            max_model_len=assign.max_model_len,
            epoch=assign.epoch,
            device=self._device,
            use_graphs=self._uses_graphs(),
        )
        runner.warm_up(WARM_UP_TOKENS)
        if store is not None:
            wait_for_all(store, key="warm", rank=rank, world_size=world_size, timeout_s=timeout_s)
        return runner, num_blocks

    def _uses_graphs(self) -> bool:
        """A graph is of one device."""
        one_device = len(set(self._assign.item_devices)) <= 1
        capturable = self._device.type == "cuda" and self._group.capturable
        return capturable and one_device and not self._settings["enforce_eager"]

    def _open_pipe(self, model: Decoder) -> Pipe:
        num_stages = len(self._assign.stages)
        if num_stages == 1:
            return Alone()
        return ProcessPipe(
            rank=self._start.rank,
            world_size=self._assign.world_size,
            group=self._group,
            hidden_size=model.hidden_size,
            dtype=_dtype(self._settings["dtype"]),
            device=self._device,
            max_in_flight=num_stages,
            timeout_s=self._assign.collective_timeout_s,
            watch=self._watch,
        )

    # -- loops --------------------------------------------------------------------------------------------------------

    def _make_engine(self, runner: Runner, *, num_blocks: int, vocab_size: int) -> Engine:
        settings, assign, plans = self._settings, self._assign, self._peers.plans
        scheduler = Scheduler(
            num_blocks=num_blocks,
            block_size=settings["block_size"],
            max_num_seqs=settings["max_num_seqs"],
            max_num_batched_tokens=settings["max_num_batched_tokens"],
            max_model_len=assign.max_model_len,
            vocab_size=vocab_size,
            epoch=assign.epoch,
            seed=settings["seed"],
            enable_prefix_caching=settings["enable_prefix_caching"],
            num_stages=len(assign.stages),
        )
        if plans is None:
            return Engine(scheduler, LocalExecutor(runner))
        others = [plan_identity(rank) for rank in range(1, assign.world_size)]
        send = partial(plans.send, others)
        if len(assign.stages) == 1:
            return Engine(scheduler, LocalExecutor(runner, send=send))
        executor = PipelineExecutor(runner, num_stages=len(assign.stages), send=send, receive=self._next_result)
        return Engine(scheduler, executor)

    def _next_result(self) -> StepResult | None:
        return self._results.popleft() if self._results else None

    def _open_requests(self) -> Dealer:
        """The socket to the head's agent, tried out: a request that comes before it is connected would be lost."""
        codec = Codec(cluster_id=self._assign.cluster_id, epoch=self._assign.epoch)
        requests = Dealer(address=self._start.engine_address, identity=ENGINE_IDENTITY, codec=codec)
        requests.send(Heartbeat(instance=ENGINE_IDENTITY.decode()))
        expect(requests, Heartbeat, timeout_s=self._assign.load_timeout_s)
        return requests

    def _run_engine(self, engine: Engine, requests: Dealer, runner: Runner) -> None:
        told, owes_a_word = engine.stats(), False
        answering = self._peers.plans if len(self._assign.stages) > 1 else None
        links: list[Dealer | Router] = [self._link, requests, *([answering] if answering else [])]
        while not self._told_to_stop(links, block=engine.idle):
            if answering is not None:
                self._results.extend(_arrived_results(answering))
            while (envelope := requests.receive()) is not None:
                owes_a_word = True
                _take_request(engine, requests, envelope)
            outputs = engine.step()
            if outputs is None and engine.num_in_flight == 0 and (owes_a_word or engine.stats() != told):
                # An abort has no step whose outputs would say that it was heard, and what it freed.
                outputs = StepOutputs(step=runner.step, outputs=(), stats=engine.stats())
            if outputs is not None:
                told, owes_a_word = outputs.stats, False
                requests.send(outputs)

    def _run_plans(self, runner: Runner) -> None:
        plan_link = self._peers.plan_link
        assert plan_link is not None
        while not self._told_to_stop([self._link, plan_link], block=True):
            # One at a time: with several stages the next plan is always there, and the agent wants its word too.
            if (envelope := plan_link.receive()) is not None:
                assert isinstance(envelope.body, StepPlan)
                result = runner.execute(envelope.body)
                if result is not None:
                    plan_link.send(result)

    def _told_to_stop(self, links: Sequence[Dealer | Router], *, block: bool) -> bool:
        """Wait for a message if there is nothing to do, and look for the agent's RankStop."""
        if block:
            self._watch.idle(True)
            wait_any(links, timeout_s=IDLE_POLL_S)
            self._watch.idle(False)
        envelope = self._link.receive()
        return envelope is not None and isinstance(envelope.body, RankStop)

    # -- talk with the agent ------------------------------------------------------------------------------------------

    def _report(self, **changes: object) -> None:
        self._update = msgspec.structs.replace(self._update, **changes)
        self._link.send(self._update)

    def _report_load(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now >= self._next_report or done == total:
            self._next_report = now + PROGRESS_INTERVAL_S
            self._report(done=done, total=total)


def _arrived_results(plans: Router) -> Iterator[StepResult]:
    """What the last stage has sampled by now. Every peer holds the cluster's key, but for other messages than results
    there is no reason."""
    while (envelope := plans.receive()) is not None:
        if isinstance(envelope.body, StepResult):
            yield envelope.body
        else:
            logger.warning("unexpected %s from a rank", type(envelope.body).__name__)


def _take_request(engine: Engine, requests: Dealer, envelope: Envelope) -> None:
    match envelope.body:
        case Generate() as request:
            try:
                engine.add(request)
            except RequestError as error:
                failed = RequestFailed(
                    request_id=request.request_id, status=error.status, message=str(error), param=error.param
                )
                requests.send(failed)
        case Abort(request_id=request_id):
            engine.abort(request_id)
        case other:
            logger.warning("unexpected %s for the engine", type(other).__name__)


def _device(start: RankStart) -> torch.device:
    """Where this rank computes; with several devices in one process, the first that has a part of the model."""
    items = start.assign.item_devices
    if items:
        device = computing_device(items[0])
    elif start.assign.settings["device"] == "cpu":
        device = torch.device("cpu")
    else:
        device = torch.device("cuda", start.local_rank % torch.cuda.device_count())
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype
