"""Prompts to measure with: random token ids that no prefix cache has seen, or the texts of a file."""

import json
import random
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path

from tpdist.errors import SettingsError

Prompt = str | tuple[int, ...]


def random_prompts(
    count: int, *, num_tokens: int, vocab_size: int, seed: int, run: int, shared_prefix_tokens: int = 0
) -> list[Prompt]:
    """`count` prompts of random token ids below `vocab_size`, others for every `seed` and every `run`.

    The first `shared_prefix_tokens` of them are the same within a run, and new in the next one.
    """
    generator = random.Random(f"{seed} {run}")
    prefix = _ids(generator, shared_prefix_tokens, vocab_size)
    return [prefix + _ids(generator, num_tokens - shared_prefix_tokens, vocab_size) for _ in range(count)]


def _ids(generator: random.Random, count: int, vocab_size: int) -> tuple[int, ...]:
    return tuple(generator.choices(range(vocab_size), k=count))


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file: JSON objects with "prompt", one a line, or plain lines. Raises SettingsError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"cannot read --prompt-file {path}: {error}") from error
    prompts = [_prompt(line, path, number) for number, line in enumerate(lines, start=1) if line.strip()]
    if not prompts:
        raise SettingsError(f"--prompt-file {path} holds no prompt: write one a line")
    return prompts


def _prompt(line: str, path: Path, number: int) -> str:
    if not line.lstrip().startswith("{"):
        return line
    try:
        value = json.loads(line)
    except ValueError as error:
        raise SettingsError(f"--prompt-file {path}, line {number}: starts as JSON, but is not: {error}") from error
    prompt = value.get("prompt")
    if not isinstance(prompt, str) or not prompt:
        raise SettingsError(f'--prompt-file {path}, line {number}: has no text under "prompt"')
    return prompt


def take(prompts: Sequence[Prompt], count: int, *, skip: int) -> list[Prompt]:
    """`count` prompts after the first `skip`, in their order, from the beginning again after the last."""
    return list(islice(cycle(prompts), skip, skip + count))
