"""Waiting in a coroutine for what must not be left halfway, however often its caller is cancelled meanwhile."""

from __future__ import annotations

import asyncio
from typing import Any

import anyio

__all__ = ["end_of"]


async def end_of(task: asyncio.Future[Any]) -> asyncio.CancelledError | None:
    """Wait until a task is done, and return the last cancellation that came meanwhile; None where none came."""
    cancellation: asyncio.CancelledError | None = None
    # A scope of AnyIO shields from AnyIO's cancellation only, and this loop from a Task.cancel() too, as
    # asyncio.timeout() does it.
    with anyio.CancelScope(shield=True):
        while not task.done():
            try:
                await asyncio.wait([task])
            except asyncio.CancelledError as error:
                cancellation = error
    return cancellation
