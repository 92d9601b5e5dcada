"""The store of nonces, and the guard that accepts a signed message once, and only while the message is fresh."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import insert

from homeagent import Database, Freshness, Nonce, ReplayGuard
from homeagent.errors import InvalidArgumentError, NonceLimitError
from homeagent.stores.nonces import NONCE_GRACE
from tests.conftest import START, FakeClock, dump

MINUTE = timedelta(minutes=1)
MS = timedelta(milliseconds=1)
SKEW = timedelta(minutes=5)


def consume(database: Database, nonce: str = "n", device_id: str = "lamp", **options: int) -> bool:
    """Consume a nonce in a separate unit."""
    with database.unit_of_work() as unit:
        return unit.nonces.consume(device_id, nonce, expires_at=START + MINUTE, **options)


def test_consume_is_true_once(database: Database) -> None:
    """The first call for a device and nonce returns True and later calls False, for all printable characters."""
    for nonce in ("n", "a+/=", "x" * 256, "é☎"):
        assert consume(database, nonce) is True
        assert consume(database, nonce) is False
        assert consume(database, nonce, "other") is True
    with database.unit_of_work(read_only=True) as unit:
        found = unit.nonces.find("lamp", "n")
        assert found is not None
        assert (found.created_at, found.expires_at) == (START, START + MINUTE)
        assert unit.nonces.find("lamp", "N") is None


def test_expiry_is_exact(database: Database, clock: FakeClock) -> None:
    """A nonce is known one millisecond before its end and has expired exactly at its end, before any cleanup."""
    assert consume(database) is True
    clock.now = START + MINUTE - MS
    with database.unit_of_work() as unit:
        assert unit.nonces.find("lamp", "n") is not None
        assert unit.nonces.consume("lamp", "n", expires_at=START + 2 * MINUTE) is False
    clock.now = START + MINUTE
    with database.unit_of_work() as unit:
        assert unit.nonces.find("lamp", "n") is None
        assert unit.nonces.consume("lamp", "m", expires_at=clock.now) is False
        assert unit.nonces.consume("lamp", "n", expires_at=clock.now + MS) is True
        found = unit.nonces.find("lamp", "n")
        assert found is not None
        assert found.expires_at == clock.now + MS
    assert len(dump(database)["nonces"]) == 1


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


def test_a_device_has_at_most_ten_thousand_nonces(database: Database, clock: FakeClock) -> None:
    """With the default limit, nonce number 10,001 of a device is refused, a replay is False, and expiry makes room."""
    expires_at = clock.now + timedelta(hours=1)
    row = {"device_id": "lamp", "created_at": clock.now, "expires_at": expires_at}
    with database.unit_of_work() as unit:
        unit.session.connection().execute(insert(Nonce), [{**row, "nonce": f"n{number}"} for number in range(9_999)])
    assert database.nonces.consume("lamp", "number 10,000", expires_at=expires_at)
    with pytest.raises(NonceLimitError) as caught:
        database.nonces.consume("lamp", "one too many", expires_at=expires_at)
    assert (caught.value.device_id, caught.value.limit) == ("lamp", 10_000)
    assert not database.nonces.consume("lamp", "n3", expires_at=expires_at)
    assert not database.nonces.consume("door", "n0", expires_at=clock.now)
    assert database.nonces.consume("door", "n0", expires_at=expires_at)
    clock.advance(timedelta(hours=1))
    assert database.nonces.consume("lamp", "room again", expires_at=clock.now + timedelta(hours=1))


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
