"""Side effects that happen once: claim, effect, record.

The claim is committed before the effect begins, the effect runs outside of any transaction, and its record is
committed after it. Where the process dies in between, nobody can know whether the effect took place: that is said
(`OutcomeUnknownError`), and the effect is never silently run again.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from secrets import token_hex
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from homeagent.callables import check_function, refuse_coroutine
from homeagent.canonical_json import fingerprint_of
from homeagent.clock import monotonic
from homeagent.errors import (
    EffectFailedError,
    EffectNotStartedError,
    HomeAgentError,
    InvalidArgumentError,
    LeaseLostError,
    OutcomeUnknownError,
)
from homeagent.models.idempotency_key import Attempt, IdempotencyScope, Outcome
from homeagent.models.types import LONGEST_WAIT
from homeagent.unit_of_work import UnitOfWork

if TYPE_CHECKING:
    from pydantic import JsonValue

    from homeagent.stores.idempotency_keys import IdempotencyKeyStore

__all__ = ["ARUN_ONCE", "LeaseTimer", "OnAbandoned", "OnceCall", "arun_once", "run_once"]

ARUN_ONCE = "call arun_once"
"""What to do about an effect that is a coroutine."""

T = TypeVar("T")

# Both are called with idempotent=True: whatever is done here may be done twice.
Run = Callable[[Callable[[UnitOfWork], Any]], Any]
ARun = Callable[[Callable[[UnitOfWork], Any]], Awaitable[Any]]
OnAbandoned = Literal["refuse", "rerun"] | Callable[[Attempt], Any]

logger = logging.getLogger("homeagent")

# A lease is renewed at a third of its length, so that two renewals may be late before it lapses; never more often
# than this, in seconds, however short it is.
_SHORTEST_PERIOD = 0.05


@dataclass(frozen=True, slots=True)
class OnceCall:
    """One call of `run_once`: what it is about, fixed before the effect could change its parameters."""

    scope: IdempotencyScope
    fingerprint: str
    lease: timedelta
    ttl: timedelta
    on_abandoned: OnAbandoned
    owner: str = field(default_factory=lambda: token_hex(16), repr=False)

    @classmethod
    def of(
        cls,
        scope: IdempotencyScope,
        *,
        params: JsonValue,
        lease: timedelta,
        ttl: timedelta,
        on_abandoned: OnAbandoned,
        effect: Callable[[Attempt], Any],
        instead: str | None = None,
    ) -> OnceCall:
        """Check the arguments, and take the fingerprint of the parameters as they are now.

        `instead` says what takes a coroutine function; None where that is this call itself.
        """
        check_function(effect, "effect", coroutine=instead)
        if callable(on_abandoned):
            check_function(on_abandoned, "on_abandoned", coroutine=instead)
        elif on_abandoned not in ("refuse", "rerun"):
            raise InvalidArgumentError("on_abandoned must be 'refuse', 'rerun' or a function that finds out")
        return cls(scope, fingerprint_of(params), lease, ttl, on_abandoned)

    @property
    def period(self) -> float:
        """How long to wait between two renewals, in seconds."""
        return max(min(self.lease, LONGEST_WAIT).total_seconds() / 3, _SHORTEST_PERIOD)

    def claim(self, unit: UnitOfWork, *, rerun: bool) -> Attempt | Outcome:
        """Claim the key."""
        return unit.idempotency_keys.claim(
            self.scope,
            fingerprint=self.fingerprint,
            lease=self.lease,
            ttl=self.ttl,
            rerun=rerun,
            owner=self.owner,
        )

    def renew(self, unit: UnitOfWork, attempt: Attempt) -> None:
        """Extend the attempt's lease."""
        unit.idempotency_keys.renew(attempt, lease=self.lease)


class _Once:
    """A unit that ends an attempt, and may be done again where nobody knows whether it was committed before.

    Args:
        attempt: whose outcome it is.
        write: records it, or gives the key back.
        leaves_record: whether a record tells of it. Where none does, the key is gone or somebody else's, which is as
            well as if this attempt had given it back.
    """

    def __init__(
        self, attempt: Attempt, write: Callable[[IdempotencyKeyStore], Any], *, leaves_record: bool = True
    ) -> None:
        self._attempt = attempt
        self._write = write
        self._leaves_record = leaves_record
        self._begun = False

    def __call__(self, unit: UnitOfWork) -> Any:
        again, self._begun = self._begun, True
        try:
            return self._write(unit.idempotency_keys)
        except LeaseLostError:
            if not again:
                raise
            if not self._leaves_record:
                return None
            record = unit.idempotency_keys.find_recorded(self._attempt)
            if record is None:
                raise
            return not record.omitted


