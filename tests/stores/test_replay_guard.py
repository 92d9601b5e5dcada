"""The guard that accepts a signed message once, and only while the message is fresh."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from homeagent import Database, Freshness, ReplayGuard
from homeagent.errors import InvalidArgumentError, NonceLimitError
from tests.conftest import START, FakeClock

SKEW = timedelta(minutes=5)
MOMENT = timedelta(milliseconds=1)


def judge(database: Database, nonce: str, *, offset: timedelta, guard: ReplayGuard | None = None) -> Freshness:
    """Judge a message that was signed `offset` after START, in a separate unit."""
    guard = guard or ReplayGuard(skew=SKEW)
    return database.run(lambda unit: guard.check(unit.nonces, "lamp", nonce, signed_at=START + offset))


def test_fresh_message_is_accepted_once(database: Database) -> None:
    """A second use of a message is a replay for as long as its timestamp is fresh."""
    assert judge(database, "one", offset=timedelta(0)) is Freshness.FRESH
    assert judge(database, "one", offset=timedelta(0)) is Freshness.REPLAYED


@pytest.mark.parametrize(
    ("offset", "verdict"),
    [
        (-SKEW - MOMENT, Freshness.STALE),
        (-SKEW, Freshness.STALE),
        (-SKEW + MOMENT, Freshness.FRESH),
        (SKEW, Freshness.FRESH),
        (SKEW + MOMENT, Freshness.FUTURE),
        (datetime.max.replace(tzinfo=UTC) - START, Freshness.FUTURE),
    ],
)
def test_a_timestamp_is_judged_to_the_millisecond(database: Database, offset: timedelta, verdict: Freshness) -> None:
    """A message becomes stale exactly when its nonce expires, and the signer's clock may be ahead by the skew."""
    assert judge(database, "one", offset=offset) is verdict


def test_refused_timestamp_uses_no_nonce(database: Database) -> None:
    """If a message is stale or in the future, its nonce is not stored."""
    judge(database, "one", offset=-SKEW)
    judge(database, "one", offset=SKEW + MOMENT)
    with database.unit_of_work(read_only=True) as unit:
        assert unit.nonces.find("lamp", "one") is None


def test_nonce_is_kept_while_its_message_is_fresh(database: Database, clock: FakeClock) -> None:
    """If the signer's clock is ahead, the nonce is a replay until the skew after its timestamp, even after a sweep."""
    assert judge(database, "one", offset=SKEW) is Freshness.FRESH
    clock.advance(2 * SKEW - MOMENT)
    database.sweep()
    assert judge(database, "one", offset=SKEW) is Freshness.REPLAYED
    clock.advance(MOMENT)
    assert judge(database, "one", offset=SKEW) is Freshness.STALE


def test_clock_set_back_accepts_no_replay(database: Database, clock: FakeClock) -> None:
    """A sweep keeps an expired nonce for the grace, so that the nonce is still known after the clock is set back."""
    assert judge(database, "one", offset=timedelta(0)) is Freshness.FRESH
    clock.advance(SKEW + timedelta(minutes=30))
    database.sweep()
    clock.advance(-timedelta(minutes=34))
    assert judge(database, "one", offset=timedelta(0)) is Freshness.REPLAYED


def test_guard_limits_nonces_of_a_device(database: Database) -> None:
    """If a device reaches the guard's limit, new messages are refused and no unexpired nonce is removed."""
    guard = ReplayGuard(skew=SKEW, limit=3)
    for number in range(3):
        assert judge(database, f"n{number}", offset=timedelta(0), guard=guard) is Freshness.FRESH
    with pytest.raises(NonceLimitError):
        judge(database, "n3", offset=timedelta(0), guard=guard)
    with database.unit_of_work(read_only=True) as unit:
        assert all(unit.nonces.find("lamp", f"n{number}") for number in range(3))


def test_guards_with_two_limits(database: Database) -> None:
    """If a guard with a high limit stored many nonces, a guard with a low limit refuses a new message."""
    assert judge(database, "first", offset=timedelta(0), guard=ReplayGuard(skew=SKEW)) is Freshness.FRESH
    guard = ReplayGuard(skew=SKEW, limit=3)
    for number in range(2):
        assert judge(database, f"n{number}", offset=timedelta(0), guard=guard) is Freshness.FRESH
    with pytest.raises(NonceLimitError):
        judge(database, "n2", offset=timedelta(0), guard=guard)


def test_guard_refuses_bad_settings() -> None:
    """If the skew is zero or another setting is invalid, the guard raises an error."""
    for bad in (timedelta(0), -SKEW):
        with pytest.raises(InvalidArgumentError):
            ReplayGuard(skew=bad)
    with pytest.raises(InvalidArgumentError):
        ReplayGuard(skew=SKEW, limit=0)
