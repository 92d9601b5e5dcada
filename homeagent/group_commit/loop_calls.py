"""Coroutines of asyncio hand their units to one thread, which does many in a commit and wakes the loop once for all."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import anyio

from homeagent.group_commit.calls import Call
from homeagent.group_commit.grouping import Grouping
from homeagent.shielding import ended_in_thread
from homeagent.unit_of_work import UnitOfWork, call_back

__all__ = ["LoopCalls"]

T = TypeVar("T")


class _LoopCall(Call[T]):
    __slots__ = ("future",)

    future: asyncio.Future[None]


class LoopCalls:
    """Does functions as write units for the coroutines of any number of event loops.

    Args:
        grouping: does the units.
        timeout: how long a call waits for others, in seconds.
    """

    def __init__(self, grouping: Grouping, timeout: float) -> None:
        self._grouping = grouping
        self._timeout = timeout
        self._loops: WeakKeyDictionary[asyncio.AbstractEventLoop, _Loop] = WeakKeyDictionary()

    async def run(self, work: Callable[[UnitOfWork], T]) -> T:
        """Do one unit, and return what `work` returned.

        Who is cancelled before its turn leaves the queue, and then nothing took place; later, it waits for the end.
        """
        running = asyncio.get_running_loop()
        loop = self._loops.get(running)
        if loop is None:
            loop = self._loops[running] = _Loop(self)
        call = _LoopCall(work, loop)
        call.future = running.create_future()
        loop.expect(running)
        cancellation: asyncio.CancelledError | None = None
        try:
            self._grouping.submit(call)
            try:
                await call.future
            except asyncio.CancelledError as error:
                if self._grouping.withdraw(call):
                    raise
                cancellation = await _end_of(call, error)
        finally:
            loop.pending -= 1
        if call.callbacks is not None:
            # They may open units themselves, and must not block the loop.
            task, late = await ended_in_thread(partial(call_back, call.callbacks))
            cancellation = late or cancellation
            if cancellation is None or not task.cancelled():
                task.result()
        if cancellation is not None:
            call.error = None
            raise cancellation
        return call.outcome()

    def lead(self, call: Call[Any]) -> None:
        """Have this call, and who waits with it, done by a thread."""
        self._grouping.hand(call)

    def overdue(self, loop: _Loop) -> tuple[list[tuple[Call[Any], Exception]], float]:
        """Give up the calls of a loop that waited too long; see `Grouping.overdue`."""
        late, again = self._grouping.overdue(loop)
        return list(late), again

    @property
    def timeout(self) -> float:
        """How long a call waits for its turn, in seconds."""
        return self._timeout


class _Loop:
    """The calls of one event loop. It refers to that through the calls alone, so that neither keeps the other alive."""

    def __init__(self, calls: LoopCalls) -> None:
        self._calls = calls
        self._watched = False
        self._untold: list[Call[Any]] = []
        self.pending = 0

    def expect(self, running: asyncio.AbstractEventLoop) -> None:
        """Count one more call, and see to it that somebody looks whether it waits too long."""
        self.pending += 1
        if not self._watched:
            self._watched = True
            running.call_later(self._calls.timeout, self._look, running)

    def _look(self, running: asyncio.AbstractEventLoop) -> None:
        while self._untold:
            _resolve([self._untold.pop()])
        late, again = self._calls.overdue(self)
        for call, error in late:
            call.error = error
            _resolve([call])
        self._watched = self.pending > len(late)
        if self._watched:
            # Never in no time, or a busy queue would be looked through again and again.
            running.call_later(max(again, 0.005), self._look, running)

    def lead(self, call: Call[Any]) -> None:
        """Have the call lead, in the thread."""
        self._calls.lead(call)

    def deliver(self, calls: Sequence[Call[Any]]) -> None:
        """Wake the callers, all at once."""
        first = calls[0]
        if isinstance(first, _LoopCall):
            try:
                first.future.get_loop().call_soon_threadsafe(_resolve, calls)
            except RuntimeError:
                pass  # a loop that was closed meanwhile has nobody left to be told
            except BaseException:
                # No memory, or a loop that fails: it is told when it looks who waits too long.
                self._untold.extend(calls)
                raise


def _resolve(calls: Sequence[Call[Any]]) -> None:
    for call in calls:
        if isinstance(call, _LoopCall) and not call.future.done():
            call.future.set_result(None)


async def _end_of(call: _LoopCall[Any], cancellation: asyncio.CancelledError) -> asyncio.CancelledError:
    """Wait until a call that is being done is over, and return the last cancellation."""
    # A scope of AnyIO shields from AnyIO's cancellation only, and this loop from a Task.cancel() too.
    with anyio.CancelScope(shield=True):
        while not call.is_over:
            # The cancellation ended the future that was waited for. It is resolved in this very thread, so that
            # nothing comes between the look and this.
            call.future = asyncio.get_running_loop().create_future()
            try:
                await call.future
            except asyncio.CancelledError as error:
                cancellation = error
    return cancellation
