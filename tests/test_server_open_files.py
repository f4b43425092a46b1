"""How many files a node may have open."""

import resource

import pytest

from tpdist.errors import SettingsError
from tpdist.server.open_files import set_open_file_limit


def test_a_limit_with_no_room_for_a_node_is_refused_with_how_to_raise_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (64, 64))
    with pytest.raises(SettingsError, match=r"allows a process 64 open files, and a node needs 128 .* \(ulimit -Hn\)"):
        set_open_file_limit()
