"""How a field of a request is read: strict JSON types, unknown and unsupported fields refused by name.

Knows no endpoint; the bodies are in schema.py.
"""

import difflib
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    PlainValidator,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

MAX_INT = 2**31 - 1
MAX_CHOICES = 1024
MAX_STOP_STRINGS = 32
MAX_STOP_CHARS = 512
MAX_BIASES = 1024
MAX_BIAS = 100
MAX_ID_DIGITS = 10

Prompts = tuple[str | tuple[int, ...], ...]


@dataclass(frozen=True, eq=False)
class Off:
    """Marks a field that is not supported; null and `values` mean that it is not used.

    Compared by identity: Off(0) equal to Off(False) would make typing give both fields the same Annotated.
    """

    values: tuple[Any, ...]

    def __init__(self, *values: Any) -> None:
        object.__setattr__(self, "values", values)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"enum": [None, *self.values], "description": "Not supported: accepted only when it is off."}

    def _check(self, value: Any) -> Any:
        if value is None or any(
            value == off and isinstance(value, bool) == isinstance(off, bool) for off in self.values
        ):
            return value
        raise PydanticCustomError("unsupported", "is not supported by this server; leave it out")


class Strict(BaseModel):
    """Base of all requests: JSON types are taken as they are, and an unknown field is refused with the nearest name."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_fields(cls, data: Any) -> Any:
        known = cls.model_fields
        for name in data if isinstance(data, dict) else ():
            if name not in known:
                near = difflib.get_close_matches(name[:64], known, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise PydanticCustomError("unknown_field", "is not a known field{hint}", {"field": name, "hint": hint})
        return data


def _parse_prompt(value: Any) -> Prompts:
    """One prompt or several, each text or token ids, as a tuple of prompts."""
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and value:
        if all(type(item) is int for item in value):
            return (tuple(value),)
        if all(isinstance(item, str) for item in value):
            return tuple(value)
        if all(isinstance(item, list) and item and all(type(token) is int for token in item) for item in value):
            return tuple(tuple(item) for item in value)
    raise PydanticCustomError("prompt", "must be a string, a list of strings, token ids, or a list of those; not empty")


def _parse_stop(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if stops is None:
        return ()
    if not isinstance(stops, list) or not all(
        isinstance(stop, str) and 0 < len(stop) <= MAX_STOP_CHARS for stop in stops
    ):
        raise PydanticCustomError(
            "stop", "must be a string or a list of strings of 1 to {most} characters", {"most": MAX_STOP_CHARS}
        )
    if len(stops) > MAX_STOP_STRINGS:
        raise PydanticCustomError("stop", "may hold at most {most} strings", {"most": MAX_STOP_STRINGS})
    return tuple(stops)


def _parse_bias(value: Any) -> dict[int, float] | None:
    if value is None:
        return None
    if not isinstance(value, dict) or not all(map(_is_bias, value, value.values())):
        raise PydanticCustomError(
            "value", "must be an object of token ids, each with a bias from -{most} to {most}", {"most": MAX_BIAS}
        )
    if len(value) > MAX_BIASES:
        raise PydanticCustomError("value", "may hold at most {most} token ids", {"most": MAX_BIASES})
    return {int(token): float(bias) for token, bias in value.items()}


def _is_bias(token: Any, bias: Any) -> bool:
    is_id = isinstance(token, str) and len(token) <= MAX_ID_DIGITS and token.isascii() and token.isdecimal()
    return is_id and str(int(token)) == token and type(bias) in (int, float) and -MAX_BIAS <= bias <= MAX_BIAS


Int = Annotated[int, Field(ge=0, le=MAX_INT)]
PositiveInt = Annotated[int, Field(ge=1, le=MAX_INT)]
Text = Annotated[str, Field(min_length=1)]
TokenIds = Annotated[list[Int], Field(min_length=1)]
Several = Field(min_length=1, max_length=MAX_CHOICES)
PromptInput = Text | Annotated[list[Text], Several] | TokenIds | Annotated[list[TokenIds], Several]
PromptField = Annotated[Prompts, PlainValidator(_parse_prompt, json_schema_input_type=PromptInput)]
StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
StopInput = StopText | Annotated[list[StopText], Field(max_length=MAX_STOP_STRINGS)] | None
StopField = Annotated[tuple[str, ...], PlainValidator(_parse_stop, json_schema_input_type=StopInput)]
Bias = Annotated[float, Field(ge=-MAX_BIAS, le=MAX_BIAS)]
BiasInput = Annotated[dict[str, Bias], Field(max_length=MAX_BIASES)] | None
BiasField = Annotated[dict[int, float] | None, PlainValidator(_parse_bias, json_schema_input_type=BiasInput)]
