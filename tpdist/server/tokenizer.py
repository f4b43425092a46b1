"""Text to token ids and back, and chat messages to text, as the model's folder says.

Knows nothing of requests. transformers is used through its lazy attributes: PreTrainedTokenizerFast does not import
torch, AutoTokenizer does, so the second is touched only for a model without tokenizer.json.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import transformers

from tpdist.checkpoint.resolve import resolve_model
from tpdist.errors import CheckpointError, RequestError, SettingsError
from tpdist.server.token_bytes import Spelling, read_spelling
from tpdist.settings import Settings

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
)


class Tokenizer:
    """A model's tokenizer and chat template.

    Threads may share it: all that changes is a cache of the bytes of tokens, where every writer writes the same.
    """

    def __init__(self, backend: Any, *, chat_template: str | None = None) -> None:
        """`backend` is a transformers tokenizer; `chat_template` (jinja source) replaces the model's own.

        Raises CheckpointError for a template that is not jinja.
        """
        self._backend = backend
        self._chat_template = chat_template
        self.special_ids = _special_ids(backend)
        self._added_ids = frozenset(backend.added_tokens_decoder)
        self._read_spelling = _spelling(backend)
        self._bytes: dict[int, bytes] = {}
        _check_template(backend, chat_template)

    def __len__(self) -> int:
        return len(self._backend)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of `text`; with `add_special_tokens` as the model wants a prompt to begin (usually BOS)."""
        return list(self._backend.encode(text, add_special_tokens=add_special_tokens, verbose=False))

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Text of `token_ids`, without the clean-up of spaces that would make a prefix differ from the whole."""
        fast = getattr(self._backend, "backend_tokenizer", None)
        if fast is not None:
            return str(fast.decode(list(token_ids), skip_special_tokens=skip_special_tokens))
        return str(
            self._backend.decode(
                list(token_ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
            )
        )

    def token_strings(self, token_ids: Sequence[int]) -> list[str]:
        """The vocabulary's own spelling of each id."""
        return [str(token) for token in self._backend.convert_ids_to_tokens(list(token_ids))]

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token: exact where the vocabulary tells, or else of the text that it makes alone. Empty
        for an id that the tokenizer does not have."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._spelt(token_id)
        return known

    def token_text(self, token_id: int) -> str:
        """The text of one token, with U+FFFD for what is a part of a character only."""
        return self.token_bytes(token_id).decode(errors="replace")

    def _spelt(self, token_id: int) -> bytes:
        entry = self._backend.convert_ids_to_tokens(token_id) if token_id < len(self) else None
        if entry is None:
            return b""
        spelt = None if token_id in self._added_ids else self._read_spelling(entry)
        return self.decode([token_id]).encode() if spelt is None else spelt

    def render_chat(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True) -> str:
        """The prompt of a conversation. It holds its special tokens, so encode it without adding more.

        Raises RequestError when the model has no chat template, or the template refuses these messages.
        """
        if self._chat_template is None and not self._backend.chat_template:
            raise RequestError(
                "this model has no chat template: start the server with --chat-template, or use /v1/completions",
                param="messages",
            )
        try:
            return str(
                self._backend.apply_chat_template(
                    [dict(message) for message in messages],
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    chat_template=self._chat_template,
                )
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise RequestError(f"the chat template refuses these messages: {error}", param="messages") from error


def open_tokenizer(settings: Settings, folder: Path) -> Tokenizer:
    """The tokenizer that the settings ask for: --tokenizer, or else the model's own in `folder`. As load_tokenizer."""
    if settings.tokenizer is not None:
        folder = resolve_model(settings.tokenizer, revision=None)
    return load_tokenizer(folder, chat_template=settings.chat_template)


def load_tokenizer(folder: Path, *, chat_template: str | None = None) -> Tokenizer:
    """Read the tokenizer of the model in `folder`. `chat_template` is a file's name, or jinja source itself.

    Takes about a second and imports transformers: call it on a thread. Raises CheckpointError when the files are
    missing or damaged, SettingsError when `chat_template` is neither a file nor a template.
    """
    template = None if chat_template is None else read_chat_template(chat_template)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise CheckpointError(f"{folder} holds no tokenizer: none of {', '.join(TOKENIZER_FILES)} is there")
    fast = (folder / "tokenizer.json").is_file()
    try:
        kind = transformers.PreTrainedTokenizerFast if fast else transformers.AutoTokenizer
        backend = kind.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exception for a damaged file
        raise CheckpointError(f"cannot read the tokenizer in {folder}: {error}") from error
    return Tokenizer(backend, chat_template=template)


def read_chat_template(value: str) -> str:
    """The jinja source that --chat-template means: the content of a file, or `value` itself if it has braces."""
    if "{" in value:
        return value
    try:
        return Path(value).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(
            f"--chat-template {value!r} is neither a file that can be read nor jinja source: {error}"
        ) from error


def _spelling(backend: Any) -> Spelling:
    """How to read the vocabulary's entries as bytes; None for each entry of a tokenizer that does not tell."""
    fast = getattr(backend, "backend_tokenizer", None)
    decoder = None if fast is None else fast.decoder
    known = None if decoder is None else read_spelling(decoder.__getstate__())
    return known or (lambda entry: None)


def _special_ids(backend: Any) -> frozenset[int]:
    added = backend.added_tokens_decoder.items()
    return frozenset(backend.all_special_ids) | {token_id for token_id, token in added if token.special}


def _check_template(backend: Any, chat_template: str | None) -> None:
    """Compile the template once by rendering one message; a template may well refuse this message."""
    if chat_template is None and not backend.chat_template:
        return
    try:
        backend.apply_chat_template(
            [{"role": "user", "content": "x"}], tokenize=False, add_generation_prompt=True, chat_template=chat_template
        )
    except jinja2.TemplateSyntaxError as error:
        raise CheckpointError(f"the chat template is not valid jinja, line {error.lineno}: {error.message}") from error
    except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError):
        return
