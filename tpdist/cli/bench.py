"""`tpdist bench`: the load generator on the terminal."""

import asyncio
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import msgspec

from tpdist.bench.in_process import RunningModel, running_model
from tpdist.bench.load import Load
from tpdist.bench.openai_server import OpenAIServer, find_model
from tpdist.bench.plot import draw
from tpdist.bench.report import PointReport
from tpdist.bench.roofline import MemoryClock
from tpdist.bench.session import BenchReport, Workload, measure_points, warm_up
from tpdist.cli.bench_options import (
    FOREIGN_VOCAB_SIZE,
    MAX_SEED,
    check_plot,
    loads_of,
    numbers,
    quiet,
    refuse_ignored_flags,
    workload_of,
    write_plot,
)
from tpdist.cli.bench_output import RequestProgress, print_report, title_of
from tpdist.cli.frame import command
from tpdist.cli.options import settings_options
from tpdist.cli.progress import LoadProgress
from tpdist.errors import SettingsError
from tpdist.server.api_keys import read_api_keys
from tpdist.server.tokenizer import open_tokenizer
from tpdist.settings import Settings

FIND_TIMEOUT_S = 30.0

EXAMPLES = (
    "tpdist bench ./model",
    "tpdist bench ./model --local-world-size 2 --concurrency 1,4,16,64 --plot latency.svg",
    "tpdist bench ./model --prompt-tokens 1000 --max-tokens 32 --shared-prefix-tokens 960",
    "",
    "# any server with the OpenAI API: tpdist, vLLM, llama.cpp, mistral.rs",
    "tpdist bench --url http://127.0.0.1:8000 --rate 0.5,1,2 --num-requests 60",
    "tpdist bench --url https://gpu1 --model big --api-key-file key --json | jq .points[].tokens_per_s",
    "tpdist bench --url http://127.0.0.1:8080 --prompt-file prompts.jsonl",
)


@command(examples=EXAMPLES)
@click.argument("model", required=False)
@click.option("--url", help="Measure a server with the OpenAI API instead of MODEL.")
@click.option("--model", "model_name", metavar="NAME", help="With --url: its model; default: its first.")
@click.option(
    "--api-key-file",
    envvar="TPDIST_API_KEY_FILE",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="With --url: bearer tokens, one a line; the first is used. [TPDIST_API_KEY_FILE]",
)
@click.option(
    "--concurrency",
    callback=numbers(int),
    metavar="N,...",
    help="Closed loop: as many requests at once; default without --rate: 1,4,16.",
)
@click.option(
    "--rate",
    callback=numbers(float),
    metavar="R,...",
    help="Open loop: requests a second on average, at random times (Poisson).",
)
@click.option(
    "--num-requests",
    type=click.IntRange(min=1),
    metavar="N",
    help="Of each load; default: 4 for each at once, at least 8; 32 of an open loop.",
)
@click.option(
    "--prompt-tokens",
    type=click.IntRange(min=1),
    default=128,
    show_default=True,
    metavar="N",
    help="Tokens of each random prompt.",
)
@click.option(
    "--max-tokens",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    metavar="N",
    help="Tokens of each answer.",
)
@click.option(
    "--shared-prefix-tokens",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    metavar="N",
    help="Of each prompt, the same in all requests of a load: measures the prefix cache.",
)
@click.option(
    "--prompt-file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help='Prompts instead of random token ids: JSON lines with "prompt", or plain lines.',
)
@click.option(
    "--vocab-size",
    type=click.IntRange(min=1),
    metavar="N",
    help=f"Random token ids are below it; default: the model's, with --url {FOREIGN_VOCAB_SIZE}.",
)
@click.option(
    "--prompt-seed",
    type=click.IntRange(0, MAX_SEED),
    metavar="N",
    help="Of prompts and start times; default: a new one, so that no prompt was seen before.",
)
@click.option(
    "--request-timeout-s",
    type=click.FloatRange(min=0.1),
    default=600.0,
    show_default=True,
    metavar="S",
    help="For one whole answer.",
)
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Draw latency against load into this SVG.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@settings_options("cluster", "model", "engine", "placement", "deadlines")
def bench(
    model: str | None,
    url: str | None,
    model_name: str | None,
    api_key_file: Path | None,
    plot: Path | None,
    as_json: bool,
    settings: Settings,
    **given: Any,
) -> None:
    """Measure latency and throughput under load.

    MODEL is a folder with config.json and *.safetensors, or a Hugging Face id; it runs in this process's own node. With
    --url any server with the OpenAI API is measured instead, by the same generator.

    Every answer has exactly --max-tokens tokens: the end of sequence is banned. No prompt repeats unless it comes from
    a file, so that prefix caches stay cold. The speed of a request is (n - 1) / (last token - first token).
    """
    if (model is None) == (url is None):
        raise SettingsError("give either MODEL, to run it here, or --url URL, to measure a server")
    refuse_ignored_flags(with_url=url is not None, with_file=given["prompt_file"] is not None)
    loads = loads_of(given)
    workload = workload_of(given)
    if plot is not None:
        check_plot(plot)
    if model is not None:
        report = asyncio.run(_bench_model(quiet(settings), model, loads, workload, vocab_size=given["vocab_size"]))
    else:
        assert url is not None
        keys = read_api_keys(api_key_file)
        report = asyncio.run(_bench_url(url, model_name, keys[0] if keys else None, loads, workload))
    if as_json:
        click.echo(msgspec.json.encode(report))
    else:
        print_report(report)
    if plot is not None:
        write_plot(plot, draw(report.points, title=title_of(report)))
    _refuse_failure(report.points)


