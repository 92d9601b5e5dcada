"""Shield a coroutine from cancellation until a call in another thread has ended."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Executor
from contextvars import copy_context
from typing import Any, TypeVar

import anyio

T = TypeVar("T")


async def call_in_thread(act: Callable[[], T], executor: Executor, *, must_run: bool = False) -> T:
    """Call the function `act()` in a thread of an executor, and wait for its end. Return the function's value, or raise
    its error.

    Do not replace the executor by `anyio.to_thread.run_sync()`, which takes several times as long as a read of one row.

    Args:
        act: function that can block. The function runs with the caller's context variables.
        executor: executor with the threads.
        must_run: True if the function also runs after a cancellation of the caller. With the default False, a
            cancellation prevents a call that has not begun.

    Raises:
        asyncio.CancelledError: if the caller was cancelled during the wait. After the error, the function `act()`
            neither runs nor starts.
        RuntimeError: if no thread can be started, so that the function `act()` does not run.
    """
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()
    # The thread takes the lock before it calls the function. A cancelled caller tries to take the lock first, to
    # prevent the call.
    decision = threading.Lock()
    value: Any = None
    failure: BaseException | None = None

    def attempt() -> None:
        nonlocal value, failure
        try:
            value = act()
        except BaseException as error:  # noqa: BLE001  `call_in_thread()` raises the error
            failure = error

    def whole() -> None:
        if decision.acquire(blocking=False):
            # Do not call `act()` here. The function `clear_locals()` can clear only a frame that has ended.
            attempt()
            loop.call_soon_threadsafe(ended.set_result, None)

    cancellation: asyncio.CancelledError | None = None
    try:
        executor.submit(copy_context().run, whole)
        await asyncio.shield(ended)
    # If no thread can be started, the method `submit()` raises RuntimeError. Another thread of the executor can still
    # take the call from the queue.
    except (asyncio.CancelledError, RuntimeError) as error:
        if (not must_run or isinstance(error, RuntimeError)) and decision.acquire(blocking=False):
            raise
        cancellation = await shielded_wait(ended)
        if cancellation is None and isinstance(error, asyncio.CancelledError):
            cancellation = error
    if cancellation is not None:
        raise cancellation
    if failure is not None:
        try:
            raise failure
        finally:
            failure = None  # Break the reference cycle of the error, its traceback and this frame.
    result: T = value
    return result


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
