"""Waiting in a coroutine for what must not be left halfway, however often its caller is cancelled meanwhile."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import anyio
import anyio.to_thread

__all__ = ["call_in_thread", "shielded_wait"]

T = TypeVar("T")


async def call_in_thread(act: Callable[[], T], *, limiter: anyio.CapacityLimiter | None = None) -> T:
    """Call `act` in a worker thread, wait for its end, and return its value or raise its error.

    Args:
        act: a function that may block.
        limiter: how many threads may run such functions at once; None for AnyIO's own.

    Raises:
        asyncio.CancelledError: the caller was cancelled meanwhile. `act` has ended all the same, or never begins.
    """
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()
    mutex = threading.Lock()
    begun = given_up = False

    def whole() -> T:
        nonlocal begun
        with mutex:
            if given_up:
                raise asyncio.CancelledError
            begun = True
        try:
            return act()
        finally:
            loop.call_soon_threadsafe(ended.set_result, None)

    task = asyncio.ensure_future(anyio.to_thread.run_sync(whole, limiter=limiter))
    cancellation = await shielded_wait(task)
    if task.cancelled():
        # asyncio.run() cancels all tasks that are left when it ends, this one too, and that stops no thread.
        with mutex:
            given_up = not begun
        if begun:
            cancellation = await shielded_wait(ended) or cancellation
    if cancellation is not None:
        if not task.cancelled():
            task.exception()  # looked at, or asyncio would report it as lost
        raise cancellation
    return task.result()


async def shielded_wait(task: asyncio.Future[Any]) -> asyncio.CancelledError | None:
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
