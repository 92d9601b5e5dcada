"""The one clock that every store method reads, once."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from time import time_ns

__all__ = ["Clock", "system_clock"]

Clock = Callable[[], datetime]
"""Returns the present instant as an aware datetime. An injected clock is believed, even when it steps back."""

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
