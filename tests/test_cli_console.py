"""What a node shows beside its log."""

import os

import pytest

from tpdist.cli.console import LogConsole


def test_a_reader_that_has_gone_ends_no_node(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", buffering=1) as broken:
        monkeypatch.setattr("sys.stderr", broken)
        console = LogConsole()
        for _ in range(2):
            console.print("what nobody reads")
        monkeypatch.undo()
        with pytest.raises(BrokenPipeError):
            broken.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), writer)
