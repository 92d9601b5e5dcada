"""The one clock that every store method reads, once."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from datetime import UTC, datetime

__all__ = ["Clock", "system_clock"]

Clock = Callable[[], datetime]
"""Returns the present instant as an aware datetime. An injected clock is believed, even when it steps back."""

# A signal's handler may come while its own thread holds it, and read the clock.
_lock = threading.RLock()
_latest = datetime.min.replace(tzinfo=UTC)


def system_clock() -> datetime:
    """Return the present instant, never an earlier one than this process was told before.

    A wall clock that is set back would otherwise make dead nonces live again and order events wrongly. While the
    wall clock is behind, the last instant is returned again.
    """
    global _latest
    now = datetime.now(UTC)
    with _lock:
        if now > _latest:
            _latest = now
        return _latest


def _renew_lock() -> None:
    # A thread that is not there in a forked child may have held it.
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)
