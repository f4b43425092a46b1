"""`tpdist probe`: what this machine has, for people or as JSON."""

import click
import msgspec
from rich.console import Console
from rich.table import Table

from tpdist.cli.frame import command
from tpdist.cli.sizes import size
from tpdist.control.messages import ProbeReport
from tpdist.preflight import probe as preflight


@command(examples=("tpdist probe", "tpdist probe --json | jq .devices"))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def probe(as_json: bool) -> None:
    """Show what this machine has: versions, devices, free memory."""
    report = preflight.probe()
    if as_json:
        click.echo(msgspec.json.encode(report))
        return
    console = Console()
    console.print(_versions(report), _devices(report), sep="\n")


def _versions(report: ProbeReport) -> Table:
    table = Table(title=report.hostname, title_justify="left", show_header=False)
    for name in ("tpdist", "python", "torch", "cuda", "nccl", "driver"):
        table.add_row(name, getattr(report, name) or "-")
    table.add_row("CPUs", str(report.num_cpus))
    table.add_row("memory", f"{size(report.available_bytes)} available of {size(report.memory_bytes)}")
    return table


def _devices(report: ProbeReport) -> Table:
    table = Table("device", "name", "free", "total", title="devices", title_justify="left")
    for device in report.devices:
        table.add_row(f"{device.kind}:{device.index}", device.name, size(device.free_bytes), size(device.total_bytes))
    return table
