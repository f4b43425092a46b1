"""Tokens that arrive one by one -> text that can be sent: no half characters, no piece of a stop string.

Pure: no clock, no network. One TextReader reads one sequence.
"""

from collections.abc import Collection, Sequence
from operator import itemgetter
from typing import Protocol

import msgspec

from tpdist.control.messages import Generate, TokenLogprobs, TokenOutput
from tpdist.errors import RequestError

REPLACEMENT = "\ufffd"
CONTEXT_TOKENS = 6
MAX_CHARACTER_BYTES = 4
MAX_HELD_TOKENS = 32


class Decoder(Protocol):
    """What this module needs of a tokenizer."""

    @property
    def special_ids(self) -> Collection[int]: ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str: ...


def check_token_ids(token_ids: Sequence[int], *, vocab_size: int, param: str) -> None:
    """Raise RequestError for an id that the model does not have."""
    if token_ids and not (min(token_ids) >= 0 and max(token_ids) < vocab_size):
        wrong = next(token for token in token_ids if not 0 <= token < vocab_size)
        raise RequestError(
            f"{param} holds token id {str(wrong)[:40]}, but the vocabulary has ids 0 to {vocab_size - 1}", param=param
        )


class Detokenizer:
    """Text of a growing sequence, in pieces whose concatenation is the text of the whole.

    Each push decodes a small window: `_ids[:_read]` is context whose text is out (a decoder treats the first token of
    a text differently, so the window never starts with the new token), the rest is new. `_shown` is the part of the
    window's text that is out. Replacement characters at the end of the window may be the first bytes of a character,
    so they wait; after MAX_HELD_TOKENS they are taken for what the model wrote.
    """

    def __init__(self, decoder: Decoder, *, prompt: Sequence[int], skip_special_tokens: bool) -> None:
        self._decoder = decoder
        self._skipped = decoder.special_ids if skip_special_tokens else frozenset()
        self._ids = self._context(prompt)
        self._read = len(self._ids)
        self._shown = decoder.decode(self._ids)

    def push(self, token: int) -> str:
        """The text that `token` completes; often empty inside a character of several tokens."""
        if token in self._skipped:
            return ""
        self._ids.append(token)
        text = self._decoder.decode(self._ids)
        settled = len(text.rstrip(REPLACEMENT))
        if len(self._ids) - self._read >= MAX_HELD_TOKENS:
            settled = len(text)
        start = self._num_shown(text)
        if settled <= start:
            return ""
        self._shown = text[:settled]
        if settled == len(text):
            self._advance()
        return text[start:settled]

    def flush(self) -> str:
        """What is still held, at the end of the sequence: replacement characters for a character cut in half."""
        text = self._decoder.decode(self._ids)
        start, self._shown = self._num_shown(text), text
        return text[start:]

    def _context(self, prompt: Sequence[int]) -> list[int]:
        """The last tokens of the prompt: a few more than CONTEXT_TOKENS if these would start inside a character."""
        contexts = (
            [token for token in prompt[-size:] if token not in self._skipped]
            for size in range(CONTEXT_TOKENS, CONTEXT_TOKENS + MAX_CHARACTER_BYTES)
        )
        return min(contexts, key=lambda ids: self._decoder.decode(ids).count(REPLACEMENT))

    def _num_shown(self, text: str) -> int:
        """How much of the window's new text is out. A replacement character that has turned into another is not: the
        prompt, or what was held for too long, ended inside a character."""
        return len(self._shown if text.startswith(self._shown) else self._shown.rstrip(REPLACEMENT))

    def _advance(self) -> None:
        self._ids = self._ids[self._read :]
        self._read = len(self._ids)
        self._shown = self._decoder.decode(self._ids)


