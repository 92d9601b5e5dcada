"""The store of nonces."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from homeagent import Database
from homeagent.errors import InvalidArgumentError, NonceLimitError
from homeagent.stores.nonces import NONCE_GRACE
from tests.conftest import START, FakeClock, dump

MINUTE = timedelta(minutes=1)
MS = timedelta(milliseconds=1)


def consume(database: Database, nonce: str = "n", device_id: str = "lamp", **options: int) -> bool:
    """Consume a nonce in a unit of its own."""
    with database.unit_of_work() as unit:
        return unit.nonces.consume(device_id, nonce, expires_at=START + MINUTE, **options)


def test_consume_is_true_once(database: Database) -> None:
    """A nonce is used up by the first call, per device, whatever printable characters it has."""
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
    """A nonce is live a millisecond before its end and dead at that very instant, before any cleanup."""
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
    """A dead nonce keeps its row for the grace, so that a clock that is set back does not readmit it."""
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
    """One call removes no more than its limit, those that died first, and never a live one."""
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


def test_limit_refuses_new_ones_and_evicts_none(database: Database, clock: FakeClock) -> None:
    """At the bound a new nonce of the device is refused, a replay is False, and room comes from expiry alone."""
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
    """Ids, nonces, instants and limits outside of the contract are refused."""
    with database.unit_of_work() as unit:
        for device_id, nonce in [("", "n"), ("a/b", "n"), ("x" * 129, "n"), ("d", ""), ("d", "x" * 257), ("d", "\0")]:
            with pytest.raises(InvalidArgumentError):
                unit.nonces.consume(device_id, nonce, expires_at=START + MINUTE)
            with pytest.raises(InvalidArgumentError):
                unit.nonces.find(device_id, nonce)
        with pytest.raises(InvalidArgumentError, match="aware"):
            unit.nonces.consume("lamp", "n", expires_at=START.replace(tzinfo=None))
        for limit in (0, -1, True):
            with pytest.raises(InvalidArgumentError):
                unit.nonces.delete_expired(limit=limit)
            with pytest.raises(InvalidArgumentError):
                unit.nonces.consume("lamp", "n", expires_at=START + MINUTE, limit=limit)
    assert dump(database)["nonces"] == []


def test_a_device_has_ten_thousand_live_nonces_at_most(database: Database, clock: FakeClock) -> None:
    """The default bound: ten thousand live ones are let in, the next one is refused until they are over."""
    expires_at = clock.now + timedelta(hours=1)
    with database.unit_of_work() as unit:
        for number in range(10_000):
            assert unit.nonces.consume("lamp", f"n{number}", expires_at=expires_at)
    with pytest.raises(NonceLimitError), database.unit_of_work() as unit:
        unit.nonces.consume("lamp", "one too many", expires_at=expires_at)
    with database.unit_of_work() as unit:
        assert not unit.nonces.consume("door", "n0", expires_at=clock.now)
        assert unit.nonces.consume("door", "n0", expires_at=expires_at)
    clock.advance(timedelta(hours=1))
    with database.unit_of_work() as unit:
        assert unit.nonces.consume("lamp", "room again", expires_at=clock.now + timedelta(hours=1))


def test_a_store_that_was_restarted_remembers(database: Database, reopen: Any, clock: FakeClock) -> None:
    """A consumed nonce is a replay for the next process as well."""
    expires_at = clock.now + timedelta(hours=1)
    with database.unit_of_work() as unit:
        assert unit.nonces.consume("lamp", "one", expires_at=expires_at)
    database.close()
    with reopen() as again, again.unit_of_work() as unit:
        assert not unit.nonces.consume("lamp", "one", expires_at=expires_at)
