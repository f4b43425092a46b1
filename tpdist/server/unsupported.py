"""Endpoints of OpenAI's that this server knows by name alone: a request gets a 400 that says so."""

from fastapi import APIRouter

from tpdist.server.errors import ApiError


def unsupported_router() -> APIRouter:
    router = APIRouter(include_in_schema=False)

    @router.post("/v1/embeddings")
    async def create_embedding() -> None:
        raise ApiError(
            400,
            "embeddings are not supported by this server; it has /v1/completions and /v1/chat/completions",
            code="unsupported",
        )

    return router
