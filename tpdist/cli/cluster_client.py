"""Asks one node of a cluster, over HTTP, for what its head sees.

Knows the shape of /v1/cluster, and reads it leniently, so that it can show a cluster of another release.
"""

import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from tpdist.errors import JoinError, SettingsError

METRIC = re.compile(r"^tpdist_(\w+) (-?\d+(?:\.\d+)?(?:e[-+]?\d+)?)$", re.MULTILINE)
"""A sample without labels, in the text format of Prometheus."""


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
    """`url` is the HTTP address of any node. Each answer may take `timeout_s`."""

    url: str
    token: str | None
    timeout_s: float

    def cluster(self) -> dict[str, Any]:
        """The body of /v1/cluster. Raises JoinError when nobody answers, SettingsError for another kind of server."""
        url = self.url + "/v1/cluster"
        if not url.startswith(("http://", "https://")):
            raise SettingsError(f"--url must start with http:// or https://, not be {url}")
        try:
            body = self._get(url)
        except HTTPError as error:
            hint = "; set --api-key-file" if error.code in (401, 403) else ""
            raise SettingsError(f"{url} answered {error.code} {error.reason}{hint}") from error
        except (URLError, OSError, HTTPException) as error:
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
            with error:
                return error.read()
        except (URLError, OSError, HTTPException):
            return b""

    def _get(self, url: str) -> bytes:
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        with urlopen(Request(url, headers=headers), timeout=self.timeout_s) as response:
            body = response.read()
            assert isinstance(body, bytes)
            return body


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
