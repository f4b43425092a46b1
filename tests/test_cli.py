"""The frame of the command line: help, wrong usage, exit codes, and flags that come from settings."""

import errno
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from tpdist.cli import frame
from tpdist.cli.frame import COMMANDS, LazyCommand, command, run
from tpdist.cli.options import settings_options
from tpdist.errors import CheckpointError, InterruptedByUser, JoinError, LostError, PlanError, SettingsError
from tpdist.settings import OPTIONS, Settings

OURS = ("keygen", "probe", "status")
SECTIONS = ("cluster", "placement", "model", "engine", "http", "deadlines")


@command(examples=("tpdist trial ./model",))
@click.argument("model")
@settings_options(*SECTIONS)
def trial(settings: Settings, model: str) -> None:
    """Try the frame."""
    click.echo(f"{model} {settings.port} {settings.insecure} {settings.debug}")


@pytest.fixture
def trial_command(monkeypatch: pytest.MonkeyPatch) -> None:
    for option in OPTIONS.values():
        for variable in option.variables:
            monkeypatch.delenv(variable, raising=False)
    monkeypatch.setitem(COMMANDS, "trial", LazyCommand(f"{__name__}:trial", "Try."))


@pytest.fixture
def run_failing(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run a command that raises the given exception."""

    def run_it(error: BaseException, *flags: str) -> int:
        @command(examples=())
        def failing() -> None:
            """Fail."""
            raise error

        monkeypatch.setattr(sys.modules[__name__], "failing", failing, raising=False)
        monkeypatch.setitem(COMMANDS, "failing", LazyCommand(f"{__name__}:failing", "Fail."))
        return run(["failing", *flags])

    return run_it


def test_help_lists_every_command_and_imports_nothing_heavy() -> None:
    heavy = ("torch", "fastapi", "transformers", "zmq", "pydantic_settings")
    program = (
        "import sys, tpdist.cli.frame as f; code = f.run(['-h'])\n"
        f"print(code, [name for name in {heavy} if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.splitlines()[-1] == "0 []"
    for name in COMMANDS:
        assert f"\n  {name} " in result.stdout


def test_help_answers_at_once() -> None:
    def cpu_seconds() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = cpu_seconds()
    subprocess.run([sys.executable, "-m", "tpdist", "-h"], capture_output=True, timeout=60, check=True)
    assert cpu_seconds() - before < 0.4


@pytest.mark.parametrize("name", OURS)
def test_every_command_has_help_with_examples(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([name, "-h"]) == 0
    text = capsys.readouterr().out
    assert f"Examples:\n  tpdist {name}" in text
    assert "--debug" in text


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("tpdist 0.")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ["Missing command", "`tpdist -h`"]),
        (["sevre"], ["no command sevre", "nearest is serve"]),
        (["status", "--ulr", "x"], ["no option --ulr", "nearest is --url", "`tpdist status -h`"]),
        (["keygen"], ["Missing argument 'FILE'"]),
        (["trial"], ["Missing argument 'MODEL'"]),
        (["trial", ""], ["MODEL is empty", "`tpdist trial -h`"]),
        (["trial", "m", "--max-model-length", "1"], ["no option --max-model-length", "nearest is --max-model-len"]),
        (["trial", "m", "--port", "x"], ["--port=x", "integer"]),
        (["trial", "m", "--worker-id", "0"], ["MISTRALRS_MN_WORKER_SERVER_ADDR"]),
    ],
)
@pytest.mark.usefixtures("trial_command")
def test_wrong_usage_ends_with_2_and_says_what_is_right(
    argv: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    for word in words:
        assert word in err


@pytest.mark.parametrize(
    ("error", "exit_code"),
    [
        (SettingsError("told"), 2),
        (PlanError("told"), 3),
        (CheckpointError("told"), 4),
        (JoinError("told"), 5),
        (LostError("told"), 6),
    ],
)
def test_an_error_ends_with_its_code_and_without_a_traceback(
    error: Exception, exit_code: int, run_failing: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_failing(error) == exit_code
    assert capsys.readouterr().err == "error: told\n"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), InterruptedByUser("")])
def test_an_interrupt_ends_with_130(error: BaseException, run_failing: Callable[..., int]) -> None:
    assert run_failing(error) == 130


def test_an_interrupt_says_by_what_if_that_is_known(
    run_failing: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    run_failing(InterruptedByUser("SIGTERM on head"))
    assert capsys.readouterr().err == "error: interrupted by SIGTERM on head\n"
    run_failing(InterruptedByUser(""))
    assert capsys.readouterr().err == "error: interrupted\n"


def test_too_many_open_files_are_no_bug_but_a_limit_to_raise(
    run_failing: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_failing(OSError(errno.EMFILE, "Too many open files")) == 2
    assert "`ulimit -n 65536`" in (err := capsys.readouterr().err)
    assert "bug" not in err


def test_a_working_directory_that_has_been_deleted_is_named(
    run_failing: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert run_failing(FileNotFoundError(errno.ENOENT, "No such file or directory")) == 2
    assert "the working directory has been deleted" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["-h"], ["probe", "--json"], ["plan", "-h"]])
def test_output_that_cannot_be_written_is_said_in_one_line(words: list[str]) -> None:
    with open("/dev/full", "wb") as full:
        command = [sys.executable, "-m", "tpdist", *words]
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert result.returncode == 2
    assert result.stderr == (
        "error: cannot write the output: No space left on device; free space there, or write elsewhere\n"
    )


def test_an_error_of_a_command_that_does_not_write_stays_a_bug(run_failing: Callable[..., int]) -> None:
    assert run_failing(OSError(errno.ENOSPC, "No space left on device")) == 1


def test_debug_shows_the_traceback_of_a_command_that_cannot_even_be_loaded(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(COMMANDS, "absent", LazyCommand("tpdist.no_such_module:absent", "Absent."))
    assert run(["absent"]) == 1
    assert "Traceback" not in capsys.readouterr().err
    assert run(["absent", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_bug_ends_with_1_and_asks_for_a_report(
    run_failing: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_failing(ZeroDivisionError("by zero")) == 1
    err = capsys.readouterr().err
    assert "internal error: ZeroDivisionError: by zero" in err
    assert "--debug" in err
    assert "Traceback" not in err


def test_debug_shows_the_traceback_by_flag_and_by_variable(
    run_failing: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_failing(PlanError("told"), "--debug") == 3
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setenv("TPDIST_DEBUG", "1")
    assert run_failing(PlanError("told")) == 3
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.usefixtures("trial_command")
def test_flags_reach_the_command_as_settings(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TPDIST_PORT", "1")
    assert run(["trial", "m"]) == 0
    assert run(["trial", "m", "--port", "2", "--insecure", "--debug"]) == 0
    assert capsys.readouterr().out.splitlines() == ["m 1 False False", "m 2 True True"]


@pytest.mark.usefixtures("trial_command")
def test_a_variable_that_no_option_reads_is_a_warning(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TPDIST_PROT", "1")
    assert run(["trial", "m"]) == 0
    assert "TPDIST_PROT is set, but no option reads it; the nearest is TPDIST_PORT" in capsys.readouterr().err


@pytest.mark.usefixtures("trial_command")
def test_help_shows_every_option_with_its_variable_and_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["trial", "-h"]) == 0
    text = capsys.readouterr().out
    words = " ".join(text.split())
    for option in OPTIONS.values():
        assert f" {option.flag} " in words
        assert option.variable in words
    assert "[TPDIST_PORT; default: 8000]" in words
    assert [line for line in text.splitlines() if line and line[0] != " "][1:] == [
        "Options:",
        "Cluster:",
        "Placement:",
        "Model:",
        "Engine:",
        "HTTP:",
        "Deadlines and budgets, in seconds:",
        "Examples:",
    ]


@pytest.mark.parametrize("name", COMMANDS)
def test_the_list_of_commands_knows_the_place_of_each(name: str) -> None:
    module = COMMANDS[name].place.partition(":")[0]
    file = Path(frame.__file__).parents[2] / (module.replace(".", "/") + ".py")
    if not file.exists():
        pytest.skip(f"{module} is not written")
    assert COMMANDS[name].load().name == name
