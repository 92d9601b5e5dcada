"""A sweep at the same time as other units: it notices waiting units and rests for them.

Some tests are for SQLite only: on PostgreSQL no unit waits for a sweep's rows.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from homeagent import Database, IdempotencyScope
from homeagent.engine.sqlite.dialect import connect
from homeagent.errors import DatabaseClosedError
from homeagent.maintenance.sweep import Pace, Sweeper, sweep
from homeagent.stores import NonceStore
from tests import fork_server
from tests.conftest import START, FakeClock, add_agent, copy_template, dump
from tests.interrupts import interrupt_at

MINUTE = timedelta(minutes=1)


class Rests(threading.Event):
    """Records the length of each rest, and advances the clock instead of waiting."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.noted: list[float] = []
        self.writers: list[threading.Thread] = []

    def monotonic(self) -> float:
        """Return the time that passed."""
        return self.now

    def wait(self, timeout: float | None = None) -> bool:
        """Rest until the waiting units are done."""
        assert timeout is not None
        while self.writers:
            self.writers.pop().join(30)
        self.noted.append(round(timeout, 6))
        self.now += timeout
        return super().is_set()


def fill(database: Database, clock: FakeClock, count: int) -> None:
    """Add nonces and let them expire."""
    with database.unit_of_work() as unit:
        for number in range(count):
            unit.nonces.consume("lamp", f"n{number}", expires_at=START + MINUTE)
    clock.advance(hours=2)


class Batches:
    """Makes every batch take three milliseconds, and lets another unit wait for some batches."""

    def __init__(self, database: Database, rests: Rests, monkeypatch: pytest.MonkeyPatch) -> None:
        self.database = database
        self.rests = rests
        self.awaited: set[int] = set()
        self.counts: list[int] = []
        self._delete = NonceStore.delete_expired
        monkeypatch.setattr(NonceStore, "delete_expired", lambda store, *, limit: self.delete(store, limit))

    def delete(self, store: NonceStore, limit: int) -> int:
        """Delete a batch."""
        if len(self.counts) in self.awaited:
            writer = threading.Thread(target=add_agent, args=(self.database, f"a{len(self.counts)}"))
            writer.start()
            self.rests.writers.append(writer)
            while not self.database._engine.writers._waiters:
                time.sleep(0.001)
        self.rests.now += 0.003
        self.counts.append(self._delete(store, limit=limit))
        return self.counts[-1]

    def sweep(self, **options: Any) -> Any:
        """Sweep with these options."""
        given = {"time_budget": None, "stop": self.rests, "monotonic": self.rests.monotonic, **options}
        try:
            return sweep(self.database._settings, **given)
        finally:
            self.rests.wait(0)
            self.rests.noted.pop()


