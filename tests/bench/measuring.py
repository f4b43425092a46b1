"""What the benchmarks share: systems under test in processes of their own, alternation, and figures with their spread.

A benchmark starts its systems (systems.py, or `tpdist serve`), which stay alive; one of them computes at a time. Every
alternation asks each of them once, and ratios are made within an alternation, so that a machine that is slower for a
while is slower for all.
"""

import argparse
import asyncio
import json
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any, TypeVar
from urllib.error import URLError
from urllib.request import ProxyHandler, build_opener

from checkpoint import NUM_LAYERS, checkpoint

from tpdist.bench.http import Address
from tpdist.bench.load import Load, Loop, Record, Target, run_load
from tpdist.bench.openai_server import OpenAIServer
from tpdist.bench.prompts import random_prompts
from tpdist.bench.report import answered, summarise, ttft_s
from tpdist.preflight import cgroup

ANSWER_S = 600.0
READY_S = 180.0
STOP_S = 60.0
POLL_S = 0.02
SYSTEMS = Path(__file__).with_name("systems.py")
DIRECT = build_opener(ProxyHandler({}))
Value = TypeVar("Value")

# -- options and checkpoint -------------------------------------------------------------------------------------------


def parser(doc: str, *, runs: int = 5) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--runs", type=int, default=runs, metavar="N", help=f"alternations (default: {runs})")
    made.add_argument(
        "--model",
        "--keep",
        type=Path,
        metavar="FOLDER",
        help="the checkpoint; made there, and left there, if there is none (default: a temporary one)",
    )
    made.add_argument(
        "--layers",
        type=int,
        default=NUM_LAYERS,
        metavar="N",
        help=f"of a checkpoint that is made, to try a benchmark out (default: {NUM_LAYERS}, 1.1 billion weights)",
    )
    made.add_argument(
        "--threads",
        type=int,
        default=cgroup.num_cpus(),
        metavar="N",
        help="of every system, all its ranks together (default: the CPUs of this machine)",
    )
    made.add_argument("--json", action="store_true", help="print one JSON object")
    return made


@contextmanager
def model_folder(arguments: argparse.Namespace) -> Iterator[Path]:
    """The checkpoint that the options ask for."""
    with checkpoint(arguments.model, num_layers=arguments.layers) as folder:
        yield folder


# -- systems in processes of their own --------------------------------------------------------------------------------


