"""Runs StepPlans on one rank: plan -> tensors -> model -> sampled ids.

All ranks run the same plans in the same order. Of the last stage's ranks, the first samples and broadcasts the ids;
other stages learn them from a later plan. So each rank holds the last token of every slot when it is needed.
Log-probabilities stay on the rank that samples. It knows nothing of requests or of where plans come from.
"""

from collections.abc import Sequence
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from tpdist.control.messages import SequenceStart, SlotBlocks, SlotWork, StepPlan, StepResult
from tpdist.control.progress import Watch
from tpdist.engine.batch import PromptChunk, Samples, SlotTable
from tpdist.engine.decode_graphs import DecodeGraphs, Forward, Recorder
from tpdist.engine.kv_cache import KVCache
from tpdist.engine.logprobs import ROWS_AT_ONCE, read, sample_and_score, score
from tpdist.engine.trace import Trace
from tpdist.engine.transfer import to_device
from tpdist.errors import LostError
from tpdist.parallel.group import RankGroup
from tpdist.parallel.pipeline import Alone, Pipe
from tpdist.sampling_params import SamplingParams


class PlanGapError(LostError):
    """A plan is missing, came twice or is of another epoch: this rank no longer agrees with the others."""


class Model(Forward, Protocol):
    """What the runner needs of a model; models.decoder.Decoder is one."""

    def logits(self, hidden: Tensor) -> Tensor | None:
        """hidden: [n, hidden_size]. Returns float32 [n, vocab_size] on rank 0 of the group, None elsewhere. Every rank
        must call it."""


