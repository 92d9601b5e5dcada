"""For each presented device id, count the failed checks of guessable secrets. The id can be known or unknown.

A success does not reset the count. Otherwise each success would give an attacker 30 new guesses.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from datetime import datetime, timedelta
from hashlib import sha256
from typing import TypeVar

from homeagent.clock import Clock, monotonic
from homeagent.errors import TooManyAttemptsError

FAILED_CHECKS_PER_MINUTE = 30
_MINUTE = timedelta(minutes=1)
_MOST_IDS = 10_000
# A caller can present an id of any length. For an id over `_LONGEST_ID` characters, the counter keeps only a hash.
_LONGEST_ID = 512

T = TypeVar("T")

# All instances share one lock, which `_renew_lock()` replaces after a fork. The lock is reentrant, because a signal
# handler can check a secret.
_lock = threading.RLock()

_Moment = tuple[datetime, float]
"""Simultaneous readings of the database's clock and the monotonic clock."""


def _age(begun: _Moment, now: _Moment) -> timedelta:
    """Return the age of a check. If the database's clock and monotonic clock disagree, return the larger age."""
    return max(now[0] - begun[0], timedelta(seconds=now[1] - begun[1]))


class FailedChecks:
    """Counts the failed and unfinished checks of each device id. The argument `per_minute=` limits the checks of one
    id.

    The argument `most_ids=` limits the number of counted ids. At the limit, a new id replaces the id with the fewest
    failures. Do not replace the oldest id. Otherwise an attacker could erase an id's count by sending 10,000 new ids.

    A check expires after 60 seconds. The database's clock and the monotonic clock both measure the 60 seconds. So a
    check expires even if one clock stands still.
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

    def run(self, device_id: str, check: Callable[[], T | None]) -> T | None:
        """Run a check of the id, which returns None for a wrong secret. Count the check while it runs, and afterwards
        if the secret was wrong. If the id has reached the limit, raise TooManyAttemptsError.
        """
        if len(device_id) > _LONGEST_ID:
            device_id = f"sha256:{sha256(device_id.encode(errors='surrogatepass')).hexdigest()}"
        begun = self._begin(device_id)
        is_wrong = False
        try:
            found = check()
            is_wrong = found is None
        finally:
            if not is_wrong:
                self._take_back(device_id, begun)
        return found

    def _begin(self, device_id: str) -> _Moment:
        """Count a started check, and return the start time. At the limit of the id, raise TooManyAttemptsError."""
        with _lock:
            now = (self._clock(), self._monotonic())
            failed = [begun for begun in self._failed.get(device_id, ()) if _age(begun, now) < _MINUTE]
            if len(failed) >= self._per_minute:
                raise TooManyAttemptsError(
                    f"{len(failed)} checks of a secret of device {device_id!r} failed within a minute or are under way",
                    # If the database's clock was set back, the wait is a minute.
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
    # Replace the lock. A thread of the parent process can hold the old lock.
    global _lock
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_renew_lock)
