"""Turns what the user calls a model into a folder on this machine: a folder as it is, or a download from the Hub.

Downloads go through huggingface_hub, into its cache, with its environment variables. Knows no file's contents.
"""

from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, RevisionResolutionError, XetDownloadError
from huggingface_hub.utils.tqdm import tqdm

from tpdist.errors import CheckpointError, SettingsError

# Configuration, tokenizer and weights; none of a repository's copies in other formats.
WANTED = ("*.json", "*.safetensors", "*.jinja", "*.txt", "tokenizer.model")
UNWANTED = ("*/*", "consolidated*")


def resolve_model(model: str, *, revision: str | None = None, progress: bool = True) -> Path:
    """The folder of `model`, which is a folder or a Hugging Face id; an id is downloaded unless it is in the cache.

    `progress` shows bars on stderr. Raises CheckpointError if there is no such folder or the download fails, and
    SettingsError for a revision of a folder.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        if revision is not None:
            raise SettingsError(f"--revision {revision} means nothing for {path}, which is a folder; unset it")
        return path
    if path.exists():
        raise CheckpointError(f"{path} is a file; give the folder that holds config.json")
    return _download(model, revision, progress)


def _download(model: str, revision: str | None, progress: bool) -> Path:
    try:
        folder = snapshot_download(
            model,
            revision=revision,
            allow_patterns=list(WANTED),
            ignore_patterns=list(UNWANTED),
            tqdm_class=tqdm if progress else _Silent,
        )
    except ValueError as error:
        raise CheckpointError(f"{model} is neither a folder nor a Hugging Face id") from error
    except (HfHubHTTPError, OSError, RevisionResolutionError, XetDownloadError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{model} is not a folder here, and cannot be downloaded from the Hugging Face Hub: {reason}"
        ) from error
    return Path(folder)


class _Silent(tqdm):
    """A progress bar that is never drawn."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{**options, "disable": True})  # type: ignore[no-untyped-call]