class Runner:
    """Holds the state of one rank in one epoch. `max_model_len` bounds sequences together with the size of the cache,
    as it does in the scheduler. `group` is this stage's, `pipe` leads to the other stages. `watch` notes each step that
    is begun."""

    def __init__(
        self,
        model: Model,
        *,
        group: RankGroup,
        cache: KVCache,
        max_num_seqs: int,
        max_model_len: int,
        epoch: int,
        device: torch.device,
        pipe: Pipe | None = None,
        trace: Trace | None = None,
        watch: Watch | None = None,
        use_graphs: bool = False,
        record: Recorder | None = None,
    ) -> None:
        self._model = model
        self._group = group
        self._pipe = pipe or Alone()
        self._trace = trace or Trace(None, rank=0)
        self._watch = watch or Watch()
        self._cache = cache
        self._epoch = epoch
        self._device = device
        self._step = 0
        self._max_tokens = min(max_model_len, cache.num_blocks * cache.block_size)
        self._slots = SlotTable(max_num_seqs=max_num_seqs, max_tokens=self._max_tokens, block_size=cache.block_size)
        self._graphs = DecodeGraphs(
            model,
            group=group,
            cache=cache,
            max_num_seqs=max_num_seqs,
            max_tokens=self._max_tokens,
            device=device,
            enabled=use_graphs,
            record=record,
        )

    @property
    def step(self) -> int:
        """The last step that was begun."""
        return self._step

    @torch.inference_mode()
    def warm_up(self, num_tokens: int) -> None:
        """Run a prefill of up to `num_tokens` and a decode, so that the first request does not pay for lazy
        initialisation. Every rank of all stages must call it, before its first step."""
        assert self._step == 0, "warm_up after the first step would overwrite the cache of a request"
        for plan in _warm_up_plans(min(num_tokens, self._max_tokens - 1), block_size=self._cache.block_size):
            self._run(plan)
        self._slots.apply(StepPlan(epoch=self._epoch, step=0, free=(0,)))

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult | None:
        """Run one step. Every rank must call it with the same plan. Returns the tokens on the first rank of the last
        stage, None elsewhere. Raises PlanGapError unless `plan` is the next one of this epoch."""
        self._check_order(plan)
        result = self._run(plan)
        self._watch.end_step()
        return result if self._group.rank == 0 else None

    def _run(self, plan: StepPlan) -> StepResult | None:
        """Apply and run a plan. Returns its result, whose tokens are the same on every rank of the last stage; None on
        the other stages."""
        if not self._pipe.is_last and plan.sampled:
            self._learn(plan.sampled)
        self._slots.apply(plan)
        self._graphs.start(plan.start)
        num_tokens = sum(work.num_tokens for work in plan.work)
        span = partial(self._trace.span, step=plan.step, num_tokens=num_tokens)
        x = None
        if not self._pipe.is_first:
            with span("receive"):
                x = self._pipe.receive(num_tokens, step=plan.step)
        with span("forward"):
            hidden, samples = self._forward(plan, x)
        if self._pipe.is_last:
            with span("sample"):
                return self._finish(plan, hidden, samples)
        with span("send"):
            self._pipe.send(hidden, step=plan.step)
        return None

    def _learn(self, sampled: Sequence[tuple[int, int]]) -> None:
        """Take tokens that the last stage has sampled: (slot, token) each."""
        slots, tokens = zip(*sampled, strict=True)
        self._slots.append(slots, tokens)
        if self._pipe.is_first:
            self._graphs.remember(slots, to_device(np.array(tokens), self._device))

    def _finish(self, plan: StepPlan, hidden: Tensor, samples: Samples) -> StepResult:
        """Score and sample what the last stage computed. hidden: [num_tokens, hidden_size]."""
        prompts = self._score_prompts(plan, hidden)
        tokens, sampled = self._sample(samples, hidden)
        self._graphs.remember(samples.slots, tokens)
        token_ids, entries = read(tokens, [*sampled.values(), *prompts.values()])
        self._slots.append(samples.slots, token_ids)
        return StepResult(
            plan.step,
            tuple(zip(samples.slots, token_ids, strict=True)),
            logprobs={slot: entry for slot, (entry,) in zip(sampled, entries[: len(sampled)], strict=True)},
            prompt_logprobs=dict(zip(prompts, entries[len(sampled) :], strict=True)),
        )

    def _forward(self, plan: StepPlan, x: Tensor | None) -> tuple[Tensor, Samples]:
        """The hidden states of the tokens of a plan, [num_tokens, hidden_size], and after which of them to sample. x:
        what the stage before made of them, or None on the first one."""
        if self._graphs.serves(plan.work):
            hidden = self._graphs.run(*self._slots.decodes(plan), x=x, eager=lambda: self._run_eagerly(plan, x)[0])
            return hidden, Samples(tuple(work.slot for work in plan.work), None)
        return self._run_eagerly(plan, x)

    def _run_eagerly(self, plan: StepPlan, x: Tensor | None) -> tuple[Tensor, Samples]:
        batch = self._slots.batch(plan, device=self._device)
        hidden = self._model(
            batch.token_ids if x is None else x,
            positions=batch.positions,
            attention=batch.attention,
            caches=self._cache.layers,
        )
        return hidden, batch.samples

    def _check_order(self, plan: StepPlan) -> None:
        if (plan.epoch, plan.step) != (self._epoch, self._step + 1):
            raise PlanGapError(
                f"got the plan of step {plan.step} in epoch {plan.epoch}, but step {self._step + 1} in epoch "
                f"{self._epoch} is next"
            )
        self._step = plan.step
        self._watch.begin_step(plan.step)

    def _score_prompts(self, plan: StepPlan, hidden: Tensor) -> dict[int, Tensor]:
        """By slot, the scores of the prompt's tokens that this step predicts, on rank 0; nothing elsewhere. Every rank
        asks for the same logits. hidden: [num_tokens, hidden_size]."""
        scored = {chunk.slot: self._score_chunk(chunk, hidden) for chunk in self._slots.prompt_chunks(plan)}
        return {slot: torch.cat(parts) for slot, parts in scored.items() if parts}

    def _score_chunk(self, chunk: PromptChunk, hidden: Tensor) -> list[Tensor]:
        parts = []
        for first in range(0, len(chunk.token_ids), ROWS_AT_ONCE):
            token_ids = chunk.token_ids[first : first + ROWS_AT_ONCE]
            row = chunk.first + first
            logits = self._model.logits(hidden[row : row + len(token_ids)])
            if logits is not None:
                parts.append(score(logits, to_device(token_ids, logits.device), num_top=chunk.num_top))
        return parts

    def _sample(self, samples: Samples, hidden: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        """One token for each of the batch's sample slots, [num_samples] int64, the same on every rank of the stage; and
        on rank 0 the scores of those that ask for them, by slot. hidden: [num_tokens, hidden_size]."""
        slots = samples.slots
        if not slots:
            return torch.empty(0, dtype=torch.int64, device=hidden.device), {}
        logits = self._model.logits(hidden if samples.rows is None else hidden[samples.rows.to(hidden.device)])
        if logits is None:
            return self._group.broadcast(torch.empty(len(slots), dtype=torch.int64, device=self._device)), {}
        tokens, scores = sample_and_score(logits, self._slots.sample_rows(slots))
        return self._group.broadcast(tokens), {slots[position]: values for position, values in scores.items()}


def _warm_up_plans(num_tokens: int, *, block_size: int) -> tuple[StepPlan, StepPlan]:
    """A prefill of `num_tokens` in slot 0 and the decode after it."""
    start = SequenceStart(0, bytes(4 * num_tokens), num_tokens, 0, SamplingParams(), ())
    blocks = SlotBlocks(0, tuple(range(num_tokens // block_size + 1)))
    prefill = SlotWork(0, 0, num_tokens, False)
    decode = SlotWork(0, num_tokens, 1, True)
    return (
        StepPlan(epoch=0, step=0, start=(start,), blocks=(blocks,), work=(prefill,)),
        StepPlan(epoch=0, step=0, work=(decode,)),
    )
