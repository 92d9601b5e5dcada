"""The store of nonces."""

from __future__ import annotations

from datetime import timedelta

import pytest
from sqlalchemy import insert

from homeagent import Database, Nonce
from homeagent.errors import InvalidArgumentError, NonceLimitError
from homeagent.stores.nonces import NONCE_GRACE
from tests.conftest import START, FakeClock, dump

MINUTE = timedelta(minutes=1)
MS = timedelta(milliseconds=1)


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
    """Cleanup keeps an expired nonce for the grace, so that a clock that is set back accepts no replay."""
    assert consume(database) is True
    clock.now = START + MINUTE + NONCE_GRACE - MS
    with database.unit_of_work() as unit:
        assert unit.nonces.delete_expired() == 0
    clock.now = START
    assert consume(database) is False
    clock.now = START + MINUTE + NONCE_GRACE
    with database.unit_of_work() as unit:
        assert unit.nonces.delete_expired() == 1
    assert dump(database)["nonces"] == []


def test_cleanup_is_bounded_and_oldest_first(database: Database, clock: FakeClock) -> None:
    """One cleanup call removes at most `limit` rows, the earliest expired first, and never an unexpired row."""
    with database.unit_of_work() as unit:
        for number in range(7):
            unit.nonces.consume("lamp", f"n{number}", expires_at=START + MINUTE * (7 - number))
        unit.nonces.consume("lamp", "live", expires_at=START + timedelta(days=2))
    clock.now = START + timedelta(hours=2)
    with database.unit_of_work() as unit:
        assert unit.nonces.delete_expired(limit=3) == 3
    names = {value for row in dump(database)["nonces"] for value in row if isinstance(value, str)} - {"lamp"}
    assert names == {"n0", "n1", "n2", "n3", "live"}
    with database.unit_of_work() as unit:
        assert unit.nonces.delete_expired() == 4
        assert unit.nonces.delete_expired() == 0
        assert unit.nonces.find("lamp", "live") is not None


def test_limit_refuses_new_nonces(database: Database, clock: FakeClock) -> None:
    """If a device has reached its limit, a new nonce raises an error, a replay is False, and only expiry makes room."""
    used = 0
    with pytest.raises(NonceLimitError) as caught:
        for number in range(20):
            assert consume(database, f"n{number}", limit=8)
            used += 1
    assert (caught.value.device_id, caught.value.limit) == ("lamp", 8)
    assert used == 8
    assert len(dump(database)["nonces"]) == 8
    assert consume(database, "n3", limit=8) is False
    assert consume(database, "n", "other", limit=8) is True
    clock.now = START + MINUTE
    with database.unit_of_work() as unit:
        assert unit.nonces.consume("lamp", "later", expires_at=clock.now + MINUTE, limit=8) is True


def test_bad_arguments_write_nothing(database: Database) -> None:
    """Invalid ids, nonces, timestamps and limits raise an error."""
    with database.unit_of_work() as unit:
        for device_id, nonce in [("", "n"), ("a/..", "n"), ("x" * 513, "n"), ("d", ""), ("d", "x" * 1025), ("d", "\0")]:
            with pytest.raises(InvalidArgumentError):
                unit.nonces.consume(device_id, nonce, expires_at=START + MINUTE)
        with pytest.raises(InvalidArgumentError, match="aware"):
            unit.nonces.consume("lamp", "n", expires_at=START.replace(tzinfo=None))
        for limit in (0, -1, True):
            with pytest.raises(InvalidArgumentError):
                unit.nonces.delete_expired(limit=limit)
            with pytest.raises(InvalidArgumentError):
                unit.nonces.consume("lamp", "n", expires_at=START + MINUTE, limit=limit)
    assert dump(database)["nonces"] == []


def test_a_device_has_at_most_ten_thousand_nonces(database: Database, clock: FakeClock) -> None:
    """With the default limit, a device's nonce number 10,001 is refused until the others have expired."""
    expires_at = clock.now + timedelta(hours=1)
    row = {"device_id": "lamp", "created_at": clock.now, "expires_at": expires_at}
    with database.unit_of_work() as unit:
        unit.session.connection().execute(insert(Nonce), [{**row, "nonce": f"n{number}"} for number in range(9_999)])
    with database.unit_of_work() as unit:
        assert unit.nonces.consume("lamp", "number 10,000", expires_at=expires_at)
    with pytest.raises(NonceLimitError), database.unit_of_work() as unit:
        unit.nonces.consume("lamp", "one too many", expires_at=expires_at)
    with database.unit_of_work() as unit:
        assert not unit.nonces.consume("door", "n0", expires_at=clock.now)
        assert unit.nonces.consume("door", "n0", expires_at=expires_at)
    clock.advance(timedelta(hours=1))
    with database.unit_of_work() as unit:
        assert unit.nonces.consume("lamp", "room again", expires_at=clock.now + timedelta(hours=1))
