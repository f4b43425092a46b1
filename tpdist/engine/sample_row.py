"""What decides the tokens of one slot besides its logits: options, seed, and the tokens so far.

One SampleRow lives as long as a sequence holds its slot, so that a step builds nothing anew. It knows neither tensors
nor steps.
"""

from dataclasses import dataclass, field

import numpy as np

from tpdist.sampling_params import SamplingParams


class TokenCounts:
    """The distinct tokens of a prompt and of the completion after it, each with how often it stands in the completion.

    A sampled token costs the same however long the sequence is: tokens keep the place of their first appearance.
    """

    def __init__(self, prompt: np.ndarray, *, capacity: int) -> None:
        """`capacity`: the most tokens, prompt and completion, that there can be."""
        first = np.unique(prompt).tolist()
        self._ids = np.zeros(capacity)
        self._counts = np.zeros(capacity)
        self._ids[: len(first)] = first
        self._places = {token: place for place, token in enumerate(first)}
        self._num_counted = 0

    def up_to(self, completion: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Count the tokens that `completion` has gained since the last call; return ids and counts, [n] float64."""
        for token in completion[self._num_counted :].tolist():
            place = self._places.setdefault(token, len(self._places))
            self._ids[place] = token
            self._counts[place] += 1
        self._num_counted = len(completion)
        return self._ids[: len(self._places)], self._counts[: len(self._places)]


@dataclass(slots=True, eq=False, kw_only=True)
class SampleRow:
    """`tokens` is the memory of the slot, [max_tokens] int32. Its first `num_tokens` count: prompt and completion.

    `greedy`: there is no random draw. `adjusted`: logits may change before a token is chosen. `penalised`: by how the
    tokens so far are repeated.
    """

    sampling: SamplingParams
    stop_token_ids: tuple[int, ...]
    seed: int
    num_prompt_tokens: int
    tokens: np.ndarray
    num_tokens: int
    greedy: bool = field(init=False)
    adjusted: bool = field(init=False)
    penalised: bool = field(init=False)
    _counts: TokenCounts | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        options = self.sampling
        self.greedy = options.greedy
        repeats = options.repetition_penalty != 1
        self.penalised = repeats or options.frequency_penalty != 0 or options.presence_penalty != 0
        self.adjusted = self.penalised or bool(options.logit_bias) or options.min_tokens > 0

    @property
    def num_sampled(self) -> int:
        return self.num_tokens - self.num_prompt_tokens

    def token_counts(self) -> tuple[np.ndarray, np.ndarray]:
        """Ids of the tokens so far and how often each stands in the completion, [n] float64. Tokens of the prompt alone
        are left out unless the repetition penalty asks for them."""
        if self._counts is None:
            penalised = self.num_prompt_tokens if self.sampling.repetition_penalty != 1 else 0
            self._counts = TokenCounts(self.tokens[:penalised], capacity=len(self.tokens))
        return self._counts.up_to(self.tokens[self.num_prompt_tokens : self.num_tokens])
