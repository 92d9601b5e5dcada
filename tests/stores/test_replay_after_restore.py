"""After a restore, no earlier message is accepted again, and new messages are soon accepted."""

from __future__ import annotations

import tempfile
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import text

from homeagent import Database, Freshness, ReplayGuard
from homeagent.errors import CorruptDatabaseError
from homeagent.models.types import to_milliseconds
from tests.conftest import START, FakeClock, MakeDatabase

SKEW = timedelta(minutes=5)
MOMENT = timedelta(milliseconds=1)

guard = ReplayGuard(skew=SKEW)


def judge(database: Database, nonce: str, signed_at: datetime) -> Freshness:
    """Judge a message in a separate unit."""
    return database.run(lambda unit: guard.check(unit.nonces, "lamp", nonce, signed_at=signed_at))


def begin_epoch(database: Database, restored_at: datetime | None) -> None:
    """Begin an epoch at this time, as a restore does, and delete the nonces."""
    with database.unit_of_work() as unit:
        connection = unit.session.connection()
        connection.execute(text("DELETE FROM nonces"))
        instant = None if restored_at is None else to_milliseconds(restored_at)
        connection.execute(text("UPDATE store SET epoch = 2, restored_at = :at"), {"at": instant})


# Steps of a minute and of a millisecond meet every bound.
def spans_of(minutes: st.SearchStrategy[int], milliseconds: st.SearchStrategy[int]) -> st.SearchStrategy[timedelta]:
    return st.builds(timedelta, minutes=minutes, milliseconds=milliseconds)


spans, leads = spans_of(st.integers(0, 12), st.integers(0, 2)), spans_of(st.integers(-5, 5), st.integers(-1, 1))
messages = st.lists(st.tuples(spans, leads), max_size=4)
later = st.lists(spans, min_size=1, max_size=3)


def nothing_enters_twice(
    before: list[tuple[timedelta, timedelta]],
    after: list[tuple[timedelta, timedelta]],
    until_restore: timedelta,
    later: list[timedelta],
) -> None:
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
            clock.now = max(clock.now, restored_at + MOMENT)
            signed_at = restored_at + SKEW + MOMENT
            expected = Freshness.FRESH if clock.now < signed_at + SKEW else Freshness.STALE
            assert judge(database, "new", signed_at) is expected


@pytest.mark.parametrize("histories", [6, pytest.param(60, marks=pytest.mark.slow)])
def test_no_message_is_accepted_twice(histories: int) -> None:
    """After a restore, no earlier message is accepted again. SQLite only: `restore` exists for this engine only."""
    test = given(before=messages, after=messages.filter(bool), until_restore=spans, later=later)(nothing_enters_twice)
    settings(max_examples=histories, deadline=None)(test)()


def test_time_limit_after_a_restore_is_exact(database: Database, reopen: MakeDatabase, clock: FakeClock) -> None:
    """A message that could have been accepted before the restore is stale, to the millisecond, and uses no nonce."""
    begin_epoch(database, START)
    clock.advance(2 * MOMENT)
    again = reopen()
    # The offset SKEW: accepted exactly at the time of the restore, from a clock that is ahead by the whole skew.
    for offset in (-SKEW, timedelta(0), MOMENT, SKEW, SKEW + MOMENT):
        expected = Freshness.FRESH if offset > SKEW else Freshness.STALE
        assert judge(again, str(offset), START + offset) is expected
        assert (again.nonces.find("lamp", str(offset)) is not None) == (expected is Freshness.FRESH)


def test_missing_epoch_row_refuses_all(database: Database, reopen: MakeDatabase) -> None:
    """If the row with the epoch is missing, every message raises `CorruptDatabaseError`."""
    with database.unit_of_work() as unit:
        unit.session.connection().execute(text("DELETE FROM store"))
    with pytest.raises(CorruptDatabaseError, match="newest good backup"):
        judge(reopen(), "one", START)
