"""The default clock."""

from __future__ import annotations

from datetime import timedelta

import pytest

from homeagent import clock


def test_the_clock_never_goes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock stays at its latest reading if the system's clock is set back, even after a race of two threads."""
    monkeypatch.setattr(clock, "_latest", clock._latest)  # restored at the end of the test
    now = clock.time_ns() + 10**9
    monkeypatch.setattr(clock, "time_ns", lambda: now)
    first = clock.system_clock()
    others = []

    class Preempted:
        """A factor that another thread's reading interrupts."""

        def __rmul__(self, milliseconds: int) -> timedelta:
            nonlocal now
            monkeypatch.setattr(clock, "_MILLISECOND", timedelta(milliseconds=1))
            now += 10**9
            others.append(clock.system_clock())
            return timedelta(milliseconds=milliseconds)

    monkeypatch.setattr(clock, "_MILLISECOND", Preempted())
    now += 10**9
    assert clock.system_clock() == first + timedelta(seconds=1)
    now -= 60 * 10**9
    assert clock.system_clock() == others[0] == first + timedelta(seconds=2)
