"""Units of work as functions: run again whole where that is safe, in the caller's thread or in a worker's.

A unit that met another one has been undone, so it may be run again. So may one whose connection was lost before its
COMMIT was sent. Where the connection was lost after that, nobody can know whether the commit took place: the unit is
run again only if its owner says that twice is the same as once.
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
from homeagent.unit_of_work import UnitOfWork, UnitSettings

if TYPE_CHECKING:
    from anyio import CapacityLimiter

__all__ = ["Runner"]

T = TypeVar("T")

RETRIED = (TransientError, ConnectionLostError, StandbyError, CommitUnknownError)
"""After these a unit may be run again whole; after the last one only where twice is the same as once."""

# The first pause of a retry and the longest, in seconds; each is drawn at random up to its bound.
_FIRST_PAUSE = 0.005
_LONGEST_PAUSE = 0.5


class Runner:
    """Runs functions as units of work of one database.

    Args:
        settings: what its units share; their timeout bounds the retrying too.
    """

    def __init__(self, settings: UnitSettings) -> None:
        self._settings = settings
        # PostgreSQL groups commits by itself, and has many writers: each unit has a connection of its own there.
        self._group_commit = GroupCommit(settings) if settings.engine.shares_commits else None

    def run(self, work: Callable[[UnitOfWork], T], *, read_only: bool = False, idempotent: bool = False) -> T:
        """Do a unit of work, again whole where that is safe; see `Database.run`."""
        begun, tries = monotonic(), None
        while True:
            try:
                if self._group_commit is not None and not read_only:
                    return _done(work, self._group_commit.run(work))
                with UnitOfWork(self._settings, read_only=read_only) as unit:
                    return _done(work, work(unit))
            except RETRIED as fault:
                tries = tries or _Tries(self._settings, begun, idempotent=idempotent)
                pause = tries.pause_after(fault)
            time.sleep(pause)

    async def arun(self, work: Callable[[UnitOfWork], T], *, read_only: bool = False, idempotent: bool = False) -> T:
        """Do as `run` does without blocking the event loop; see `Database.arun`."""
        await checkpoint_if_cancelled()
        if self._group_commit is None or read_only or not _under_asyncio():
            return await _in_thread(partial(self.run, work, read_only=read_only, idempotent=idempotent))
        begun, tries = monotonic(), None
        while True:
            try:
                return _done(work, await self._group_commit.arun(work))
            except RETRIED as fault:
                tries = tries or _Tries(self._settings, begun, idempotent=idempotent)
                pause = tries.pause_after(fault)
            await asyncio.sleep(pause)

    async def in_thread(self, work: Callable[[], T], *, slow: bool) -> T:
        """Call `work` in a worker thread, and wait for its end even if the caller is cancelled meanwhile.

        Args:
            work: a function that may block.
            slow: whether it computes a slow hash. Such functions have threads of their own, so that however many of
                them wait, they take no thread from units of work and from checks that need no slow hash.
        """
        await checkpoint_if_cancelled()
        return await _in_thread(work, slow=slow)

    def close(self) -> None:
        """End the thread that does the units of many callers. The lanes are closed before."""
        if self._group_commit is not None:
            self._group_commit.close()


def _done(work: Callable[[UnitOfWork], T], value: T) -> T:
    return refuse_coroutine_function(work, value, "work", "make it an ordinary function, and await outside of it")


class _Tries:
    """How often a unit was tried, and what came of it."""

    __slots__ = ("_bound", "_deadline", "_idempotent", "_settings", "_unknown")

    def __init__(self, settings: UnitSettings, begun: float, *, idempotent: bool) -> None:
        self._settings = settings
        self._idempotent = idempotent
        self._deadline = begun + settings.timeout
        self._bound = _FIRST_PAUSE
        self._unknown: CommitUnknownError | None = None

    def pause_after(self, fault: HomeAgentError) -> float:
        """Return how long to wait before the next try, in seconds. Where there is to be none, raise what to tell."""
        if isinstance(fault, CommitUnknownError):
            if not self._idempotent:
                raise fault
            self._unknown = fault
        pause = random.uniform(0, self._bound)  # noqa: S311  it parts the callers, it keeps no secret
        if monotonic() + pause >= self._deadline:
            # What a later try met says nothing of an earlier one, whose commit may have taken place.
            raise self._unknown or fault
        self._bound = min(self._bound * 2, _LONGEST_PAUSE)
        self._settings.engine.counters.retries += 1
        return pause


def _under_asyncio() -> bool:
    try:
        return asyncio.current_task() is not None
    except RuntimeError:
        return False


_WORKERS = 64
"""How many threads the units of one event loop may wait in, and how many its slow hashes; none is the host's own."""


async def _in_thread(work: Callable[[], T], *, slow: bool = False) -> T:
    """Call `work` in a worker thread, and wait for its end even where the caller is cancelled meanwhile."""
    import anyio.to_thread

    from homeagent.cancellation import call_in_thread

    limiter = _worker_places("homeagent_slow_hash_places" if slow else "homeagent_worker_places")
    if not _under_asyncio():
        return await anyio.to_thread.run_sync(work, limiter=limiter)
    # Until then the unit is under way, or not yet handed to a thread.
    return await call_in_thread(work, limiter=limiter)


def _worker_places(name: str) -> CapacityLimiter:
    from anyio import CapacityLimiter
    from anyio.lowlevel import RunVar

    places: RunVar[CapacityLimiter] = RunVar(name)
    try:
        return places.get()
    except LookupError:
        limiter = CapacityLimiter(_WORKERS)
        places.set(limiter)
        return limiter
