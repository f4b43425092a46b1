"""The Python API: `LLM` runs a whole node inside a program, with names that follow vLLM's.

The node lives on an event loop in a thread of its own, so that it works in scripts and notebooks alike; its ranks are
child processes that end with this one.
"""

import asyncio
import atexit
import os
import threading
from collections.abc import Coroutine, Iterable, Sequence
from contextlib import ExitStack, aclosing, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import msgspec

from tpdist.control.agent import Outcome
from tpdist.control.messages import ClusterState, DrainRequest, Generate
from tpdist.errors import LostError, RequestError, SettingsError, TpdistError, error_for
from tpdist.node import Model, Node, open_model_later
from tpdist.run_directory import run_directory
from tpdist.sampling_params import SamplingParams
from tpdist.server.answers import (
    best_answers,
    check_sampling_ids,
    cumulative_logprob,
    join,
    read_pieces,
    split_answers,
)
from tpdist.server.logprobs import Logprob, by_token, prompt_by_token
from tpdist.server.text import Piece, TextReader, check_token_ids
from tpdist.server.tokenizer import open_tokenizer
from tpdist.settings import Role, Settings

INTERNAL_SERVER_ERROR = 500
NEWS_S = 5.0
"""For the news that follow a lost request: whether the node ends."""
Prompt = str | Sequence[int]
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class CompletionOutput:
    """One answer. `finish_reason` is stop or length; a stop token is the last of `token_ids`.

    `logprobs` and `cumulative_logprob` are None unless SamplingParams.logprobs asked for them; each position has its
    token, then the most probable ones. `stop_reason` is the stop string or the one of stop_token_ids that ended it.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None
    stop_reason: str | int | None


@dataclass(frozen=True, kw_only=True)
class RequestOutput:
    """One prompt and its answers; with best_of the best comes first. `prompt` is None when it was given as token ids.

    `prompt_logprobs` has None for the first token, which nothing predicts. `num_cached_tokens` of the prompt were
    found in the prefix cache.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    outputs: list[CompletionOutput]
    num_cached_tokens: int
    finished: bool = True