# -- targets ----------------------------------------------------------------------------------------------------------


async def _bench_model(
    settings: Settings, name: str, loads: list[Load], workload: Workload, *, vocab_size: int | None
) -> BenchReport:
    with LoadProgress() as loading:
        async with running_model(settings, name, environ=os.environ, on_rank_update=loading.update) as running:
            workload = await _fit(
                settings, running, replace(workload, vocab_size=vocab_size or running.config.vocab_size)
            )
            return await running.measure(_measure_model(settings, name, running, loads, workload))


async def _measure_model(
    settings: Settings, name: str, running: RunningModel, loads: list[Load], workload: Workload
) -> BenchReport:
    await warm_up(running.target, workload)
    memory = MemoryClock(running.plan, devices=running.devices, threads=settings.threads)
    await memory.read()
    with RequestProgress(workload) as progress:
        points = await measure_points(running.target, loads, workload, traffic=running.traffic, on_end=progress.update)
    await memory.read()
    return BenchReport.of(
        workload,
        target="in process",
        model=name,
        points=points,
        start=running.start,
        memory=memory.report(running.traffic),
    )


async def _fit(settings: Settings, running: RunningModel, workload: Workload) -> Workload:
    """The same workload with its texts as token ids. Raises SettingsError if an answer would not fit the context."""
    longest = workload.prompt_tokens
    if workload.prompts is not None:
        tokenizer = await asyncio.to_thread(open_tokenizer, settings, running.folder)
        texts = [prompt for prompt in workload.prompts if isinstance(prompt, str)]
        prompts = [tuple(tokenizer.encode(text, add_special_tokens=True)) for text in texts]
        longest = max(map(len, prompts))
        workload = replace(workload, prompts=prompts)
    most = running.limits.max_tokens
    needed = longest + workload.max_tokens
    if needed > most:
        raise SettingsError(
            f"a prompt of {longest} tokens and --max-tokens {workload.max_tokens} make {needed}, "
            f"but a sequence of this model has at most {most}; lower --prompt-tokens or --max-tokens"
        )
    return workload


async def _bench_url(
    url: str, model: str | None, api_key: str | None, loads: list[Load], workload: Workload
) -> BenchReport:
    found = await find_model(url, model=model, api_key=api_key, timeout_s=FIND_TIMEOUT_S)
    server = OpenAIServer(found.address, model=found.model, api_key=api_key)
    await warm_up(server, workload)
    with RequestProgress(workload) as progress:
        points = await measure_points(server, loads, workload, on_end=progress.update)
    return BenchReport.of(workload, target=str(found.address), model=found.model, points=points)


# -- results ----------------------------------------------------------------------------------------------------------


def _refuse_failure(points: list[PointReport]) -> None:
    """A load without a single answer has not been measured."""
    for point in points:
        if point.num_failed == point.num_requests:
            raise SettingsError(
                f"all {point.num_requests} requests of the {point.loop} loop at {point.load:g} failed; the first: "
                f"{point.first_error}"
            )
