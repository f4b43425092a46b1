"""What `tpdist bench` was asked for: loads, prompts and the plot, and what of it is refused before anything runs."""

import os
import secrets
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from tpdist import log
from tpdist.bench.load import Load, Loop
from tpdist.bench.prompts import read_prompts
from tpdist.bench.session import Workload
from tpdist.errors import SettingsError
from tpdist.settings import OPTIONS, Role, Settings

DEFAULT_CONCURRENCY = (1.0, 4.0, 16.0)
FOREIGN_VOCAB_SIZE = 1000
MAX_SEED = 2**31 - 1
ENGINE = tuple(name for name, option in OPTIONS.items() if option.section not in ("http", "general"))


def numbers(
    kind: type[int] | type[float],
) -> Callable[[click.Context, click.Parameter, str | None], tuple[float, ...]]:
    """A callback that reads positive numbers, separated by commas."""

    def read(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[float, ...]:
        try:
            numbers = tuple(float(kind(part)) for part in value.split(",")) if value else ()
        except ValueError as error:
            raise click.BadParameter(f"{value} is not as 1,4,16: {error}", ctx, param) from error
        if not all(0 < number < float("inf") for number in numbers):
            raise click.BadParameter(f"{value}: every number must be above 0", ctx, param)
        return numbers

    return read


def loads_of(given: dict[str, Any]) -> list[Load]:
    """The loads in their order. Raises SettingsError for one with fewer requests than it keeps running."""
    concurrency, rates, num_requests = given["concurrency"], given["rate"], given["num_requests"]
    if not concurrency and not rates:
        concurrency = DEFAULT_CONCURRENCY
    most = max(concurrency, default=0)
    if num_requests is not None and num_requests < most:
        raise SettingsError(
            f"--num-requests {num_requests} is less than --concurrency {most:g}: so many would never run at once"
        )
    return [Load(Loop.CLOSED, value) for value in concurrency] + [Load(Loop.OPEN, value) for value in rates]


def workload_of(given: dict[str, Any]) -> Workload:
    """What every request asks for. Raises SettingsError."""
    if given["shared_prefix_tokens"] >= given["prompt_tokens"]:
        raise SettingsError(
            f"--shared-prefix-tokens {given['shared_prefix_tokens']} must be less than --prompt-tokens "
            f"{given['prompt_tokens']}"
        )
    file, seed = given["prompt_file"], given["prompt_seed"]
    return Workload(
        prompt_tokens=given["prompt_tokens"],
        max_tokens=given["max_tokens"],
        vocab_size=given["vocab_size"] or FOREIGN_VOCAB_SIZE,
        seed=secrets.randbelow(MAX_SEED) if seed is None else seed,
        timeout_s=given["request_timeout_s"],
        shared_prefix_tokens=given["shared_prefix_tokens"],
        num_requests=given["num_requests"],
        prompts=None if file is None else read_prompts(file),
    )


def quiet(settings: Settings) -> Settings:
    """Settings for a node of this process. Raises SettingsError for a role that serves no requests of its own."""
    if settings.role not in (Role.SINGLE, Role.HEAD):
        raise SettingsError(f"`tpdist bench MODEL` cannot run as a {settings.role.value}; run `tpdist serve` there")
    if "log_level" in settings.model_fields_set:
        return settings
    log.configure(level="WARNING", log_format=settings.log_format)
    return settings.model_copy(update={"log_level": "WARNING"})


def refuse_ignored_flags(*, with_url: bool, with_file: bool) -> None:
    """A flag that would change nothing is a mistake, a variable of the environment may be meant for another command.

    Raises SettingsError with the flag's name."""
    if with_url:
        _refuse(ENGINE, "is for MODEL; with --url set it on the server")
    else:
        _refuse(("model_name", "api_key_file"), "is for --url; MODEL runs here")
    if with_file:
        _refuse(
            ("prompt_tokens", "shared_prefix_tokens", "vocab_size"), "is for random prompts; with --prompt-file omit it"
        )


def _refuse(names: Collection[str], reason: str) -> None:
    context = click.get_current_context()
    for param in context.command.params:
        given = param.name in names and context.get_parameter_source(param.name) is ParameterSource.COMMANDLINE
        if given:
            raise SettingsError(f"{param.opts[0]} {reason}")


def check_plot(path: Path) -> None:
    """Raise SettingsError if the plot could not be written: better before the measurement than after it."""
    if not path.parent.is_dir():
        raise SettingsError(f"cannot write --plot {path}: {path.parent} is no folder")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise SettingsError(f"cannot write --plot {path}: no permission")


def write_plot(path: Path, text: str) -> None:
    """Raises SettingsError."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise SettingsError(f"cannot write --plot {path}: {error}") from error
