"""The guard that accepts a signed message once, and only while the message is fresh."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from homeagent import Database, Freshness, ReplayGuard
from homeagent.errors import InvalidArgumentError
from tests.conftest import START, FakeClock

SKEW = timedelta(minutes=5)
MOMENT = timedelta(milliseconds=1)


def judge(database: Database, nonce: str, *, offset: timedelta, guard: ReplayGuard | None = None) -> Freshness:
    """Judge a message that was signed `offset` after START, in a separate unit."""
    guard = guard or ReplayGuard(skew=SKEW)
    return database.run(lambda unit: guard.check(unit.nonces, "lamp", nonce, signed_at=START + offset))


def test_a_timestamp_is_judged_to_the_millisecond(database: Database) -> None:
    """A message becomes stale exactly when its nonce expires, and the signer's clock may be ahead by the skew."""
    for offset, verdict in (
        (-SKEW - MOMENT, Freshness.STALE),
        (-SKEW, Freshness.STALE),
        (-SKEW + MOMENT, Freshness.FRESH),
        (SKEW, Freshness.FRESH),
        (SKEW + MOMENT, Freshness.FUTURE),
        (datetime.max.replace(tzinfo=UTC) - START, Freshness.FUTURE),
    ):
        assert judge(database, str(offset), offset=offset) is verdict


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


def test_guard_refuses_bad_settings() -> None:
    """If the skew is zero or another setting is invalid, the guard raises an error."""
    for bad in (timedelta(0), -SKEW):
        with pytest.raises(InvalidArgumentError):
            ReplayGuard(skew=bad)
    with pytest.raises(InvalidArgumentError):
        ReplayGuard(skew=SKEW, limit=0)
