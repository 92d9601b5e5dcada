"""The store of nonces, and the guard that accepts a signed message once, also after a restore."""

from __future__ import annotations

import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import text

from homeagent import Database, Freshness, ReplayGuard
from homeagent.errors import CorruptDatabaseError, InvalidArgumentError
from homeagent.models.types import to_milliseconds
from homeagent.stores.nonces import NONCE_GRACE
from tests.conftest import START, FakeClock, MakeDatabase, dump

MINUTE = timedelta(minutes=1)
SKEW = timedelta(minutes=5)
MS = timedelta(milliseconds=1)

guard = ReplayGuard(skew=SKEW)


def judge(database: Database, nonce: str, signed_at: datetime) -> Freshness:
    """Judge a message in a separate unit."""
    return database.run(lambda unit: guard.check(unit.nonces, "lamp", nonce, signed_at=signed_at))


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
        assert judge(database, str(offset), START + offset) is verdict
        assert (database.nonces.find("lamp", str(offset)) is not None) is (verdict is Freshness.FRESH)
    for bad in ({"skew": timedelta(0)}, {"skew": -SKEW}, {"skew": SKEW, "limit": 0}):
        with pytest.raises(InvalidArgumentError):
            ReplayGuard(**bad)  # type: ignore[arg-type]  # the settings are known


def test_nonce_is_kept_while_its_message_is_fresh(database: Database, clock: FakeClock) -> None:
    """If the signer's clock is ahead, the nonce is a replay until the skew after its timestamp, even after a sweep."""
    assert judge(database, "one", START + SKEW) is Freshness.FRESH
    clock.advance(2 * SKEW - MS)
    database.sweep()
    assert judge(database, "one", START + SKEW) is Freshness.REPLAYED
    clock.advance(MS)
    assert judge(database, "one", START + SKEW) is Freshness.STALE


# A restore


# Steps of a minute and of a millisecond meet every bound.
def spans_of(minutes: st.SearchStrategy[int], milliseconds: st.SearchStrategy[int]) -> st.SearchStrategy[timedelta]:
    return st.builds(timedelta, minutes=minutes, milliseconds=milliseconds)


spans, leads = spans_of(st.integers(0, 12), st.integers(0, 2)), spans_of(st.integers(-5, 5), st.integers(-1, 1))
messages = st.lists(st.tuples(spans, leads), max_size=4)
later = st.lists(spans, min_size=1, max_size=3)


Messages = list[tuple[timedelta, timedelta]]


def nothing_enters_twice(before: Messages, after: Messages, until_restore: timedelta, later: list[timedelta]) -> None:
    """Accept messages before and after a backup, with early and late clocks, then restore and send each again."""
    clock = FakeClock()
    with tempfile.TemporaryDirectory() as directory:
        path, backup = Path(directory) / "homeagent.db", Path(directory) / "the.backup"
        let_in: dict[str, datetime] = {}
        with Database.open(path, clock=clock, durability="normal") as database:
            for place, messages in (("before", before), ("after", after)):
                for number, (pause, lead) in enumerate(messages):
                    clock.advance(pause)
                    signed_at = clock.now + lead
                    if judge(database, f"{place}-{number}", signed_at) is Freshness.FRESH:
                        let_in[f"{place}-{number}"] = signed_at
                if place == "before":
                    database.backup(backup)
        restored_at = clock.advance(until_restore)
        Database.restore(backup, path, clock=clock)
        with Database.open(path, clock=clock, durability="normal") as database:
            for pause in (timedelta(0), *later):
                clock.advance(pause)
                for nonce, signed_at in let_in.items():
                    assert judge(database, nonce, signed_at) is not Freshness.FRESH, (nonce, signed_at, clock.now)
            # Not every message is refused: a message signed after the last possible earlier message is judged as usual.
            clock.now = max(clock.now, restored_at + MS)
            signed_at = restored_at + SKEW + MS
            expected = Freshness.FRESH if clock.now < signed_at + SKEW else Freshness.STALE
            assert judge(database, "new", signed_at) is expected


@pytest.mark.parametrize("histories", [6, pytest.param(60, marks=pytest.mark.slow)])
def test_no_message_is_accepted_twice(histories: int) -> None:
    """After a restore, no earlier message is accepted again. SQLite only: `restore` exists for this engine only."""
    test = given(before=messages, after=messages.filter(bool), until_restore=spans, later=later)(nothing_enters_twice)
    settings(max_examples=histories, deadline=None)(test)()


def test_time_limit_after_a_restore_is_exact(database: Database, reopen: MakeDatabase, clock: FakeClock) -> None:
    """A message that could have been accepted before the restore is stale, to the millisecond, and uses no nonce."""
    with database.unit_of_work() as unit:
        restored = text("UPDATE store SET epoch = 2, restored_at = :at")
        unit.session.connection().execute(restored, {"at": to_milliseconds(START)})
    clock.advance(2 * MS)
    again = reopen()
    # The offset SKEW: accepted exactly at the time of the restore, from a clock that is ahead by the whole skew.
    for offset in (-SKEW, timedelta(0), MS, SKEW, SKEW + MS):
        expected = Freshness.FRESH if offset > SKEW else Freshness.STALE
        assert judge(again, str(offset), START + offset) is expected
        assert (again.nonces.find("lamp", str(offset)) is not None) == (expected is Freshness.FRESH)


def test_missing_epoch_row_refuses_all(database: Database, reopen: MakeDatabase) -> None:
    """If the row with the epoch is missing, every message raises `CorruptDatabaseError`."""
    with database.unit_of_work() as unit:
        unit.session.connection().execute(text("DELETE FROM store"))
    with pytest.raises(CorruptDatabaseError, match="newest good backup"):
        judge(reopen(), "one", START)


def consume(database: Database, nonce: str = "n", device_id: str = "lamp") -> bool:
    return database.nonces.consume(device_id, nonce, expires_at=START + MINUTE)


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
