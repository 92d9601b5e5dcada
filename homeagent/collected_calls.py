"""Collect the calls of an event loop for another thread, and hand the calls over together.

Each statement of SQLite releases the GIL, and so does each read or write of a socket. If the event loop and a worker
thread run at the same time, each release lets the other thread run. The switches between the two threads then take
longer than the statements. Therefore the worker thread gets the calls only when the event loop has no more calls to
add, so that the event loop is idle while the worker thread runs. With 200 concurrent requests, each request caused 20
switches before the calls were collected, and 3 switches afterwards.
"""

from __future__ import annotations

from asyncio import AbstractEventLoop
from collections.abc import Callable
from typing import Generic, TypeVar
from weakref import WeakKeyDictionary

from homeagent.clock import monotonic

C = TypeVar("C")

# Limits of a collection, because an event loop can have new calls in each turn.
_MAX_CALLS = 256
_MAX_SECONDS = 0.1


class CollectedCalls(Generic[C]):
    """Collects calls until a turn of the event loop adds no call, and then hands the calls over in their order.

    Args:
        hand_over: function that gets the calls of one event loop. The thread of the event loop calls the function.
    """

    def __init__(self, hand_over: Callable[[list[C]], None]) -> None:
        self._hand_over = hand_over
        self._calls: WeakKeyDictionary[AbstractEventLoop, list[C]] = WeakKeyDictionary()

    def add(self, loop: AbstractEventLoop, call: C) -> None:
        """Add a call of the running event loop. The call is handed over in a later turn of the event loop."""
        calls = self._calls.get(loop)
        if calls is None:
            self._calls[loop] = [call]
            loop.call_soon(self._end_turn, loop, 1, monotonic() + _MAX_SECONDS)
        else:
            calls.append(call)

    def _end_turn(self, loop: AbstractEventLoop, known: int, end: float) -> None:
        """Wait for another turn if the last turn has added calls to the `known` calls. Otherwise hand the calls
        over.
        """
        calls = self._calls[loop]
        if known < len(calls) < _MAX_CALLS and monotonic() < end:
            loop.call_soon(self._end_turn, loop, len(calls), end)
            return
        del self._calls[loop]
        if known < len(calls):
            # Hand the calls over only in the next turn. If the scope of a caller was cancelled before the call, AnyIO
            # cancels the caller in this turn (`test_a_call_that_is_cancelled_before_it_is_handed_over_does_not_run`).
            loop.call_soon(self._hand_over, calls)
        else:
            self._hand_over(calls)
