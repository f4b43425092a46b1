"""A node with its HTTP server, put together."""

import asyncio
from typing import Any

import pytest

from tpdist import launcher
from tpdist.control.agent import Outcome
from tpdist.launcher import serve
from tpdist.node import Model
from tpdist.settings import Settings

WORKER = {"global_world_size": "2", "worker_id": "0", "worker_server_addr": "127.0.0.1:7100", "port": "0"}


class NodeToldToEnd:
    """It ends while its model is still being opened, which it stops."""

    def __init__(self, settings: Settings, model: "asyncio.Task[Model]", **options: Any) -> None:
        self._model = model

    async def run(self) -> Outcome:
        self._model.cancel()
        await asyncio.gather(self._model, return_exceptions=True)
        return Outcome(5, "the nodes disagree")


def test_a_node_that_is_told_to_end_before_it_has_its_model_ends_as_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    async def open_model(model: str, *, revision: str | None) -> Model:
        await asyncio.Event().wait()
        raise AssertionError("nobody sets it")

    monkeypatch.setattr(launcher, "open_model_later", open_model)
    monkeypatch.setattr(launcher, "Node", NodeToldToEnd)
    settings = Settings.load(WORKER, environ={})
    assert asyncio.run(serve(settings, "model", environ={})) == Outcome(5, "the nodes disagree")
