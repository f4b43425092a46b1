"""A small server with the OpenAI API that answers as a test says, over real HTTP on loopback."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

HOLD_S = 20.0


def chunk(text: str = "x", token_ids: list[int] | None = None, finish_reason: str | None = None) -> dict[str, Any]:
    """One event of a stream."""
    choice: dict[str, Any] = {"index": 0, "text": text, "finish_reason": finish_reason}
    return {"choices": [choice if token_ids is None else {**choice, "token_ids": token_ids}]}


def usage(num_tokens: int, *, cached: int | None = None) -> dict[str, Any]:
    """The last event before [DONE]."""
    details = {} if cached is None else {"prompt_tokens_details": {"cached_tokens": cached}}
    return {"choices": [], "usage": {"completion_tokens": num_tokens, **details}}


def events(*bodies: Any, done: bool = True) -> bytes:
    """The bytes of a stream."""
    lines = [b"data: " + json.dumps(body).encode() + b"\n\n" for body in bodies]
    return b"".join(lines) + (b"data: [DONE]\n\n" if done else b"")


@dataclass
class OpenAIFake:
    """What the server says, and the bodies that it was sent. `streams` are answered in turn, the last one for ever; an
    integer is an answer with that status. `hold` is waited for before every answer."""

    url: str = ""
    models: Any = field(default_factory=lambda: {"data": [{"id": "big"}, {"id": "small"}]})
    models_status: int = 200
    key: str | None = None
    streams: list[bytes | int] = field(default_factory=list)
    content_type: str = "text/event-stream"
    chunked: bool = False
    hold: threading.Event = field(default_factory=threading.Event)
    asked: list[dict[str, Any]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def next_stream(self, body: dict[str, Any]) -> bytes | int:
        with self._lock:
            self.asked.append(body)
            if not self.streams:
                count = body["max_tokens"]
                return events(*(chunk(token_ids=[7]) for _ in range(count)), usage(count))
            return self.streams.pop(0) if len(self.streams) > 1 else self.streams[0]


@contextmanager
def openai_fake() -> Iterator[OpenAIFake]:
    """The server, on a port of its own; without `streams` it answers as many tokens as it is asked for."""
    fake = OpenAIFake()
    fake.hold.set()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            fake.paths.append(self.path)
            self._send(fake.models_status, "application/json", json.dumps(fake.models).encode())

        def do_POST(self) -> None:
            fake.paths.append(self.path)
            stream = fake.next_stream(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            assert fake.hold.wait(HOLD_S)
            if isinstance(stream, int):
                self._send(stream, "application/json", b'{"error": {"message": "told so"}}')
            else:
                self._send(200, fake.content_type, stream)

        def _send(self, status: int, kind: str, body: bytes) -> None:
            if fake.key is not None and self.headers.get("Authorization") != f"Bearer {fake.key}":
                status, kind, body = 401, "application/json", b'{"error": {"message": "the API key is wrong"}}'
            self.send_response(status)
            self.send_header("Content-Type", kind)
            if fake.chunked:
                self.send_header("Transfer-Encoding", "chunked")
                pieces = [body[start : start + 7] for start in range(0, len(body), 7)]
                body = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(body)
            self.close_connection = True

        def log_message(self, format: str, *args: object) -> None:
            """Keep stderr for the command."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.02,))
        thread.start()
        fake.url = f"http://127.0.0.1:{http.server_port}"
        try:
            yield fake
        finally:
            fake.hold.set()
            http.shutdown()
            thread.join(timeout=10)
