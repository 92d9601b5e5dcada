"""Failed checks are counted for each id within a minute, in a bounded memory that guesses cannot empty."""

from __future__ import annotations

from datetime import timedelta
from unittest.mock import Mock

import pytest

from homeagent.credentials.failed_checks import FailedChecks
from homeagent.errors import TooManyAttemptsError
from tests.conftest import FakeClock

MINUTE = timedelta(minutes=1)


def fail(checks: FailedChecks, device_id: str, times: int = 1) -> None:
    for _ in range(times):
        checks.run(device_id, lambda: None)


def is_refused(checks: FailedChecks, device_id: str) -> bool:
    """Return whether a check of this id is refused; an accepted check leaves no count."""
    try:
        return not checks.run(device_id, lambda: True)
    except TooManyAttemptsError:
        return True


def test_refused_until_the_oldest_failure_is_a_minute_old(clock: FakeClock) -> None:
    """At most `per_minute` checks fail within any minute; `retry_after` is the time until the next check may begin."""
    checks = FailedChecks(clock, per_minute=2, monotonic=lambda: 0.0)
    fail(checks, "lamp")
    clock.advance(seconds=40)
    fail(checks, "lamp")
    with pytest.raises(TooManyAttemptsError, match=r"2 checks .*'lamp' failed.* try again in 20\.000 s") as refused:
        fail(checks, "lamp")
    assert (refused.value.device_id, refused.value.retry_after) == ("lamp", timedelta(seconds=20))
    assert not is_refused(checks, "door")
    clock.advance(seconds=19.999)
    assert is_refused(checks, "lamp")
    clock.advance(seconds=0.001)
    fail(checks, "lamp")
    assert is_refused(checks, "lamp")


def test_success_is_not_counted_and_resets_no_count(clock: FakeClock) -> None:
    """A successful check neither counts nor gives an attacker further guesses."""
    checks = FailedChecks(clock, per_minute=2, monotonic=lambda: 0.0)
    fail(checks, "lamp")
    for _ in range(5):
        assert not is_refused(checks, "lamp")
    fail(checks, "lamp")
    assert is_refused(checks, "lamp")


def test_check_with_an_error_is_not_counted(clock: FakeClock) -> None:
    """If a check raises an error before the hash was computed, no guess was tried, and the check is not counted."""
    checks = FailedChecks(clock, per_minute=1, monotonic=lambda: 0.0)
    for _ in range(3):
        with pytest.raises(MemoryError):
            checks.run("lamp", Mock(side_effect=MemoryError))
    assert not is_refused(checks, "lamp")


@pytest.mark.parametrize("step", [timedelta(0), timedelta(hours=-1)], ids=["stands still", "set back"])
def test_stopped_wall_clock_does_not_prolong_the_minute(clock: FakeClock, step: timedelta) -> None:
    """If the wall clock stands still, the monotonic clock ends the minute."""
    ticks = Mock(return_value=0.0)
    checks = FailedChecks(clock, per_minute=1, monotonic=ticks)
    fail(checks, "lamp")
    clock.advance(step)
    ticks.return_value = 59.0
    with pytest.raises(TooManyAttemptsError) as refused:
        fail(checks, "lamp")
    assert refused.value.retry_after == MINUTE
    ticks.return_value = 60.0
    assert not is_refused(checks, "lamp")


def test_other_ids_do_not_remove_a_count(clock: FakeClock) -> None:
    """If too many ids are remembered, expired ids are removed first, then the id with the fewest failures."""
    checks = FailedChecks(clock, per_minute=3, most_ids=10, monotonic=lambda: 0.0)
    fail(checks, "expired", 3)
    clock.advance(MINUTE)
    fail(checks, "lamp", 3)
    for number in range(100):
        fail(checks, f"guess {number}", 1 + number % 2)
        assert len(checks._failed) <= 10
        assert is_refused(checks, "lamp")
    assert "expired" not in checks._failed
