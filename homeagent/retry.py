"""Run functions as units of work, with retries after errors."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from threading import get_ident
from typing import TYPE_CHECKING, TypeVar

from anyio.lowlevel import checkpoint_if_cancelled

from homeagent.clock import monotonic
from homeagent.errors import CommitUnknownError, ConnectionLostError, HomeAgentError, StandbyError, TransientError
from homeagent.group_commit import GroupCommit
from homeagent.transaction import UnitSettings, current_task, refuse_nesting
from homeagent.unit_of_work import UnitOfWork
from homeagent.worker_threads import CollectedCalls, ThreadCall, call_in_thread, run_in_thread

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from anyio import CapacityLimiter

T = TypeVar("T")

RETRIED = (TransientError, ConnectionLostError, StandbyError, CommitUnknownError)
"""Errors after which a unit can run again. After CommitUnknownError, only an idempotent unit can run again."""

# Upper bounds of the first and the longest pause, in seconds. The length of each pause is random.
_FIRST_PAUSE = 0.005
_LONGEST_PAUSE = 0.5

_UNITS, _CHECKS, _SLOW_HASHES = "units", "checks", "slow_hashes"
_WORKERS = 64


class Runner:
    """Runs functions as units of work of one database. After the timeout in the settings, the runner does not start a
    retry.
    """

    def __init__(self, settings: UnitSettings) -> None:
        self._settings = settings
        # PostgreSQL itself groups the commits of several connections.
        self._group_commit = (
            GroupCommit(settings, partial(self._executor, _UNITS)) if settings.engine.shares_commits else None
        )
        self._executors: dict[str, Executor] = {}
        self._checks = CollectedCalls[ThreadCall](lambda calls: run_in_thread(self._executor(_CHECKS), calls))

    def run(self, work: Callable[[UnitOfWork], T], *, read_only: bool = False, idempotent: bool = False) -> T:
        """Run a function as a unit, with retries (see `Database.run`)."""
        begun, retries = monotonic(), None
        while True:
            try:
                if self._group_commit is not None and not read_only:
                    return self._group_commit.run(work)
                with self._settings.unit(self._settings, read_only) as unit:
                    return work(unit)
            except RETRIED as error:
                retries = retries or _Retries(self._settings, begun, idempotent)
                pause = retries.pause_after(error)
            time.sleep(pause)

    async def arun(self, work: Callable[[UnitOfWork], T], *, read_only: bool = False, idempotent: bool = False) -> T:
        """Run a function as a unit for a coroutine (see `Database.arun`)."""
        if not read_only:
            self.refuse_inside_unit()
        if self._group_commit is None or read_only or not _under_asyncio():
            await checkpoint_if_cancelled()
            return await self._in_thread(partial(self.run, work, read_only=read_only, idempotent=idempotent), _UNITS)
        # A call of `checkpoint_if_cancelled()` is unnecessary. `GroupCommit.arun()` lets AnyIO cancel the caller before
        # the unit starts.
        begun, retries = monotonic(), None
        while True:
            try:
                return await self._group_commit.arun(work)
            except RETRIED as error:
                retries = retries or _Retries(self._settings, begun, idempotent)
                pause = retries.pause_after(error)
            await asyncio.sleep(pause)

    def refuse_inside_unit(self) -> None:
        """If the caller's asyncio task has an open write unit, raise UnitStateError. A call that writes in another
        thread would wait for the unit, and the task for the call.
        """
        unit = self._settings.writing.get(get_ident())
        if unit is not None and unit._task is not None and unit._task is current_task():
            refuse_nesting(unit)

    async def in_thread(self, work: Callable[[], T], *, slow: bool) -> T:
        """Call `work()` in a worker thread. Even a cancelled caller waits until a started call has ended."""
        await checkpoint_if_cancelled()
        # Use different threads, because a check must not wait for a slow hash.
        return await self._in_thread(work, _SLOW_HASHES if slow else _CHECKS)

    async def _in_thread(self, work: Callable[[], T], kind: str) -> T:
        """Call `work()` in a worker thread for the given kind of work."""
        if not _under_asyncio():
            import anyio.to_thread

            return await anyio.to_thread.run_sync(work, limiter=_worker_limiter(kind))
        # In a forked child, which has no threads, `pool()` raises an error.
        self._settings.engine.pool(read_only=True)
        # Several checks can share a thread. A unit gets a separate thread, because the application's function can be
        # slow. On PostgreSQL, a check also gets a separate thread, because the check waits for the network.
        collects = kind is _CHECKS and self._group_commit is not None
        return await call_in_thread(work, self._checks if collects else self._executor(kind))

    def _executor(self, kind: str) -> Executor:
        """Return the thread pool for a kind of work. Create the pool at its first use."""
        executor = self._executors.get(kind)
        if executor is None:
            from concurrent.futures import ThreadPoolExecutor

            executor = self._executors.setdefault(kind, ThreadPoolExecutor(_WORKERS, "homeagent-worker"))
        return executor

    def close(self) -> None:
        """End the writer thread. The caller must close the connection pools before this call."""
        if self._group_commit is not None:
            self._group_commit.close()
        # Do not call `shutdown()`, because later calls would raise RuntimeError instead of DatabaseClosedError. The
        # threads end with the last reference to the executor.
        self._executors.clear()


@dataclass(slots=True)
class _Retries:
    settings: UnitSettings
    begun: float
    idempotent: bool
    bound: float = _FIRST_PAUSE
    unknown: CommitUnknownError | None = None

    def pause_after(self, error: HomeAgentError) -> float:
        """Return the pause before the next try, in seconds. If the unit must not run again, raise the error."""
        if isinstance(error, CommitUnknownError):
            if not self.idempotent:
                raise error
            self.unknown = error
        pause = random.uniform(0, self.bound)  # noqa: S311  the pause separates callers and is not a secret
        if monotonic() + pause >= self.begun + self.settings.timeout:
            # An earlier CommitUnknownError takes precedence over the last error.
            raise self.unknown or error
        self.bound = min(self.bound * 2, _LONGEST_PAUSE)
        self.settings.engine.counters.retries += 1
        return pause


def _under_asyncio() -> bool:
    """Return True if the caller is an asyncio task. Under trio, or without an event loop, return False."""
    return current_task() is not None


def _worker_limiter(kind: str) -> CapacityLimiter:
    """Return the limiter of trio's worker threads for a kind of work."""
    from anyio import CapacityLimiter
    from anyio.lowlevel import RunVar

    variable: RunVar[CapacityLimiter] = RunVar(f"homeagent_{kind}")
    try:
        return variable.get()
    except LookupError:
        limiter = CapacityLimiter(_WORKERS)
        variable.set(limiter)
        return limiter
