"""The commands of tests/bench: their figures, their options, and each of them once on the built-in model."""

import asyncio
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from test_bench_report import record_of

from tpdist import builtin
from tpdist.bench.load import Answer
from tpdist.bench.prompts import Prompt
from tpdist.errors import RequestError

FOLDER = Path(__file__).with_name("bench")
SHARED = ("measuring", "systems", "checkpoint", "collectives", "control_processes", "models", "simulated_nodes")
COMMANDS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in SHARED)
END_S = 240.0


@pytest.fixture
def measuring(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    return import_module("measuring")


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    return import_module("memory")


def test_alternations_go_forwards_and_backwards_and_keep_the_order_of_their_values(measuring: Any) -> None:
    asked: list[str] = []

    def measure(name: str) -> Callable[[], int]:
        return lambda: asked.append(name) or len(asked)

    values = measuring.alternate(3, {"a": measure("a"), "b": measure("b")})
    assert asked == ["a", "b", "b", "a", "a", "b"]
    assert values == {"a": [1, 4, 5], "b": [2, 3, 6]}


def test_a_ratio_is_made_within_each_alternation(measuring: Any) -> None:
    assert list(measuring.ratio("r", [1.0, 9.0], [2.0, 3.0]).values) == [0.5, 3.0]
    with pytest.raises(ValueError, match="zip"):
        measuring.ratio("r", [1.0], [2.0, 3.0])


def test_figures_show_the_median_and_the_spread(measuring: Any, capsys: pytest.CaptureFixture[str]) -> None:
    figures = [measuring.Figure("speed", [1234.5, 10.0, 99.0], "tokens/s"), measuring.Figure("part", [0.12345])]
    measuring.show(figures, as_json=False)
    first, second = capsys.readouterr().out.splitlines()
    assert first.split() == ["speed", "99", "tokens/s", "(10", "to", "1234)"]
    assert second.split() == ["part", "0.123", "(0.123", "to", "0.123)"]
    measuring.show(figures, as_json=True)
    shown = json.loads(capsys.readouterr().out)["figures"]
    assert [figure["median"] for figure in shown] == [99.0, 0.12345]
    assert shown[0]["values"] == [1234.5, 10.0, 99.0]


def test_tokens_count_while_all_requests_decode(measuring: Any) -> None:
    """Between 2.0 and 4.0: two tokens in two seconds of the first, three in three of the second, whose step goes on."""
    first = record_of((1.0, 1), (2.0, 1), (3.0, 1), (4.0, 1))
    second = record_of((2.0, 1), (2.5, 1), (3.5, 1), (5.0, 1))
    assert measuring.together_tokens_per_s([first, second]) == 2 / 2.0 + 3 / 3.0
    assert measuring.together_tokens_per_s([first]) == 3 / 3.0
    assert measuring.together_tokens_per_s([first, record_of((9.0, 1), (9.5, 1))]) is None


def test_no_token_of_a_step_is_lost_because_its_tokens_come_apart(measuring: Any) -> None:
    """48 steps of 0.1 s for 16 requests, whose tokens of a step come 10 us apart."""
    records = [record_of(*((step * 0.1 + row * 1e-5, 1) for step in range(48))) for row in range(16)]
    assert measuring.together_tokens_per_s(records) == pytest.approx(16 / 0.1, rel=1e-9)


class Target:
    """Answers `num_tokens` tokens, or fails."""

    def __init__(self, num_tokens: int | None) -> None:
        self.prompts: list[Prompt] = []
        self._num_tokens = num_tokens

    async def answer(self, prompt: Prompt, *, max_tokens: int, on_tokens: Callable[[int], None]) -> Answer:
        self.prompts.append(prompt)
        if self._num_tokens is None:
            raise RequestError("told so")
        on_tokens(self._num_tokens)
        return Answer(num_tokens=self._num_tokens)


LOAD = {"concurrency": 2, "num_requests": 4, "prompt_tokens": 30, "max_tokens": 3}


def test_the_load_generator_sends_prompts_that_never_repeat(measuring: Any) -> None:
    target = Target(3)
    generator = measuring.LoadGenerator(target, vocab_size=1000)
    for _ in range(2):
        assert len(asyncio.run(generator.measure(**LOAD))["ttft_s"]) == 4
    assert len(set(target.prompts)) == 8
    asyncio.run(generator.measure(**LOAD, shared_prefix_tokens=20))
    assert len({prompt[:20] for prompt in target.prompts[8:]}) == 1


@pytest.mark.parametrize("num_tokens", [None, 2])
def test_a_load_with_failed_or_short_answers_is_no_figure(measuring: Any, num_tokens: int | None) -> None:
    generator = measuring.LoadGenerator(Target(num_tokens), vocab_size=1000)
    with pytest.raises(SystemExit, match="failed"):
        asyncio.run(generator.measure(**LOAD))


def test_anonymous_memory_is_read_from_the_kernel(memory: Any) -> None:
    assert memory.anonymous_bytes("Rss: 9 kB\nAnonymous:     12 kB\nLazyFree: 1 kB\n") == 12 * 1024
    assert memory.anonymous_bytes(Path("/proc/self/smaps_rollup").read_text()) > 1 << 20


def test_the_peak_of_anonymous_memory_is_kept_when_it_is_given_back(memory: Any) -> None:
    pid, deadline = os.getpid(), time.monotonic() + END_S
    before = memory.read_anonymous_bytes(pid)
    with memory.peaks([pid]) as peaks:
        held = b"x" * (256 << 20)
        while peaks[pid] < before + len(held) // 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        del held
    assert peaks[pid] - memory.read_anonymous_bytes(pid) > 64 << 20


class Facts:
    """A system that tells its limits and counts the tokens that it is asked for."""

    def __init__(self, *, kv_tokens: int, max_tokens: int) -> None:
        self.loads: list[dict[str, int]] = []
        self._facts = {"kv_tokens": kv_tokens, "max_tokens": max_tokens, "ranks": []}

    def ask(self, do: str, **options: int) -> dict[str, Any]:
        if do == "load":
            self.loads.append(options)
        return self._facts


@pytest.mark.parametrize("kv_tokens", [504, 1007, 2978, 5956])
def test_the_load_of_the_memory_benchmark_passes_through_the_whole_cache(memory: Any, kv_tokens: int) -> None:
    """Of each prompt the blocks of 16 tokens that are full stay in the cache, until all of it is used."""
    system = Facts(kv_tokens=kv_tokens, max_tokens=504)
    memory.load(system, prompt_tokens=500)
    (load,) = system.loads
    assert load["concurrency"] * (load["prompt_tokens"] + load["max_tokens"]) <= kv_tokens
    assert load["num_requests"] * 496 >= kv_tokens


@pytest.mark.parametrize(("kv_tokens", "max_tokens"), [(503, 2048), (4096, 64)])
def test_the_memory_benchmark_says_that_not_one_prompt_fits(memory: Any, kv_tokens: int, max_tokens: int) -> None:
    with pytest.raises(SystemExit, match=r"a prompt of 500 tokens .* do not fit.*--prompt-tokens"):
        memory.load(Facts(kv_tokens=kv_tokens, max_tokens=max_tokens), prompt_tokens=500)


def test_a_server_that_does_not_end_by_itself_is_killed(
    measuring: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script, told = tmp_path / "deaf", tmp_path / "pid"
    script.write_text(
        f"#!{sys.executable}\nimport os, pathlib, signal\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"made = pathlib.Path({str(told)!r} + '.new')\nmade.write_text(str(os.getpid()))\nmade.rename({str(told)!r})\n"
        "while True:\n    signal.pause()\n"
    )
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.setattr(measuring, "_is_ready", lambda url: told.exists())
    monkeypatch.setattr(measuring, "STOP_S", 0.1)
    with measuring.served(tmp_path):
        pid = int(told.read_text())
    assert not Path(f"/proc/{pid}").exists()


def test_every_command_has_help_that_says_what_it_claims() -> None:
    """One process for all: each of them imports torch."""
    program = (
        "import runpy, sys\n"
        f"for name in {COMMANDS}:\n"
        f"    sys.argv = [name, '-h']\n"
        "    try:\n"
        f"        runpy.run_path({str(FOLDER)!r} + '/' + name + '.py', run_name='__main__')\n"
        "    except SystemExit as end:\n"
        "        print(name, 'ended with', end.code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONPATH": str(FOLDER)},
        capture_output=True,
        text=True,
        timeout=END_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for name in COMMANDS:
        assert f"{name} ended with 0" in done.stdout
        assert f"python tests/bench/{name}.py [--runs " in done.stdout


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "flags", "ratios"),
    [
        ("decode", ["--tokens", "8"], 9),
        ("prefill", ["--prompt-tokens", "32"], 3),
        ("serving", ["--clients", "4", "--tokens", "8"], 1),
        ("prefix_cache", ["--prefix-tokens", "40"], 1),
        ("clients", ["--clients", "4", "--tokens", "8"], 1),
        ("time_to_ready", [], 1),
        ("pipeline", ["--tokens", "8"], 4),
        ("timeline", ["--tokens", "8", "--steps", "4"], 1),
        ("memory", ["--prompt-tokens", "32", "--kv-cache", "1MiB"], 0),
    ],
)
def test_each_command_measures_the_built_in_model(name: str, flags: list[str], ratios: int) -> None:
    command = [sys.executable, str(FOLDER / f"{name}.py"), "--runs", "1", "--threads", "2", "--json"]
    done = subprocess.run(
        [*command, "--model", str(builtin.path()), *flags],
        capture_output=True,
        text=True,
        timeout=END_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)["figures"]
    assert sum(not figure["unit"] for figure in figures) == ratios
    assert all(len(figure["values"]) == 1 for figure in figures)
    assert all(figure["median"] > 0 for figure in figures if not re.search("^added|part of the time", figure["name"]))
