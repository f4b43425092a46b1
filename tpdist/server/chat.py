"""POST /v1/chat/completions."""

from collections.abc import Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any

from fastapi import APIRouter, Request, Response

from tpdist.server import responses
from tpdist.server.body import StrictRoute
from tpdist.server.generation import encode, plan_job
from tpdist.server.logprobs import PromptLogprobs, Vocabulary, chat_logprobs
from tpdist.server.replies import plan_reply, respond
from tpdist.server.schema import ChatRequest
from tpdist.server.service import Service
from tpdist.server.text import Piece


@dataclass(frozen=True)
class ChatShape:
    vocabulary: Vocabulary
    object: str = "chat.completion"
    chunk_object: str = "chat.completion.chunk"

    def choice(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def delta(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}}

    def opening(self) -> dict[str, Any]:
        return {"delta": {"role": "assistant", "content": ""}}

    def logprobs(self, piece: Piece, *, most: int) -> dict[str, Any]:
        return chat_logprobs(self.vocabulary, piece.logprobs, most=most)

    def add_prompt_logprobs(self, body: dict[str, Any], of_choices: Sequence[PromptLogprobs]) -> None:
        body["prompt_logprobs"] = of_choices[0]


def chat_router(service: Service) -> APIRouter:
    router = APIRouter(route_class=StrictRoute, tags=["generation"])

    @router.post(
        "/v1/chat/completions", response_model=responses.ChatResponse, responses=responses.generation_responses()
    )
    async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation, written as a prompt by the model's chat template."""
        arrived_s = monotonic()
        service.check_model(body.model)
        service.ready_engine()
        tokenizer = service.ready_tokenizer()
        text = tokenizer.render_chat([message.for_template() for message in body.messages])
        prompt = await encode(tokenizer, text, add_special_tokens=False)
        reply = plan_reply(body, prefix="chatcmpl", shape=ChatShape(tokenizer))
        job = plan_job(
            body, request_id=reply.id, service=service, tokenizer=tokenizer, prompts=[prompt], arrived_s=arrived_s
        )
        return await respond(request, job=job, reply=reply)

    return router
