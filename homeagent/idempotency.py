"""Run a side effect once. One unit claims the key, and another unit stores the outcome. The effect runs between both
units.

If the process ends between the units, the outcome is unknown. By default, homeagent does not repeat an effect with an
unknown outcome.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from operator import methodcaller
from os import urandom
from typing import TYPE_CHECKING, Any, Literal

from homeagent.callables import check_function, refuse_deferred
from homeagent.clock import monotonic
from homeagent.errors import (
    EffectFailedError,
    EffectNotStartedError,
    HomeAgentError,
    InvalidArgumentError,
    LeaseLostError,
)
from homeagent.models.idempotency_key import Attempt, IdempotencyScope, Outcome
from homeagent.models.types import LONGEST_WAIT
from homeagent.unit_of_work import UnitOfWork

if TYPE_CHECKING:
    from homeagent.stores.idempotency_keys import IdempotencyKeyStore

ARUN_ONCE = "call arun_once"
"""Remedy in the error message about a coroutine function."""

# Types of the methods `Database.run` and `Database.arun`. With `idempotent=True`, both methods can run a unit twice.
Run = Callable[[Callable[[UnitOfWork], Any]], Any]
ARun = Callable[[Callable[[UnitOfWork], Any]], Awaitable[Any]]
OnAbandoned = Literal["refuse", "rerun"] | Callable[[Attempt], Any]

logger: logging.Logger = logging.getLogger("homeagent")

# Shortest time between two renewals, in seconds
_SHORTEST_PERIOD = 0.05


def check_on_abandoned(value: OnAbandoned, instead: str | None = None) -> None:
    """Raise InvalidArgumentError for an invalid value. With `instead=None`, allow coroutine functions."""
    if callable(value):
        check_function(value, "on_abandoned", coroutine=instead)
    elif value not in ("refuse", "rerun"):
        raise InvalidArgumentError("on_abandoned must be 'refuse', 'rerun' or a function that returns the outcome")


@dataclass(frozen=True, slots=True)
class OnceCall:
    """Arguments of `run_once()`. The effect can change the parameters, so the object keeps a fingerprint."""

    scope: IdempotencyScope
    fingerprint: str
    lease: timedelta
    ttl: timedelta
    on_abandoned: OnAbandoned
    owner: str = field(default_factory=lambda: urandom(16).hex(), repr=False)

    def check(self, effect: Callable[[Attempt], Any], instead: str | None = None) -> None:
        """Check the effect and the value of `on_abandoned`. With `instead=None`, allow coroutine functions."""
        check_function(effect, "effect", coroutine=instead)
        check_on_abandoned(self.on_abandoned, instead)

    @property
    def period(self) -> float:
        """Seconds between two renewals. If one renewal fails, the next renewal is still in time."""
        return max(min(self.lease, LONGEST_WAIT).total_seconds() / 3, _SHORTEST_PERIOD)

    def claim(self, unit: UnitOfWork) -> Attempt | Outcome:
        """Claim the key. If the field `on_abandoned` is not "refuse", take over an abandoned attempt."""
        return unit.idempotency_keys.claim(
            self.scope,
            fingerprint=self.fingerprint,
            lease=self.lease,
            ttl=self.ttl,
            rerun=self.on_abandoned != "refuse",
            owner=self.owner,
        )


def _once(
    attempt: Attempt, write: Callable[[IdempotencyKeyStore], Any], *, leaves_record: bool = True
) -> Callable[[UnitOfWork], Any]:
    """Return a function that ends an attempt. After a CommitUnknownError, the function can run again. If the given
    function releases the key, pass `leaves_record=False`.
    """
    begun = False

    def end(unit: UnitOfWork) -> Any:
        nonlocal begun
        again, begun = begun, True
        try:
            return write(unit.idempotency_keys)
        except LeaseLostError:
            if not again:
                raise
            if not leaves_record:
                return None
            record = unit.idempotency_keys.find_recorded(attempt)
            if record is None:
                raise
            return not record.omitted

    return end


@dataclass(eq=False, slots=True)
class _Lease:
    call: OnceCall
    attempt: Attempt
    due: float
    """Time of the next renewal, on the clock `homeagent.clock.monotonic`."""


class LeaseTimer:
    """Thread that renews the leases of all effects that run on a `Database`.

    The thread stays alive, so that many short effects can share one thread.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        # The lock must be reentrant, because a signal handler can run an effect.
        self._changed = threading.Condition()
        self._leases: set[_Lease] = set()
        self._has_thread = False
        self._wakes = math.inf

    def renew(self, call: OnceCall, attempt: Attempt) -> Callable[[], None]:
        """Renew a lease until the caller calls the returned function. If no thread can start, raise RuntimeError."""
        lease = _Lease(call, attempt, monotonic() + call.period)
        with self._changed:
            if not self._has_thread:
                # A new thread without a lease waits until `lease.due`, and then ends.
                self._wakes = lease.due
                threading.Thread(target=self._keep, name="homeagent-lease", daemon=True).start()
                self._has_thread = True
            self._leases.add(lease)
            if lease.due < self._wakes:
                self._changed.notify()
        # The returned function must not take the lock. In a forked child, the lock can stay locked.
        return partial(self._leases.discard, lease)

    def close(self) -> None:
        """Stop all renewals and end the thread."""
        with self._changed:
            self._leases.clear()
            self._wakes = -math.inf
            self._changed.notify_all()

    def _keep(self) -> None:
        while (lease := self._next()) is not None:
            try:
                self._run(partial(self._renew, lease))
            except LeaseLostError:
                self._leases.discard(lease)
            except Exception as error:  # noqa: BLE001  After an error, such as a full disk, the thread tries again.
                if lease in self._leases:
                    logger.warning(
                        "a lease could not be renewed and will be tried again: %s",
                        error,
                        extra={"event": "lease_renewal_failed", "error": type(error).__name__},
                    )
            lease.due = monotonic() + lease.call.period

    def _next(self) -> _Lease | None:
        """Wait until a renewal is due, and return the lease. If the thread must end, return None."""
        with self._changed:
            while True:
                lease = min([*self._leases], key=lambda lease: lease.due, default=None)
                if lease is not None:
                    self._wakes = lease.due
                wait = self._wakes - monotonic()
                if wait > 0:
                    self._changed.wait(wait)
                    continue
                self._has_thread = lease is not None
                return lease

    def _renew(self, lease: _Lease, unit: UnitOfWork) -> None:
        if lease in self._leases:  # the effect can end while this unit waits for the write lock
            unit.idempotency_keys.renew(lease.attempt, lease=lease.call.lease)


