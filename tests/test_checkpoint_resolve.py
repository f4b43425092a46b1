"""What the user calls a model: a folder, or an id that is asked of the Hub (replaced here)."""

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, RevisionResolutionError

from tpdist.checkpoint import resolve
from tpdist.checkpoint.resolve import resolve_model
from tpdist.errors import CheckpointError, SettingsError


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """What the Hub is asked for; it answers with `tmp_path`."""
    requests: list[dict[str, Any]] = []

    def download(model: str, **options: Any) -> str:
        requests.append({"model": model, **options})
        return str(tmp_path)

    monkeypatch.setattr(resolve, "snapshot_download", download)
    return requests


def fail_with(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def download(model: str, **options: Any) -> str:
        raise error

    monkeypatch.setattr(resolve, "snapshot_download", download)


def test_a_folder_is_taken_as_it_is(tmp_path: Path, asked: list[dict[str, Any]]) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path
    assert not asked


def test_an_id_is_downloaded_at_its_revision(tmp_path: Path, asked: list[dict[str, Any]]) -> None:
    assert resolve_model("org/name", revision="v1", progress=False) == tmp_path
    assert (asked[0]["model"], asked[0]["revision"]) == ("org/name", "v1")
    assert list(asked[0]["tqdm_class"](range(3))) == [0, 1, 2]


def test_a_revision_of_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="--revision v1"):
        resolve_model(str(tmp_path), revision="v1")


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    with pytest.raises(CheckpointError, match="is a file"):
        resolve_model(str(tmp_path / "model.gguf"))


def test_a_path_that_does_not_exist_and_cannot_be_an_id_is_refused_without_a_download() -> None:
    with pytest.raises(CheckpointError, match="/no/such/folder is neither a folder nor a Hugging Face id"):
        resolve_model("/no/such/folder")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (LocalEntryNotFoundError("no connection\nlong advice"), "no connection$"),
        (RevisionResolutionError("no revision v9"), "no revision v9$"),
        (OSError(), "OSError$"),
    ],
)
def test_a_download_that_fails_says_why_in_one_line(
    monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    fail_with(monkeypatch, error)
    with pytest.raises(CheckpointError, match=f"org/name is not a folder here, .*: {reason}"):
        resolve_model("org/name")
