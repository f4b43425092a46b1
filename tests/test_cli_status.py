"""`tpdist status`, against a server that answers what the test says."""

import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tpdist.cli import status
from tpdist.cli.cluster_client import Snapshot
from tpdist.cli.cluster_view import cluster_view, step_rates
from tpdist.cli.frame import run

RANK = {"rank": 0, "local_rank": 0, "pid": 2, "device": "cuda:0", "state": "ready", "step": 7, "kv_blocks": 128}
NODE = {"node_id": "head", "role": "head", "host": "alpha", "pid": 1, "state": "ready", "last_seen_s": 0.5}
CLUSTER = {
    "state": "ready",
    "epoch": 2,
    "phase": "ready",
    "nodes": [
        {**NODE, "ranks": [{**RANK, "weight_bytes": 2**31}]},
        {**NODE, "node_id": "worker-0", "host": "beta", "state": "lost", "ranks": []},
    ],
    "plan": {"tp_size": 1},
    "restarts": [{"epoch": 1, "cause": "rank 1 on beta was killed"}],
}


@dataclass
class Answer:
    """What the server says next, and what it was asked. `others` are the bodies of paths other than /v1/cluster."""

    url: str = ""
    status: int = 200
    body: bytes = b""
    others: dict[str, bytes] = field(default_factory=dict)
    asked: list[tuple[str, str | None]] = field(default_factory=list)


@pytest.fixture
def server() -> Iterator[Answer]:
    answer = Answer(body=json.dumps(CLUSTER).encode())

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer.asked.append((self.path, self.headers.get("Authorization")))
            known = self.path == "/v1/cluster" or self.path in answer.others
            self.send_response(answer.status if known else 404)
            self.end_headers()
            self.wfile.write(answer.others.get(self.path, answer.body))

        def log_message(self, format: str, *args: object) -> None:
            """Keep stderr for the command."""

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.02,))
        thread.start()
        answer.url = f"http://127.0.0.1:{http.server_port}"
        yield answer
        http.shutdown()
        thread.join(timeout=10)


