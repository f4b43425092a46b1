"""What every endpoint needs, built once and passed down: the cluster, the tokenizer, the model's names and limits."""

from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from tpdist.control.messages import ClusterState, EngineInfo
from tpdist.server.auth import ApiKeys
from tpdist.server.client import EngineClient
from tpdist.server.errors import ApiError
from tpdist.server.metrics import Metrics
from tpdist.server.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Service:
    """`model_names[0]` is the name in answers to requests that give none; `created_s` is when the server started."""

    client: EngineClient
    tokenizer: Future[Tokenizer]
    model_names: tuple[str, ...]
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    keys: ApiKeys
    metrics: Metrics
    created_s: int

    def check_model(self, model: str) -> None:
        """Raise ApiError 404 for a name that this server does not answer to."""
        if model not in self.model_names:
            known = ", ".join(self.model_names)
            raise ApiError(
                404, f"there is no model {model[:200]!r} here; there is {known}", param="model", code="model_not_found"
            )

    def ready_engine(self) -> EngineInfo:
        """The engine's limits. Raises ApiError 503 with the reason unless all ranks are ready."""
        state = self.client.state()
        reason = reason_not_ready(state)
        if state.engine is None or reason:
            raise ApiError(503, f"the cluster is {state.state}: {reason}", code="not_ready")
        return state.engine

    def ready_tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises ApiError 503 while it is loading, or if it could not be read."""
        reason = self.reason_no_tokenizer()
        if reason:
            raise ApiError(503, reason, code="not_ready")
        return self.tokenizer.result()

    def readiness(self) -> tuple[bool, dict[str, Any]]:
        """Whether this node serves requests now, and the body of /readyz."""
        state = self.client.state()
        reason = reason_not_ready(state) or self.reason_no_tokenizer()
        shown = "starting" if reason and state.state == "ready" else state.state
        return not reason, {"state": shown, "reason": reason, "epoch": state.epoch, "phase": state.phase}

    def reason_no_tokenizer(self) -> str:
        if not self.tokenizer.done():
            return "the tokenizer is loading"
        error = self.tokenizer.exception()
        return f"the tokenizer could not be read: {error}" if error else ""


def reason_not_ready(state: ClusterState) -> str:
    """Why the cluster cannot take a request now; empty if it can."""
    if state.state != "ready":
        return state.reason or f"phase {state.phase}"
    return "" if state.engine is not None else "the limits of the engine are not known yet"
