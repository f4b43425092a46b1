"""`tpdist bench`: against a server that answers what the test says, and once with a model in process."""

import json
import os
import signal
import socket
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from openai_fakes import OpenAIFake, chunk, events, openai_fake, usage

from tpdist import builtin
from tpdist.cli.frame import run

SHORT = ("--concurrency", "2", "--num-requests", "4", "--max-tokens", "3")
QUICK = (*SHORT, "--prompt-tokens", "5")
END_S = 120.0


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("TPDIST_", "MISTRALRS_"))]:
        monkeypatch.delenv(name)


@pytest.fixture
def fake() -> Iterator[OpenAIFake]:
    with openai_fake() as server:
        yield server


@pytest.fixture
def bench(fake: OpenAIFake, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run the command against the server; its exit code, stdout and stderr."""

    def run_it(*flags: str) -> tuple[int, str, str]:
        code = run(["bench", "--url", fake.url, *flags])
        return (code, *capsys.readouterr())

    return run_it


def test_the_table_shows_every_load_and_the_seed(bench: Any, fake: OpenAIFake) -> None:
    code, out, err = bench(*QUICK[2:], "--concurrency", "1,2", "--rate", "500", "--prompt-seed", "7")
    assert (code, err) == (0, "")
    for word in (
        "big",
        fake.url,
        "5 prompt tokens",
        "at once",
        "a second",
        "TTFT ms",
        "ITL ms",
        "p99",
        "req/s",
        "seed 7",
    ):
        assert word in out
    assert "failed" not in out
    assert "memory" not in out
    assert len(fake.asked) == 1 + 3 * 4
    assert max(len(line) for line in out.splitlines()) <= 80


def test_the_json_has_every_figure(bench: Any) -> None:
    code, out, _ = bench(*QUICK, "--json", "--prompt-seed", "7")
    assert code == 0
    report = json.loads(out)
    assert (report["model"], report["seed"], report["max_tokens"], report["memory"]) == ("big", 7, 3, None)
    (point,) = report["points"]
    assert (point["loop"], point["load"], point["num_requests"], point["num_failed"]) == ("closed", 2, 4, 0)
    assert (point["num_tokens"], point["short_answers"]) == (12, 0)
    for name in ("ttft_s", "itl_s", "request_s"):
        assert 0 <= point[name]["p50"] <= point[name]["p90"] <= point[name]["p99"]


def test_no_prompt_repeats_unless_the_seed_does(bench: Any, fake: OpenAIFake) -> None:
    for seed in ((), (), ("--prompt-seed", "1"), ("--prompt-seed", "1")):
        assert bench(*QUICK, "--prompt-tokens", "20", *seed)[0] == 0
    prompts = [tuple(body["prompt"]) for body in fake.asked]
    assert len(set(prompts[:15])) == 15
    assert sorted(prompts[10:15]) == sorted(prompts[15:])
    assert all(len(prompt) == 20 for prompt in prompts)


def test_prompts_of_a_file_are_sent_as_text(bench: Any, fake: OpenAIFake, tmp_path: Path) -> None:
    file = tmp_path / "prompts"
    file.write_text('{"prompt": "first"}\nsecond\n')
    code, out, _ = bench(*SHORT, "--prompt-file", str(file))
    assert code == 0
    assert sorted(body["prompt"] for body in fake.asked) == ["first"] * 3 + ["second"] * 2
    assert "came more than once" in out


def test_the_plot_is_written(bench: Any, tmp_path: Path) -> None:
    file = tmp_path / "latency.svg"
    assert bench(*QUICK, "--plot", str(file))[0] == 0
    assert ElementTree.parse(file).getroot().tag.endswith("svg")


def test_a_plot_without_a_folder_is_refused_before_the_first_request(
    bench: Any, fake: OpenAIFake, tmp_path: Path
) -> None:
    code, out, err = bench(*QUICK, "--plot", str(tmp_path / "none" / "latency.svg"))
    assert (code, out) == (2, "")
    assert f"cannot write --plot {tmp_path}/none/latency.svg: {tmp_path}/none is no folder" in " ".join(err.split())
    assert fake.asked == []


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_a_plot_that_cannot_be_written_leaves_the_report(bench: Any, flags: tuple[str, ...]) -> None:
    code, out, err = bench(*QUICK, *flags, "--plot", "/dev/full")
    assert code == 2
    assert "cannot write --plot /dev/full" in err
    assert "seed" in out


def test_failed_requests_are_counted_with_the_first_error(bench: Any, fake: OpenAIFake) -> None:
    good = events(*(chunk(token_ids=[1]) for _ in range(3)), usage(3))
    fake.streams = [good, good, 503, 429, good]
    code, out, err = bench(*QUICK, "--concurrency", "1")
    assert (code, err) == (0, "")
    assert "failed" in out
    assert "2 of 4 requests failed; the first: HTTP 503: told so" in " ".join(out.split())


def test_a_load_without_an_answer_is_an_error_after_the_table(bench: Any, fake: OpenAIFake) -> None:
    fake.streams = [events(chunk(token_ids=[1, 2, 3]), usage(3)), 503]
    code, out, err = bench(*QUICK)
    assert code == 2
    assert "seed" in out
    assert "all 4 requests of the closed loop at 2 failed; the first: HTTP 503" in err


def test_short_answers_are_told(bench: Any, fake: OpenAIFake) -> None:
    fake.streams = [events(chunk(token_ids=[1]), chunk(token_ids=[2]), usage(2))]
    assert "4 answers were shorter than asked for" in bench(*QUICK)[1]


def test_cached_prompt_tokens_are_told(bench: Any, fake: OpenAIFake) -> None:
    fake.streams = [events(chunk(token_ids=[1, 2, 3]), usage(3, cached=4))]
    assert "16 prompt tokens came from the prefix cache" in bench(*QUICK)[1]


def test_a_server_that_refuses_the_first_request_ends_it_with_what_to_try(bench: Any, fake: OpenAIFake) -> None:
    fake.streams = [400]
    code, out, err = bench(*QUICK)
    assert (code, out) == (2, "")
    for word in ("the first request failed: HTTP 400: told so", "--prompt-file", "--vocab-size"):
        assert word in err
    assert len(fake.asked) == 1


def test_the_first_key_of_the_file_is_sent_to_models_and_requests(bench: Any, fake: OpenAIFake, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\nfirst\nsecond\n")
    fake.key = "first"
    assert bench(*QUICK, "--api-key-file", str(file))[0] == 0
    code, _, err = bench(*QUICK)
    assert code == 2
    assert "401" in err
    assert "--api-key-file" in err


def test_a_model_that_is_not_there_is_told(bench: Any) -> None:
    code, _, err = bench(*QUICK, "--model", "huge")
    assert code == 2
    assert "no model huge; it has big, small" in err


def test_a_server_that_is_not_there_ends_with_5(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        assert run(["bench", "--url", url]) == 5
    assert f"cannot reach {url}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("bench",), "either MODEL"),
        (("bench", "model", "--url", "http://a"), "either MODEL"),
        (("bench", "--url", "http://a", "--threads", "2"), "--threads is for MODEL"),
        (("bench", "--url", "a"), "--url must be"),
        (("bench", "--url", "http://a", "--concurrency", "1,x"), "--concurrency"),
        (("bench", "--url", "http://a", "--concurrency", "0"), "above 0"),
        (("bench", "--url", "http://a", "--concurrency", "1.5"), "1.5"),
        (("bench", "--url", "http://a", "--rate", "-1"), "above 0"),
        (("bench", "--url", "http://a", "--rate", "inf"), "above 0"),
        (("bench", "--url", "http://a", "--shared-prefix-tokens", "128"), "less than --prompt-tokens 128"),
        (("bench", "--url", "http://a", "--prompt-file", "/none"), "cannot read --prompt-file"),
        (("bench", "--url", "http://a", "--prompt-file", "/none", "--prompt-tokens", "5"), "--prompt-tokens is for"),
        (("bench", "model", "--prompt-file", "/none", "--shared-prefix-tokens", "5"), "--shared-prefix-tokens is for"),
        (("bench", "model", "--prompt-file", "/none", "--vocab-size", "5"), "--vocab-size is for"),
        (("bench", "model", "--model", "big"), "--model is for --url"),
        (("bench", "model", "--api-key-file", __file__), "--api-key-file is for --url"),
        (
            ("bench", "--url", "http://a", "--concurrency", "2,9,3", "--num-requests", "8"),
            "--num-requests 8 is less than --concurrency 9",
        ),
        (("bench", "model", "--num-requests", "15"), "--num-requests 15 is less than --concurrency 16"),
        (("bench", "--urls", "http://a"), "nearest is --url"),
    ],
)
def test_wrong_usage_is_told(flags: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(list(flags)) == 2
    assert told in capsys.readouterr().err


def test_a_key_file_of_the_environment_is_no_mistake_of_a_model_that_runs_here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TPDIST_API_KEY_FILE", __file__)
    assert run(["bench", "/none"]) != 0
    assert "--api-key-file" not in capsys.readouterr().err


def test_a_worker_is_told_to_serve(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("MISTRALRS_MN_GLOBAL_WORLD_SIZE", "2")
    monkeypatch.setenv("MISTRALRS_MN_WORKER_ID", "0")
    monkeypatch.setenv("MISTRALRS_MN_WORKER_SERVER_ADDR", "127.0.0.1:1")
    assert run(["bench", "model"]) == 2
    assert "cannot run as a worker" in capsys.readouterr().err


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "-h"]) == 0
    text = capsys.readouterr().out
    assert "Examples:\n  tpdist bench ./model" in text
    assert "--shared-prefix-tokens" in text


# -- with a model -----------------------------------------------------------------------------------------------------


def command(*flags: str) -> list[str]:
    small = ("--device", "cpu", "--threads", "1", "--kv-cache-memory-bytes", "4MiB")
    return [sys.executable, "-m", "tpdist", "bench", str(builtin.path()), *small, *flags]


@pytest.mark.e2e
def test_a_model_in_process_is_measured_with_its_start_and_its_memory() -> None:
    flags = ("--concurrency", "1,4", "--num-requests", "8", "--prompt-tokens", "20", "--max-tokens", "12", "--json")
    done = subprocess.run(command(*flags), capture_output=True, text=True, timeout=END_S, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert [point["num_tokens"] for point in report["points"]] == [96, 96]
    assert all(point["num_failed"] == point["short_answers"] == 0 for point in report["points"])
    assert all(0 < point["memory_fraction"] < 1 for point in report["points"])
    assert len(report["memory"]["read_bytes_per_s"]) == 2
    assert report["start"]["load_bytes"] > 1 << 20
    assert 0 < report["start"]["load_s"] < report["start"]["time_to_ready_s"]


@pytest.mark.e2e
def test_an_answer_that_does_not_fit_the_context_is_refused_with_the_numbers() -> None:
    done = subprocess.run(command("--prompt-tokens", "60"), capture_output=True, text=True, timeout=END_S, check=False)
    assert done.returncode == 2, done.stderr
    assert "a prompt of 60 tokens and --max-tokens 64 make 124" in done.stderr
    assert "at most 64" in done.stderr


@pytest.mark.e2e
def test_ctrl_c_ends_a_measurement_with_130_and_leaves_no_rank() -> None:
    flags = ("--prompt-tokens", "8", "--max-tokens", "8", "--concurrency", "1", "--num-requests", "1000000")
    process = subprocess.Popen(
        command(*flags, "--log-level", "INFO"), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr is not None
        assert any("now ready" in line for line in process.stderr)
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=END_S)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130, err
    assert out == ""
    assert children
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
