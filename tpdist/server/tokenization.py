"""POST /tokenize and /detokenize, in vLLM's shape. They need the tokenizer only, not the cluster."""

from fastapi import APIRouter, Response

from tpdist.server import responses
from tpdist.server.body import StrictRoute
from tpdist.server.event_stream import json_response
from tpdist.server.generation import encode
from tpdist.server.schema import DetokenizeRequest, TokenizeRequest
from tpdist.server.service import Service
from tpdist.server.text import check_token_ids
from tpdist.server.tokenizer import Tokenizer


def tokenization_router(service: Service) -> APIRouter:
    router = APIRouter(route_class=StrictRoute, tags=["tokenizer"])
    errors = responses.error_responses(400, 401, 404, 413, 503)

    @router.post("/tokenize", response_model=responses.TokenizeResponse, responses=errors)
    async def tokenize(body: TokenizeRequest) -> Response:
        """Token ids of a prompt, or of a conversation as the chat template writes it."""
        service.check_model(body.model or service.model_names[0])
        tokenizer = service.ready_tokenizer()
        tokens = await _encode_input(tokenizer, body)
        engine = service.client.state().engine
        return json_response(
            {
                "count": len(tokens),
                "max_model_len": None if engine is None else engine.max_model_len,
                "tokens": tokens,
                "token_strs": tokenizer.token_strings(tokens) if body.return_token_strs else None,
            }
        )

    @router.post("/detokenize", response_model=responses.DetokenizeResponse, responses=errors)
    async def detokenize(body: DetokenizeRequest) -> Response:
        """Text of token ids, special tokens included."""
        service.check_model(body.model or service.model_names[0])
        tokenizer = service.ready_tokenizer()
        check_token_ids(body.tokens, vocab_size=max(len(tokenizer), service.vocab_size), param="tokens")
        return json_response({"prompt": tokenizer.decode(body.tokens)})

    return router


async def _encode_input(tokenizer: Tokenizer, body: TokenizeRequest) -> tuple[int, ...]:
    if body.messages is None:
        return await encode(tokenizer, body.prompt or "", add_special_tokens=body.add_special_tokens)
    messages = [message.for_template() for message in body.messages]
    text = tokenizer.render_chat(messages, add_generation_prompt=body.add_generation_prompt)
    return await encode(tokenizer, text, add_special_tokens=False)
