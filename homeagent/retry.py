"""Run functions as units of work, and run a unit again after an error if a second run is safe.

A unit can run again after a conflict with another unit, or if the connection was lost before COMMIT was sent, because
the database has rolled it back. If the connection was lost after COMMIT was sent, the outcome of the commit is unknown.
After an unknown outcome, the unit runs again only if the caller has passed `idempotent=True`.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from anyio.lowlevel import checkpoint_if_cancelled

from homeagent.callables import refuse_coroutine_function
from homeagent.clock import monotonic
from homeagent.errors import CommitUnknownError, ConnectionLostError, HomeAgentError, StandbyError, TransientError
from homeagent.group_commit import GroupCommit
from homeagent.unit_of_work import UnitOfWork
from homeagent.unit_settings import UnitSettings

if TYPE_CHECKING:
    from anyio import CapacityLimiter

__all__ = ["Runner"]

T = TypeVar("T")

RETRIED = (TransientError, ConnectionLostError, StandbyError, CommitUnknownError)
"""Errors after which a unit can run again. After CommitUnknownError, only an idempotent unit can run again."""

# Upper bounds of the first and of the longest pause before a retry, in seconds. Each pause is random, up to its bound.
_FIRST_PAUSE = 0.005
_LONGEST_PAUSE = 0.5


class Runner:
    """Runs functions as units of work of one database. The retries of a unit end after the time `settings.timeout`."""

    def __init__(self, settings: UnitSettings) -> None:
        self._settings = settings
        # PostgreSQL groups commits by itself and has many writers, so each unit uses its own connection.
        self._group_commit = GroupCommit(settings) if settings.engine.shares_commits else None

    def run(self, work: Callable[[UnitOfWork], T], *, read_only: bool = False, idempotent: bool = False) -> T:
        """Run a unit of work, and run the unit again if a second run is safe (see `Database.run`)."""
        begun, retries = monotonic(), None
        while True:
            try:
                if self._group_commit is not None and not read_only:
                    return _done(work, self._group_commit.run(work))
                with self._settings.unit(self._settings, read_only=read_only) as unit:
                    return _done(work, work(unit))
            except RETRIED as error:
                retries = retries or _Retries(self._settings, begun, idempotent=idempotent)
                pause = retries.pause_after(error)
            time.sleep(pause)

    async def arun(self, work: Callable[[UnitOfWork], T], *, read_only: bool = False, idempotent: bool = False) -> T:
        """Do the same as `run()`, without blocking the event loop (see `Database.arun`)."""
        await checkpoint_if_cancelled()
        if self._group_commit is None or read_only or not _under_asyncio():
            return await _in_thread(partial(self.run, work, read_only=read_only, idempotent=idempotent))
        begun, retries = monotonic(), None
        while True:
            try:
                return _done(work, await self._group_commit.arun(work))
            except RETRIED as error:
                retries = retries or _Retries(self._settings, begun, idempotent=idempotent)
                pause = retries.pause_after(error)
            await asyncio.sleep(pause)

    async def in_thread(self, work: Callable[[], T], *, slow: bool) -> T:
        """Call the function `work()` in a worker thread. Wait for the end of the call even if the caller is cancelled
        meanwhile.

        Args:
            work: function that can block.
            slow: True if the function computes a slow hash. Slow hashes have their own worker threads, because
                otherwise units and fast checks would wait for a free thread.
        """
        await checkpoint_if_cancelled()
        return await _in_thread(work, slow=slow)

    def close(self) -> None:
        """End the writer thread. The caller must have closed the connection pools."""
        if self._group_commit is not None:
            self._group_commit.close()


def _done(work: Callable[[UnitOfWork], T], value: T) -> T:
    return refuse_coroutine_function(work, value, "work", "make it an ordinary function, and await outside the unit")


class _Retries:
    """State of one unit's retries: the next pause, the deadline, and the error of a commit with unknown outcome."""

    __slots__ = ("_bound", "_deadline", "_idempotent", "_settings", "_unknown")

    def __init__(self, settings: UnitSettings, begun: float, *, idempotent: bool) -> None:
        self._settings = settings
        self._idempotent = idempotent
        self._deadline = begun + settings.timeout
        self._bound = _FIRST_PAUSE
        self._unknown: CommitUnknownError | None = None

    def pause_after(self, error: HomeAgentError) -> float:
        """Return the pause before the next try, in seconds. If the unit must not run again, raise its error."""
        if isinstance(error, CommitUnknownError):
            if not self._idempotent:
                raise error
            self._unknown = error
        pause = random.uniform(0, self._bound)  # noqa: S311  the pause separates callers and is not a secret
        if monotonic() + pause >= self._deadline:
            # Raise the error of the commit with unknown outcome, because the error of a later try does not show that
            # the outcome is unknown.
            raise self._unknown or error
        self._bound = min(self._bound * 2, _LONGEST_PAUSE)
        self._settings.engine.counters.retries += 1
        return pause


def _under_asyncio() -> bool:
    """Return True if the caller is an asyncio task. Under trio, or without an event loop, return False."""
    try:
        return asyncio.current_task() is not None
    except RuntimeError:
        return False


# Number of worker threads for units in each event loop. The same number of additional threads computes slow hashes. Do
# not use AnyIO's default limiter, which is for the application.
_WORKERS = 64


async def _in_thread(work: Callable[[], T], *, slow: bool = False) -> T:
    """Call the function `work()` in a worker thread (see `Runner.in_thread`)."""
    import anyio.to_thread

    from homeagent.cancellation import call_in_thread

    limiter = _worker_limiter("homeagent_slow_hash_workers" if slow else "homeagent_workers")
    if not _under_asyncio():
        return await anyio.to_thread.run_sync(work, limiter=limiter)
    return await call_in_thread(work, limiter=limiter)


def _worker_limiter(name: str) -> CapacityLimiter:
    """Return the limiter of the event loop that has the given name. At its first use, create the limiter."""
    from anyio import CapacityLimiter
    from anyio.lowlevel import RunVar

    variable: RunVar[CapacityLimiter] = RunVar(name)
    try:
        return variable.get()
    except LookupError:
        limiter = CapacityLimiter(_WORKERS)
        variable.set(limiter)
        return limiter
