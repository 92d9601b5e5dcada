"""The one clock that every store method reads, once; and the clock by which waits and timeouts are measured."""

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
"""Returns the present instant as an aware datetime. An injected clock is believed, even when it steps back."""

monotonic: Callable[[], float] = (
    partial(time.clock_gettime, time.CLOCK_MONOTONIC) if hasattr(time, "clock_gettime") else time.monotonic
)
"""Returns seconds of a clock that only goes on. Waits and timeouts are measured by this clock.

An application's tests may freeze time with freezegun, which freezes `time.monotonic` too: a timeout measured by that
would never end. Neither freezegun nor time-machine freezes this clock.
"""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND = timedelta(milliseconds=1)
_MILLION = 1_000_000

# A signal's handler may come while its own thread holds it, and read the clock.
_lock = threading.RLock()
_latest = (0, _EPOCH)


def system_clock() -> datetime:
    """Return the present instant in whole milliseconds, never an earlier one than this process was told before.

    A wall clock that is set back would otherwise make dead nonces live again and order events wrongly. While the
    wall clock is behind, the last instant is returned again.
    """
    global _latest
    milliseconds = time_ns() // _MILLION
    latest, instant = _latest
    if milliseconds == latest:
        return instant
    with _lock:
        latest, instant = _latest
        if milliseconds > latest:
            instant = _EPOCH + milliseconds * _MILLISECOND
            _latest = (milliseconds, instant)
        return instant


def _renew_lock() -> None:
    # A thread that is not there in a forked child may have held it.
    global _lock
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_renew_lock)
