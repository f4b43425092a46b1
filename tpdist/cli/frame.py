"""The frame of every command: help, nearest names for typing errors, and one place where errors become exit codes.

Knows the commands by name only: a command's module is imported when that command runs, so that `tpdist -h` answers
at once.
"""

import errno
import importlib
import os
import resource
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import click

from tpdist import log
from tpdist.errors import InterruptedByUser, SettingsError, TpdistError
from tpdist.settings_options import nearest

HELP_FLAGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
INTERNAL_ERROR = 1
WRITERS = ("click.utils", "rich.")
"""The modules through which commands write what they have to say."""


@dataclass(frozen=True)
class LazyCommand:
    """Where a command lives ("module:function"), and its line in `tpdist -h`."""

    place: str
    summary: str

    def load(self) -> click.Command:
        module, _, name = self.place.partition(":")
        command = getattr(importlib.import_module(module), name)
        assert isinstance(command, click.Command), f"{self.place} is not a click command"
        return command


COMMANDS = {
    "serve": LazyCommand("tpdist.cli.serve:serve", "Start this node: head, worker, single node or torchrun rank."),
    "generate": LazyCommand("tpdist.cli.generate:generate", "Print one answer, without a server."),
    "plan": LazyCommand("tpdist.cli.plan:plan", "Show where a model would go, before anything is loaded."),
    "demo": LazyCommand("tpdist.cli.demo:demo", "Run the built-in tiny model over two nodes on this machine."),
    "bench": LazyCommand("tpdist.cli.bench:bench", "Measure latency and throughput under load."),
    "doctor": LazyCommand("tpdist.cli.doctor:doctor", "Check this machine, and every link between the nodes."),
    "status": LazyCommand("tpdist.cli.status:status", "Show a cluster as its head sees it."),
    "probe": LazyCommand("tpdist.cli.probe:probe", "Show what this machine has: versions, devices, free memory."),
    "keygen": LazyCommand("tpdist.cli.keygen:keygen", "Make a cluster key."),
}


@dataclass
class Invocation:
    """What one run of the program has found out about itself. `debug` shows tracebacks."""

    debug: bool = False


class LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command:
        if cmd_name not in COMMANDS:
            raise click.UsageError(f"there is no command {cmd_name}; the nearest is {nearest(cmd_name, COMMANDS)}", ctx)
        return COMMANDS[cmd_name].load()

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, command.summary) for name, command in COMMANDS.items()])


class FramedCommand(click.Command):
    """A command whose help ends with examples, and whose options stand under the heading of their section."""

    def __init__(self, *args: Any, examples: Sequence[str] = (), **attributes: Any) -> None:
        attributes["context_settings"] = HELP_FLAGS
        super().__init__(*args, **attributes)
        self.examples = examples

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            rest = super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            flags = [flag for param in self.get_params(ctx) for flag in param.opts if flag.startswith("--")]
            message = f"there is no option {error.option_name}; the nearest is {nearest(error.option_name, flags)}"
            raise click.UsageError(message, ctx) from error
        for param in self.get_params(ctx):
            if isinstance(param, click.Argument) and ctx.params.get(str(param.name)) == "":
                name = param.human_readable_name
                raise click.UsageError(f"{name} is empty: is the variable that it comes from set?", ctx)
        return rest

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        by_heading: dict[str, list[tuple[str, str]]] = {"Options": []}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None and isinstance(param, click.Option):
                by_heading.setdefault(getattr(param, "heading", "Options"), []).append(record)
        for heading, records in by_heading.items():
            with formatter.section(heading):
                formatter.write_dl(records)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Examples"):
            formatter.write("".join(f"  {example}\n" for example in self.examples))


def command(*, examples: Sequence[str]) -> Callable[[Callable[..., Any]], click.Command]:
    """Make a command of a function. Its docstring is the help; a returned number is the exit code."""

    def decorate(function: Callable[..., Any]) -> click.Command:
        made = click.command(cls=FramedCommand, examples=examples)(function)
        made.params.append(_debug_option())
        return made

    return decorate


