"""Read the wall clock for timestamps and the monotonic clock for timeouts."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from time import time_ns

Clock = Callable[[], datetime]
"""A function that returns the current time as an aware datetime. homeagent does not correct an injected clock."""

monotonic: Callable[[], float] = partial(time.clock_gettime, time.CLOCK_MONOTONIC)
"""A function that returns the seconds of a monotonic clock.

Do not use `time.monotonic`. If a test freezes `time.monotonic` with freezegun, no timeout ends.
"""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND = timedelta(milliseconds=1)
_MILLION = 1_000_000

_latest = (0, _EPOCH)


def system_clock() -> datetime:
    """Return the current time in whole milliseconds. The time does not go back, so expired nonces stay expired."""
    global _latest
    milliseconds = time_ns() // _MILLION
    latest, timestamp = _latest
    if milliseconds > latest:
        # Two threads can run this block at the same time. Each thread returns the time of its own reading.
        timestamp = _EPOCH + milliseconds * _MILLISECOND
        reading = (milliseconds, timestamp)
        # Do not add a call between the comparison and the assignment. After a call, CPython can switch threads. The
        # stored time could go back (`test_the_clock_never_goes_back`).
        if reading > _latest:
            _latest = reading
    return timestamp
