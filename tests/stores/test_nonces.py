"""The store of nonces, and the guard that accepts a signed message once, and only while the message is fresh."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from homeagent import Database, Freshness, ReplayGuard
from homeagent.errors import InvalidArgumentError
from homeagent.stores.nonces import NONCE_GRACE
from tests.conftest import START, FakeClock, dump

MINUTE = timedelta(minutes=1)
MS = timedelta(milliseconds=1)
SKEW = timedelta(minutes=5)


def test_cleanup_keeps_a_grace(database: Database, clock: FakeClock) -> None:
    """Cleanup removes at most `limit` rows, the earliest first, and none within the grace, so that no replay enters."""
    for number in range(7):
        database.nonces.consume("lamp", f"n{number}", expires_at=START + MINUTE * (7 - number))
    clock.now = START + MINUTE + NONCE_GRACE - MS
    assert database.nonces.delete_expired() == 0
    clock.now = START
    assert database.nonces.consume("lamp", "n6", expires_at=START + MINUTE) is False
    clock.now = START + 6 * MINUTE + NONCE_GRACE
    assert database.nonces.delete_expired(limit=4) == 4
    names = {value for row in dump(database)["nonces"] for value in row if isinstance(value, str)} - {"lamp"}
    assert names == {"n0", "n1", "n2"}
    assert [database.nonces.delete_expired() for _ in range(2)] == [2, 0]
    assert len(dump(database)["nonces"]) == 1


# The guard


def judge(database: Database, nonce: str, *, offset: timedelta, guard: ReplayGuard | None = None) -> Freshness:
    """Judge a message that was signed `offset` after START, in a separate unit."""
    guard = guard or ReplayGuard(skew=SKEW)
    return database.run(lambda unit: guard.check(unit.nonces, "lamp", nonce, signed_at=START + offset))


def test_a_timestamp_is_judged_to_the_millisecond(database: Database) -> None:
    """A message becomes stale exactly when its nonce expires; a refused timestamp and a bad setting use no nonce."""
    for offset, verdict in (
        (-SKEW - MS, Freshness.STALE),
        (-SKEW, Freshness.STALE),
        (-SKEW + MS, Freshness.FRESH),
        (SKEW, Freshness.FRESH),  # the signer's clock may be ahead by the skew
        (SKEW + MS, Freshness.FUTURE),
        (datetime.max.replace(tzinfo=UTC) - START, Freshness.FUTURE),
    ):
        assert judge(database, str(offset), offset=offset) is verdict
        assert (database.nonces.find("lamp", str(offset)) is not None) is (verdict is Freshness.FRESH)
    for bad in ({"skew": timedelta(0)}, {"skew": -SKEW}, {"skew": SKEW, "limit": 0}):
        with pytest.raises(InvalidArgumentError):
            ReplayGuard(**bad)  # type: ignore[arg-type]  # the settings are known


def test_nonce_is_kept_while_its_message_is_fresh(database: Database, clock: FakeClock) -> None:
    """If the signer's clock is ahead, the nonce is a replay until the skew after its timestamp, even after a sweep."""
    assert judge(database, "one", offset=SKEW) is Freshness.FRESH
    clock.advance(2 * SKEW - MS)
    database.sweep()
    assert judge(database, "one", offset=SKEW) is Freshness.REPLAYED
    clock.advance(MS)
    assert judge(database, "one", offset=SKEW) is Freshness.STALE
