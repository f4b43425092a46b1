"""One request on its way through the engine: its tokens, how many of them are computed, and the blocks it holds.

It knows nothing of other sequences, of the cache or of tensors.
"""

from dataclasses import dataclass, field

import numpy as np

from tpdist.control.messages import Generate, SequenceStart
from tpdist.sampling_params import SamplingParams


@dataclass(eq=False, slots=True, kw_only=True)
class Sequence:
    """`token_ids` are prompt and completion; the first `num_scheduled` of them are in the cache, or will be once the
    steps in flight have run. `arrival` orders sequences for good; `slot` is None while the sequence waits.

    `sample_pending`: a step in flight will add a token. Until then the sequence is neither scheduled nor preempted.
    """

    request_id: str
    arrival: int
    sampling: SamplingParams
    seed: int
    stop_token_ids: tuple[int, ...]
    max_tokens: int
    num_prompt_tokens: int
    token_ids: list[int]
    num_scheduled: int = 0
    blocks: list[int] = field(default_factory=list)
    slot: int | None = None
    sample_pending: bool = False

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_unscheduled(self) -> int:
        """Known tokens that no step has been given yet: 1 for a decode, more for the rest of a prefill."""
        return len(self.token_ids) - self.num_scheduled

    def append(self, token_id: int) -> str | None:
        """Add a sampled token; return the finish reason if it is the last one."""
        self.token_ids.append(token_id)
        self.sample_pending = False
        if token_id in self.stop_token_ids:
            return "stop"
        return "length" if self.num_tokens >= self.max_tokens else None

    def start_in(self, slot: int) -> SequenceStart:
        """Take `slot` and say so to the ranks."""
        self.slot = slot
        return SequenceStart(
            slot=slot,
            token_ids=np.asarray(self.token_ids, dtype="<i4").tobytes(),
            num_prompt_tokens=self.num_prompt_tokens,
            seed=self.seed,
            sampling=self.sampling,
            stop_token_ids=self.stop_token_ids,
        )

    def stop_running(self) -> tuple[int, list[int]]:
        """Give up slot and blocks, which are returned. Tokens are kept: a later start computes all of them again."""
        assert self.slot is not None, f"{self.request_id} holds no slot"
        slot, blocks = self.slot, self.blocks
        self.slot, self.blocks, self.num_scheduled = None, [], 0
        return slot, blocks


def new_sequence(request: Generate, *, arrival: int, seed: int, capacity: int) -> Sequence:
    """`capacity` is the most tokens, prompt and completion, that a sequence can hold. `seed` is for a request without
    one."""
    sampling = request.sampling
    num_prompt_tokens = len(request.prompt_token_ids)
    max_tokens = capacity if sampling.max_tokens is None else min(capacity, num_prompt_tokens + sampling.max_tokens)
    eos = () if sampling.ignore_eos else request.eos_token_ids
    return Sequence(
        request_id=request.request_id,
        arrival=arrival,
        sampling=sampling,
        seed=seed if sampling.seed is None else sampling.seed,
        stop_token_ids=tuple(dict.fromkeys((*sampling.stop_token_ids, *eos))),
        max_tokens=max_tokens,
        num_prompt_tokens=num_prompt_tokens,
        token_ids=list(request.prompt_token_ids),
    )
