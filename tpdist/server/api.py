"""The HTTP API of a node, put together: endpoints, errors, keys, limits. Serves nothing by itself; see http.py."""

import time
from collections.abc import Sequence
from concurrent.futures import Future
from importlib.metadata import version

from fastapi import FastAPI

from tpdist.server.auth import ApiKeys, RequireApiKey
from tpdist.server.body import DEFAULT_MAX_BODY_BYTES, BodyRoom
from tpdist.server.chat import chat_router
from tpdist.server.client import EngineClient
from tpdist.server.completions import completions_router
from tpdist.server.errors import install_handlers
from tpdist.server.head_requests import HeadAsGet
from tpdist.server.metrics import Metrics
from tpdist.server.operations import operations_router
from tpdist.server.service import Service
from tpdist.server.tokenization import tokenization_router
from tpdist.server.tokenizer import Tokenizer
from tpdist.server.unsupported import unsupported_router


def create_app(
    client: EngineClient,
    *,
    tokenizer: Future[Tokenizer],
    model_names: Sequence[str],
    vocab_size: int,
    eos_token_ids: Sequence[int],
    api_keys: Sequence[str] = (),
    max_body_bytes: int = DEFAULT_MAX_BODY_BYTES,
) -> FastAPI:
    """The app of one node.

    `tokenizer` may still be loading: until it is done /readyz says so and requests get 503. `vocab_size` and
    `eos_token_ids` are the model's; its other limits come with the state of `client`. Without `api_keys` everybody
    who reaches the port may use the API, and only this machine may drain the cluster.
    """
    if not model_names:
        raise ValueError("at least one model name is needed")
    keys = ApiKeys(api_keys)
    service = Service(
        client=client,
        tokenizer=tokenizer,
        model_names=tuple(model_names),
        vocab_size=vocab_size,
        eos_token_ids=tuple(eos_token_ids),
        keys=keys,
        metrics=Metrics(client.state),
        created_s=int(time.time()),
    )
    app = FastAPI(title="tpdist", version=version("tpdist"), redirect_slashes=False)
    app.state.max_body_bytes = max_body_bytes
    app.state.body_room = BodyRoom()
    for router in (completions_router, chat_router, tokenization_router, operations_router):
        app.include_router(router(service))
    app.include_router(unsupported_router())
    install_handlers(app)
    app.add_middleware(RequireApiKey, keys=keys)
    app.add_middleware(HeadAsGet)
    return app
