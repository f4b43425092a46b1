"""The Python API: `LLM` runs a whole node inside a program, with names that follow vLLM's.

The node lives on an event loop in a thread of its own, so that it works in scripts and notebooks alike; its ranks are
child processes that end with this one.
"""

import asyncio
import atexit
import os
import threading
from collections.abc import Coroutine, Sequence
from contextlib import ExitStack, aclosing
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from tpdist.control.agent import Outcome
from tpdist.control.messages import ClusterState, DrainRequest, Generate
from tpdist.errors import RequestError, SettingsError, TpdistError, error_for
from tpdist.node import Model, Node, open_model_later, run_directory
from tpdist.sampling_params import SamplingParams
from tpdist.server.text import TextReader, check_token_ids
from tpdist.server.tokenizer import open_tokenizer
from tpdist.settings import Role, Settings

INTERNAL_SERVER_ERROR = 500
Prompt = str | Sequence[int]
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class CompletionOutput:
    """One answer. `finish_reason` is stop or length; a stop token is the last of `token_ids`."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None


@dataclass(frozen=True, kw_only=True)
class RequestOutput:
    """One prompt and its answers. `prompt` is None when it was given as token ids."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = True


class LLM:
    """A model over the ranks of this machine (and, with the head's variables set, over its workers).

        with LLM("path", tensor_parallel_size=2) as llm:
            llm.generate(["Hello"], SamplingParams(max_tokens=16))

    `options` are those of `tpdist serve` with underscores: tensor_parallel_size, dtype, device, max_model_len, ...
    Raises the TpdistError that a `tpdist serve` would have ended with.
    """

    def __init__(self, model: str | Path, **options: Any) -> None:
        self._settings = Settings.load({"log_level": "WARNING", **options})
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
    ) -> list[RequestOutput]:
        """Answer all prompts together, in their order. A prompt is text or token ids.

        One SamplingParams serves all prompts, or give one for each. Raises RequestError for a prompt that cannot be
        served, LostError when the ranks are lost.
        """
        if self._closed:
            raise RuntimeError("this LLM is closed")
        batch = _as_batch(prompts)
        if isinstance(sampling_params, SamplingParams) or sampling_params is None:
            sampling_params = [sampling_params or SamplingParams()] * len(batch)
        if len(sampling_params) != len(batch):
            raise ValueError(f"{len(batch)} prompts need as many SamplingParams, got {len(sampling_params)}")
        return self._call(self._generate(batch, sampling_params))

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
                await self._node.agent.drain(DrainRequest(reason="LLM.close()", immediate=True))
            await self._running
        self._cleanup.close()

    async def _generate(self, prompts: Sequence[Prompt], sampling: Sequence[SamplingParams]) -> list[RequestOutput]:
        tasks = [asyncio.create_task(self._answer(*pair)) for pair in zip(prompts, sampling, strict=True)]
        try:
            return await asyncio.gather(*tasks)
        except RequestError as error:
            if error.status < INTERNAL_SERVER_ERROR:
                raise
            raise await self._end_of_node() from error
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _end_of_node(self) -> TpdistError:
        """Why the node is ending: it has the first cause when it has ended."""
        outcome = await asyncio.shield(self._running)
        return error_for(outcome.exit_code, outcome.cause)

    async def _answer(self, prompt: Prompt, sampling: SamplingParams) -> RequestOutput:
        is_text = isinstance(prompt, str)
        ids = self._tokenizer.encode(prompt, add_special_tokens=True) if isinstance(prompt, str) else list(prompt)
        check_token_ids(ids, vocab_size=self._vocab_size, param="prompt")
        self._num_requests += 1
        request = Generate(
            request_id=f"llm-{self._num_requests}",
            prompt_token_ids=tuple(ids),
            sampling=sampling,
            eos_token_ids=self._eos_token_ids,
        )
        reader = TextReader(self._tokenizer, request)
        text, finish_reason = "", None
        token_ids: list[int] = []
        async with aclosing(self._node.agent.generate(request)) as outputs:
            async for output in outputs:
                piece = reader.push(output)
                text += piece.text
                token_ids += piece.token_ids
                finish_reason = piece.finish_reason
                if finish_reason is not None:
                    break
        answer = CompletionOutput(index=0, text=text, token_ids=token_ids, finish_reason=finish_reason)
        return RequestOutput(
            request_id=request.request_id,
            prompt=str(prompt) if is_text else None,
            prompt_token_ids=ids,
            outputs=[answer],
        )


def _as_batch(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt is a batch of one: a string, or a non-empty sequence of token ids."""
    if isinstance(prompts, str):
        return [prompts]
    items = list(prompts)
    if items and all(isinstance(item, int) for item in items):
        return [[item for item in items if isinstance(item, int)]]
    return [item for item in items if not isinstance(item, int)]
