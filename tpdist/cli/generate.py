"""`tpdist generate`: one answer on the terminal, no server."""

import asyncio
import os
import sys
from contextlib import aclosing

import click
import msgspec

from tpdist import log
from tpdist.cli.frame import command
from tpdist.cli.options import settings_options
from tpdist.cli.progress import LoadProgress
from tpdist.control.agent import Outcome
from tpdist.control.messages import DrainRequest, Generate
from tpdist.errors import InterruptedByUser, RequestError, SettingsError, error_for
from tpdist.node import Model, Node, handled_signals, open_model_later
from tpdist.run_directory import run_directory
from tpdist.sampling_params import SamplingParams
from tpdist.server.answers import join, read_pieces
from tpdist.server.text import TextReader
from tpdist.server.tokenizer import open_tokenizer
from tpdist.settings import Role, Settings

EXAMPLES = (
    'tpdist generate ./model --prompt "Once upon a time" --max-tokens 64',
    "echo 123+456= | tpdist generate ./model --prompt - --temperature 0",
    "tpdist generate ./model --prompt Hello --json | jq -r .text",
)
ANSWERED = "answered"
UNAVAILABLE = 503


@command(examples=EXAMPLES)
@click.argument("model")
@click.option("--prompt", required=True, metavar="TEXT", help="What to continue; - reads standard input.")
@click.option("--max-tokens", type=int, default=128, show_default=True, metavar="N", help="Most tokens of the answer.")
@click.option("--temperature", type=float, default=0.0, show_default=True, metavar="T", help="0 is greedy.")
@click.option("--top-k", type=int, default=0, metavar="K", help="Choose among the K likeliest tokens; 0: all.")
@click.option("--top-p", type=float, default=1.0, metavar="P", help="Choose among the likeliest with this much in sum.")
@click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; may be given several times.")
@click.option("--ignore-eos", is_flag=True, help="Go on after the end-of-sequence token.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the text.")
@settings_options("cluster", "model", "engine", "placement", "deadlines")
def generate(model: str, prompt: str, as_json: bool, settings: Settings, **sampling: object) -> int:
    """Print one answer, without a server.

    MODEL is a folder with config.json and *.safetensors, or a Hugging Face id. The text goes to stdout as it is made.
    """
    if settings.role not in (Role.SINGLE, Role.HEAD):
        raise SettingsError(f"`tpdist generate` cannot run as a {settings.role.value}; run `tpdist serve` there")
    if prompt == "-":
        prompt = sys.stdin.read().rstrip("\n")
    try:
        chosen = SamplingParams(**sampling)  # type: ignore[arg-type]
    except RequestError as error:
        raise SettingsError(str(error)) from error
    if "log_level" not in settings.model_fields_set:
        settings = settings.model_copy(update={"log_level": "WARNING"})
        log.configure(level=settings.log_level, log_format=settings.log_format)
    outcome = asyncio.run(_generate(settings, model, prompt, chosen, as_json=as_json))
    if outcome.exit_code != 0:
        raise error_for(outcome.exit_code, outcome.cause)
    return 0


async def _generate(settings: Settings, model: str, prompt: str, sampling: SamplingParams, *, as_json: bool) -> Outcome:
    """Run a node for one answer. The outcome is the node's, 0 if the answer is out. Raises InterruptedByUser if
    somebody ended the cluster before, with SIGTERM say: for a node that is a good end."""
    opening = asyncio.create_task(open_model_later(model, revision=settings.revision))
    opened = await opening
    with run_directory() as run_dir, LoadProgress() as progress:
        node = Node(settings, opening, environ=os.environ, run_dir=run_dir, on_rank_update=progress.update)
        with handled_signals(node):
            running = asyncio.create_task(node.run())
            answering = asyncio.create_task(_answer(node, settings, opened, prompt, sampling, as_json=as_json))
            await asyncio.wait({running, answering}, return_when=asyncio.FIRST_COMPLETED)
            if answering.done():
                await node.agent.leave(DrainRequest(reason=ANSWERED, immediate=True))
            outcome = await running
            answering.cancel()
            results = await asyncio.gather(answering, return_exceptions=True)
    problem = results[0]
    if outcome.exit_code == 0 and outcome.cause != ANSWERED and _was_cut_off(problem):
        raise InterruptedByUser(outcome.cause)
    if outcome.exit_code == 0 and isinstance(problem, RequestError):
        raise SettingsError(str(problem)) from problem
    if outcome.exit_code == 0 and isinstance(problem, Exception):
        raise problem
    return outcome


def _was_cut_off(problem: BaseException | None) -> bool:
    """Whether an answer ended because its node did."""
    if isinstance(problem, RequestError):
        return problem.status == UNAVAILABLE
    return isinstance(problem, asyncio.CancelledError)


async def _answer(
    node: Node, settings: Settings, model: Model, prompt: str, sampling: SamplingParams, *, as_json: bool
) -> None:
    """Generate and print, piece by piece."""
    tokenizer = await asyncio.to_thread(open_tokenizer, settings, model.folder)
    await node.agent.wait_ready()
    request = Generate(
        request_id="generate",
        prompt_token_ids=tuple(tokenizer.encode(prompt, add_special_tokens=True)),
        sampling=sampling,
        eos_token_ids=model.config.eos_token_ids,
    )
    reader = TextReader(tokenizer, request)
    arrived = []
    async with aclosing(read_pieces(node.agent.generate, request, reader)) as pieces:
        async for piece in pieces:
            arrived.append(piece)
            if not as_json:
                click.echo(piece.text, nl=False)
    if not as_json:
        click.echo()
        return
    answer = join(arrived)
    shown = {
        "prompt": prompt,
        "text": answer.text,
        "token_ids": answer.token_ids,
        "finish_reason": answer.finish_reason,
    }
    click.echo(msgspec.json.encode(shown))
