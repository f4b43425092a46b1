"""What the HTTP server needs of the cluster: its state, generation, and drain.

The server knows no socket and no process: whoever implements this protocol brings the requests to the engine.
"""

from collections.abc import AsyncGenerator
from typing import Protocol

from tpdist.control.messages import ClusterState, DrainRequest, Generate, TokenOutput


class EngineClient(Protocol):
    """The way from one node's server to the engine of the cluster."""

    def state(self) -> ClusterState:
        """The latest view that the head has sent. Never waits."""
        ...

    def generate(self, request: Generate) -> AsyncGenerator[TokenOutput, None]:
        """Yield the tokens of `request` as they are made; the last output has a finish_reason.

        Closing the generator before that aborts the request on all ranks. Raises RequestError: status 400 for a
        request that can never be served, 503 when the cluster cannot serve it or lost it on the way.
        """
        ...

    async def drain(self, request: DrainRequest) -> None:
        """Ask the head to end the cluster; returns once the head has the request, not when the cluster has ended."""
        ...