def run_once(run: Run, timer: LeaseTimer, call: OnceCall, effect: Callable[[Attempt], Any]) -> Outcome:
    """Run an effect once (see `Database.run_once`)."""
    claimed = run(call.claim)
    if isinstance(claimed, Outcome):
        return claimed
    attempt: Attempt = claimed
    substitute = call.on_abandoned if attempt.number > 1 and callable(call.on_abandoned) else None
    try:
        end = timer.renew(call, attempt)
    except RuntimeError:
        # The effect has not begun, so release the key.
        run(_once(attempt, lambda keys: keys.release(attempt), leaves_record=False))
        raise
    try:
        # Refuse a returned coroutine or generator, because its code has not run.
        value = refuse_deferred((substitute or effect)(attempt), "the effect", ARUN_ONCE)
    except EffectFailedError as error:
        detail = error.detail
        run(_once(attempt, lambda keys: keys.fail(attempt, detail)))
        raise
    except EffectNotStartedError:
        none_began = substitute is not None
        run(_once(attempt, lambda keys: keys.release(attempt, none_began=none_began), leaves_record=False))
        raise
    else:
        stored = run(_once(attempt, lambda keys: keys.complete(attempt, value)))
    finally:
        end()
    return Outcome(value=value, replayed=False, attempt=attempt.number, omitted=not stored)


async def _record(
    arun: ARun, attempt: Attempt, write: Callable[[IdempotencyKeyStore], Any], *, leaves_record: bool = True
) -> Any:
    """End an attempt (see `_once()`). For a cancelled caller, first finish the unit, then raise the cancellation."""
    import anyio

    work = _once(attempt, write, leaves_record=leaves_record)
    cancellation: BaseException | None = None
    shield: AbstractContextManager[Any] = nullcontext()
    while True:
        try:
            with shield:
                value = await arun(work)
            break
        except anyio.get_cancelled_exc_class() as error:
            # A CancelledError does not show whether the unit was committed. Run the unit again: `_once()` makes a
            # second run safe. The loop is necessary, because AnyIO's cancel scope does not protect from
            # `Task.cancel()`.
            cancellation, shield = error, anyio.CancelScope(shield=True)
        except HomeAgentError as error:
            if cancellation is None:
                raise
            raise cancellation from error
    if cancellation is not None:
        raise cancellation
    return value


async def arun_once(
    arun: ARun, timer: LeaseTimer, call: OnceCall, effect: Callable[[Attempt], Awaitable[Any]]
) -> Outcome:
    """Run a coroutine function as an effect once (see `Database.arun_once`)."""
    import anyio
    from anyio.lowlevel import checkpoint_if_cancelled

    attempts: list[Attempt] = []

    def claim(unit: UnitOfWork) -> Attempt | Outcome:
        claimed = call.claim(unit)
        # Store the attempt here, because a cancelled `arun()` does not return the attempt.
        attempts[:] = [claimed] if isinstance(claimed, Attempt) else []
        return claimed

    try:
        claimed = await arun(claim)
        await checkpoint_if_cancelled()
        if isinstance(claimed, Outcome):
            return claimed
        attempt: Attempt = claimed
        end = timer.renew(call, attempt)
    except (anyio.get_cancelled_exc_class(), RuntimeError):
        # The effect has not begun, so release the key. Ignore errors, because the claim also ends with the lease.
        for unused in attempts:
            with suppress(HomeAgentError):
                await _record(arun, unused, methodcaller("release", unused), leaves_record=False)
        raise
    substitute = call.on_abandoned if attempt.number > 1 and callable(call.on_abandoned) else None
    try:
        value: Any = (substitute or effect)(attempt)
        if isinstance(value, Awaitable):
            value = await value
        value = refuse_deferred(value, "the effect", "return its result")
    except EffectFailedError as error:
        detail = error.detail
        await _record(arun, attempt, lambda keys: keys.fail(attempt, detail))
        raise
    except EffectNotStartedError:
        none_began = substitute is not None
        await _record(arun, attempt, lambda keys: keys.release(attempt, none_began=none_began), leaves_record=False)
        raise
    else:
        stored = await _record(arun, attempt, lambda keys: keys.complete(attempt, value))
    finally:
        end()
    return Outcome(value=value, replayed=False, attempt=attempt.number, omitted=not stored)
