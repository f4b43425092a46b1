"""`tpdist demo`: the built-in model over two nodes on this machine, with real processes and sockets."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

import click
from rich.console import Console, Group

from tpdist import builtin
from tpdist.cli.cluster_view import ranks_table
from tpdist.cli.frame import command
from tpdist.errors import TpdistError, error_for

QUESTIONS = ("123+456=", "7+8=", "999+1=", "250+250=", "64+936=", "808+77=")
POLL_S = 0.1
REQUEST_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 40.0
LOG_LINES_SHOWN = 20


@dataclass(frozen=True)
class DemoNode:
    """One `tpdist serve` process."""

    name: str
    process: "subprocess.Popen[bytes]"
    url: str
    log: Path


@command(examples=("tpdist demo", "tpdist demo --json"))
@click.option("--timeout-s", type=click.FloatRange(min=1), default=120.0, show_default=True, help="To become ready.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def demo(timeout_s: float, as_json: bool) -> None:
    """Run the built-in tiny model over two nodes on this machine.

    Starts a head and a worker with one rank each, exactly as on two machines, asks both endpoints to add numbers,
    checks the answers, shows the cluster, and drains it. Needs no GPU and no download.
    """
    console = Console(stderr=as_json)
    with TemporaryDirectory(prefix="tpdist-demo-") as folder, ExitStack() as stack:
        console.print("Starting a head and a worker on this machine, one rank each ...", highlight=False)
        nodes = [stack.enter_context(_running(node)) for node in _start(Path(folder))]
        _wait_ready(nodes, timeout_s=timeout_s)
        answers = [_ask(node, question) for node in nodes for question in QUESTIONS]
        for answer in answers:
            console.print(_line(answer), highlight=False)
        cluster = _cluster_after(nodes[1])
        console.print(Group("", ranks_table(cluster["nodes"]), ""))
        _stop(nodes)
    wrong = [answer for answer in answers if not answer["right"]]
    if as_json:
        click.echo(json.dumps({"answers": answers, "cluster": cluster, "wrong": len(wrong)}))
    if wrong:
        raise TpdistError(f"{len(wrong)} of {len(answers)} answers are wrong: {wrong[0]}")
    console.print(
        f"All {len(answers)} answers are right, on both nodes. Both nodes drained and ended with 0.", highlight=False
    )


# -- nodes ------------------------------------------------------------------------------------------------------------


def _start(folder: Path) -> Iterator[DemoNode]:
    """The head, then the worker: the same command, told apart by the environment."""
    control, head_http, worker_http = _free_ports(3)
    base = {name: value for name, value in os.environ.items() if not name.startswith(("MISTRALRS_", "TPDIST_"))}
    base |= {"MISTRALRS_MN_GLOBAL_WORLD_SIZE": "2", "TPDIST_DEVICE": "cpu"}
    head = {"MISTRALRS_MN_HEAD_NUM_WORKERS": "1", "MISTRALRS_MN_HEAD_PORT": str(control)}
    worker = {"MISTRALRS_MN_WORKER_ID": "0", "MISTRALRS_MN_WORKER_SERVER_ADDR": f"127.0.0.1:{control}"}
    yield _start_node("head", base | head, head_http, folder)
    yield _start_node("worker", base | worker, worker_http, folder)


def _start_node(name: str, environ: Mapping[str, str], port: int, folder: Path) -> DemoNode:
    log = folder / f"{name}.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "tpdist", "serve", str(builtin.path()), "--port", str(port)],
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
        )
    return DemoNode(name, process, f"http://127.0.0.1:{port}", log)


@contextmanager
def _running(node: DemoNode) -> Iterator[DemoNode]:
    """The node, which does not outlive the demo."""
    try:
        yield node
    finally:
        if node.process.poll() is None:
            node.process.kill()
        node.process.wait()


def _wait_ready(nodes: list[DemoNode], *, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    waiting = list(nodes)
    while waiting:
        node = waiting[0]
        if node.process.poll() is not None:
            raise error_for(node.process.returncode, f"the {node.name} ended early:\n{_last_lines(node)}")
        if time.monotonic() > deadline:
            raise TpdistError(f"the {node.name} was not ready within {timeout_s:g} s:\n{_last_lines(node)}")
        if _is_ready(node):
            waiting.pop(0)
        else:
            time.sleep(POLL_S)


def _cluster_after(node: DemoNode) -> dict[str, Any]:
    """The cluster as `node` shows it once all ranks have reported the last step, within about two heartbeats."""
    deadline = time.monotonic() + REQUEST_TIMEOUT_S
    while True:
        cluster: dict[str, Any] = _get(node.url + "/v1/cluster")
        steps = {rank["step"] for each in cluster["nodes"] for rank in each["ranks"]}
        if (len(steps) == 1 and 0 not in steps) or time.monotonic() > deadline:
            return cluster
        time.sleep(POLL_S)


def _stop(nodes: list[DemoNode]) -> None:
    """Drain the cluster as an operator would: SIGTERM to one node ends both."""
    nodes[0].process.send_signal(signal.SIGTERM)
    for node in nodes:
        try:
            exit_code = node.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired as error:
            raise TpdistError(f"the {node.name} did not end after SIGTERM:\n{_last_lines(node)}") from error
        if exit_code != 0:
            raise error_for(exit_code, f"the {node.name} ended with {exit_code}:\n{_last_lines(node)}")


def _last_lines(node: DemoNode) -> str:
    return "\n".join(node.log.read_text(errors="replace").splitlines()[-LOG_LINES_SHOWN:])


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


# -- questions --------------------------------------------------------------------------------------------------------


def _ask(node: DemoNode, question: str) -> dict[str, Any]:
    body = {"model": str(builtin.path()), "prompt": question, "max_tokens": 8, "temperature": 0}
    started = time.monotonic()
    answer = _get(node.url + "/v1/completions", body=body)["choices"][0]["text"].strip()
    expected = str(sum(int(number) for number in question.rstrip("=").split("+")))
    return {
        "node": node.name,
        "question": question,
        "answer": answer,
        "right": answer == expected,
        "milliseconds": round((time.monotonic() - started) * 1000, 1),
    }


def _line(answer: Mapping[str, Any]) -> str:
    mark = "[green]right[/]" if answer["right"] else "[red]WRONG[/]"
    return f"  {answer['node']:<7} {answer['question']:>9} {answer['answer']:<5} {mark}  {answer['milliseconds']:>6} ms"


def _is_ready(node: DemoNode) -> bool:
    try:
        return bool(_get(node.url + "/readyz"))
    except (URLError, OSError):
        return False


def _get(url: str, *, body: object = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = Request(url, data=data, headers={"Content-Type": "application/json"})
    with urlopen(request, timeout=REQUEST_TIMEOUT_S) as response:
        return json.load(response)
