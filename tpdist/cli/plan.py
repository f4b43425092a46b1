"""`tpdist plan`: where a model would go, from config.json and the headers of its files.

Reads the model, finds the devices, and shows what the planner says; what is best is the planner's matter.
"""

from dataclasses import asdict, replace
from pathlib import Path

import click
import msgspec

from tpdist.cli.frame import command
from tpdist.cli.options import settings_options
from tpdist.cli.plan_devices import Found, find_devices
from tpdist.cli.plan_model import PlannedModel, read_model
from tpdist.cli.plan_output import print_plan
from tpdist.cli.plan_picture import draw
from tpdist.control.placing import demand_of, place
from tpdist.errors import JoinError, SettingsError
from tpdist.node import one_process_of
from tpdist.plan.placement import Inventory, Placement
from tpdist.plan.sizes import Extra
from tpdist.settings import Settings

EXAMPLES = (
    "tpdist plan ./model                                     # on this machine",
    "tpdist plan ./model --devices 4x80GiB",
    "tpdist plan ./model --devices 2xH100,24GiB@1TB/s --tensor-shares auto",
    "tpdist plan ./model --inventory two-machines.toml --max-model-len 32768 --all",
    "tpdist plan ./model --inventory two-machines.toml --svg plan.svg",
    "tpdist plan ./model --devices 2x24GiB --json | jq '.devices[].weight_bytes'",
    "",
    "# one process, its layers over two GPUs and the machine's memory",
    "MISTRALRS_NO_NCCL=1 tpdist plan ./model --devices 2x24GiB,cpu=64GiB",
)


@command(examples=EXAMPLES)
@click.argument("model")
@click.option(
    "--devices",
    metavar="SIZE,...",
    help="GPUs of one node instead of this machine's: 2x80GiB,24GiB@1TB/s or 2xH100, and cpu=64GiB for its memory.",
)
@click.option(
    "--inventory",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="TOML file of nodes, devices and links instead of this machine; configs/two-machines.toml is an example.",
)
@click.option(
    "--svg", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Draw the plan into this SVG."
)
@click.option("--all", "show_all", is_flag=True, help="Show every layout that was weighed, not only the first few.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@settings_options("cluster", "placement", "model", "engine")
def plan(
    model: str,
    devices: str | None,
    inventory: Path | None,
    svg: Path | None,
    show_all: bool,
    as_json: bool,
    settings: Settings,
) -> None:
    """Show where a model would go, before anything is loaded.

    MODEL is a folder with config.json, with or without its *.safetensors, or a Hugging Face id, which is downloaded.
    Only headers are read: no weights, and no GPU is needed. Times are predictions from the bandwidths of memory and
    links; measure with `tpdist bench`.

    Exit codes: 0 it fits; 2 wrong usage; 3 it does not fit or is not supported; 4 checkpoint missing or damaged.
    """
    if svg is not None:
        _check_folder(svg)
    planned = read_model(model, settings)
    try:
        found = find_devices(settings, text=devices, path=inventory)
        placement = placed(planned, found, settings)
    except JoinError as error:
        # The nodes are what was asked for here: sizes that do not go with them are wrong usage.
        raise SettingsError(str(error)) from error
    if svg is not None:
        _write(svg, draw(placement, inventory=_inventory_of(placement, found), facts=planned.facts))
    if as_json:
        click.echo(msgspec.json.encode({**placement.as_dict(), "model": asdict(planned.facts)}))
    else:
        print_plan(placement, planned.facts, full=show_all)


def placed(model: PlannedModel, found: Found, settings: Settings) -> Placement:
    """What the planner says, with the notes of those who read model and devices. Raises PlanError."""
    asked, config, weights = settings.shared(), model.config, model.weights
    demand = demand_of(config, asked, dtype=model.dtype, explicit=settings.model_fields_set)
    placement = place(
        config,
        weights,
        demand,
        asked,
        ranks=found.inventory,
        process=found.process,
        one_process=one_process_of(settings),
        extra=Extra.of(model.tower),
    )
    return replace(placement, notes=(*model.notes, *found.notes, *placement.notes))


def _inventory_of(placement: Placement, found: Found) -> Inventory:
    """The devices that were used: those of ranks, or of a process."""
    return found.inventory if placement.method == "ranks" or found.process is None else found.process


def _check_folder(file: Path) -> None:
    if not file.parent.is_dir():
        raise SettingsError(f"cannot write --svg {file}: {file.parent} is no folder")


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise SettingsError(f"cannot write --svg {file}: {error.strerror or error}") from error
