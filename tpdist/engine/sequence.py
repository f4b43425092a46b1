"""One request on its way through the engine: its tokens, how many of them are computed, and the blocks it holds.

It knows nothing of other sequences, of the cache or of tensors.
"""

from dataclasses import dataclass, field

import numpy as np

from tpdist.control.messages import Generate, SequenceStart, TokenLogprobs, TokenOutput
from tpdist.sampling_params import SamplingParams


@dataclass(eq=False, slots=True, kw_only=True)
class Sequence:
    """`token_ids` are prompt and completion; the first `num_scheduled` of them are in the cache, or will be once the
    steps in flight have run. (`priority`, `arrival`) orders sequences for good; `slot` is None while the sequence
    waits.

    `prefilling`: some of the tokens that were known at its start are not scheduled; `num_promised` blocks are kept for
    them beside `blocks`. `sample_pending`: a step in flight will add a token. Until then the sequence is neither
    scheduled nor preempted. `restarted`: it was preempted at least once.

    `block_digests` name its first full blocks, as far as somebody asked. `num_cached` prompt tokens were found in the
    prefix cache before it was ever preempted. `num_prompt_logprobs` entries of its prompt were delivered. It came to
    the engine at `arrived_s` (monotonic), and waited `queue_s` for its first start.
    """

    request_id: str
    priority: int
    arrival: int
    arrived_s: float
    sampling: SamplingParams
    seed: int
    stop_token_ids: tuple[int, ...]
    max_tokens: int
    num_prompt_tokens: int
    token_ids: list[int]
    num_scheduled: int = 0
    blocks: list[int] = field(default_factory=list)
    num_promised: int = 0
    block_digests: list[bytes] = field(default_factory=list)
    slot: int | None = None
    prefilling: bool = False
    sample_pending: bool = False
    restarted: bool = False
    num_cached: int = 0
    num_prompt_logprobs: int = 0
    queue_s: float | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_unscheduled(self) -> int:
        """Known tokens that no step has been given yet: 1 for a decode, more for the rest of a prefill."""
        return len(self.token_ids) - self.num_scheduled

    @property
    def may_skip_prompt(self) -> bool:
        """Whether nobody needs the logits of the prompt's tokens."""
        return self.sampling.prompt_logprobs is None or self.num_prompt_logprobs == self.num_prompt_tokens - 1

    def wants_score_after(self, position: int) -> bool:
        """Whether the log-probability of the prompt's token behind `position` is asked for."""
        return self.sampling.prompt_logprobs is not None and position < self.num_prompt_tokens - 1

    def take(
        self,
        token_id: int,
        *,
        logprobs: tuple[TokenLogprobs, ...] = (),
        prompt_logprobs: tuple[TokenLogprobs, ...] = (),
    ) -> TokenOutput:
        """Add a sampled token; the output has a finish reason if it is the last one."""
        is_first = self.num_tokens == self.num_prompt_tokens
        num_cached, queue_s = (self.num_cached, self.queue_s) if is_first else (0, None)
        self.token_ids.append(token_id)
        self.sample_pending = False
        finish_reason = "length" if self.num_tokens >= self.max_tokens else None
        if token_id in self.stop_token_ids:
            finish_reason = "stop"
        return TokenOutput(self.request_id, (token_id,), finish_reason, logprobs, prompt_logprobs, num_cached, queue_s)

    def deliver(self, start: int, entries: tuple[TokenLogprobs, ...]) -> tuple[TokenLogprobs, ...]:
        """Of the log-probabilities at the prompt's positions `start` + 1 and following, those that were not delivered
        before; from now on they are."""
        assert start <= self.num_prompt_logprobs, f"{self.request_id}: prompt log-probabilities before {start} are lost"
        fresh = entries[self.num_prompt_logprobs - start :]
        self.num_prompt_logprobs += len(fresh)
        return fresh

    def start_in(self, slot: int) -> SequenceStart:
        """Take `slot` and say so to the ranks."""
        self.slot, self.prefilling = slot, True
        return SequenceStart(
            slot=slot,
            token_ids=np.asarray(self.token_ids, dtype="<i4").tobytes(),
            num_prompt_tokens=self.num_prompt_tokens,
            seed=self.seed,
            sampling=self.sampling,
            stop_token_ids=self.stop_token_ids,
        )

    def stop_running(self) -> int:
        """Give up the slot, which is returned; the blocks are given back already. Tokens are kept: a later start
        computes them again, but for what the prefix cache still has."""
        assert self.slot is not None, f"{self.request_id} holds no slot"
        slot, self.slot, self.num_scheduled = self.slot, None, 0
        self.prefilling, self.restarted = False, True
        return slot


def new_sequence(request: Generate, *, arrival: int, now: float, seed: int, capacity: int) -> Sequence:
    """`capacity` is the most tokens, prompt and completion, that a sequence can hold. `seed` is for a request without
    one, `now` (monotonic) for one that nobody stamped when it was handed over."""
    sampling = request.sampling
    num_prompt_tokens = len(request.prompt_token_ids)
    max_tokens = capacity if sampling.max_tokens is None else min(capacity, num_prompt_tokens + sampling.max_tokens)
    eos = () if sampling.ignore_eos else request.eos_token_ids
    return Sequence(
        request_id=request.request_id,
        priority=request.priority,
        arrival=arrival,
        arrived_s=now if request.handed_over_s is None else request.handed_over_s,
        sampling=sampling,
        seed=seed if sampling.seed is None else sampling.seed,
        stop_token_ids=tuple(dict.fromkeys((*sampling.stop_token_ids, *eos))),
        max_tokens=max_tokens,
        num_prompt_tokens=num_prompt_tokens,
        token_ids=list(request.prompt_token_ids),
    )
