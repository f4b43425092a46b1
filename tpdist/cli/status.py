"""`tpdist status`: the cluster as its head sees it, once or again and again, as a table or as JSON."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from time import localtime, monotonic, sleep, strftime
from typing import Any, TypeVar

import click
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from tpdist.cli.cluster_client import ClusterClient, Snapshot
from tpdist.cli.cluster_view import cluster_view, silent_view
from tpdist.cli.frame import command
from tpdist.errors import JoinError, SettingsError, TpdistError
from tpdist.server.api_keys import read_api_keys

WATCH_INTERVAL_S = 2.0
Answer = TypeVar("Answer", Snapshot, dict[str, Any])
EXAMPLES = (
    "tpdist status",
    "tpdist status --url http://10.0.0.1:8000 --watch",
    "tpdist status --json | jq .state",
    "tpdist status --json --watch 10 >> cluster.jsonl",
)


@command(examples=EXAMPLES)
@click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="HTTP address of any node.")
@click.option(
    "--api-key-file",
    envvar="TPDIST_API_KEY_FILE",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Bearer tokens, one a line; the first is used. [TPDIST_API_KEY_FILE]",
)
@click.option("--timeout-s", type=click.FloatRange(min=0.1), default=5.0, show_default=True, help="For each answer.")
@click.option(
    "--watch",
    "interval_s",
    is_flag=False,
    flag_value=WATCH_INTERVAL_S,
    type=click.FloatRange(min=0.1),
    metavar="[SECONDS]",
    help=f"Ask again after SECONDS ({WATCH_INTERVAL_S:g}) and draw anew, until Ctrl-C, which ends with 0. A node that "
    "does not answer is shown as such and asked again.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the answer as it came; with --watch each in a line.")
def status(url: str, api_key_file: Path | None, timeout_s: float, interval_s: float | None, as_json: bool) -> None:
    """Show a cluster as its head sees it: nodes, ranks, their states, and why it restarted."""
    keys = read_api_keys(api_key_file)
    client = ClusterClient(
        url=url.rstrip("/"), token=keys[0] if keys else None, timeout_s=timeout_s, key_file=api_key_file
    )
    if interval_s is not None:
        show = _print_events if as_json else _draw
        with suppress(KeyboardInterrupt):  # this is how it ends
            show(client, interval_s)
    elif as_json:
        click.echo(json.dumps(client.cluster()))
    else:
        Console(highlight=False).print(cluster_view(client.snapshot()))


def _draw(client: ClusterClient, interval_s: float) -> None:
    """In place on a terminal, one below the other elsewhere."""
    before: Snapshot | None = None
    view: RenderableType | None = None
    heard_s = monotonic()
    with _drawing(Console(highlight=False)) as draw:
        for answer in _answers(client.snapshot, interval_s):
            if isinstance(answer, Snapshot):
                view, before, heard_s = cluster_view(answer, before or answer), answer, monotonic()
                shown = view
            else:
                shown = silent_view(str(answer), since_s=monotonic() - heard_s, last=view)
            draw(Group(Text(strftime("%H:%M:%S", localtime()), style="dim"), shown))


def _print_events(client: ClusterClient, interval_s: float) -> None:
    for answer in _answers(client.cluster, interval_s):
        event = answer if isinstance(answer, dict) else {"state": "unreachable", "error": str(answer)}
        click.echo(json.dumps(event))


def _answers(ask: Callable[[], Answer], interval_s: float) -> Iterator[Answer | TpdistError]:
    """What `ask` returns, or the error of a node that does not answer, for ever. Raises SettingsError if it is asked in
    the wrong way and never answered before."""
    answered = False
    while True:
        answer = _try(ask)
        if isinstance(answer, SettingsError) and not answered:
            raise answer
        answered = answered or not isinstance(answer, TpdistError)
        yield answer
        sleep(interval_s)


def _try(ask: Callable[[], Answer]) -> Answer | TpdistError:
    try:
        return ask()
    except (JoinError, SettingsError) as error:
        return error


@contextmanager
def _drawing(console: Console) -> Iterator[Callable[[RenderableType], None]]:
    if console.is_terminal:
        with Live(console=console, auto_refresh=False) as live:
            yield partial(live.update, refresh=True)
    else:
        yield console.print
