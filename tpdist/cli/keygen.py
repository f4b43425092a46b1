"""`tpdist keygen`: make the one secret that all nodes of a cluster share.

The file is one line: 32 random bytes in hex. control/channel.py derives the key pairs from it.
"""

import os
import secrets
from pathlib import Path

import click

from tpdist.cli.frame import command
from tpdist.errors import SettingsError

NUM_SEED_BYTES = 32


@command(examples=("tpdist keygen cluster.key", "tpdist keygen --force cluster.key"))
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--force", is_flag=True, help="Replace the file if it exists; every node then needs the new one.")
def keygen(file: Path, force: bool) -> None:
    """Write a new cluster key to FILE, with mode 0600.

    Copy it to every node and name it there with TPDIST_KEY_FILE. Any node that holds it can pose as the head.
    """
    try:
        _write_key(file, replace=force)
    except FileExistsError as error:
        raise SettingsError(f"{file} exists; a cluster may be using it: --force replaces it") from error
    except OSError as error:
        raise SettingsError(f"cannot write {file}: {error.strerror}") from error
    click.echo(f"{file}: new cluster key; copy it to every node and set TPDIST_KEY_FILE there", err=True)


def _write_key(file: Path, *, replace: bool) -> None:
    """Create `file` whole or not at all, never readable by others. Raises FileExistsError unless `replace`."""
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as opened:
            opened.write(secrets.token_hex(NUM_SEED_BYTES) + "\n")
        if replace:
            draft.replace(file)
        else:
            os.link(draft, file)
    finally:
        draft.unlink(missing_ok=True)
