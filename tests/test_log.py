"""One line an event: for people as text, for programs as JSON, whoever wrote to stderr and however."""

import json
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tpdist import log
from tpdist.cli.frame import run

KEYS = ["time", "level", "node", "rank", "epoch", "logger", "message"]
logger = logging.getLogger("tpdist.some.module")


@pytest.fixture(autouse=True)
def kept_logging() -> Iterator[None]:
    """Other tests find logging as it was."""
    ours, others = logging.getLogger("tpdist"), logging.getLogger()
    before = (ours.handlers[:], ours.level, ours.propagate, others.handlers[:])
    yield
    log.configure()
    ours.handlers[:], ours.level, ours.propagate, others.handlers[:] = before


def events(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    """What was written to stderr, all of it JSON."""
    found = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert all(isinstance(event, dict) for event in found)
    return found


def fail() -> None:
    raise ValueError("broken\nin two lines")


def test_text_is_a_line_with_time_level_and_context(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure(node="head", rank=1, epoch=2)
    logger.warning("read %d bytes", 5)
    line = capsys.readouterr().err
    assert re.fullmatch(r"\d\d:\d\d:\d\d\.\d{3} WARNING node=head rank=1 epoch=2 read 5 bytes\n", line)


def test_json_is_one_object_a_line_with_all_keys(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure(log_format="json", node="head", rank=1, epoch=2)
    logger.warning("read %d bytes,\nthen rested", 5)
    log.add_context(epoch=3)
    logger.info("\u00e9 \ud800")
    first, second = events(capsys)
    assert list(first) == KEYS
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", first.pop("time"))
    expected = {"level": "WARNING", "node": "head", "rank": 1, "epoch": 2, "logger": "tpdist.some.module"}
    assert first == {**expected, "message": "read 5 bytes,\nthen rested"}
    assert (second["epoch"], second["message"]) == (3, "\u00e9 \ud800")


def test_what_does_not_apply_is_null_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure(log_format="json", node="worker-0")
    logger.info("x")
    (event,) = events(capsys)
    assert [event[key] for key in ("node", "rank", "epoch")] == ["worker-0", None, None]


def test_the_level_holds_in_both_formats(capsys: pytest.CaptureFixture[str]) -> None:
    for log_format in log.LogFormat.__args__:  # type: ignore[attr-defined]
        log.configure(log_format=log_format, level="WARNING")
        logger.info("x")
    assert capsys.readouterr().err == ""


def test_a_traceback_is_a_part_of_its_event(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure(log_format="json")
    try:
        fail()
    except ValueError:
        logger.exception("it failed")
    (event,) = events(capsys)
    assert event["message"] == "it failed"
    assert event["exception"].startswith("Traceback (most recent call last):\n")
    assert event["exception"].endswith("ValueError: broken\nin two lines")


def test_fields_of_a_record_stand_in_its_event(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure(log_format="json")
    logger.info("the plan", extra={"fields": {"plan": {"ranks": 2}}})
    assert events(capsys)[0]["plan"] == {"ranks": 2}


def test_what_is_written_without_a_logger_becomes_events(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure(log_format="json", node="head")
    print("two\nlines", file=sys.stderr)
    print("a bar\rthat moves\r", end="\n", file=sys.stderr)
    logging.getLogger("somebody.else").warning("careful")
    found = events(capsys)
    assert [event["message"] for event in found] == ["two", "lines", "a bar", "that moves", "careful"]
    assert [event["logger"] for event in found] == [None] * 4 + ["somebody.else"]
    assert all((list(event), event["node"]) == (KEYS, "head") for event in found)
    assert not sys.stderr.isatty()


def test_lines_of_other_processes_are_passed_on_as_the_format_wants(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure(log_format="json", node="head", rank=7)
    logger.info("of a rank")
    event = capsys.readouterr().err.strip()
    log.configure(log_format="json", node="head")
    for line in (event, "free(): invalid pointer", '{"time": 1}', '{"time": '):
        log.pass_on(line, rank=3, epoch=2)
    found = events(capsys)
    assert found[0] == json.loads(event)
    assert [(each["rank"], each["epoch"], each["message"]) for each in found[1:]] == [
        (3, 2, "free(): invalid pointer"),
        (3, 2, '{"time": 1}'),
        (3, 2, '{"time": '),
    ]
    log.configure()
    log.pass_on(event, rank=3)
    assert capsys.readouterr().err == event + "\n"


def test_an_event_is_readable_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure(log_format="json", rank=7)
    try:
        fail()
    except ValueError:
        logger.exception("it failed")
    lines = log.readable(capsys.readouterr().err.strip()).splitlines()
    assert re.fullmatch(r"\d{4}-\S+Z ERROR   it failed", lines[0])
    assert (lines[1], lines[-1]) == ("Traceback (most recent call last):", "in two lines")
    assert log.readable("free(): invalid pointer") == "free(): invalid pointer"


def test_text_again_after_json_leaves_nothing_behind(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure(log_format="json")
    log.configure()
    assert not log.logs_json()
    logging.getLogger("somebody.else").info("not ours")
    logger.info("x")
    assert capsys.readouterr().err.endswith("INFO     x\n")


# -- commands ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", [True, False])
def test_the_last_error_of_a_command_is_an_event_with_its_exit_code(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, flag: bool
) -> None:
    if not flag:
        monkeypatch.setenv("TPDIST_LOG_FORMAT", "json")
    options = ["--log-format", "json"] if flag else []
    assert run(["plan", "/no/such/model", "--devices", "1GiB", *options]) == 4
    (event,) = events(capsys)
    assert (event["level"], event["exit_code"]) == ("ERROR", 4)
    assert "/no/such/model" in event["message"]
    assert not event["message"].startswith("error:")


def test_settings_that_are_wrong_are_reported_in_the_format_that_was_asked_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(["plan", "x", "--log-format", "json", "--block-size", "none"]) == 2
    (event,) = events(capsys)
    assert event["exit_code"] == 2
    assert "--block-size=none" in event["message"]
    assert run(["plan", "x", "--log-format", "xml"]) == 2
    assert "--log-format=xml" in capsys.readouterr().err


def test_debug_puts_the_traceback_into_the_event(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "/no/such/model", "--devices", "1GiB", "--log-format", "json", "--debug"]) == 4
    (event,) = events(capsys)
    assert "CheckpointError" in event["exception"]


def test_an_uncaught_error_of_a_thread_breaks_no_line() -> None:
    program = """
import threading
from tpdist import log
log.configure(log_format="json")
thread = threading.Thread(target=lambda: 1 / 0)
thread.start()
thread.join()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    messages = [json.loads(line)["message"] for line in done.stderr.splitlines()]
    assert messages[-1] == "ZeroDivisionError: division by zero"