def test_status_shows_nodes_ranks_and_restarts(
    server: Answer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert run(["status", "--url", server.url + "/"]) == 0
    text = capsys.readouterr().out
    for word in ("ready, epoch 2", "alpha", "cuda:0", "2.0 GiB", "128", "beta", "lost", "rank 1 on beta was killed"):
        assert word in text
    assert server.asked[0] == ("/v1/cluster", None)


def test_status_as_json_is_the_answer_itself(server: Answer, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["status", "--url", server.url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == CLUSTER
    assert server.asked == [("/v1/cluster", None)]


def test_the_first_token_of_the_key_file_is_sent(
    server: Answer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("first\nsecond\n")
    monkeypatch.setenv("TPDIST_API_KEY_FILE", str(tokens))
    assert run(["status", "--url", server.url]) == 0
    assert server.asked[0] == ("/v1/cluster", "Bearer first")
    assert {token for _, token in server.asked} == {"Bearer first"}


def test_the_key_file_is_read_as_the_server_reads_it(
    server: Answer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = tmp_path / "keys"
    keys.write_bytes(b"# of the \xff\n\n  first key \nsecond\n")
    assert run(["status", "--url", server.url, "--api-key-file", str(keys)]) == 0
    assert {key for _, key in server.asked} == {"Bearer first key"}
    keys.write_bytes("ok\n\u20ac".encode())
    assert run(["status", "--url", server.url, "--api-key-file", str(keys)]) == 2
    assert f"{keys}, line 2: a key must be printable ASCII" in capsys.readouterr().err


def test_a_key_that_the_server_refuses_is_told_from_none(
    server: Answer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.status = 401
    (keys := tmp_path / "keys").write_text("wrong\n")
    assert run(["status", "--url", server.url, "--api-key-file", str(keys)]) == 2
    assert f"the key in {keys} was refused" in capsys.readouterr().err


def test_a_server_that_wants_a_token_is_reported_with_the_flag(
    server: Answer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.status = 401
    assert run(["status", "--url", server.url]) == 2
    assert "401" in (err := capsys.readouterr().err)
    assert "--api-key-file" in err


@pytest.mark.parametrize("body", [b"<html>", b"[]", b'{"state": "ready"}'])
def test_another_server_on_the_port_is_told_from_tpdist(
    server: Answer, body: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    server.body = body
    assert run(["status", "--url", server.url]) == 2
    assert "not a tpdist server?" in capsys.readouterr().err


def test_an_unreachable_node_ends_with_5_and_its_address(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        assert run(["status", "--url", url]) == 5
    assert f"cannot reach {url}/v1/cluster" in capsys.readouterr().err


def test_a_server_that_does_not_answer_is_given_up_after_the_timeout(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert run(["status", "--url", url, "--timeout-s", "0.2"]) == 5
    assert "timed out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("localhost:8000", "it must start with http:// or https://"),
        ("", "it must start with http:// or https://"),
        ("http://[::1", "Invalid IPv6 URL"),
        (f"http://{'a' * 70}.example", "one of more than 63 characters"),
        ("http://127.0.0.1:abc", "'abc'"),
        ("http://127.0.0.1:99999", "Port out of range 0-65535"),
        ("http://127.0.0.1:0", "port 0 is nobody's"),
        ("http://:8000", "it names no host"),
        ("http://a b", "it holds a space"),
        ("http://127.0.0.1/\u20ac", "its path is not ASCII"),
        ("http://127.0.0.1:8000?x", "it must end with the port or a path"),
    ],
)
def test_a_url_that_is_no_url_is_refused_before_anybody_is_asked(
    url: str, problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["status", "--url", url]) == 2
    assert f"--url {url!r}: " in (err := capsys.readouterr().err)
    assert problem in err
    assert "as http://10.0.0.1:8000" in err


def test_a_server_that_sends_its_clients_to_no_address_is_not_reached(capsys: pytest.CaptureFixture[str]) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(302)
            self.send_header("Location", "http://[::1")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Keep stderr for the command."""

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.handle_request)
        thread.start()
        assert run(["status", "--url", f"http://127.0.0.1:{http.server_port}"]) == 5
        thread.join(timeout=10)
    assert "cannot reach" in capsys.readouterr().err


METRICS = b"""# TYPE tpdist_num_requests_running gauge
tpdist_num_requests_running 3.0
tpdist_num_requests_waiting 12.0
tpdist_kv_cache_usage_perc 0.25
tpdist_ranks_expected 2.0
tpdist_standbys 1.0
tpdist_last_epoch_abort_age_seconds 300.0
tpdist_weight_load_seconds{node="head",rank="0"} 1.5
"""


def cluster_at(*, step: int, **changes: Any) -> dict[str, Any]:
    """The head alone, at this step."""
    rank = {**RANK, "weight_bytes": 2**31, "step": step}
    return {**CLUSTER, "nodes": [{**NODE, "ranks": [rank]}], **changes}


def snapshot(at_s: float, *, step: int, **changes: Any) -> Snapshot:
    return Snapshot(at_s=at_s, cluster=cluster_at(step=step, **changes), reason="", metrics={})


def test_status_shows_what_the_metrics_tell(server: Answer, capsys: pytest.CaptureFixture[str]) -> None:
    server.others["/metrics"] = METRICS
    assert run(["status", "--url", server.url]) == 0
    text = capsys.readouterr().out
    for words in (
        "1 of 2 ranks ready; 1 standby; ",
        "3 requests running, 12 waiting",
        "KV cache 25% used",
        "ended 5 min ago",
    ):
        assert words in text


def test_what_is_not_there_is_left_out(server: Answer, capsys: pytest.CaptureFixture[str]) -> None:
    server.others["/metrics"] = b"\xff\nanother_metric 1.0\ntpdist_num_requests_running many\n"
    assert run(["status", "--url", server.url]) == 0
    text = capsys.readouterr().out
    assert "requests" not in text
    assert "epoch 1 ended: " in text


def test_a_cluster_that_is_not_ready_says_why(server: Answer, capsys: pytest.CaptureFixture[str]) -> None:
    server.body = json.dumps({**CLUSTER, "state": "recovering"}).encode()
    server.others["/readyz"] = b'{"reason": "phase load, because rank 1 was lost"}'
    assert run(["status", "--url", server.url]) == 0
    assert "phase load, because rank 1 was lost" in capsys.readouterr().out


def test_of_many_restarts_the_last_are_shown_and_one_of_them_whole(
    server: Answer, capsys: pytest.CaptureFixture[str]
) -> None:
    restarts = [{"epoch": epoch, "cause": f"cause {epoch}\n  | last line {epoch}"} for epoch in range(1, 9)]
    server.body = json.dumps({**CLUSTER, "restarts": restarts}).encode()
    assert run(["status", "--url", server.url]) == 0
    text = capsys.readouterr().out
    assert re.findall(r"epoch (\d) ended: cause", text) == ["4", "5", "6", "7", "8"]
    assert re.findall(r"last line (\d)", text) == ["8"]
    assert "8 epochs ended" in text


def test_a_table_with_rates_fits_80_columns_and_has_colours(capsys: pytest.CaptureFixture[str]) -> None:
    now, before = snapshot(12.0, step=100_200), snapshot(10.0, step=100_000)
    Console(width=80, force_terminal=True, highlight=False).print(cluster_view(now, before))
    text = capsys.readouterr().out
    assert "\x1b[32mready" in text
    plain = re.sub(r"\x1b\[[\d;]*m", "", text)
    (row,) = [line for line in plain.splitlines() if "cuda:0" in line]
    assert row.split() == ["head", "alpha", "0.5", "s", "0", "cuda:0", "ready", "100200", "100.0", "2.0", "GiB", "128"]


def test_rates_are_of_one_epoch() -> None:
    assert step_rates(snapshot(12.0, step=8), snapshot(10.0, step=4)) == {0: 2.0}
    assert step_rates(snapshot(12.0, step=8, epoch=3), snapshot(10.0, step=4)) == {}
    assert step_rates(snapshot(10.0, step=8), snapshot(10.0, step=4)) == {}
    assert step_rates(snapshot(12.0, step=0), snapshot(10.0, step=4)) == {0: 0.0}


# -- watching ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def between(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Instead of a pause between two snapshots, the test does something; after the last, somebody types Ctrl-C."""

    def play(*acts: Callable[[], object]) -> None:
        left = list(acts)

        def pause(seconds: float) -> None:
            assert seconds == 0.5
            if not left:
                raise KeyboardInterrupt
            left.pop(0)()

        monkeypatch.setattr(status, "sleep", pause)

    return play


def watch(server: Answer, *options: str) -> int:
    return run(["status", "--url", server.url, "--watch", "0.5", *options])


def test_watching_appends_snapshots_where_there_is_no_terminal(
    server: Answer, between: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    between(lambda: setattr(server, "body", json.dumps(cluster_at(step=9, state="draining")).encode()))
    assert watch(server) == 0
    text = capsys.readouterr().out
    assert re.findall(r"(\w+), epoch 2", text) == ["ready", "draining"]
    assert text.count("steps/s") == 2
    assert len(re.findall(r"^\d\d:\d\d:\d\d$", text, re.MULTILINE)) == 2
    assert "\x1b" not in text


def test_a_node_that_stops_answering_is_shown_as_such_and_watched_on(
    server: Answer, between: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    between(lambda: setattr(server, "status", 500), lambda: setattr(server, "status", 200))
    assert watch(server) == 0
    first, second, third = re.split(r"^\d\d:\d\d:\d\d\n", capsys.readouterr().out, flags=re.MULTILINE)[1:]
    assert first.startswith("ready")
    assert second.startswith("unreachable: ")
    assert "answered 500" in " ".join(second.split())
    assert "ready, epoch 2" in second
    assert third.startswith("ready")


def test_watching_may_begin_before_the_node_does(
    between: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        between()
        answer = Answer(url=f"http://127.0.0.1:{bound.getsockname()[1]}")
        assert watch(answer) == 0
    assert "unreachable: cannot reach" in capsys.readouterr().out


def test_watching_what_was_never_a_cluster_ends_at_once(
    server: Answer, between: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    server.status = 401
    between()
    assert watch(server) == 2
    assert "--api-key-file" in capsys.readouterr().err


def test_watching_as_json_is_one_object_a_line(
    server: Answer, between: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    between(lambda: setattr(server, "body", b"<html>"))
    assert watch(server, "--json") == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first == CLUSTER
    assert second["state"] == "unreachable"
    assert "not a tpdist server?" in second["error"]


def test_watching_redraws_in_place_on_a_terminal(
    server: Answer,
    between: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(status, "Console", lambda **options: Console(force_terminal=True, **options))
    between(lambda: None)
    assert watch(server) == 0
    text = capsys.readouterr().out
    assert "\x1b[1A" in text, "the cursor goes up again"
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1, "the cursor is hidden and shown again"


def test_watch_has_an_interval_of_its_own(
    server: Answer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    paused: list[float] = []

    def pause(seconds: float) -> None:
        paused.append(seconds)
        raise KeyboardInterrupt

    monkeypatch.setattr(status, "sleep", pause)
    assert run(["status", "--watch", "--url", server.url]) == 0
    assert paused == [status.WATCH_INTERVAL_S]