class LLM:
    """A model over the ranks of this machine (and, with the head's variables set, over its workers).

        with LLM("path", tensor_parallel_size=2) as llm:
            llm.generate(["Hello"], SamplingParams(max_tokens=16))

    `options` are those of `tpdist serve` with underscores: tensor_parallel_size, dtype, device, max_model_len, ...
    Lost ranks end it, unless max_restarts says that they are started again. Raises the TpdistError that a `tpdist
    serve` would have ended with.
    """

    def __init__(self, model: str | Path, **options: Any) -> None:
        self._settings = Settings.load({"log_level": "WARNING", "max_restarts": 0, **options})
        if self._settings.role not in (Role.SINGLE, Role.HEAD):
            raise SettingsError(f"LLM cannot run as a {self._settings.role.value}; use `tpdist serve` there")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="tpdist", daemon=True)
        self._thread.start()
        self._cleanup = ExitStack()
        self._num_requests = 0
        self._closed = False
        atexit.register(self.close)
        try:
            self._call(self._start(str(model)))
        except BaseException:
            self.close()
            raise

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int | Sequence[int] = 0,
    ) -> list[RequestOutput]:
        """Answer all prompts together, in their order. A prompt is text or token ids.

        One SamplingParams serves all prompts, or give one for each; so with `priority`, of which a lower one is served
        first. Raises RequestError for a prompt that cannot be served, LostError when the ranks are lost.
        """
        if self._closed:
            raise RuntimeError("this LLM is closed")
        batch = _as_batch(prompts)
        if isinstance(sampling_params, SamplingParams) or sampling_params is None:
            sampling_params = [sampling_params or SamplingParams()] * len(batch)
        if isinstance(priority, int):
            priority = [priority] * len(batch)
        for given in (*sampling_params, *priority):
            _check_types(given)
        for name, values in (("SamplingParams", sampling_params), ("priorities", priority)):
            if len(values) != len(batch):
                raise ValueError(f"{len(batch)} prompts need as many {name}, got {len(values)}")
        return self._call(self._generate(batch, sampling_params, priority))

    def cluster_state(self) -> ClusterState:
        """The nodes and ranks of this model as they are now: what /v1/cluster shows."""
        return self._node.agent.state()

    def close(self) -> None:
        """End the ranks. Nothing happens the second time."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        self._call(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _call(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Run `work` on the node's loop; Ctrl-C cancels it, which aborts its requests."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    # -- on the loop --------------------------------------------------------------------------------------------------

    async def _start(self, name: str) -> None:
        opening: asyncio.Task[Model] = asyncio.create_task(open_model_later(name, revision=self._settings.revision))
        model = await opening
        run_dir = self._cleanup.enter_context(run_directory())
        self._node = Node(self._settings, opening, environ=os.environ, run_dir=run_dir)
        self._running: asyncio.Task[Outcome] = asyncio.create_task(self._node.run())
        self._eos_token_ids = model.config.eos_token_ids
        self._vocab_size = model.config.vocab_size
        self._tokenizer = await asyncio.to_thread(open_tokenizer, self._settings, model.folder)
        ready = asyncio.create_task(self._node.agent.wait_ready())
        await asyncio.wait({ready, self._running}, return_when=asyncio.FIRST_COMPLETED)
        if not ready.done() or ready.exception() is not None:
            ready.cancel()
            raise await self._end_of_node()

    async def _stop(self) -> None:
        if hasattr(self, "_running"):
            if not self._running.done():
                await self._node.agent.leave(DrainRequest(reason="LLM.close()", immediate=True))
            await self._running
        self._cleanup.close()

    async def _generate(
        self, prompts: Sequence[Prompt], sampling: Sequence[SamplingParams], priorities: Sequence[int]
    ) -> list[RequestOutput]:
        try:
            await self._node.agent.wait_ready()
            return await _gather(
                self._answer_prompt(prompt, of_prompt, priority)
                for prompt, of_prompt, priority in zip(prompts, sampling, priorities, strict=True)
            )
        except RequestError as error:
            if error.status < INTERNAL_SERVER_ERROR:
                raise
            if await self._recovers():
                raise LostError(f"{error}; the ranks are being started again") from error
            raise await self._end_of_node() from error

    async def _recovers(self) -> bool:
        """Whether this node goes on although a request was lost: it is told of either after that."""
        if self._settings.max_restarts == 0:
            return False
        with suppress(RequestError, TimeoutError):
            async with asyncio.timeout(NEWS_S):
                await self._node.agent.wait_until(lambda state: state.state != "ready")
        return self._node.agent.state().state in ("recovering", "ready")

    async def _end_of_node(self) -> TpdistError:
        """Why the node is ending: it has the first cause when it has ended."""
        outcome = await asyncio.shield(self._running)
        return error_for(outcome.exit_code, outcome.cause)

    async def _answer_prompt(self, prompt: Prompt, sampling: SamplingParams, priority: int) -> RequestOutput:
        text = prompt if isinstance(prompt, str) else None
        ids = self._tokenizer.encode(prompt, add_special_tokens=True) if isinstance(prompt, str) else list(prompt)
        check_token_ids(ids, vocab_size=self._vocab_size, param="prompt")
        check_sampling_ids(sampling, vocab_size=self._vocab_size)
        self._num_requests += 1
        request = Generate(
            request_id=f"llm-{self._num_requests}",
            prompt_token_ids=tuple(ids),
            sampling=sampling,
            eos_token_ids=self._eos_token_ids,
            priority=priority,
        )
        answers = await _gather(map(self._answer, split_answers(request)))
        best = best_answers(answers, n=sampling.n)
        return RequestOutput(
            request_id=request.request_id,
            prompt=text,
            prompt_token_ids=ids,
            prompt_logprobs=self._prompt_logprobs(answers[0], sampling),
            outputs=[self._output(index, answer, sampling) for index, answer in enumerate(best)],
            num_cached_tokens=answers[0].num_cached_tokens,
        )

    async def _answer(self, request: Generate) -> Piece:
        reader = TextReader(self._tokenizer, request)
        async with aclosing(read_pieces(self._node.agent.generate, request, reader)) as pieces:
            return join([piece async for piece in pieces])

    def _prompt_logprobs(self, answer: Piece, sampling: SamplingParams) -> list[dict[int, Logprob] | None] | None:
        if sampling.prompt_logprobs is None:
            return None
        return prompt_by_token(self._tokenizer, answer.prompt_logprobs, most=sampling.prompt_logprobs)

    def _output(self, index: int, answer: Piece, sampling: SamplingParams) -> CompletionOutput:
        most = sampling.logprobs
        shown = None if most is None else [by_token(self._tokenizer, entry, most=most) for entry in answer.logprobs]
        return CompletionOutput(
            index=index,
            text=answer.text,
            token_ids=list(answer.token_ids),
            cumulative_logprob=None if shown is None else cumulative_logprob(answer),
            logprobs=shown,
            finish_reason=answer.finish_reason,
            stop_reason=answer.stop_reason,
        )


async def _gather(work: Iterable[Coroutine[Any, Any, Result]]) -> list[Result]:
    """The results of all, in their order; the first failure ends the others, and is raised once they have ended."""
    tasks = [asyncio.create_task(each) for each in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _check_types(value: object) -> None:
    """Raise RequestError for a value that messages do not take, which the head would drop: a Struct checks the types of
    its fields when it arrives, not when it is made."""
    try:
        msgspec.convert(msgspec.to_builtins(value), type(value) if isinstance(value, SamplingParams) else int)
    except (msgspec.ValidationError, OverflowError) as error:
        name = "SamplingParams" if isinstance(value, SamplingParams) else "priority"
        raise RequestError(f"{name}: {error}", param=name) from error


def _as_batch(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt is a batch of one: a string, or a non-empty sequence of token ids."""
    if isinstance(prompts, str):
        return [prompts]
    items = list(prompts)
    if items and all(isinstance(item, int) for item in items):
        return [[item for item in items if isinstance(item, int)]]
    return [item for item in items if not isinstance(item, int)]
