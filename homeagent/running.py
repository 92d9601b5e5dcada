"""Units of work as functions: run again whole where that is safe, in the caller's thread or in a worker's.

A unit that met another one has been undone, so it may be run again. So may one whose connection was lost before its
COMMIT was sent. Where the connection was lost after that, nobody can know whether the commit took place: the unit is
run again only if its owner says that twice is the same as once.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from homeagent.engine.faults import StandbyError, TransientError
from homeagent.errors import CommitUnknownError, ConnectionLostError, HomeAgentError
from homeagent.unit_of_work import UnitOfWork, UnitSettings

if TYPE_CHECKING:
    from anyio import CapacityLimiter

__all__ = ["Runner"]

T = TypeVar("T")

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

    def run(self, work: Callable[[UnitOfWork], T], *, read_only: bool = False, idempotent: bool = False) -> T:
        """Do a unit of work, again whole where that is safe; see `Database.run`."""
        deadline = time.monotonic() + self._settings.timeout
        bound = _FIRST_PAUSE
        unknown: CommitUnknownError | None = None
        while True:
            try:
                with UnitOfWork(self._settings, read_only=read_only) as unit:
                    return work(unit)
            except (TransientError, ConnectionLostError, StandbyError) as fault:
                error: HomeAgentError = fault
            except CommitUnknownError as fault:
                if not idempotent:
                    raise
                error = unknown = fault
            pause = random.uniform(0, bound)  # noqa: S311  it parts the callers, it keeps no secret
            if time.monotonic() + pause >= deadline:
                # What a later try met says nothing of an earlier one, whose commit may have taken place.
                raise unknown or error
            self._settings.engine.counters.retries += 1
            time.sleep(pause)
            bound = min(bound * 2, _LONGEST_PAUSE)

    async def arun(self, work: Callable[[UnitOfWork], T], *, read_only: bool = False, idempotent: bool = False) -> T:
        """Do as `run` does in a worker thread; see `Database.arun`."""
        return await _in_thread(partial(self.run, work, read_only=read_only, idempotent=idempotent))


_WORKERS = 64
"""How many threads the coroutines of one event loop may wait in; the host's own threads are not taken from it."""


async def _in_thread(work: Callable[[], T]) -> T:
    """Call `work` in a worker thread, and wait for its end even where the caller is cancelled meanwhile."""
    import asyncio

    import anyio.to_thread
    from anyio.lowlevel import checkpoint_if_cancelled

    await checkpoint_if_cancelled()
    try:
        under_asyncio = asyncio.current_task() is not None
    except RuntimeError:
        under_asyncio = False
    if not under_asyncio:
        return await anyio.to_thread.run_sync(work, limiter=_worker_places())
    # A scope of AnyIO shields from AnyIO's cancellation only: a Task.cancel(), as asyncio.timeout() does it, would end
    # the wait here, with the unit under way or not yet handed to a thread.
    task = asyncio.ensure_future(anyio.to_thread.run_sync(work, limiter=_worker_places()))
    cancellation: asyncio.CancelledError | None = None
    with anyio.CancelScope(shield=True):
        while not task.done():
            try:
                await asyncio.wait([task])
            except asyncio.CancelledError as error:
                cancellation = error
    if cancellation is not None:
        if not task.cancelled():
            task.exception()  # looked at, or asyncio would report it as lost
        raise cancellation
    return task.result()


def _worker_places() -> CapacityLimiter:
    from anyio import CapacityLimiter
    from anyio.lowlevel import RunVar

    places: RunVar[CapacityLimiter] = RunVar("homeagent_worker_places")
    try:
        return places.get()
    except LookupError:
        limiter = CapacityLimiter(_WORKERS)
        places.set(limiter)
        return limiter
