"""The commands of tests/bench: their figures, their options, and each of them once on the built-in model."""

import asyncio
import json
import subprocess
import sys
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
SHARED = ("measuring", "systems", "checkpoint", "collectives")
COMMANDS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in SHARED)
END_S = 240.0


@pytest.fixture
def measuring(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    return import_module("measuring")


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
    """Between 2.0 and 4.0: the tokens at 3.0 and 4.0 of the first, at 2.5 and 3.5 of the second."""
    first = record_of((1.0, 1), (2.0, 1), (3.0, 1), (4.0, 1))
    second = record_of((2.0, 1), (2.5, 1), (3.5, 1), (5.0, 1))
    assert measuring.together_tokens_per_s([first, second]) == 4 / 2.0
    assert measuring.together_tokens_per_s([first]) == 3 / 3.0
    assert measuring.together_tokens_per_s([first, record_of((9.0, 1), (9.5, 1))]) is None


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


def test_anonymous_memory_is_read_from_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    memory = import_module("memory")
    assert memory.anonymous_bytes("Rss: 9 kB\nAnonymous:     12 kB\nLazyFree: 1 kB\n") == 12 * 1024
    assert memory.anonymous_bytes(Path("/proc/self/smaps_rollup").read_text()) > 1 << 20


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
    assert all(figure["median"] > 0 for figure in figures if not figure["name"].startswith("added"))
