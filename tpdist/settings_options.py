"""What an option is: one declared field with its variables, flag, section and help.

Knows nothing of which options exist; settings_cluster.py and settings.py declare them, cli/ turns them into flags.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal, get_args

from pydantic import AliasChoices, Field
from pydantic.fields import FieldInfo

MAX_COUNT = 2**31 - 1
"""The most of anything that is counted in tokens or sequences."""

Section = Literal["cluster", "placement", "model", "engine", "http", "deadlines", "general"]
SECTIONS: tuple[str, ...] = get_args(Section)


@dataclass(frozen=True, kw_only=True)
class Option:
    """One option as its users meet it. The first of `variables` is the one that messages name."""

    name: str
    variables: tuple[str, ...]
    section: str
    metavar: str
    default: object
    short: str
    is_switch: bool
    description: str

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def off_flag(self) -> str:
        """What turns a switch off that is on by default; empty for other options."""
        return "--no-" + self.name.replace("_", "-") if self.is_switch and self.default else ""

    @property
    def variable(self) -> str:
        return self.variables[0]


def option(
    default: Any,
    description: str,
    *,
    section: Section,
    metavar: str,
    variables: str = "",
    short: str = "",
    **limits: Any,
) -> Any:
    """Declare a field of the settings model. `variables` are its environment variables, separated by spaces; without
    them it is TPDIST_<NAME>. `short`: a flag of one letter. `limits` are pydantic's (ge, le, gt, lt)."""
    extra: dict[str, Any] = {"section": section, "metavar": metavar, "short": short}
    alias = AliasChoices(*variables.split()) if variables else None
    return Field(default, description=description, validation_alias=alias, json_schema_extra=extra, **limits)


def options_of(fields: dict[str, FieldInfo]) -> dict[str, Option]:
    """The options among the fields of a model, by name, in the order of their declaration."""
    return {name: _describe(name, field) for name, field in fields.items() if field.json_schema_extra}


def _describe(name: str, field: FieldInfo) -> Option:
    alias, extra = field.validation_alias, field.json_schema_extra
    assert isinstance(extra, dict)
    variables = [str(choice) for choice in alias.choices] if isinstance(alias, AliasChoices) else []
    return Option(
        name=name,
        variables=tuple(variables) or (f"TPDIST_{name.upper()}",),
        section=str(extra["section"]),
        metavar=str(extra["metavar"]),
        default=field.default,
        short=str(extra["short"]),
        is_switch=field.annotation is bool,
        description=field.description or "",
    )


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name that is most like `name`."""
    candidates = sorted(known)
    return get_close_matches(name, candidates, n=1, cutoff=0.0)[0] if candidates else ""
