"""What a task or a future dies of, passed on to the future that somebody waits for."""

import asyncio
from collections.abc import Callable
from typing import Any


def failure_to(waited_for: "asyncio.Future[Any]") -> "Callable[[asyncio.Future[Any]], None]":
    """A done callback: an error ends `waited_for` too, unless that is done. A cancellation is no error."""

    def pass_on(ended: "asyncio.Future[Any]") -> None:
        if not ended.cancelled() and (error := ended.exception()) and not waited_for.done():
            waited_for.set_exception(error)

    return pass_on
