"""POST /v1/completions."""

from collections.abc import Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any

from fastapi import APIRouter, Request, Response

from tpdist.server import responses
from tpdist.server.body import StrictRoute
from tpdist.server.generation import encode, plan_job
from tpdist.server.logprobs import PromptLogprobs, Vocabulary, completion_logprobs
from tpdist.server.replies import plan_reply, respond
from tpdist.server.schema import CompletionRequest
from tpdist.server.service import Service
from tpdist.server.text import Piece


@dataclass(frozen=True)
class CompletionShape:
    vocabulary: Vocabulary
    object: str = "text_completion"
    chunk_object: str = "text_completion"

    def choice(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def delta(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def opening(self) -> None:
        return None

    def logprobs(self, piece: Piece, *, most: int) -> dict[str, Any]:
        return completion_logprobs(self.vocabulary, piece.logprobs, piece.offsets, most=most)

    def add_prompt_logprobs(self, body: dict[str, Any], of_choices: Sequence[PromptLogprobs]) -> None:
        for choice, found in zip(body["choices"], of_choices, strict=True):
            choice["prompt_logprobs"] = found


def completions_router(service: Service) -> APIRouter:
    router = APIRouter(route_class=StrictRoute, tags=["generation"])

    @router.post(
        "/v1/completions", response_model=responses.CompletionResponse, responses=responses.generation_responses()
    )
    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        """Continue each prompt. Choices come in the order of the prompts, the n answers to a prompt together."""
        arrived_s = monotonic()
        service.check_model(body.model)
        service.ready_engine()
        tokenizer = service.ready_tokenizer()
        prompts = [
            await encode(tokenizer, prompt, add_special_tokens=True) if isinstance(prompt, str) else prompt
            for prompt in body.prompt
        ]
        reply = plan_reply(body, prefix="cmpl", shape=CompletionShape(tokenizer))
        job = plan_job(
            body,
            request_id=reply.id,
            service=service,
            tokenizer=tokenizer,
            prompts=prompts,
            echoed=body.prompt if body.echo else (),
            arrived_s=arrived_s,
        )
        return await respond(request, job=job, reply=reply)

    return router
