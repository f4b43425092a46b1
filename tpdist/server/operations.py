"""What operators and their tools ask: liveness, readiness, metrics, models, the cluster, and drain."""

from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST

from tpdist.control.messages import ClusterState, DrainRequest
from tpdist.server import responses
from tpdist.server.auth import require_trusted_client
from tpdist.server.body import StrictRoute
from tpdist.server.event_stream import json_response
from tpdist.server.schema import DrainBody
from tpdist.server.service import Service

NOT_READY: dict[int | str, dict[str, Any]] = {
    503: {"model": responses.Readiness, "description": "This node does not serve requests now; reason says why."}
}


def operations_router(service: Service) -> APIRouter:
    """All of these endpoints."""
    router = APIRouter(tags=["operations"])
    router.include_router(_probes(service))
    router.include_router(_models(service))
    router.include_router(_cluster(service))
    return router


def _probes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.get("/livez", response_model=responses.Liveness)
    async def livez() -> Response:
        """200 as long as this process answers, whatever its ranks do."""
        return json_response({"status": "alive"})

    async def readyz() -> Response:
        """200 only when this node can serve a request now: all ranks of the epoch are ready, and the tokenizer is."""
        ready, body = service.readiness()
        return json_response(body, status=200 if ready else 503)

    for path in ("/readyz", "/health"):
        router.get(path, response_model=responses.Readiness, responses=NOT_READY, name=path[1:])(readyz)

    @router.get("/metrics", responses={200: {"content": {CONTENT_TYPE_LATEST: {"schema": {"type": "string"}}}}})
    async def metrics() -> Response:
        """Metrics for Prometheus."""
        return Response(service.metrics.render(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    return router


def _models(service: Service) -> APIRouter:
    router = APIRouter()

    @router.get("/v1/models", response_model=responses.ModelList, responses=responses.error_responses(401))
    async def list_models() -> Response:
        """The names that this server answers to; all are the same model."""
        return json_response({"object": "list", "data": [_model(service, name) for name in service.model_names]})

    @router.get(
        "/v1/models/{model:path}", response_model=responses.Model, responses=responses.error_responses(401, 404)
    )
    async def retrieve_model(model: str) -> Response:
        """One of these names."""
        service.check_model(model)
        return json_response(_model(service, model))

    return router


def _cluster(service: Service) -> APIRouter:
    router = APIRouter(route_class=StrictRoute)

    @router.get("/v1/cluster", response_model=responses.Cluster, responses=responses.error_responses(401))
    async def cluster() -> Response:
        """The cluster as the head sees it."""
        return json_response(cluster_body(service.client.state()))

    @router.post(
        "/v1/cluster/drain",
        status_code=202,
        response_model=responses.DrainAccepted,
        responses=responses.error_responses(400, 401, 403, 413, 503),
    )
    async def drain(request: Request, body: DrainBody | None = None) -> Response:
        """End the cluster on all nodes once what runs is done. Without an API key: from this machine only."""
        require_trusted_client(request, keys=service.keys)
        wanted = body or DrainBody()
        await service.client.drain(DrainRequest(reason=wanted.reason, immediate=wanted.immediate))
        return json_response({"state": "draining"}, status=202)

    return router


def cluster_body(state: ClusterState) -> dict[str, Any]:
    """The body of /v1/cluster. What ranks hold stands beside what was planned, as `measured`; what else the head knows
    of ranks and restarts is in the metrics."""
    nodes = msgspec.to_builtins(state.nodes)
    ranks = [rank for node in nodes for rank in node["ranks"]]
    measured = [{"rank": rank["rank"], **held} for rank in ranks for held in rank["held"]]
    for node in nodes:
        node["ranks"] = [{key: rank[key] for key in responses.Rank.model_fields} for rank in node["ranks"]]
    return {
        "state": state.state,
        "epoch": state.epoch,
        "phase": state.phase,
        "nodes": nodes,
        "plan": {**state.plan, "measured": measured},
        "restarts": [{"epoch": restart.epoch, "cause": restart.cause} for restart in state.restarts],
    }


def _model(service: Service, name: str) -> dict[str, Any]:
    engine = service.client.state().engine
    return {
        "id": name,
        "object": "model",
        "created": service.created_s,
        "owned_by": "tpdist",
        "max_model_len": None if engine is None else engine.max_model_len,
    }
