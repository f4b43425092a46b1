"""Flags made from the fields of Settings, so that a flag, its variable, its default and its help cannot disagree.

Values are checked by Settings alone: every option reaches it as the text that was typed.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import click

from tpdist import log
from tpdist.cli.frame import Invocation
from tpdist.settings import OPTIONS, Settings, asked_log_format
from tpdist.settings_options import Option

HEADINGS = {
    "cluster": "Cluster",
    "placement": "Placement",
    "model": "Model",
    "engine": "Engine",
    "http": "HTTP",
    "deadlines": "Deadlines and budgets, in seconds",
    "general": "Options",
}

logger = logging.getLogger(__name__)


class SettingsOption(click.Option):
    """One flag of one setting; `heading` is where help shows it."""

    def __init__(self, param_decls: Sequence[str], *, setting: Option) -> None:
        flag = f"{setting.flag}/{setting.off_flag}" if setting.off_flag else setting.flag
        super().__init__(
            [*param_decls, *filter(None, [setting.short]), flag, setting.name],
            is_flag=setting.is_switch,
            default=None,
            type=None if setting.is_switch else str,
            metavar=None if setting.is_switch else setting.metavar,
            help=_help(setting),
        )
        self.heading = HEADINGS[setting.section]


def settings_options(*sections: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command the flags of these sections and the general ones, and its function the `Settings` that they and
    the environment make, as the keyword `settings`. Logging is configured before the function runs."""
    assert set(sections) <= set(HEADINGS), sections
    chosen = [
        setting for setting in OPTIONS.values() if setting.section in (*sections, "general") and setting.name != "debug"
    ]

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def with_settings(**given: Any) -> Any:
            flags = {setting.name: given.pop(setting.name) for setting in chosen}
            invocation = click.get_current_context().find_object(Invocation)
            flags["debug"] = True if invocation and invocation.debug else None
            return function(settings=_load(flags), **given)

        decorated: Callable[..., Any] = with_settings
        for setting in reversed(chosen):
            decorated = click.option(cls=SettingsOption, setting=setting)(decorated)
        return decorated

    return decorate


def _load(flags: dict[str, Any]) -> Settings:
    log.configure(log_format=asked_log_format(flags))
    settings = Settings.load(flags)
    log.configure(level=settings.log_level, log_format=settings.log_format)
    for name, near in settings.unknown_variables:
        logger.warning("%s is set, but no option reads it; the nearest is %s", name, near)
    return settings


def _help(setting: Option) -> str:
    default = "on" if setting.off_flag else setting.default
    shown = "" if default is None or default is False else f"; default: {default}"
    return f"{setting.description} [{' or '.join(setting.variables)}{shown}]"
