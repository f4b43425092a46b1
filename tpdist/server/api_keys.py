"""The file of API keys, read alike by those who ask for a key and those who send one. Knows nothing of HTTP."""

from pathlib import Path

from tpdist.errors import SettingsError


def read_api_keys(path: Path | None) -> list[str]:
    """Bearer tokens, one a line; empty lines and those that start with # are skipped. Raises SettingsError, which keeps
    the secret, also for a key that no client could send: headers hold printable ASCII."""
    if path is None:
        return []
    try:
        text = path.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        raise SettingsError(f"cannot read TPDIST_API_KEY_FILE={path}: {error.strerror or error}") from error
    lines = ((number, line.strip()) for number, line in enumerate(text.splitlines(), start=1))
    keys = {number: line for number, line in lines if line and not line.startswith("#")}
    if not keys:
        raise SettingsError(f"TPDIST_API_KEY_FILE={path} holds no key: write one a line, or unset it")
    for number, key in keys.items():
        if not (key.isascii() and key.isprintable()):
            raise SettingsError(
                f"TPDIST_API_KEY_FILE={path}, line {number}: a key must be printable ASCII, or no HTTP header can hold "
                "it; write another"
            )
    return list(keys.values())
