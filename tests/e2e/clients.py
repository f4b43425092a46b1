"""Clients of the HTTP API: streams that run in the background, and the official one."""

import json
import threading
from collections.abc import Sequence
from typing import Any, Self

import httpx
import openai

from e2e.cluster import ANSWER_S, NodeProcess


class Stream(threading.Thread):
    """A streaming completion that runs in a thread of its own. `events` are the JSON objects that came."""

    def __init__(self, node: NodeProcess, prompt: Sequence[int], *, max_tokens: int) -> None:
        super().__init__(name=f"stream-{node.name}", daemon=True)
        self.node = node
        self.events: list[Any] = []
        self.status = 0
        self.broken = ""
        self.done = False
        self._flowing = threading.Event()
        self._leaving = threading.Event()
        self._body = {
            "model": model_name(node),
            "prompt": list(prompt),
            "max_tokens": max_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "return_token_ids": True,
        }
        self.start()

    def run(self) -> None:
        try:
            self._read()
        except httpx.TransportError as error:
            self.broken = repr(error)
        self._flowing.set()

    def _read(self) -> None:
        url = f"{self.node.url}/v1/completions"
        with httpx.stream("POST", url, json=self._body, timeout=ANSWER_S, trust_env=False) as response:
            self.status = response.status_code
            if self.status != 200:
                self.events.append(json.loads(response.read()))
                return
            for line in response.iter_lines():
                self.done = self.done or line == "data: [DONE]"
                if line.startswith("data: {"):
                    self.events.append(json.loads(line.removeprefix("data: ")))
                    self._flowing.set()
                if self._leaving.is_set():
                    return

    def wait_first(self) -> Self:
        """Return once tokens flow."""
        assert self._flowing.wait(ANSWER_S), "no token came"
        assert self.status == 200, f"HTTP {self.status} {self.broken}"
        assert self.events, self.broken
        return self

    def leave(self) -> None:
        """Close the connection in the middle of the answer."""
        self._leaving.set()
        self.finish()

    def finish(self, timeout_s: float = ANSWER_S) -> Self:
        self.join(timeout_s)
        assert not self.is_alive(), f"{self.name} hangs after {len(self.events)} events"
        return self

    @property
    def token_ids(self) -> list[int]:
        return [token for event in self.events for choice in event.get("choices", ()) for token in choice["token_ids"]]

    @property
    def error(self) -> str:
        """What the client was told went wrong; empty if nothing."""
        told = [event["error"]["message"] for event in self.events if "error" in event]
        return told[0] if told else self.broken


def openai_client(node: NodeProcess) -> openai.OpenAI:
    """The official client, which sees no proxy of this machine and tries nothing twice."""
    return openai.OpenAI(
        base_url=f"{node.url}/v1", api_key="none", max_retries=0, http_client=httpx.Client(trust_env=False)
    )


def model_name(node: NodeProcess) -> str:
    name: str = node.get("/v1/models").json()["data"][0]["id"]
    return name


def complete(node: NodeProcess, prompt: str | Sequence[int] | Sequence[Sequence[int]], **options: Any) -> Any:
    """The body of a greedy completion; eos does not end it."""
    body = {"model": model_name(node), "prompt": prompt, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    response = node.post("/v1/completions", {**body, **options})
    assert response.status_code == 200, response.text
    return response.json()


def completed_tokens(node: NodeProcess, prompt: Sequence[int], max_tokens: int) -> list[int]:
    """The greedy tokens that follow one prompt."""
    tokens: list[int] = complete(node, prompt, max_tokens=max_tokens)["choices"][0]["token_ids"]
    return tokens
