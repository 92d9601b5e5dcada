"""The wall clock, which each store method reads once, and the monotonic clock for waits and timeouts."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from time import time_ns

__all__ = ["Clock", "monotonic", "system_clock"]

Clock = Callable[[], datetime]
"""Returns the current time as an aware datetime. An injected clock may step back; its time is used unchanged."""

monotonic: Callable[[], float] = (
    partial(time.clock_gettime, time.CLOCK_MONOTONIC) if hasattr(time, "clock_gettime") else time.monotonic
)
"""Returns the seconds of a monotonic clock.

An application's tests may use freezegun, which also freezes `time.monotonic`: a timeout would not end. Neither
freezegun nor time-machine freezes `time.clock_gettime`.
"""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND = timedelta(milliseconds=1)
_MILLION = 1_000_000

# Reentrant: a signal handler may read the clock while its thread holds the lock.
_lock = threading.RLock()
_latest = (0, _EPOCH)


def system_clock() -> datetime:
    """Return the current time in whole milliseconds, not earlier than the last returned timestamp of this process.

    While the wall clock is set back, return the last timestamp again. Otherwise expired nonces would count as not
    expired, and events would have the wrong order.
    """
    global _latest
    milliseconds = time_ns() // _MILLION
    latest, timestamp = _latest
    if milliseconds == latest:
        return timestamp
    with _lock:
        latest, timestamp = _latest
        if milliseconds > latest:
            timestamp = _EPOCH + milliseconds * _MILLISECOND
            _latest = (milliseconds, timestamp)
        return timestamp


def _renew_lock() -> None:
    # In the parent process, another thread may have held the lock at the fork.
    global _lock
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_renew_lock)
