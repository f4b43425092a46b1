"""The bytes that a vocabulary's entry stands for, read from its spelling.

A token may be a part of a character, or begin with a space that decoding it alone would drop; the spelling in the
vocabulary tells both, if the tokenizer's decoder is of a known kind:

    byte-level (GPT-2, Llama 3, Qwen)        each character of the spelling is a byte
    sentencepiece with bytes (Llama 2)       U+2581 is a space, <0xE2> a byte
    any other                                not known here
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

Spelling = Callable[[str], bytes | None]
SPACE = "\u2581"
_BYTE = re.compile("<0x([0-9A-F]{2})>")


def read_spelling(decoder_state: bytes) -> Spelling | None:
    """How to read the entries of a vocabulary whose decoder has this state (JSON of the tokenizers library).

    The function that is returned gives None for an entry that is not spelt so. None: the kind is not known.
    """
    steps = list(_steps(json.loads(decoder_state)))
    kinds = {step["type"] for step in steps}
    if "ByteLevel" in kinds:
        return _read_byte_level
    if "Metaspace" in kinds or any(step.get("pattern") == {"String": SPACE} for step in steps):
        return _read_with_bytes if "ByteFallback" in kinds else _read_with_spaces
    return None


def _steps(state: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    if state["type"] != "Sequence":
        yield state
        return
    for step in state["decoders"]:
        yield from _steps(step)


def _bytes_by_character() -> dict[str, int]:
    """GPT-2's table (bytes_to_unicode in https://github.com/openai/gpt-2/blob/master/src/encoder.py): a byte that
    prints in Latin-1 is itself, the others are U+0100 and up in their order."""
    printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printing]
    return {chr(byte): byte for byte in printing} | {chr(256 + index): byte for index, byte in enumerate(others)}


_BYTE_OF = _bytes_by_character()


def _read_byte_level(entry: str) -> bytes | None:
    if not all(character in _BYTE_OF for character in entry):
        return None
    return bytes(_BYTE_OF[character] for character in entry)


def _read_with_spaces(entry: str) -> bytes:
    return entry.replace(SPACE, " ").encode()


def _read_with_bytes(entry: str) -> bytes:
    byte = _BYTE.fullmatch(entry)
    return bytes([int(byte[1], 16)]) if byte else _read_with_spaces(entry)
