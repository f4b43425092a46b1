"""`tpdist serve` on one node: model, node, HTTP server and signals, and the order in which they end.

start   the HTTP port is bound and the checkpoint's headers are checked before anything else starts;
        then the node joins while the tokenizer loads, and HTTP answers 503 until all ranks are ready
end     the node's outcome comes first: ranks are gone and every request has its answer or its error;
        then HTTP stops, then sockets and the run directory go
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tpdist import log
from tpdist.control.agent import Outcome
from tpdist.control.messages import ClusterState, RankUpdate
from tpdist.errors import RequestError, SettingsError, TpdistError
from tpdist.node import Model, Node, handled_signals, open_model_later
from tpdist.parent import follow_parent
from tpdist.plan.placement import Placement
from tpdist.run_directory import run_directory
from tpdist.server.api import create_app
from tpdist.server.api_keys import read_api_keys
from tpdist.server.http import HttpServer, bind, check_certificate
from tpdist.server.open_files import set_open_file_limit
from tpdist.server.tokenizer import Tokenizer, open_tokenizer
from tpdist.settings import Role, Settings

logger = logging.getLogger(__name__)

HTTP_STOP_TIMEOUT_S = 5.0


async def serve(
    settings: Settings,
    model: str,
    *,
    environ: Mapping[str, str],
    run_dir: Path | None = None,
    supervise: bool = True,
    on_rank_update: Callable[[RankUpdate], None] | None = None,
    on_plan: Callable[[Model, Placement], None] | None = None,
    on_ready: Callable[[ClusterState], None] | None = None,
) -> Outcome:
    """Run this node until its cluster ends. Raises what is wrong before it starts. `on_plan` and `on_ready` are called
    when the head has planned, and when all ranks are ready.

    `run_dir` and `supervise` False come from torchrun, whose ranks look for their agent in that folder.
    """
    log.add_context(node=_node_name(settings))
    set_open_file_limit()
    if problems := list(settings.taken_twice()):
        raise SettingsError("\n".join(problems))
    listener = bind(settings.host, settings.port)
    api_keys = read_api_keys(settings.api_key_file)
    check_certificate(settings.ssl_certfile, settings.ssl_keyfile)
    with contextlib.closing(listener), _folder(run_dir) as folder:
        opening = asyncio.create_task(open_model_later(model, revision=settings.revision))
        if settings.role is Role.SINGLE and Path(model).is_dir():
            await opening
        node = Node(
            settings,
            opening,
            environ=environ,
            run_dir=folder,
            supervise=supervise,
            on_rank_update=on_rank_update,
            on_plan=on_plan,
        )
        with handled_signals(node):
            if not supervise:
                follow_parent(os.getppid(), signal.SIGUSR1)
            running = asyncio.create_task(node.run())
            await asyncio.wait({running, opening}, return_when=asyncio.FIRST_COMPLETED)
            # A node that is told to end stops opening its model.
            if opening.done() and not opening.cancelled() and opening.exception() is None:
                await _serve_http(settings, opening.result(), model, node, running, listener, api_keys, on_ready)
            return await running


async def _serve_http(
    settings: Settings,
    model: Model,
    name: str,
    node: Node,
    running: "asyncio.Task[Outcome]",
    listener: socket.socket,
    api_keys: list[str],
    on_ready: Callable[[ClusterState], None] | None,
) -> None:
    """Serve the API until the node has ended. A tokenizer that cannot be read ends it."""
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenizer")
    tokenizer = pool.submit(open_tokenizer, settings, model.folder)
    app = create_app(
        node.agent,
        tokenizer=tokenizer,
        model_names=[settings.served_model_name or name],
        vocab_size=model.config.vocab_size,
        eos_token_ids=model.config.eos_token_ids,
        api_keys=api_keys,
    )
    server = HttpServer(app, sock=listener, ssl_certfile=settings.ssl_certfile, ssl_keyfile=settings.ssl_keyfile)
    await server.start()
    logger.info("HTTP on %s, answering 503 until all ranks are ready", server.url)
    announcing = asyncio.create_task(_announce(node, asyncio.wrap_future(tokenizer), server.url, on_ready))
    await asyncio.wait({running})
    announcing.cancel()
    await asyncio.gather(announcing, return_exceptions=True)
    await server.stop(timeout_s=HTTP_STOP_TIMEOUT_S)
    pool.shutdown(cancel_futures=True)


async def _announce(
    node: Node,
    tokenizer: "asyncio.Future[Tokenizer]",
    url: str,
    on_ready: Callable[[ClusterState], None] | None,
) -> None:
    """Say so when this node serves; end it, and so the cluster, if it never can."""
    try:
        await tokenizer
    except TpdistError as error:
        node.agent.abandon(error.exit_code, str(error))
        return
    except Exception as error:
        cause = f"internal error: the tokenizer: {type(error).__name__}: {error}"
        node.agent.abandon(TpdistError.exit_code, cause)
        return
    with contextlib.suppress(RequestError):
        await node.agent.wait_ready()
        _say_ready(node.agent.state(), url)
        if on_ready is not None:
            on_ready(node.agent.state())
        while True:
            await node.agent.wait_until(lambda state: state.state != "ready")
            await node.agent.wait_ready()
            logger.info("ready again, in epoch %d", node.agent.state().epoch)


def _say_ready(state: ClusterState, url: str) -> None:
    assert state.engine is not None
    logger.info(
        "ready: %d ranks, %d tokens in the KV cache, up to %d a sequence; try\n  curl %s/v1/models",
        sum(len(each.ranks) for each in state.nodes),
        state.engine.num_kv_blocks * state.engine.block_size,
        state.engine.max_tokens,
        url,
    )


@contextlib.contextmanager
def _folder(given: Path | None) -> Iterator[Path]:
    if given is not None:
        yield given
        return
    with run_directory() as folder:
        yield folder


def _node_name(settings: Settings) -> str:
    if settings.torchrun is not None:
        return f"group-{settings.torchrun.group_rank}"
    if settings.standby:
        return "standby"
    return "head" if settings.worker_id is None else f"worker-{settings.worker_id}"
