"""`tpdist generate` that is ended before its answer is there."""

import asyncio
import os
import signal
from typing import Any

import pytest

from tpdist import builtin
from tpdist.cli import generate
from tpdist.cli.frame import run


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
@pytest.mark.parametrize("waits_for_node", [True, False])
def test_a_signal_before_the_answer_ends_it_as_interrupted(
    number: signal.Signals,
    waits_for_node: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    async def answer(node: Any, *rest: object, **options: object) -> None:
        os.kill(os.getpid(), number)
        await (node.agent.wait_ready() if waits_for_node else asyncio.Event().wait())

    monkeypatch.setattr(generate, "_answer", answer)
    assert run(["generate", str(builtin.path()), "--prompt", "1+1=", "--device", "cpu"]) == 130
    assert f"error: interrupted by {number.name}" in capsys.readouterr().err
