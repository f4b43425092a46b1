"""A deadline for an awaitable that lets a cancellation through. `asyncio.wait_for` of Python 3.11 swallows one that
comes as its work ends (cpython#86296), and the task goes on for ever."""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

Result = TypeVar("Result")


async def within(seconds: float, work: Awaitable[Result]) -> Result:
    """What `work` returns. Raises TimeoutError after `seconds`."""
    async with asyncio.timeout(seconds):
        return await work
