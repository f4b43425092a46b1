"""The file of API keys: what is a key, and what is refused with its line and without the secret."""

from pathlib import Path

import pytest

from tpdist.errors import SettingsError
from tpdist.server.api_keys import read_api_keys


def test_keys_are_whole_lines_and_comments_may_hold_anything(tmp_path: Path) -> None:
    (file := tmp_path / "keys").write_bytes(b"# by \xff and \xe2\x82\xac\n\n first \r\na key with spaces\n  # late\n")
    assert read_api_keys(file) == ["first", "a key with spaces"]
    assert read_api_keys(None) == []


@pytest.mark.parametrize("key", ["s\u00e9cret".encode(), "\u20ac".encode(), b"s\xff", b"a\x00b", b"a\tb", b"a\x7f"])
def test_a_key_that_no_header_can_hold_is_refused_with_its_line(key: bytes, tmp_path: Path) -> None:
    (file := tmp_path / "keys").write_bytes(b"# ours\ngood\n" + key + b"\n")
    with pytest.raises(SettingsError) as refused:
        read_api_keys(file)
    assert f"TPDIST_API_KEY_FILE={file}, line 3: a key must be printable ASCII" in str(refused.value)
    assert key.decode(errors="replace") not in str(refused.value)


@pytest.mark.parametrize("content", [b"", b"\n \n", b"# only a comment\n"])
def test_a_file_without_a_key_is_refused(content: bytes, tmp_path: Path) -> None:
    (file := tmp_path / "keys").write_bytes(content)
    with pytest.raises(SettingsError, match="holds no key"):
        read_api_keys(file)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="Is a directory"):
        read_api_keys(tmp_path)
