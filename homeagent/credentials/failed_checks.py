"""Failed checks of secrets that can be guessed, counted for each device id that callers present.

An id is counted whether or not a device has it, so that a refusal does not tell whether the device exists. Only secrets
that need a slow hash are counted: a generated secret can't be guessed, and its checks are never refused.

A success does not reset the count of its id. A device presents its right secret all the time, and each success would
give guesses at the same id another `per_minute` attempts.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta

from homeagent.clock import Clock, monotonic
from homeagent.errors import TooManyAttemptsError

__all__ = ["FAILED_CHECKS_PER_MINUTE", "CheckAttempt", "FailedChecks"]

FAILED_CHECKS_PER_MINUTE = 30
_MINUTE = timedelta(minutes=1)
_MOST_IDS = 10_000

# One lock for all instances, so that a forked child can renew it. It is held for microseconds. A signal handler may
# check a secret while its own thread holds the lock.
_lock = threading.RLock()


_Moment = tuple[datetime, float]
"""What the database's clock and the monotonic clock showed at the same time."""


def _age(begun: _Moment, now: _Moment) -> timedelta:
    # By whichever clock moved further: see `FailedChecks`.
    return max(now[0] - begun[0], timedelta(seconds=now[1] - begun[1]))


@dataclass(slots=True)
class CheckAttempt:
    """One check of a secret. Set `failed` if the secret was wrong; otherwise the attempt is not counted."""

    failed: bool = False


class FailedChecks:
    """Counts the failed checks of each id, and refuses further checks of an id that has too many within a minute.

    The count is kept in memory and holds for one process. A check counts from its beginning and is taken back if it
    does not fail, so that checks at the same time can't exceed the bound together.

    If `most_ids` ids failed within the last minute, a new id replaces the one with the fewest failures. To remove a
    count of n, a caller needs n failed checks of each of the other ids within that minute. For a count of 30 that is
    300,000 slow hashes, far more than one process computes. If the oldest count were removed instead, 10,000 would do.

    A minute is over when either the injected clock or the monotonic clock has moved by a minute. A wall clock that was
    set back, or stands still, therefore can't keep a device out for longer. A wall clock that was set forward ends the
    minute early, which gives `per_minute` more guesses.

    Args:
        clock: the database's clock.
        per_minute: how many checks of one id may fail within any minute, 1 or more.
        most_ids: how many ids are remembered, 1 or more.
        monotonic: the monotonic clock, in seconds.
    """

    def __init__(
        self,
        clock: Clock,
        *,
        per_minute: int = FAILED_CHECKS_PER_MINUTE,
        most_ids: int = _MOST_IDS,
        monotonic: Callable[[], float] = monotonic,
    ) -> None:
        self._clock = clock
        self._per_minute = per_minute
        self._most_ids = most_ids
        self._monotonic = monotonic
        self._failed: dict[str, list[_Moment]] = {}

    @contextmanager
    def attempt(self, device_id: str) -> Iterator[CheckAttempt]:
        """Count a check of this id while the block runs, and after the block if the check failed.

        Raises:
            TooManyAttemptsError: `per_minute` checks of the id failed within the last minute, or are under way.
        """
        begun = self._begin(device_id)
        attempt = CheckAttempt()
        try:
            yield attempt
        finally:
            if not attempt.failed:
                self._take_back(device_id, begun)

    def _begin(self, device_id: str) -> _Moment:
        with _lock:
            now = (self._clock(), self._monotonic())
            failed = [begun for begun in self._failed.get(device_id, ()) if _age(begun, now) < _MINUTE]
            if len(failed) >= self._per_minute:
                raise TooManyAttemptsError(
                    f"{len(failed)} checks of a secret of device {device_id!r} failed within a minute or are under way",
                    # By the database's clock, and a minute at most if that clock was set back.
                    retry_after=_MINUTE - max(timedelta(0), *(now[0] - begun for begun, _ in failed)),
                    device_id=device_id,
                )
            if device_id not in self._failed and len(self._failed) >= self._most_ids:
                self._make_room(now)
            self._failed[device_id] = [*failed, now]
            return now

    def _take_back(self, device_id: str, begun: _Moment) -> None:
        with _lock:
            failed = self._failed.get(device_id, [])
            if begun in failed:
                failed.remove(begun)
            if not failed:
                self._failed.pop(device_id, None)

    def _make_room(self, now: _Moment) -> None:
        self._failed = {one: failed for one, failed in self._failed.items() if _age(failed[-1], now) < _MINUTE}
        if len(self._failed) >= self._most_ids:
            del self._failed[min(self._failed, key=lambda one: len(self._failed[one]))]


def _renew_lock() -> None:
    # A thread that does not exist in a forked child may have held the lock.
    global _lock
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_renew_lock)
