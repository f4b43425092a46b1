"""A model that runs in this process's own node, measured without HTTP and without text."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

from tpdist.bench.load import Answer
from tpdist.bench.prompts import Prompt
from tpdist.bench.roofline import Traffic, traffic_of
from tpdist.control.agent import Outcome
from tpdist.control.messages import DrainRequest, EngineInfo, Generate, RankUpdate, RankView
from tpdist.errors import InterruptedByUser, RequestError, TpdistError, error_for
from tpdist.node import Model, Node, handled_signals, open_model_later
from tpdist.plan.model_config import ModelConfig
from tpdist.run_directory import run_directory
from tpdist.sampling_params import SamplingParams
from tpdist.server.client import EngineClient
from tpdist.settings import Settings

Result = TypeVar("Result")


class EngineTarget:
    """A Target that is the engine itself. Prompts must be token ids."""

    def __init__(self, client: EngineClient) -> None:
        self._client = client
        self._numbers = count()

    async def answer(self, prompt: Prompt, *, max_tokens: int, on_tokens: Callable[[int], None]) -> Answer:
        assert not isinstance(prompt, str), "text must be tokenized before the clock runs"
        sampling = SamplingParams(max_tokens=max_tokens, min_tokens=max_tokens, temperature=0, ignore_eos=True)
        request = Generate(request_id=f"bench-{next(self._numbers)}", prompt_token_ids=prompt, sampling=sampling)
        num_tokens, num_cached_tokens = 0, 0
        async with aclosing(self._client.generate(request)) as outputs:
            async for output in outputs:
                num_cached_tokens += output.num_cached_tokens
                if output.token_ids:
                    num_tokens += len(output.token_ids)
                    on_tokens(len(output.token_ids))
        return Answer(num_tokens=num_tokens, num_cached_tokens=num_cached_tokens)


@dataclass(frozen=True, kw_only=True)
class StartReport:
    """How a model came up. `load_bytes_per_s` is of all ranks together, from the first byte to the last; None when a
    load was too short for a report of it. `load_s` likewise."""

    time_to_ready_s: float
    load_bytes: int
    load_s: float | None
    load_bytes_per_s: float | None


class LoadClock:
    """Listens to ranks for when the first began to load and the last had loaded."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._started = now()
        self._begun: float | None = None
        self._ended: dict[int, float] = {}
        self._bytes: dict[int, int] = {}

    def update(self, update: RankUpdate) -> None:
        """Take a rank's word on how far it is."""
        if update.phase == "load":
            self._begun = self._now() if self._begun is None else self._begun
            self._bytes[update.rank] = update.total
        elif update.phase in ("warmup", "ready"):
            self._ended.setdefault(update.rank, self._now())

    def report(self) -> StartReport:
        """What has been heard until now, when all ranks are ready."""
        load_s = None if self._begun is None or not self._ended else max(self._ended.values()) - self._begun
        load_bytes = sum(self._bytes.values())
        return StartReport(
            time_to_ready_s=self._now() - self._started,
            load_bytes=load_bytes,
            load_s=load_s,
            load_bytes_per_s=load_bytes / load_s if load_s else None,
        )


class RunningModel:
    """A node that serves requests: made by `running_model`."""

    def __init__(self, node: Node, model: Model, ending: "asyncio.Task[Outcome]", start: StartReport) -> None:
        self._model = model
        self.start = start
        self.target = EngineTarget(node.agent)
        self._node = node
        self._ending = ending

    @property
    def folder(self) -> Path:
        return self._model.folder

    @property
    def config(self) -> ModelConfig:
        return self._model.config

    @property
    def limits(self) -> EngineInfo:
        engine = self._node.agent.state().engine
        assert engine is not None, "a ready cluster has limits"
        return engine

    @property
    def plan(self) -> Mapping[str, Any]:
        return self._node.agent.state().plan

    @property
    def traffic(self) -> Traffic:
        return traffic_of(self.plan, self._model.config)

    @property
    def ranks(self) -> list[RankView]:
        """All ranks of all nodes, as the head last described them."""
        return [rank for node in self._node.agent.state().nodes for rank in node.ranks]

    @property
    def devices(self) -> list[set[str]]:
        """The devices in use, node by node."""
        return [{rank.device for rank in node.ranks} for node in self._node.agent.state().nodes]

    async def measure(self, work: Coroutine[Any, Any, Result]) -> Result:
        """The result of `work`. Raises why the node ended, if it ends meanwhile: no figure is of a broken cluster."""
        task = asyncio.create_task(work)
        try:
            await asyncio.wait({task, self._ending}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done() or self._node.agent.state().state in ("draining", "failed"):
                raise _cause(await asyncio.shield(self._ending))
            return task.result()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


@asynccontextmanager
async def running_model(
    settings: Settings,
    name: str,
    *,
    environ: Mapping[str, str],
    on_rank_update: Callable[[RankUpdate], None] = lambda update: None,
) -> AsyncIterator[RunningModel]:
    """Start a node with all its ranks, and end it afterwards. Signals go to the node meanwhile.

    Raises the TpdistError that `tpdist serve` would have ended with."""
    clock = LoadClock()

    def on_update(update: RankUpdate) -> None:
        clock.update(update)
        on_rank_update(update)

    opening = asyncio.create_task(open_model_later(name, revision=settings.revision))
    model = await opening
    with run_directory() as run_dir:
        node = Node(settings, opening, environ=environ, run_dir=run_dir, on_rank_update=on_update)
        with handled_signals(node):
            ending = asyncio.create_task(node.run())
            try:
                await _ready(node, ending)
                yield RunningModel(node, model, ending, clock.report())
            finally:
                if not ending.done():
                    await node.agent.leave(DrainRequest(reason="measured", immediate=True))
                outcome = await ending
            if outcome.exit_code != 0:
                raise _cause(outcome)


async def _ready(node: Node, ending: "asyncio.Task[Outcome]") -> None:
    try:
        await node.agent.wait_ready()
    except RequestError as error:
        raise _cause(await asyncio.shield(ending)) from error


def _cause(outcome: Outcome) -> TpdistError:
    if outcome.exit_code == 0:
        return InterruptedByUser(outcome.cause)
    return error_for(outcome.exit_code, outcome.cause)
