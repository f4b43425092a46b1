"""A JSON file of a checkpoint, read key by key: what is missing or of the wrong type is named with file and key.

Knows no key of any model.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tpdist.errors import CheckpointError


@dataclass(frozen=True)
class ConfigFile:
    """A JSON object and where it came from. `prefix` is the path of keys that led to it. A key that is null counts as
    absent, as in transformers."""

    path: Path
    values: Mapping[str, Any]
    prefix: str = ""

    @classmethod
    def read(cls, path: Path) -> "ConfigFile":
        """Raises CheckpointError if `path` is not a readable file that holds one JSON object."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise CheckpointError(f"{path} does not exist; a model folder needs a {path.name}") from error
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} is not valid JSON: {error}") from error
        if not isinstance(values, dict):
            raise CheckpointError(f"{path} must hold a JSON object, found {_kind(values)}")
        return cls(path, values)

    def with_defaults(self, defaults: Mapping[str, Any]) -> "ConfigFile":
        """The same file, with `defaults` for the keys that it does not have at all; a key that is null stays null."""
        return replace(self, values={**defaults, **self.values})

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def error(self, key: str, problem: str) -> CheckpointError:
        """An error that names the file and the key."""
        return CheckpointError(f"{self.path}: {self.prefix}{key} {problem}")

    def require(self, key: str) -> None:
        if not self.has(key):
            raise self.error(key, "is missing or null")

    def section(self, key: str) -> "ConfigFile | None":
        """The object under `key`."""
        if not self.has(key):
            return None
        if not isinstance(self.values[key], dict):
            raise self._wrong(key, "an object")
        return ConfigFile(self.path, self.values[key], f"{self.prefix}{key}.")

    def positive(self, key: str, default: int | None = None) -> int:
        """An integer of at least one."""
        value = self._get(key, default)
        if not _is_integer(value) or value < 1:
            raise self._wrong(key, "a positive integer")
        return int(value)

    def count(self, key: str) -> int:
        """An integer of at least zero."""
        value = self._get(key, None)
        if not _is_integer(value) or value < 0:
            raise self._wrong(key, "an integer of at least 0")
        return int(value)

    def positive_number(self, key: str, default: float | None = None) -> float:
        """A finite number above zero."""
        value = self._get(key, default)
        if not _is_number(value) or not 0 < value < math.inf:
            raise self._wrong(key, "a positive number")
        return float(value)

    def number(self, key: str) -> float | None:
        """A finite number, or None if the key is absent."""
        if not self.has(key):
            return None
        if not _is_number(self.values[key]) or not math.isfinite(self.values[key]):
            raise self._wrong(key, "a number")
        return float(self.values[key])

    def flag(self, key: str, default: bool = False) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, "a string")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of strings."""
        value = self._get(key, None)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self._wrong(key, "a list of strings")
        return tuple(value)

    def token_id(self, key: str) -> int | None:
        """A token id, or None if the key is absent."""
        ids = self.token_ids(key)
        if len(ids) > 1:
            raise self._wrong(key, "one token id")
        return ids[0] if ids else None

    def token_ids(self, key: str) -> tuple[int, ...]:
        """A token id or a list of them; () if the key is absent."""
        if not self.has(key):
            return ()
        value = self.values[key]
        ids = value if isinstance(value, list) else [value]
        if not all(_is_integer(item) and item >= 0 for item in ids):
            raise self._wrong(key, "a token id or a list of token ids")
        return tuple(ids)

    def _get(self, key: str, default: Any) -> Any:
        if self.has(key):
            return self.values[key]
        if default is None:
            self.require(key)
        return default

    def _wrong(self, key: str, expected: str) -> CheckpointError:
        value = self.values[key]
        return self.error(key, f"must be {expected}, found {_kind(value)} {json.dumps(value)[:80]}")


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _kind(value: object) -> str:
    """The JSON name of a value's type."""
    names = {dict: "object", list: "array", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")
