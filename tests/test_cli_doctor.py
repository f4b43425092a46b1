"""`tpdist doctor` on the command line: its table, and what it refuses."""

import io

import pytest
from examinations import cluster_of
from rich.console import Console

from tpdist.cli.doctor_output import print_diagnosis
from tpdist.cli.frame import run
from tpdist.preflight.verdicts import diagnose
from tpdist.preflight.words import Diagnosis


def shown(diagnosis: Diagnosis, width: int = 80) -> str:
    console = Console(width=width, highlight=False, record=True, file=io.StringIO())
    print_diagnosis(diagnosis, console=console)
    return console.export_text()


def test_a_red_line_says_so_in_words_with_the_next_step_below() -> None:
    examination = cluster_of(1, missing=(1,), global_world_size=None)
    text = shown(Diagnosis(examination=examination, lines=diagnose(examination)), width=200)
    line = next(line for line in text.splitlines() if "RED" in line)
    assert "worker 1" in line
    assert "-> start `tpdist doctor` there" in text
    assert "1 of " in text.splitlines()[-1]


def test_the_table_fits_in_80_columns_and_brackets_stay() -> None:
    examination = cluster_of(2)
    text = shown(Diagnosis(examination=examination, lines=diagnose(examination), advice=("a [b] c",)))
    assert max(map(len, text.splitlines())) <= 80
    assert "plan: a [b] c" in text
    assert "lines are green" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--timeout-s", "0"], "--timeout-s"),
        (["--write-inventory", "/no/such/folder/x.toml"], "no folder"),
        (["--head-num-workers", "1"], "MISTRALRS_MN_HEAD_PORT"),
    ],
)
def test_wrong_usage_ends_with_2_before_anything_is_measured(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["doctor", *words]) == 2
    assert message in capsys.readouterr().err


def test_under_torchrun_there_is_nothing_to_examine(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("RANK", "LOCAL_RANK", "GROUP_RANK")
    sizes = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE")
    variables = {
        **dict.fromkeys(names, "0"),
        **dict.fromkeys(sizes, "1"),
        "MASTER_PORT": "1",
        "TORCHELASTIC_RUN_ID": "x",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert run(["doctor"]) == 2
    assert "torchrun" in capsys.readouterr().err


def test_a_standby_is_told_how_to_be_examined(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--global-world-size", "2", "--standby", "--worker-server-addr", "127.0.0.1:7100"]
    assert run(["doctor", *flags]) == 2
    assert "MISTRALRS_MN_WORKER_ID instead of TPDIST_STANDBY" in capsys.readouterr().err


def test_a_remote_head_needs_the_key(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("tpdist.introduction.addresses_towards", lambda host, port: ("10.0.0.2", "10.0.0.1"))
    flags = ["--global-world-size", "2", "--worker-id", "0", "--worker-server-addr", "10.0.0.1:7100"]
    assert run(["doctor", *flags]) == 2
    assert "TPDIST_KEY_FILE" in capsys.readouterr().err


def test_the_examples_of_the_help_name_the_variables(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "-h"]) == 0
    assert "MISTRALRS_MN_WORKER_SERVER_ADDR" in capsys.readouterr().out
