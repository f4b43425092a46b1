"""`tpdist serve`: start this node."""

import asyncio
import importlib
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import click
import msgspec
from rich.console import Console

from tpdist import log
from tpdist.cli.console import LogConsole
from tpdist.cli.frame import command
from tpdist.cli.options import settings_options
from tpdist.cli.plan_model import facts_of
from tpdist.cli.plan_output import compare, headline, layout_line, print_plan
from tpdist.cli.progress import LoadProgress
from tpdist.control.messages import ClusterState
from tpdist.errors import error_for
from tpdist.launcher import serve as serve_node
from tpdist.models import registry
from tpdist.node import Model
from tpdist.plan.placement import Placement
from tpdist.settings import Settings

logger = logging.getLogger(__name__)

EXAMPLES = (
    "tpdist serve ./model",
    "tpdist serve ./model --local-world-size 2 --device cpu",
    "",
    "# two machines: the same command on both, told apart by the environment",
    "export TPDIST_KEY_FILE=cluster.key MISTRALRS_MN_GLOBAL_WORLD_SIZE=2",
    "MISTRALRS_MN_HEAD_NUM_WORKERS=1 MISTRALRS_MN_HEAD_PORT=5555 tpdist serve ./model   # head",
    "MISTRALRS_MN_WORKER_ID=0 MISTRALRS_MN_WORKER_SERVER_ADDR=head:5555 tpdist serve ./model   # worker",
    "",
    "torchrun --nproc-per-node 2 -m tpdist serve ./model",
)


@command(examples=EXAMPLES)
@click.argument("model")
@settings_options("cluster", "model", "engine", "placement", "http", "deadlines")
def serve(model: str, settings: Settings) -> int:
    """Start this node: head, worker, single node or torchrun rank, told by the environment.

    MODEL is a folder with config.json and *.safetensors, or a Hugging Face id.
    """
    place = settings.torchrun
    if place is not None and place.agent_run_dir is None:
        # Only a rank pays for torch: the agent, which runs this same command, must not import it.
        importlib.import_module("tpdist.torchrun").run(settings, argv=sys.argv[1:])
    run_dir = None if place is None or place.agent_run_dir is None else Path(place.agent_run_dir)
    with LoadProgress() as progress:
        serving = serve_node(
            settings,
            model,
            environ=os.environ,
            run_dir=run_dir,
            supervise=place is None,
            on_rank_update=progress.update,
            on_plan=_show_plan,
            on_ready=_show_measured,
        )
        outcome = asyncio.run(serving)
    if outcome.exit_code != 0:
        raise error_for(outcome.exit_code, outcome.cause)
    return 0


def _show_plan(model: Model, placement: Placement) -> None:
    """What will run, as `tpdist plan` shows it, before anything starts."""
    weights = registry.weights(model.config)
    facts = facts_of(model.config, weights, name=str(model.folder), dtype=model.dtype)
    if log.logs_json():
        planned = msgspec.to_builtins({**placement.as_dict(), "model": asdict(facts)})
        words = f"{headline(facts, placement)}; {layout_line(placement)}"
        logger.info("%s", words, extra={"fields": {"plan": planned}})
        return
    with _printing() as console:
        print_plan(placement, facts, console=console)


def _show_measured(state: ClusterState) -> None:
    """Predicted and measured bytes side by side."""
    ranks = {rank.rank: msgspec.to_builtins(rank) for node in state.nodes for rank in node.ranks}
    if log.logs_json():
        measured = [{"rank": rank, **held} for rank, each in sorted(ranks.items()) for held in each["held"]]
        logger.info("bytes that each rank holds", extra={"fields": {"measured": measured}})
        return
    with _printing() as console:
        console.print(compare(state.plan, ranks))
        console.print()


@contextmanager
def _printing() -> Iterator[Console]:
    """The log's terminal. Once nobody reads it any more, or the disk is full, a node serves on without."""
    with suppress(OSError):
        yield LogConsole()