class StopStrings:
    """Cuts a text at the first stop string, and holds back an end that may be the start of one.

    Invariant: `_held` contains no stop string, and all of it is a proper prefix of one (or it is empty).
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        """With `include` the text is cut after the stop string, otherwise before it."""
        self._stops = tuple(stops)
        self._include = include
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """The text that is certain to be shown. Sets `found` when a stop string is complete."""
        text = self._held + text
        starts = [(text.find(stop), stop) for stop in self._stops if stop in text]
        if starts:
            start, self.found = min(starts, key=itemgetter(0))
            self._held = ""
            return text[: start + len(self.found)] if self._include else text[:start]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        cut = len(text) - held
        self._held = text[cut:]
        return text[:cut]

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper prefix of `stop`."""
    longest = min(len(stop) - 1, len(text))
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)


class Piece(msgspec.Struct, frozen=True, kw_only=True):
    """New text of one answer and the tokens behind it; a whole answer is a piece too.

    `offsets` and `logprobs`, if they were asked for, go along with `token_ids`: where in the answer's text a token
    begins, and its log-probabilities. `prompt_logprobs` are of the prompt's next positions, the first being 1.
    `finish_reason` is None until the last piece: stop or length; `stop_reason` is then the stop string or the one of
    stop_token_ids that ended the answer, if one did.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    offsets: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    num_cached_tokens: int = 0
    queue_s: float | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None


class TextReader:
    """Turns the outputs of one request into pieces. Stop strings count once `min_tokens` tokens are there.

    A token that ended the sequence (end of text, stop_token_ids) is in the token ids, but not in the text unless the
    request includes stop strings in its output.
    """

    def __init__(self, decoder: Decoder, request: Generate, *, index: int = 0, start: int = 0) -> None:
        """`start` is the offset of the answer in a text that begins with something else."""
        sampling = request.sampling
        self._index = index
        self._num_chars = start
        self._sampling = sampling
        self._num_tokens = 0
        self._eos_ids = frozenset(() if sampling.ignore_eos else request.eos_token_ids)
        self._end_ids = (
            frozenset() if sampling.include_stop_str_in_output else self._eos_ids | {*sampling.stop_token_ids}
        )
        self._stops = StopStrings(sampling.stop, include=sampling.include_stop_str_in_output)
        self._detokenizer = Detokenizer(
            decoder, prompt=request.prompt_token_ids, skip_special_tokens=sampling.skip_special_tokens
        )

    @property
    def stop_string_found(self) -> bool:
        """The text is complete although the engine would go on."""
        return self._stops.found is not None

    def push(self, output: TokenOutput) -> Piece:
        """The piece that `output` makes. No more may be pushed once it has a finish_reason."""
        text, offsets = "", []
        for position, token in enumerate(output.token_ids, start=1):
            ends = output.finish_reason == "stop" and position == len(output.token_ids) and token in self._end_ids
            offsets.append(self._num_chars)
            text += self._read_token(token, is_hidden=ends)
            if self.stop_string_found:
                break
        if output.finish_reason is not None and not self.stop_string_found:
            text += self._read_end()
        used = len(offsets)
        return Piece(
            index=self._index,
            text=text,
            token_ids=output.token_ids[:used],
            offsets=tuple(offsets),
            logprobs=output.logprobs[:used],
            prompt_logprobs=output.prompt_logprobs,
            num_cached_tokens=output.num_cached_tokens,
            queue_s=output.queue_s,
            finish_reason="stop" if self.stop_string_found else output.finish_reason,
            stop_reason=self._stops.found or self._stop_token(output),
        )

    def _read_token(self, token: int, *, is_hidden: bool) -> str:
        self._num_tokens += 1
        text = "" if is_hidden else self._detokenizer.push(token)
        self._num_chars += len(text)
        return self._stops.push(text) if self._num_tokens > self._sampling.min_tokens else text

    def _read_end(self) -> str:
        text = self._detokenizer.flush()
        if self._num_tokens > self._sampling.min_tokens:
            text = self._stops.push(text)
        return text if self.stop_string_found else text + self._stops.flush()

    def _stop_token(self, output: TokenOutput) -> int | None:
        """The token of stop_token_ids that ended the sequence; the end of text is no such token."""
        last = output.token_ids[-1] if output.finish_reason == "stop" and output.token_ids else None
        return last if last not in self._eos_ids else None
