"""POST /v1/chat/completions."""

from dataclasses import dataclass
from time import monotonic
from typing import Any

from fastapi import APIRouter, Request, Response

from tpdist.server import responses
from tpdist.server.body import StrictRoute
from tpdist.server.generation import encode, plan_job
from tpdist.server.replies import plan_reply, respond
from tpdist.server.schema import ChatRequest
from tpdist.server.service import Service


@dataclass(frozen=True)
class ChatShape:
    object: str = "chat.completion"
    chunk_object: str = "chat.completion.chunk"

    def choice(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def delta(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}}

    def opening(self) -> dict[str, Any]:
        return {"delta": {"role": "assistant", "content": ""}}


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
        reply = plan_reply(body, prefix="chatcmpl", shape=ChatShape())
        job = plan_job(
            body, request_id=reply.id, service=service, tokenizer=tokenizer, prompts=[prompt], arrived_s=arrived_s
        )
        return await respond(request, job=job, reply=reply)

    return router
