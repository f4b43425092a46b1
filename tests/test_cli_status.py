"""`tpdist status`, against a server that answers what the test says."""

import json
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

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
    """What the server says next, and what it was asked."""

    url: str = ""
    status: int = 200
    body: bytes = b""
    asked: list[tuple[str, str | None]] = field(default_factory=list)


@pytest.fixture
def server() -> Iterator[Answer]:
    answer = Answer(body=json.dumps(CLUSTER).encode())

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer.asked.append((self.path, self.headers.get("Authorization")))
            self.send_response(answer.status)
            self.end_headers()
            self.wfile.write(answer.body)

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
    assert server.asked == [("/v1/cluster", None)]


def test_status_as_json_is_the_answer_itself(server: Answer, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["status", "--url", server.url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == CLUSTER


def test_the_first_token_of_the_key_file_is_sent(
    server: Answer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("first\nsecond\n")
    monkeypatch.setenv("TPDIST_API_KEY_FILE", str(tokens))
    assert run(["status", "--url", server.url]) == 0
    assert server.asked == [("/v1/cluster", "Bearer first")]


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


def test_a_url_that_is_no_url_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["status", "--url", "localhost:8000"]) == 2
    assert "http://" in capsys.readouterr().err