def _debug_option() -> click.Option:
    def remember(ctx: click.Context, param: click.Parameter, value: bool) -> bool:
        invocation = ctx.find_object(Invocation)
        if invocation is not None:
            invocation.debug = value
        return value

    return click.Option(
        ["--debug"],
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=remember,
        envvar="TPDIST_DEBUG",
        help="Show a traceback when the command ends with an error. [TPDIST_DEBUG]",
    )


@click.group(cls=LazyGroup, context_settings=HELP_FLAGS, no_args_is_help=False)
@click.version_option(version("tpdist"), "--version", message="%(prog)s %(version)s")
def cli() -> None:
    """Serve one language model from many GPUs on one or many machines.

    \b
    Examples:
      tpdist demo                              two nodes on this machine, no model needed
      tpdist serve ./model                     this machine alone, all its GPUs
      tpdist generate ./model --prompt Hello   one answer, no server
      tpdist serve -h                          all settings, with their variables and defaults

    Exit codes: 0 success; 1 internal error; 2 wrong usage or settings; 3 the model does not fit or cannot be sharded
    so; 4 checkpoint missing or damaged; 5 a node did not join or disagrees; 6 a node or rank was lost; 130 interrupted.
    """


def run(argv: Sequence[str] | None = None) -> int:
    """Run one command line (None: this process's) and return its exit code. Errors go to stderr, in one form."""
    invocation = Invocation(debug="--debug" in (sys.argv if argv is None else argv))
    try:
        result = cli.main(args=argv, prog_name="tpdist", standalone_mode=False, obj=invocation)
    except Exception as error:
        return _report(error, trace=traceback.format_exc() if invocation.debug else "")
    return result if isinstance(result, int) else 0


def _report(error: Exception, *, trace: str) -> int:
    """Say on stderr what ended the command; return its exit code."""
    match error:
        case click.Abort():
            message, exit_code = "interrupted", InterruptedByUser.exit_code
        case InterruptedByUser():
            message, exit_code = f"interrupted by {error}" if str(error) else "interrupted", error.exit_code
        case click.UsageError():
            path = error.ctx.command_path if error.ctx else "tpdist"
            message, exit_code = f"{error.format_message()}\n`{path} -h` shows what there is", SettingsError.exit_code
        case click.ClickException():
            message, exit_code = error.format_message(), SettingsError.exit_code
        case TpdistError():
            message, exit_code = str(error), error.exit_code
        case _ if message := _trouble_outside(error):
            exit_code = SettingsError.exit_code
        case _:
            what = f"internal error: {type(error).__name__}: {error}"
            message = f"{what}\nThis is a bug: please report it, with what the same command says with --debug"
            exit_code = INTERNAL_ERROR
    with suppress(OSError):  # where nothing can be written the exit code tells
        log.show_error(message, exit_code=exit_code, traceback=trace)
    return exit_code


def _trouble_outside(error: Exception) -> str:
    """What its user has to change around the program, if an error that no command foresees is about that."""
    if getattr(error, "errno", None) == errno.EMFILE:
        allowed, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        return (
            f"too many open files: this process may open {allowed}, and at most {most} (`ulimit -Hn`); allow more, as "
            "with `ulimit -n 65536`, or with LimitNOFILE=65536 in its systemd unit"
        )
    if isinstance(error, FileNotFoundError) and not _has_working_directory():
        return "the working directory has been deleted: change to one that exists (`cd`), and start again"
    if isinstance(error, OSError) and _comes_from(error, WRITERS):
        _discard_output()
        return f"cannot write the output: {error.strerror or error}; free space there, or write elsewhere"
    return ""


def _has_working_directory() -> bool:
    try:
        os.getcwd()
    except OSError:
        return False
    return True


def _comes_from(error: Exception, modules: tuple[str, ...]) -> bool:
    """Whether one of these modules was at work when it was raised."""
    names = [each.f_globals.get("__name__", "") for each, _ in traceback.walk_tb(error.__traceback__)]
    return any(name.startswith(modules) for name in names)


def _discard_output() -> None:
    """What is still buffered goes nowhere: the interpreter would try to write it again at its end, and complain."""
    with suppress(OSError), open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
