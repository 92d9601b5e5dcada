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
from homeagent.cancellation import call_in_thread
from homeagent.clock import monotonic
from homeagent.errors import CommitUnknownError, ConnectionLostError, HomeAgentError, StandbyError, TransientError
from homeagent.group_commit import GroupCommit
from homeagent.unit_of_work import UnitOfWork
from homeagent.unit_settings import UnitSettings

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from anyio import CapacityLimiter

__all__ = ["Runner"]

T = TypeVar("T")

RETRIED = (TransientError, ConnectionLostError, StandbyError, CommitUnknownError)
"""Errors after which a unit can run again. After CommitUnknownError, only an idempotent unit can run again."""

# Upper bounds of the first and of the longest pause before a retry, in seconds. Each pause is random, up to its bound.
_FIRST_PAUSE = 0.005
_LONGEST_PAUSE = 0.5


# Kinds of work that have their own worker threads.
_UNITS, _CHECKS, _SLOW_HASHES = "units", "checks", "slow_hashes"

# Number of worker threads for each kind of work. Few threads share the checks on SQLite, because to wake a thread takes
# longer than a check. With 64 threads, 200 concurrent requests took 25% more processor time than with 4.
_WORKERS = 64
_CHECKERS = 4


class Runner:
    """Runs functions as units of work of one database. The retries of a unit end after the time `settings.timeout`."""

    def __init__(self, settings: UnitSettings) -> None:
        self._settings = settings
        # PostgreSQL groups commits by itself and has many writers, so each unit uses its own connection.
        self._group_commit = (
            GroupCommit(settings, partial(self._executor, _UNITS)) if settings.engine.shares_commits else None
        )
        self._executors: dict[str, Executor] = {}

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
            return await self._in_thread(partial(self.run, work, read_only=read_only, idempotent=idempotent), _UNITS)
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
            slow: True if the function computes a slow hash, and False if it checks something by a short read. Slow
                hashes and checks have their own worker threads, because otherwise a check would wait for a free thread.
        """
        await checkpoint_if_cancelled()
        return await self._in_thread(work, _SLOW_HASHES if slow else _CHECKS)

    async def _in_thread(self, work: Callable[[], T], kind: str) -> T:
        """Call the function `work()` in a worker thread for this kind of work (see `in_thread()`)."""
        if not _under_asyncio():
            import anyio.to_thread

            return await anyio.to_thread.run_sync(work, limiter=_worker_limiter(kind))
        self._settings.engine.pool(read_only=True)  # in a forked child, the executors have no threads
        return await call_in_thread(work, self._executor(kind))

    def _executor(self, kind: str) -> Executor:
        """Return the executor with the worker threads for one kind of work, under asyncio."""
        executor = self._executors.get(kind)
        if executor is None:
            from concurrent.futures import ThreadPoolExecutor

            # On PostgreSQL, a check waits for the network, and not for Python's global lock.
            number = _CHECKERS if kind is _CHECKS and self._group_commit is not None else _WORKERS
            executor = self._executors.setdefault(kind, ThreadPoolExecutor(number, "homeagent-worker"))
        return executor

    def close(self) -> None:
        """End the writer thread. The caller must have closed the connection pools."""
        if self._group_commit is not None:
            self._group_commit.close()
        # The threads of an executor end when the last reference to the executor is gone. Do not call `shutdown()`,
        # because a later call would raise RuntimeError instead of DatabaseClosedError.
        self._executors.clear()


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


def _worker_limiter(kind: str) -> CapacityLimiter:
    """Return the limiter of the worker threads for one kind of work in trio's event loop. At its first use, create the
    limiter. Do not use AnyIO's default limiter, which is for the application.
    """
    from anyio import CapacityLimiter
    from anyio.lowlevel import RunVar

    variable: RunVar[CapacityLimiter] = RunVar(f"homeagent_{kind}")
    try:
        return variable.get()
    except LookupError:
        limiter = CapacityLimiter(_WORKERS)
        variable.set(limiter)
        return limiter
