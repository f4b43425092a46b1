"""`tpdist doctor`: what stands between these machines and serving, and what to do about it."""

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import click
import msgspec
from rich.console import Console

from tpdist.cli.doctor_output import print_diagnosis
from tpdist.cli.frame import command
from tpdist.cli.options import settings_options
from tpdist.cli.plan_model import read_model
from tpdist.control.layout import node_sizes
from tpdist.control.placing import demand_of, place_ranks, ranks_inventory
from tpdist.errors import SettingsError
from tpdist.preflight.crossing import advise_crossing, inventory_text, measured_links, with_links
from tpdist.preflight.doctor import Doctor
from tpdist.preflight.examine import facts_of
from tpdist.preflight.words import Examination
from tpdist.settings import Settings

EXAMPLES = (
    "tpdist doctor                       # this machine",
    "tpdist doctor ./model               # and whether the model can be read, and how fast",
    "tpdist doctor --json | jq '.lines[] | select(.state == \"red\")'",
    "",
    "# two machines: the variables of `tpdist serve`, at the same time on both",
    "export TPDIST_KEY_FILE=cluster.key MISTRALRS_MN_GLOBAL_WORLD_SIZE=2",
    "MISTRALRS_MN_HEAD_NUM_WORKERS=1 MISTRALRS_MN_HEAD_PORT=5555 tpdist doctor ./model   # head",
    "MISTRALRS_MN_WORKER_ID=0 MISTRALRS_MN_WORKER_SERVER_ADDR=head:5555 tpdist doctor ./model   # worker",
)


@command(examples=EXAMPLES)
@click.argument("model", required=False)
@click.option(
    "--timeout-s",
    type=click.FloatRange(min=0.1, max=86400),
    default=60.0,
    show_default=True,
    help="For the other nodes to come.",
)
@click.option(
    "--write-inventory",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write nodes and measured links into a TOML file that `tpdist plan --inventory` reads.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with all that was measured.")
@settings_options("cluster", "placement", "model", "engine")
def doctor(model: str | None, timeout_s: float, write_inventory: Path | None, as_json: bool, settings: Settings) -> int:
    """Check this machine, and with the cluster variables set every link between the nodes.

    Takes the variables of `tpdist serve`, on every node at the same time; the head's doctor listens where the head
    would. It opens ports, adds up numbers over all nodes, and reads a part of MODEL, but loads nothing. All nodes
    print the same table.

    Exit codes: 0 all is green; 2 wrong settings, or a limit of a machine; 3 the model does not fit; 4 it cannot be
    read; 5 a node did not come or disagrees, or a link fails. Of several the highest.
    """
    if write_inventory is not None and not write_inventory.parent.is_dir():
        raise SettingsError(f"cannot write --write-inventory {write_inventory}: {write_inventory.parent} is no folder")
    progress = Console(stderr=True, highlight=False)
    examining = Doctor(
        settings=settings,
        model=model,
        environ=os.environ,
        timeout_s=timeout_s,
        advise=_adviser(model, settings),
        say=lambda words: progress.print(f"{words} ...", style="dim", markup=False),
    )
    diagnosis = asyncio.run(examining.run())
    if write_inventory is not None:
        _write(write_inventory, inventory_text(diagnosis.examination))
    if as_json:
        shown = {"lines": diagnosis.lines, "advice": diagnosis.advice, "exit_code": diagnosis.exit_code}
        click.echo(msgspec.json.encode({**shown, "examination": diagnosis.examination}))
    else:
        print_diagnosis(diagnosis)
    return diagnosis.exit_code


def _adviser(model: str | None, settings: Settings) -> Callable[[Examination], tuple[str, ...]]:
    """What the planner makes of several nodes and their links. It raises PlanError or CheckpointError."""

    def advise(examination: Examination) -> tuple[str, ...]:
        links = measured_links(examination)
        if model is None or not links or examination.missing:
            return ()
        planned, facts, asked = read_model(model, settings), facts_of(examination.nodes), settings.shared()
        gpus = all(device.kind == "cuda" for node in facts for device in node.fingerprint.probe.devices)
        device = "cuda" if gpus and settings.device != "cpu" else "cpu"
        sizes = node_sizes(facts, device=device, global_world_size=settings.global_world_size)
        demand = demand_of(planned.config, asked, dtype=planned.dtype, explicit=settings.model_fields_set)
        inventory = with_links(ranks_inventory(facts, sizes, device=device), links)
        return tuple(advise_crossing(place_ranks(planned.config, planned.weights, inventory, demand, asked)))

    return advise


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise SettingsError(f"cannot write --write-inventory {file}: {error.strerror or error}") from error
