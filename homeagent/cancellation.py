"""Shield from cancellation. A coroutine waits for the end of a call even if the coroutine is cancelled meanwhile."""

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
    """Call the function `act()` in a worker thread, and wait for its end. Return the value or raise the error of the
    function.

    Args:
        act: function that can block.
        limiter: limiter of the number of worker threads. None means AnyIO's default limiter.

    Raises:
        asyncio.CancelledError: if the caller was cancelled meanwhile. When the error is raised, the function `act()`
            has ended, or will not start.
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
        # When `asyncio.run()` ends, it cancels all tasks, also the task that waits for the thread. A cancellation does
        # not stop the thread.
        with mutex:
            given_up = not begun
        if begun:
            cancellation = await shielded_wait(ended) or cancellation
    if cancellation is not None:
        if not task.cancelled():
            task.exception()  # Retrieving the exception prevents asyncio's log message "exception was never retrieved".
        raise cancellation
    return task.result()


async def shielded_wait(task: asyncio.Future[Any]) -> asyncio.CancelledError | None:
    """Wait until a task is done. If the caller was cancelled during the wait, return the last cancellation. Otherwise
    return None.
    """
    cancellation: asyncio.CancelledError | None = None
    # AnyIO's scope shields only from AnyIO's cancellation. The `while` loop also shields from `Task.cancel()`, which
    # `asyncio.timeout()` calls.
    with anyio.CancelScope(shield=True):
        while not task.done():
            try:
                await asyncio.wait([task])
            except asyncio.CancelledError as error:
                cancellation = error
    return cancellation
