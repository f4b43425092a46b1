"""How the tokens of one request are chosen: one validated, immutable value from the client to the sampler.

Names and defaults follow vLLM's. It travels inside wire messages, so it is a msgspec Struct.
"""

from typing import Any

import msgspec

from tpdist.errors import RequestError

MAX_SEED = 2**63 - 1
LARGEST = 1e6
"""Temperatures and penalties beyond this, or under its inverse, would overflow in float32."""
MAX_LOGPROBS = 20
MAX_ANSWERS = 128


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """`temperature` 0 is greedy; `top_k` 0 or -1 and `top_p` 1 are off.

    `seed` makes draws a function of (seed, index of the token) alone; without one the head picks a seed.
    `logprobs` and `prompt_logprobs`: how many of the most probable tokens to report at each position beside the one
    that stands there (0: that one alone; None: nothing). `frequency_penalty` and `presence_penalty` count the
    completion's tokens; `logit_bias` adds to logits by token id.
    `stop` strings are looked for by the agent that holds the text, which also makes `n` sequences of one request
    (answer i is drawn with seed + i) and picks the best of `best_of`; everything else is the sampler's or scheduler's.
    Raises RequestError that names the field when a value is out of range.
    """

    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    include_stop_str_in_output: bool = False
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    n: int = 1
    best_of: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            msgspec.structs.force_setattr(self, "stop", (self.stop,))
        for name in ("stop", "stop_token_ids"):
            msgspec.structs.force_setattr(self, name, tuple(getattr(self, name) or ()))
        if self.top_k == -1:
            msgspec.structs.force_setattr(self, "top_k", 0)
        self._check("max_tokens", self.max_tokens is None or 1 <= self.max_tokens < 2**31, "at least 1")
        self._check("min_tokens", self.min_tokens >= 0, "0 or more")
        if self.max_tokens is not None:
            self._check("min_tokens", self.min_tokens <= self.max_tokens, f"at most max_tokens={self.max_tokens}")
        self._check("temperature", 0 <= self.temperature <= LARGEST, f"between 0 and {LARGEST:g}")
        self._check("top_k", 0 <= self.top_k < 2**31, "0 or -1 (off), or at least 1")
        self._check("top_p", 0 < self.top_p <= 1, "above 0 and at most 1")
        self._check("min_p", 0 <= self.min_p <= 1, "between 0 and 1")
        fits = 1 / LARGEST <= self.repetition_penalty <= LARGEST
        self._check("repetition_penalty", fits, f"between {1 / LARGEST:g} and {LARGEST:g}")
        for name in ("frequency_penalty", "presence_penalty"):
            self._check(name, -2 <= getattr(self, name) <= 2, "between -2 and 2")
        bias = self.logit_bias or {}
        self._check("logit_bias", all(0 <= token < 2**31 for token in bias), "token ids with their bias")
        self._check("logit_bias", all(-100 <= value <= 100 for value in bias.values()), "biases between -100 and 100")
        self._check("n", 1 <= self.n <= MAX_ANSWERS, f"between 1 and {MAX_ANSWERS}")
        fits = self.best_of is None or self.n <= self.best_of <= MAX_ANSWERS
        self._check("best_of", fits, f"between n={self.n} and {MAX_ANSWERS}")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            self._check(name, value is None or 0 <= value <= MAX_LOGPROBS, f"between 0 and {MAX_LOGPROBS}")
        self._check("seed", self.seed is None or -MAX_SEED - 1 <= self.seed <= MAX_SEED, "a 64-bit integer")
        self._check("stop", all(self.stop), "one or more strings, none of them empty")
        self._check("stop_token_ids", all(0 <= token < 2**31 for token in self.stop_token_ids), "token ids")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def _check(self, field: str, holds: bool, expected: str) -> None:
        if not holds:
            value: Any = getattr(self, field)
            raise RequestError(f"{field} is {value!r}, but must be {expected}", param=field)
