"""What the server's tests stand on: a small byte-level tokenizer, a cluster that answers from a script, and apps."""

import asyncio
import math
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import httpx
import tokenizers
import transformers
from fastapi import FastAPI

from tpdist.control.messages import (
    ClusterState,
    DrainRequest,
    EngineInfo,
    EngineStats,
    Generate,
    NodeView,
    RankView,
    RestartView,
    TokenLogprobs,
    TokenOutput,
)
from tpdist.errors import RequestError
from tpdist.server.api import create_app
from tpdist.server.tokenizer import Tokenizer, load_tokenizer

MODEL = "tiny"
VOCAB_SIZE = 320
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['content'] == 'refuse' %}{{ raise_exception('not this') }}{% endif %}"
    "<|start|>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant: {% endif %}"
)
CORPUS = ["the quick brown fox jumps over the lazy dog", "hello world, hello there", "stop here and stop there"] * 4


def save_tokenizer(folder: Path, *, chat_template: str | None = CHAT_TEMPLATE) -> Path:
    """Train a byte-level BPE and save it as a model's folder would hold it."""
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = byte_level(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|end|>", "<|start|>"],
        initial_alphabet=byte_level.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(CORPUS, trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>", bos_token="<|start|>")
    fast.chat_template = chat_template
    fast.save_pretrained(folder)
    return folder


def small_tokenizer(folder: Path, *, chat_template: str | None = CHAT_TEMPLATE) -> Tokenizer:
    return load_tokenizer(save_tokenizer(folder, chat_template=chat_template))


def ready_state(**changes: Any) -> ClusterState:
    """Two nodes with one ready rank each, and room for 128 tokens."""
    fields: dict[str, Any] = {
        "state": "ready",
        "reason": "",
        "epoch": 3,
        "phase": "ready",
        "nodes": tuple(_node(index) for index in range(2)),
        "plan": {"world_size": 2, "tp_size": 2},
        "restarts": (RestartView(epoch=2, cause="rank 1 on worker-0 was killed", reason="rank_lost", age_s=90),),
        "engine": EngineInfo(max_model_len=256, num_kv_blocks=16, block_size=8),
        "stats": EngineStats(num_requests_running=4, num_requests_waiting=5, kv_cache_usage=0.25, preemptions=6),
    }
    return ClusterState(**{**fields, **changes})


def _node(index: int) -> NodeView:
    rank = RankView(
        rank=index,
        local_rank=0,
        pid=100 + index,
        device="cpu",
        state="ready",
        step=7,
        weight_bytes=1,
        kv_blocks=16,
        step_age_s=1.5,
        load_bytes=2**20 + index,
        load_s=0.25,
    )
    role = "head" if index == 0 else "worker"
    name = "head" if index == 0 else f"worker-{index - 1}"
    return NodeView(node_id=name, role=role, host="h", pid=10, state="ready", last_seen_s=0.5, ranks=(rank,))


def logprobs_at(token: int, most: int) -> TokenLogprobs:
    """What the fake engine says of a position where `token` stands: always the second of three, the others are
    impossible; a higher id is less probable."""
    own = -1.0 - token / 1000
    best = [((token + 1) % VOCAB_SIZE, -0.5), (token, own), ((token + 2) % VOCAB_SIZE, -2.0)]
    best += [((token + place) % VOCAB_SIZE, -math.inf) for place in range(3, 20)]
    return TokenLogprobs((token, *(other for other, _ in best[:most])), (own, *(value for _, value in best[:most])), 2)


class FakeClient:
    """An EngineClient that answers each request with `answer(request)`, `per_step` tokens at a time, then <|end|>.

    After `fail_after` tokens it raises `failure`; after `hang_after` tokens it waits for ever. `requests`, `aborted`
    and `drains` are what it was asked. Of each prompt, `num_cached_tokens` were in the prefix cache. Every output says
    that the sequence waited `queue_s`. The prompt's log-probabilities come in two parts, the first of them before any
    token.
    """

    def __init__(
        self,
        answer: Callable[[Generate], Sequence[int]],
        *,
        per_step: int = 1,
        fail_after: int | None = None,
        failure: Exception | None = None,
        hang_after: int | None = None,
        num_cached_tokens: int = 0,
        queue_s: float | None = None,
    ) -> None:
        self.current = ready_state()
        self.requests: list[Generate] = []
        self.aborted: list[str] = []
        self.drains: list[DrainRequest] = []
        self.hanging = asyncio.Event()
        self._answer = answer
        self._per_step = per_step
        self._fail_after = fail_after
        self._failure = failure or RequestError("rank 1 was lost", status=503)
        self._hang_after = hang_after
        self._num_cached_tokens = num_cached_tokens
        self._queue_s = queue_s

    def state(self) -> ClusterState:
        return self.current

    async def drain(self, request: DrainRequest) -> None:
        self.drains.append(request)

    async def generate(self, request: Generate) -> AsyncGenerator[TokenOutput, None]:
        self.requests.append(request)
        finished = False
        try:
            tokens, reason = self._tokens(request)
            num_cached = self._num_cached_tokens
            first, rest = self._prompt_logprobs(request)
            if first:
                yield TokenOutput(request.request_id, (), None, (), first, num_cached)
                num_cached = 0
            for start in range(0, len(tokens), self._per_step):
                await self._misbehave(start)
                step = tuple(tokens[start : start + self._per_step])
                finished = start + len(step) == len(tokens)
                most = request.sampling.logprobs
                logprobs = () if most is None else tuple(logprobs_at(token, most) for token in step)
                ends = reason if finished else None
                yield TokenOutput(request.request_id, step, ends, logprobs, rest, num_cached, self._queue_s)
                rest, num_cached = (), 0
        finally:
            if not finished:
                self.aborted.append(request.request_id)

    def _tokens(self, request: Generate) -> tuple[list[int], str]:
        tokens = [*self._answer(request), *request.eos_token_ids[:1]]
        limit = request.sampling.max_tokens or len(tokens)
        return tokens[:limit], "length" if limit < len(tokens) else "stop"

    def _prompt_logprobs(self, request: Generate) -> tuple[tuple[TokenLogprobs, ...], tuple[TokenLogprobs, ...]]:
        most = request.sampling.prompt_logprobs
        if most is None:
            return (), ()
        found = tuple(logprobs_at(token, most) for token in request.prompt_token_ids[1:])
        return found[: len(found) // 2], found[len(found) // 2 :]

    async def _misbehave(self, num_done: int) -> None:
        await asyncio.sleep(0)
        if self._fail_after is not None and num_done >= self._fail_after:
            raise self._failure
        if self._hang_after is not None and num_done >= self._hang_after:
            self.hanging.set()
            await asyncio.Event().wait()


def loaded(tokenizer: Tokenizer) -> Future[Tokenizer]:
    future: Future[Tokenizer] = Future()
    future.set_result(tokenizer)
    return future


def app_for(client: FakeClient, tokenizer: Tokenizer | Future[Tokenizer], **changes: Any) -> FastAPI:
    fields: dict[str, Any] = {"model_names": [MODEL, "alias"], "vocab_size": VOCAB_SIZE, "eos_token_ids": [0]}
    future = tokenizer if isinstance(tokenizer, Future) else loaded(tokenizer)
    return create_app(client, tokenizer=future, **{**fields, **changes})


def http_client(app: FastAPI, *, address: str = "127.0.0.1") -> httpx.AsyncClient:
    """A client that calls `app` in this process, seen by it as coming from `address`."""
    transport = httpx.ASGITransport(app=app, client=(address, 1234), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test")


def call(app: FastAPI, method: str, path: str, *, address: str = "127.0.0.1", **options: Any) -> httpx.Response:
    """One call of `app` in an event loop of its own."""

    async def send() -> httpx.Response:
        async with http_client(app, address=address) as client:
            return await client.request(method, path, **options)

    return asyncio.run(send())
