"""What is left in the folder for temporary files of nodes that were killed."""

import fcntl
import os
import tempfile
from pathlib import Path

import pytest

from tpdist.errors import SettingsError
from tpdist.run_directory import LOCK, SETTLED_S, run_directory


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def left_behind(folder: Path, *, age_s: float = 10 * SETTLED_S) -> Path:
    """The folder of a node that was killed so long ago."""
    folder.mkdir()
    (folder / "control.sock").touch()
    lock = folder / LOCK
    lock.touch()
    then = lock.stat().st_mtime - age_s
    os.utime(lock, (then, then))
    return folder


def test_a_folder_goes_with_its_node_and_is_its_own(temporary: Path) -> None:
    with run_directory() as first, run_directory() as second:
        assert {first.parent, second.parent} == {temporary}
        assert first.stat().st_mode & 0o777 == 0o700
        assert first != second
    assert not list(temporary.iterdir())


def test_what_killed_nodes_left_goes_when_the_next_starts(temporary: Path) -> None:
    left_behind(temporary / "tpdist-killed")
    with run_directory() as folder:
        assert list(temporary.iterdir()) == [folder]


def test_folders_of_nodes_that_live_or_just_start_and_of_others_stay(temporary: Path) -> None:
    living = left_behind(temporary / "tpdist-living")
    starting = left_behind(temporary / "tpdist-starting", age_s=0)
    elsewhere = left_behind(temporary / "elsewhere")
    (temporary / "tpdist-link").symlink_to(elsewhere)
    (temporary / "tpdist-empty").mkdir()
    with (living / LOCK).open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with run_directory():
            assert (living / "control.sock").exists()
            assert (starting / "control.sock").exists()
            assert (elsewhere / "control.sock").exists()
            assert (temporary / "tpdist-empty").is_dir()


def test_a_path_too_long_for_sockets_is_named(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = temporary / ("d" * 100)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    with pytest.raises(SettingsError, match="is too long for Unix sockets"), run_directory():
        raise AssertionError("it was made")
    assert not list(deep.iterdir())
