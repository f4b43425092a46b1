"""`tpdist keygen`: a key that only its owner can read, and that is never lost by mistake."""

import stat
from pathlib import Path

import pytest

from tpdist.cli.frame import run
from tpdist.settings import Settings


def test_a_key_is_32_random_bytes_in_hex_that_only_its_owner_can_read(tmp_path: Path) -> None:
    files = [tmp_path / "one.key", tmp_path / "two.key"]
    for file in files:
        assert run(["keygen", str(file)]) == 0
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert len(bytes.fromhex(file.read_text().strip())) == 32
        assert Settings.load({"key_file": str(file)}, environ={}).key_file == file
    assert files[0].read_text() != files[1].read_text()
    assert sorted(tmp_path.iterdir()) == files


def test_an_existing_key_is_replaced_only_by_force(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "cluster.key"
    file.write_text("precious")
    assert run(["keygen", str(file)]) == 2
    assert "--force" in capsys.readouterr().err
    assert file.read_text() == "precious"
    assert run(["keygen", "--force", str(file)]) == 0
    assert len(bytes.fromhex(file.read_text().strip())) == 32
    assert list(tmp_path.iterdir()) == [file]


def test_a_key_never_stands_in_the_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "cluster.key"
    assert run(["keygen", str(file)]) == 0
    out, err = capsys.readouterr()
    assert file.read_text().strip() not in out + err


def test_a_folder_that_does_not_exist_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["keygen", str(tmp_path / "no" / "cluster.key")]) == 2
    assert "No such file" in capsys.readouterr().err