@dataclass(eq=False, slots=True)
class _Lease:
    call: OnceCall
    attempt: Attempt
    due: float
    """When to renew it, by `homeagent.clock.monotonic`."""


class LeaseTimer:
    """Renews the leases of the effects that run on one database, in one thread.

    The thread sleeps until the earliest renewal is due. An effect that ends before does not wake it, so a thread serves
    all short effects of such a period. It ends when it wakes and finds no effect.

    Args:
        run: does a unit of work, as `Database.run` does.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        # Its lock is reentrant: a signal handler may run an effect while its own thread holds it.
        self._changed = threading.Condition()
        self._leases: set[_Lease] = set()
        self._thread: threading.Thread | None = None
        self._wakes = math.inf

    def renew(self, call: OnceCall, attempt: Attempt) -> Callable[[], None]:
        """Renew a lease from now on, until the function that is returned is called.

        Raises:
            RuntimeError: no thread can be started.
        """
        lease = _Lease(call, attempt, monotonic() + call.period)
        with self._changed:
            if self._thread is None:
                self._thread = threading.Thread(target=self._keep, name="homeagent-lease", daemon=True)
                try:
                    self._thread.start()
                except BaseException:
                    self._thread = None  # a thread that begins in spite of an interrupt ends at once
                    raise
            self._leases.add(lease)
            if lease.due < self._wakes:
                self._changed.notify()
        # Without the lock: in a child that the effect forks, a thread that is not there may hold it.
        return partial(self._leases.discard, lease)

    def close(self) -> None:
        """Renew no lease any more, and end the thread."""
        with self._changed:
            self._leases.clear()
            self._changed.notify()

    def _keep(self) -> None:
        while (lease := self._next()) is not None:
            try:
                self._run(partial(self._renew, lease))
            except LeaseLostError:
                self._leases.discard(lease)
            except Exception as error:  # noqa: BLE001  a database that is busy or full now may not be at the next turn
                if lease in self._leases:
                    logger.warning(
                        "a lease could not be renewed and will be tried again: %s",
                        error,
                        extra={"event": "lease_renewal_failed", "error": type(error).__name__},
                    )
            lease.due = monotonic() + lease.call.period

    def _next(self) -> _Lease | None:
        """Wait until a lease is due, and return it; None if the thread is to end."""
        with self._changed:
            while True:
                lease = min([*self._leases], key=lambda lease: lease.due, default=None)
                if lease is None:
                    self._thread = None
                if lease is None or self._thread is not threading.current_thread():
                    return None
                self._wakes = lease.due
                wait = lease.due - monotonic()
                if wait <= 0:
                    return lease
                self._changed.wait(wait)

    def _renew(self, lease: _Lease, unit: UnitOfWork) -> None:
        if lease in self._leases:  # its effect may have ended while the unit waited for its turn
            lease.call.renew(unit, lease.attempt)


def run_once(run: Run, timer: LeaseTimer, call: OnceCall, effect: Callable[[Attempt], Any]) -> Outcome:
    """Run an effect once; see `Database.run_once`.

    Args:
        run: does a unit of work, as `Database.run` does.
        timer: renews the lease meanwhile.
        call: what it is about.
        effect: is given the attempt.
    """
    finds_out = False
    try:
        claimed = run(lambda unit: call.claim(unit, rerun=call.on_abandoned == "rerun"))
    except OutcomeUnknownError:
        if not callable(call.on_abandoned):
            raise
        claimed = run(lambda unit: call.claim(unit, rerun=True))
        finds_out = isinstance(claimed, Attempt) and claimed.number > 1
        effect = call.on_abandoned if finds_out else effect
    if isinstance(claimed, Outcome):
        return claimed
    attempt: Attempt = claimed
    try:
        end = timer.renew(call, attempt)
    except RuntimeError:
        # No thread is to be had, and nothing began: the key must not count as abandoned.
        run(_Once(attempt, lambda keys: keys.release(attempt), leaves_record=False))
        raise
    try:
        # Were it recorded as a result, an effect that never began would count as done.
        value = refuse_coroutine(effect(attempt), "the effect", ARUN_ONCE)
    except EffectFailedError as error:
        detail = error.detail
        run(_Once(attempt, lambda keys: keys.fail(attempt, detail)))
        raise
    except EffectNotStartedError:
        run(_Once(attempt, lambda keys: keys.release(attempt, none_began=finds_out), leaves_record=False))
        raise
    else:
        stored = run(_Once(attempt, lambda keys: keys.complete(attempt, value)))
    finally:
        end()
    return Outcome(value=value, replayed=False, attempt=attempt.number, omitted=not stored)


class _AsyncUnits:
    """The units of work of one `arun_once` call: claim the key, then record the outcome or give the key back.

    Attributes:
        find_out: the caller's `on_abandoned` function if it must run instead of the effect, because an earlier attempt
            was abandoned; else None.
    """

    def __init__(self, arun: ARun, call: OnceCall) -> None:
        self.find_out: Callable[[Attempt], Any] | None = None
        self._arun = arun
        self._call = call
        self._claimed: Attempt | None = None

    async def claim(self) -> Attempt | Outcome:
        on_abandoned = self._call.on_abandoned
        try:
            return await self._claim(rerun=on_abandoned == "rerun")
        except OutcomeUnknownError:
            if not callable(on_abandoned):
                raise
        claimed = await self._claim(rerun=True)
        if isinstance(claimed, Attempt) and claimed.number > 1:
            self.find_out = on_abandoned
        return claimed

    async def release_claim(self) -> None:
        """Give the key back if it was claimed and this attempt began nothing: it must not count as abandoned."""
        if self._claimed is not None:
            # If this fails, or the commit of the claim had failed, the lease expires.
            with suppress(HomeAgentError):
                # Whether an earlier attempt began is as unknown as before: `find_out` did not run.
                await self.release(self._claimed, none_began=False)

    async def release(self, attempt: Attempt, *, none_began: bool) -> None:
        await self.record(attempt, lambda keys: keys.release(attempt, none_began=none_began), leaves_record=False)

    async def record(
        self, attempt: Attempt, write: Callable[[IdempotencyKeyStore], Any], *, leaves_record: bool = True
    ) -> Any:
        """Run a unit to its end, however often its caller is cancelled meanwhile."""
        import anyio

        cancelled = anyio.get_cancelled_exc_class()
        work = _Once(attempt, write, leaves_record=leaves_record)
        cancellation: BaseException | None = None
        # A scope of AnyIO shields from AnyIO's cancellation only. `Task.cancel()` takes the unit out of the queue, or
        # comes after the unit was committed; `_Once` may run twice.
        with anyio.CancelScope(shield=True):
            while True:
                try:
                    value = await self._arun(work)
                except cancelled as error:
                    cancellation = error
                except HomeAgentError as error:
                    if cancellation is None:
                        raise
                    raise cancellation from error
                else:
                    break
        if cancellation is not None:
            raise cancellation
        return value

    async def _claim(self, *, rerun: bool) -> Attempt | Outcome:
        def claim(unit: UnitOfWork) -> Attempt | Outcome:
            claimed = self._call.claim(unit, rerun=rerun)
            # Set in the unit: a cancelled caller does not get the value that the unit returns.
            self._claimed = claimed if isinstance(claimed, Attempt) else None
            return claimed

        claimed: Attempt | Outcome = await self._arun(claim)
        return claimed


async def arun_once(
    arun: ARun, timer: LeaseTimer, call: OnceCall, effect: Callable[[Attempt], Awaitable[Any]]
) -> Outcome:
    """Run an effect that is a coroutine once; see `Database.arun_once`.

    A cancelled caller cancels the effect; the outcome is recorded all the same.
    """
    import anyio
    from anyio.lowlevel import checkpoint_if_cancelled

    units = _AsyncUnits(arun, call)
    try:
        claimed = await units.claim()
        await checkpoint_if_cancelled()
        if isinstance(claimed, Outcome):
            return claimed
        attempt: Attempt = claimed
        end = timer.renew(call, attempt)
    except (anyio.get_cancelled_exc_class(), RuntimeError):
        await units.release_claim()
        raise
    try:
        value: Any = (units.find_out or effect)(attempt)
        if isinstance(value, Awaitable):
            value = await value
    except EffectFailedError as error:
        detail = error.detail
        await units.record(attempt, lambda keys: keys.fail(attempt, detail))
        raise
    except EffectNotStartedError:
        await units.release(attempt, none_began=units.find_out is not None)
        raise
    else:
        stored = await units.record(attempt, lambda keys: keys.complete(attempt, value))
    finally:
        end()
    return Outcome(value=value, replayed=False, attempt=attempt.number, omitted=not stored)