class System:
    """A process that answers one command at a time, as systems.py describes."""

    def __init__(self, *arguments: str) -> None:
        self._name = " ".join(arguments[:1])
        self._process = subprocess.Popen(
            [sys.executable, str(SYSTEMS), *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, do: str, **options: Any) -> dict[str, Any]:
        """What the system answers. Ends the benchmark if it does not."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        watchdog = threading.Timer(ANSWER_S, self._process.kill)
        watchdog.start()
        try:
            self._process.stdin.write(json.dumps({"do": do, **options}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            watchdog.cancel()
        if not line:
            raise SystemExit(f"{self._name} ended, or did not answer `{do}` within {ANSWER_S:g} s")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End it: a system ends when nobody can ask it any more."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        _wait_or_kill(self._process)


def _wait_or_kill(process: "subprocess.Popen[Any]") -> None:
    """Until a process that was told to end has ended."""
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextmanager
def systems(**arguments: Sequence[str]) -> Iterator[dict[str, System]]:
    """Processes by name, each started with its arguments. They load one after the other, and are warm."""
    with ExitStack() as stack:
        started: dict[str, System] = {}
        for name, words in arguments.items():
            started[name] = System(*words)
            stack.callback(started[name].close)
            started[name].ask("warm up")
        yield started


def tpdist_arguments(folder: Path, *, ranks: int, threads: int, stages: int = 1, kv_cache: str = "512MiB") -> list[str]:
    """A system that is `ranks` ranks of tpdist in `stages` stages; `threads` are those of all of them."""
    sizes = ["--ranks", str(ranks), "--stages", str(stages), "--threads", str(max(1, threads // ranks))]
    return ["tpdist", "--model", str(folder), *sizes, "--kv-cache", kv_cache]


def transformers_arguments(folder: Path, *, threads: int) -> list[str]:
    """A system that is transformers in one process."""
    return ["transformers", "--model", str(folder), "--threads", str(threads)]


def machine_arguments(*, threads: int) -> list[str]:
    """A system that is the bare machine."""
    return ["machine", "--threads", str(threads)]


# -- load -------------------------------------------------------------------------------------------------------------


class LoadGenerator:
    """The load generator of `tpdist bench` on one target, with prompts that never repeat."""

    def __init__(self, target: Target, *, vocab_size: int) -> None:
        self._target = target
        self._vocab_size = vocab_size
        self._seed = secrets.randbelow(2**31)
        self._runs = count()

    async def measure(
        self,
        *,
        concurrency: int,
        num_requests: int,
        prompt_tokens: int,
        max_tokens: int,
        shared_prefix_tokens: int = 0,
    ) -> dict[str, Any]:
        """Tokens per second over the whole time, and while all requests decode; times to first token in their order."""
        prompts = random_prompts(
            num_requests,
            num_tokens=prompt_tokens,
            vocab_size=self._vocab_size,
            seed=self._seed,
            run=next(self._runs),
            shared_prefix_tokens=shared_prefix_tokens,
        )
        load = Load(Loop.CLOSED, concurrency)
        records = await run_load(self._target, prompts, load, max_tokens=max_tokens, timeout_s=ANSWER_S)
        report = summarise(load, records, max_tokens=max_tokens)
        if report.num_failed or report.short_answers:
            raise SystemExit(f"{report.num_failed} requests failed, {report.short_answers} were short: {report}")
        return {
            "tokens_per_s": report.tokens_per_s,
            "decode_tokens_per_s": together_tokens_per_s(records),
            "ttft_s": [ttft_s(record) for record in records],
        }


def together_tokens_per_s(records: Sequence[Record]) -> float | None:
    """Tokens per second while all requests decode: between the latest first token and the earliest last one.

    The sum of the requests' own speeds, each over whole steps: tokens of one step come a little apart, so that one
    window for all would cut a step short for most of them. For one request this is (n - 1) / (last - first). None if
    they never all decoded."""
    whole = answered(records)
    begin = max(record.arrivals[0][0] for record in whole)
    end = min(record.arrivals[-1][0] for record in whole)
    return sum(_speed(record, begin, end) for record in whole) if end > begin else None


def _speed(record: Record, begin: float, end: float) -> float:
    """Tokens per second of one request, from its last token up to `begin` to its first one from `end` on."""
    started = max(at for at, _ in record.arrivals if at <= begin)
    ended = min(at for at, _ in record.arrivals if at >= end)
    return sum(number for at, number in record.arrivals if started < at <= ended) / (ended - started)


@contextmanager
def served(folder: Path, *flags: str) -> Iterator[str]:
    """`tpdist serve` on a free port, ready; its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    deadline = time.monotonic() + READY_S
    node = subprocess.Popen([sys.executable, "-m", "tpdist", "serve", str(folder), "--port", str(port), *flags])
    try:
        while not _is_ready(f"http://127.0.0.1:{port}/readyz"):
            if node.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"not ready within {READY_S:g} s, exit code {node.returncode}")
            time.sleep(POLL_S)
        yield f"http://127.0.0.1:{port}"
    finally:
        node.send_signal(signal.SIGTERM)
        _wait_or_kill(node)


def http_generator(url: str, folder: Path) -> Callable[..., dict[str, Any]]:
    """LoadGenerator.measure through the HTTP API of a node that serves `folder`."""
    vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
    target = OpenAIServer(Address.parse(url), model=str(folder), api_key=None)
    generator = LoadGenerator(target, vocab_size=vocab_size)

    def measure(**load: int) -> dict[str, Any]:
        return asyncio.run(generator.measure(**load))

    return measure


def _is_ready(url: str) -> bool:
    try:
        with DIRECT.open(url, timeout=5) as response:
            return bool(response.status == 200)
    except (URLError, OSError):
        return False


# -- figures ----------------------------------------------------------------------------------------------------------


def alternate(runs: int, measures: Mapping[str, Callable[[], Value]]) -> dict[str, list[Value]]:
    """Take every measure once in each of `runs` alternations, in turn forwards and backwards; its values in order."""
    values: dict[str, list[Value]] = {name: [] for name in measures}
    for run in range(runs):
        names = list(measures) if run % 2 == 0 else list(reversed(measures))
        for name in names:
            print(f"alternation {run + 1} of {runs}: {name}", file=sys.stderr, flush=True)
            values[name].append(measures[name]())
    return values


@dataclass(frozen=True)
class Figure:
    """One value for each alternation. `unit` is empty for a ratio."""

    name: str
    values: Sequence[float]
    unit: str = ""

    def __str__(self) -> str:
        unit = f" {self.unit}" if self.unit else ""
        low, middle, high = (_short(pick(self.values)) for pick in (min, median, max))
        return f"{self.name:<52} {middle:>7}{unit}  ({low} to {high})"


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def ratio(name: str, above: Sequence[float], below: Sequence[float]) -> Figure:
    """The quotient of two measures, alternation by alternation."""
    return Figure(name, [high / low for high, low in zip(above, below, strict=True)])


def show(figures: Sequence[Figure], *, as_json: bool) -> None:
    """Medians with the least and the greatest value, on stdout."""
    if as_json:
        print(json.dumps({"figures": [{**asdict(figure), "median": median(figure.values)} for figure in figures]}))
        return
    for figure in figures:
        print(figure)
