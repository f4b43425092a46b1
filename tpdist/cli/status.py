"""`tpdist status`: ask any node of a cluster for what its head sees.

Knows the shape of /v1/cluster, and reads it leniently, so that it can show a cluster of another release.
"""

import json
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import click
from rich import box
from rich.console import Console
from rich.table import Table

from tpdist.cli.frame import command
from tpdist.cli.sizes import size
from tpdist.errors import JoinError, SettingsError

COLUMNS = ("node", "host", "seen", "rank", "device", "state", "step", "weights", "KV blocks")


@command(examples=("tpdist status", "tpdist status --url http://10.0.0.1:8000", "tpdist status --json | jq .state"))
@click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="HTTP address of any node.")
@click.option(
    "--api-key-file",
    envvar="TPDIST_API_KEY_FILE",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Bearer tokens, one a line; the first is used. [TPDIST_API_KEY_FILE]",
)
@click.option("--timeout-s", type=click.FloatRange(min=0.1), default=5.0, show_default=True, help="For the answer.")
@click.option("--json", "as_json", is_flag=True, help="Print the answer as it came.")
def status(url: str, api_key_file: Path | None, timeout_s: float, as_json: bool) -> None:
    """Show a cluster as its head sees it: nodes, ranks, their states, and why it restarted."""
    cluster = _fetch(url.rstrip("/") + "/v1/cluster", token=_token(api_key_file), timeout_s=timeout_s)
    if as_json:
        click.echo(json.dumps(cluster))
        return
    console = Console()
    console.print(f"{cluster['state']}, epoch {cluster.get('epoch')}, phase {cluster.get('phase')}", highlight=False)
    console.print(ranks_table(cluster["nodes"]))
    for restart in cluster.get("restarts", []):
        console.print(f"epoch {restart.get('epoch')} ended: {restart.get('cause')}", highlight=False, markup=False)


def _token(path: Path | None) -> str | None:
    lines = [] if path is None else path.read_text().split()
    return lines[0] if lines else None


def _fetch(url: str, *, token: str | None, timeout_s: float) -> dict[str, Any]:
    if not url.startswith(("http://", "https://")):
        raise SettingsError(f"--url must start with http:// or https://, not be {url}")
    request = Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    try:
        with urlopen(request, timeout=timeout_s) as response:
            body = response.read()
    except HTTPError as error:
        hint = "; set --api-key-file" if error.code in (401, 403) else ""
        raise SettingsError(f"{url} answered {error.code} {error.reason}{hint}") from error
    except (URLError, OSError) as error:
        reason = getattr(error, "reason", error)
        raise JoinError(f"cannot reach {url}: {reason}; is `tpdist serve` running there, on this port?") from error
    return _decode(body, url=url)


def _decode(body: bytes, *, url: str) -> dict[str, Any]:
    try:
        cluster = json.loads(body)
    except ValueError as error:
        raise SettingsError(f"{url} did not answer with JSON: not a tpdist server?") from error
    if not isinstance(cluster, dict) or not {"state", "nodes"} <= set(cluster):
        raise SettingsError(f"{url} answered with something else than a cluster: not a tpdist server?")
    return cluster


def ranks_table(nodes: list[dict[str, Any]]) -> Table:
    """One line a rank, in at most 80 columns; a node without ranks shows its own state."""
    table = Table(*COLUMNS, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for node in nodes:
        seen = f"{node.get('last_seen_s', 0):.1f} s ago"
        of_node = [str(node.get(key, "-")) for key in ("node_id", "host")] + [seen]
        for rank in node.get("ranks") or [{"state": node.get("state", "-")}]:
            of_rank = [str(rank.get(key, "-")) for key in ("rank", "device", "state", "step")]
            weights = size(rank["weight_bytes"]) if "weight_bytes" in rank else "-"
            table.add_row(*of_node, *of_rank, weights, str(rank.get("kv_blocks", "-")))
            of_node = [""] * len(of_node)
    return table
