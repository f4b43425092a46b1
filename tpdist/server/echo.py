"""A prompt as the beginning of its own answer: `echo` of completions.

The text is the client's own, or that of its token ids; where each token begins is read from the bytes of the tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from tpdist.control.messages import TokenLogprobs
from tpdist.server.text import Piece
from tpdist.server.tokenizer import Tokenizer

_CONTINUATION = bytes(range(0x80, 0xC0))
"""Bytes of UTF-8 that do not begin a character."""


@dataclass(frozen=True)
class Echo:
    """A prompt as text and tokens. `offsets`: the character of `text` at which each token begins, or in which."""

    text: str
    token_ids: tuple[int, ...]
    offsets: tuple[int, ...]

    def as_piece(self, index: int, prompt_logprobs: Sequence[TokenLogprobs]) -> Piece:
        """The piece that comes before all others of answer `index`. Nothing predicts the first token of a prompt."""
        first = TokenLogprobs(self.token_ids[:1], (), 0)
        return Piece(
            index=index, text=self.text, token_ids=(), offsets=self.offsets, logprobs=(first, *prompt_logprobs)
        )


def make_echo(tokenizer: Tokenizer, prompt: str | Sequence[int], token_ids: tuple[int, ...]) -> Echo:
    """The echo of `prompt`, whose tokens are `token_ids`."""
    text = prompt if isinstance(prompt, str) else tokenizer.decode(token_ids)
    return Echo(text, token_ids, _offsets(text, [tokenizer.token_bytes(token) for token in token_ids]))


def _offsets(text: str, spelt: Sequence[bytes]) -> tuple[int, ...]:
    """Where in `text` each token begins, given their bytes: what a tokenizer puts before a text counts nothing, even
    if it holds the same text."""
    whole = b"".join(spelt)
    before = -_num_characters(whole[: max(0, whole.rfind(text.encode()))])
    offsets = []
    for token in spelt:
        inside = token[:1] in _CONTINUATION if token else False
        offsets.append(min(max(before - inside, 0), len(text)))
        before += _num_characters(token)
    return tuple(offsets)


def _num_characters(spelt: bytes) -> int:
    """How many characters begin in these bytes."""
    return len(spelt.translate(None, _CONTINUATION))