@pytest.fixture
def batches(sqlite_database: Database, clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> Batches:
    """Batches of 50 expired nonces."""
    fill(sqlite_database, clock, 50)
    return Batches(sqlite_database, Rests(), monkeypatch)


def test_sweep_rests_longer_after_a_wait(batches: Batches) -> None:
    """If a writer waited for a batch, the sweep rests four times as long as the batch; otherwise one millisecond."""
    batches.awaited = {1, 3}
    assert batches.sweep(batch_size=10).nonces == 50
    assert batches.counts == [10, 10, 10, 10, 10, 0]
    assert batches.rests.noted == [0.001, 0.012, 0.001, 0.012, 0.001]


def test_sweep_ends_early(batches: Batches) -> None:
    """A sweep ends before a rest that would exceed the time budget, and in its first rest after a stop."""
    batches.awaited = {1}
    report = batches.sweep(batch_size=10, time_budget=timedelta(milliseconds=19))
    assert (report.nonces, report.more) == (20, True)
    assert batches.rests.noted == [0.001]
    batches.rests.set()
    report = batches.sweep(batch_size=10)
    assert (report.nonces, report.more) == (10, True)


@pytest.mark.parametrize("most", [1, 3, 9, 10, 100])
def test_pace_if_others_wait(most: int) -> None:
    """If other units wait, a batch shrinks to at least 10 rows; the rest is 4 times as long, at most 0.25 s."""
    pace = Pace(most)
    rows = []
    for worked_per_row in [0.001] * 5 + [0.00002] * 5:
        assert pace.after_batch(worked=pace.rows * worked_per_row, held=0.003, contended=True) == pytest.approx(0.012)
        rows.append(pace.rows)
    assert rows == [min(number, most) for number in (50, 25, 12, 10, 10, 20, 40, 80, 100, 100)]
    assert pace.after_batch(worked=0.0, held=0.0001, contended=True) == pytest.approx(0.001)
    assert pace.after_batch(worked=3, held=60, contended=True) == pytest.approx(0.25)
    # When no other unit waits any more, however slow the disk is, rests are short and batches are full again.
    for _ in range(5):
        pace.after_batch(worked=3, held=3, contended=True)
    for number in (20, 40, 80, 100):
        assert pace.after_batch(worked=3, held=4, contended=False) == pytest.approx(0.001)
        assert pace.rows == min(number, most)


def test_wal_is_emptied_in_separate_turns_if_others_wait(
    sqlite_database: Database, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If units wait, the WAL is emptied every few hundred rows with a rest after it; otherwise commits empty it."""
    fill(sqlite_database, clock, 900)
    rests = Rests()
    batches = Batches(sqlite_database, rests, monkeypatch)
    engine = sqlite_database._engine
    emptied: list[int] = []
    empty = engine.empty_log

    def slowly(timeout: float) -> None:
        emptied.append(len(batches.counts))
        empty(timeout)
        rests.now += 0.005

    monkeypatch.setattr(engine, "empty_log", slowly)
    batches.awaited = {0, 1, 2, 3, 5}
    assert batches.sweep(batch_size=100).nonces == 900
    assert emptied == [3]
    assert rests.noted == [0.012] * 3 + [0.02] + [0.012, 0.001, 0.012] + [0.001] * 3


def test_emptying_the_wal_moves_its_content_into_the_file(sqlite_database: Database) -> None:
    """After the WAL is emptied, the commits are in the file; a closed database raises an error."""
    look = "import sys; print(open(sys.argv[1], 'rb').read().count(b'/srv/in-the-log'))"

    def found() -> int:
        # In a separate process: closing the file here would drop SQLite's locks on it.
        return int(fork_server.run(look, sqlite_database.status().location).stdout)

    add_agent(sqlite_database, "in-the-log")
    assert found() == 0
    sqlite_database._engine.empty_log(1)
    assert found() > 0
    assert add_agent(sqlite_database, "later").id == "later"
    sqlite_database.close()
    with pytest.raises(DatabaseClosedError):
        sqlite_database._engine.empty_log(1)


def test_wait_for_another_process_counts_as_contention(sqlite_database: Database) -> None:
    """A wait for the lock of another process counts as contention, and a unit without a wait does not."""
    engine = sqlite_database._engine
    add_agent(sqlite_database, "ada")
    assert engine.contention == 0
    with closing(connect(sqlite_database.status().location)) as other:
        other.execute("BEGIN IMMEDIATE")
        writer = threading.Thread(target=add_agent, args=(sqlite_database, "eve"))
        writer.start()
        while engine.contention == 0:
            time.sleep(0.001)
        other.execute("COMMIT")
    writer.join(30)
    assert engine.contention == 1


def test_sweep_on_postgresql_delays_no_unit(
    empty_postgres_url: str, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On PostgreSQL a batch locks only its own rows, and emptying the WAL has no effect."""
    with Database.open(empty_postgres_url, clock=clock) as database:
        fill(database, clock, 30)
        rests = Rests()
        assert Batches(database, rests, monkeypatch).sweep(batch_size=10).nonces == 30
        assert rests.noted == [0.001] * 3
        database._engine.empty_log(1)


@pytest.mark.parametrize("deferrable", ["", "DEFERRABLE INITIALLY DEFERRED"])
def test_sweep_skips_rows_with_references(
    database: Database, clock: FakeClock, caplog: pytest.LogCaptureFixture, deferrable: str
) -> None:
    """If an application's table refers to an expired row, the sweep keeps and counts it, and deletes the others."""
    fill(database, clock, 7)
    with database.unit_of_work() as unit:
        for number in range(7):
            unit.idempotency_keys.insert(IdempotencyScope("lamp", "on", f"k{number}"), 1, ttl=MINUTE)
    clock.advance(hours=2)
    with database.unit_of_work() as unit:
        for name, key in (("nonces", "device_id, nonce"), ("idempotency_keys", "device_id, method, key")):
            columns = ", ".join(f"{column} TEXT" for column in key.split(", "))
            for statement in (
                f"CREATE TABLE own_{name} ({columns}, CONSTRAINT own_fk_{name} FOREIGN KEY ({key})"
                f" REFERENCES {name} ({key}) {deferrable})",
                f"INSERT INTO own_{name} SELECT {key} FROM {name} WHERE {key.split(', ')[-1]} IN ('n0', 'n3', 'k2')",
            ):
                unit.session.execute(text(statement))
    for _ in range(2):
        caplog.clear()
        report = database.sweep(batch_size=3)
        assert (report.skipped, report.more) == (3, False)
        (record,) = [record for record in caplog.records if vars(record).get("event") == "sweep_skipped"]
        assert vars(record)["skipped"] == 3
        names = [f"own_fk_{name} of table own_{name}" for name in ("idempotency_keys", "nonces")]
        assert list(report.constraints) == vars(record)["constraints"] == names
    left = dump(database)
    assert {row[0] for row in left["nonces"]} == {"n0", "n3"}
    assert {row[0] for row in left["idempotency_keys"]} == {"k2"}


def test_sweeper_without_a_thread(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the system has no thread left, the sweeper does not run, and `stop` and `close` work."""
    sweeper = database.sweeper()
    with monkeypatch.context() as patch:

        def refuse(thread: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="can't start"):
            sweeper.start()
    sweeper.stop()
    assert not sweeper.running
    database.close()
    with pytest.raises(DatabaseClosedError):
        database.sweep()


def test_signal_handler_may_close_while_a_sweeper_starts(sqlite_template: Path, tmp_path: Path) -> None:
    """If a signal handler closes the database while a sweeper starts, no call blocks and no sweeper is left.

    SQLite only: no lock of the engine is concerned.
    """
    modules = {"homeagent.database", "homeagent.database_maintenance", "homeagent.maintenance.sweep"}
    turn = 0
    came = [True]
    while came.pop():
        database = Database.open(copy_template(sqlite_template, tmp_path / str(turn)), durability="normal")
        sweepers: list[Sweeper] = []

        def sweep_on(database: Database = database, sweepers: list[Sweeper] = sweepers) -> None:
            with suppress(DatabaseClosedError):
                sweepers.append(database.sweeper(every=MINUTE))
                sweepers[0].start()

        def signalled(turn: int = turn, act: Callable[[], None] = sweep_on, database: Database = database) -> None:
            came.append(interrupt_at(turn, modules, act, database.close))

        thread = threading.Thread(target=signalled, daemon=True)
        thread.start()
        thread.join(20)
        assert not thread.is_alive()
        database.close()
        for sweeper in sweepers:
            sweeper.stop()
            assert not sweeper.running
        turn += 1
    assert turn > 10
