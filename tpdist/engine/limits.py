"""What one request may ask of the engine: refuses those that could never run. It knows nothing of what runs now."""

from collections.abc import Collection
from dataclasses import dataclass

from tpdist.control.messages import Generate
from tpdist.errors import RequestError


@dataclass(frozen=True, kw_only=True)
class Limits:
    max_model_len: int
    num_blocks: int
    block_size: int
    vocab_size: int

    @property
    def capacity(self) -> int:
        """Most tokens, prompt and completion, that one sequence can hold."""
        return min(self.max_model_len, self.num_blocks * self.block_size)

    def check(self, request: Generate) -> None:
        """Raise RequestError if `request` can never run."""
        length = len(request.prompt_token_ids)
        if length == 0:
            raise RequestError("the prompt has no tokens, but must have at least one", param="prompt")
        if length >= self.capacity:
            raise RequestError(f"the prompt has {length} tokens, but {self._capacity_in_words()}", param="prompt")
        self._check_ids(request.prompt_token_ids, "the prompt has", param="prompt")
        self._check_ids(request.sampling.logit_bias or (), "logit_bias names", param="logit_bias")

    def _check_ids(self, token_ids: Collection[int], who: str, *, param: str) -> None:
        if token_ids and not 0 <= min(token_ids) <= max(token_ids) < self.vocab_size:
            wrong = min(token_ids) if min(token_ids) < 0 else max(token_ids)
            message = f"{who} token id {wrong}, but the model's ids are 0 to {self.vocab_size - 1}"
            raise RequestError(message, param=param)

    def _capacity_in_words(self) -> str:
        cache = self.num_blocks * self.block_size
        if self.max_model_len <= cache:
            return f"the longest sequence here has {self.max_model_len}, at least one of which is of the answer"
        return (
            f"the KV cache holds {cache} ({self.num_blocks} blocks of {self.block_size}), which includes at least one "
            f"token of the answer; a larger --kv-cache-memory-bytes or --gpu-memory-utilization makes room for up to "
            f"{self.max_model_len}"
        )
