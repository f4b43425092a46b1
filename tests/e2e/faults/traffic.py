"""Clients that stream all the time, compare every token, and never wait without knowing for how long.

Each asks for the greedy answers of known prompts, over and over. What it gets is one of:

    answered   all tokens, and the right ones
    failed     begun, or lost on the way: the client was told, or its connection was closed
    refused    asked while the node did not serve: a 503 at once, or nobody listened
    wrong      a token that the model does not give
    hung       nothing at all for the bound
"""

import itertools
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import httpx

PAUSE_S = 0.1
NUM_CLIENTS = 16

Prompt = tuple[int, ...]


@dataclass
class Tally:
    """What all clients together saw. `longest_wait_s` is the longest that any was left without a byte."""

    outcomes: Counter[str] = field(default_factory=Counter)
    longest_wait_s: float = 0.0
    notes: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, outcome: str, waited_s: float, note: str) -> None:
        with self.lock:
            self.outcomes[outcome] += 1
            self.longest_wait_s = max(self.longest_wait_s, waited_s)
            if outcome in ("wrong", "hung"):
                self.notes.append(note)


class Traffic:
    """Clients of several nodes, from `with` to its end. `url_of` gives each node's address at the time of asking."""

    def __init__(
        self,
        answers: Mapping[Prompt, Sequence[int]],
        *,
        names: Sequence[str],
        url_of: Callable[[str], str],
        model_name: str,
        bound_s: float,
        num_clients: int = NUM_CLIENTS,
    ) -> None:
        self.tally = Tally()
        self._stop = threading.Event()
        self._clients = [
            _Client(self.tally, self._stop, answers, name=name, url_of=url_of, model_name=model_name, bound_s=bound_s)
            for name, _ in zip(itertools.cycle(names), range(num_clients), strict=False)
        ]
        self._bound_s = bound_s

    def wait_flowing(self) -> None:
        """Return once tokens have come to every client."""
        for client in self._clients:
            assert client.flowing.wait(self._bound_s), f"a client of {client.node} gets no tokens: {self.tally}"

    def __enter__(self) -> Self:
        for client in self._clients:
            client.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stop.set()
        for client in self._clients:
            client.join(2 * self._bound_s)
        assert not any(client.is_alive() for client in self._clients), "a client does not come to an end"


class _Client(threading.Thread):
    def __init__(
        self,
        tally: Tally,
        stop: threading.Event,
        answers: Mapping[Prompt, Sequence[int]],
        *,
        name: str,
        url_of: Callable[[str], str],
        model_name: str,
        bound_s: float,
    ) -> None:
        super().__init__(name=f"client-of-{name}", daemon=True)
        self.node = name
        self.flowing = threading.Event()
        self._tally = tally
        self._stop_asked = stop
        self._answers = answers
        self._url_of = url_of
        self._model_name = model_name
        self._bound_s = bound_s

    def run(self) -> None:
        with httpx.Client(trust_env=False, timeout=self._bound_s) as http:
            for prompt in itertools.cycle(self._answers):
                if self._stop_asked.is_set():
                    return
                answer = _Answer(self._answers[prompt])
                outcome, note = self._ask(http, prompt, answer)
                self._tally.add(outcome, answer.longest_wait_s(), f"{self.node}: {note}")
                if outcome != "answered":
                    self._stop_asked.wait(PAUSE_S)

    def _ask(self, http: httpx.Client, prompt: Prompt, answer: "_Answer") -> tuple[str, str]:
        try:
            return self._stream(http, prompt, answer)
        except httpx.ReadTimeout:
            return "hung", f"no byte for {self._bound_s:g} s after {answer.tokens}"
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            return "refused", repr(error)
        except httpx.TransportError as error:
            return answer.verdict("failed"), repr(error)

    def _stream(self, http: httpx.Client, prompt: Prompt, answer: "_Answer") -> tuple[str, str]:
        body = {
            "model": self._model_name,
            "prompt": list(prompt),
            "max_tokens": len(self._answers[prompt]),
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "return_token_ids": True,
        }
        with http.stream("POST", f"{self._url_of(self.node)}/v1/completions", json=body) as response:
            answer.saw_a_byte()
            if response.status_code != 200:
                error = json.loads(response.read())["error"]
                return ("refused" if error["code"] == "not_ready" else "failed"), error["message"]
            for line in response.iter_lines():
                answer.saw_a_byte()
                if line.startswith("data: {"):
                    answer.take(json.loads(line.removeprefix("data: ")))
                    self.flowing.set()
                if line == "data: [DONE]":
                    return answer.verdict("answered"), answer.error
        return answer.verdict("failed"), answer.error or "cut off"


class _Answer:
    """The tokens of one answer as they come, and how long the client had to wait for each."""

    def __init__(self, expected: Sequence[int]) -> None:
        self.tokens: list[int] = []
        self.error = ""
        self._expected = list(expected)
        self._last_s = time.monotonic()
        self._longest_s = 0.0

    def saw_a_byte(self) -> None:
        self._longest_s, self._last_s = self.longest_wait_s(), time.monotonic()

    def longest_wait_s(self) -> float:
        return max(self._longest_s, time.monotonic() - self._last_s)

    def take(self, event: dict[str, Any]) -> None:
        if "error" in event:
            self.error = event["error"]["message"]
        for choice in event.get("choices", ()):
            self.tokens += choice["token_ids"]

    def verdict(self, otherwise: str) -> str:
        """`otherwise`, unless there are tokens that are none of this answer, or too few of them for a whole one."""
        if self.tokens != self._expected[: len(self.tokens)]:
            return "wrong"
        if self.error:
            return "failed"
        return "wrong" if otherwise == "answered" and len(self.tokens) < len(self._expected) else otherwise
