"""Asks one node of a cluster, over HTTP, for what its head sees.

Knows the shape of /v1/cluster, and reads it leniently, so that it can show a cluster of another release.
"""

import json
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from tpdist.errors import JoinError, SettingsError

METRIC = re.compile(r"^tpdist_(\w+) (-?\d+(?:\.\d+)?(?:e[-+]?\d+)?)$", re.MULTILINE)
"""A sample without labels, in the text format of Prometheus."""
FAILURES = (OSError, HTTPException, ValueError)
"""Of asking: URLError is an OSError, and a server may send one to an address that is none, a ValueError."""
REFUSALS = (401, 403)
EXAMPLE = "http://10.0.0.1:8000"


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What a node says at one moment: the body of /v1/cluster, why it is not ready, and its metrics without labels, by
    name. The last two are empty where it does not give them. `at_s` is monotonic."""

    at_s: float
    cluster: dict[str, Any]
    reason: str
    metrics: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class ClusterClient:
    """`url` is the HTTP address of any node, without a slash at its end. `token` is sent; it came from `key_file`. Each
    answer may take `timeout_s`. Raises SettingsError for what is no such address."""

    url: str
    token: str | None
    timeout_s: float
    key_file: Path | None = None

    def __post_init__(self) -> None:
        if problem := url_problem(self.url):
            raise SettingsError(f"--url {self.url!r}: {problem}; give the HTTP address of a node, as {EXAMPLE}")

    def cluster(self) -> dict[str, Any]:
        """The body of /v1/cluster. Raises JoinError when nobody answers, SettingsError for another kind of server."""
        url = self.url + "/v1/cluster"
        try:
            body = self._get(url)
        except HTTPError as error:
            error.close()
            hint = self._key_hint() if error.code in REFUSALS else ""
            raise SettingsError(f"{url} answered {error.code} {error.reason}{hint}") from error
        except FAILURES as error:
            reason = getattr(error, "reason", error)
            raise JoinError(f"cannot reach {url}: {reason}; is `tpdist serve` running there, on this port?") from error
        return _decode(body, url=url)

    def snapshot(self) -> Snapshot:
        """All of it. Raises as `cluster` does; what else cannot be had is left out."""
        cluster, at_s = self.cluster(), time.monotonic()
        metrics = METRIC.findall(self._get_if_there("/metrics").decode(errors="replace"))
        return Snapshot(
            at_s=at_s,
            cluster=cluster,
            reason=_reason(self._get_if_there("/readyz")),
            metrics={name: float(value) for name, value in metrics},
        )

    def _get_if_there(self, path: str) -> bytes:
        try:
            return self._get(self.url + path)
        except HTTPError as error:
            with error, suppress(*FAILURES):
                return error.read()
        except FAILURES:
            return b""
        return b""

    def _key_hint(self) -> str:
        if self.token is None:
            return "; set --api-key-file"
        return f"; the key in {self.key_file} was refused: it must be one of the server's, and the first one is sent"

    def _get(self, url: str) -> bytes:
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        with urlopen(Request(url, headers=headers), timeout=self.timeout_s) as response:
            body = response.read()
            assert isinstance(body, bytes)
            return body


def url_problem(url: str) -> str:
    """Why nobody can be asked at this address; empty if somebody can."""
    if not url.startswith(("http://", "https://")):
        return "it must start with http:// or https://"
    if not url.isprintable() or " " in url:
        return "it holds a space or a character that cannot be printed"
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
        (host or "").encode("idna")
        parts.path.encode("ascii")
    except UnicodeError:
        return "its host has an empty part or one of more than 63 characters, or its path is not ASCII"
    except ValueError as error:
        return str(error)
    if not host:
        return "it names no host"
    if port == 0:
        return "port 0 is nobody's"
    return "" if not parts.query and not parts.fragment else "it must end with the port or a path"


def _decode(body: bytes, *, url: str) -> dict[str, Any]:
    try:
        cluster = json.loads(body)
    except ValueError as error:
        raise SettingsError(f"{url} did not answer with JSON: not a tpdist server?") from error
    if not isinstance(cluster, dict) or not {"state", "nodes"} <= set(cluster):
        raise SettingsError(f"{url} answered with something else than a cluster: not a tpdist server?")
    return cluster


def _reason(body: bytes) -> str:
    """The reason in the body of /readyz; empty if it has none."""
    try:
        answer = json.loads(body)
    except ValueError:
        return ""
    return str(answer.get("reason", "")) if isinstance(answer, dict) else ""
