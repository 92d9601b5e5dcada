"""A sweep beside others: it sees who waits, and gives way.

SQLite only where it says so: on PostgreSQL nobody waits for a sweep's rows.
"""

from __future__ import annotations

import subprocess
import sys
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
from homeagent.maintenance.sweep import Sweeper, sweep
from homeagent.stores import NonceStore
from tests.conftest import START, FakeClock, add_agent, copy_template, dump
from tests.interrupts import interrupt_at

MINUTE = timedelta(minutes=1)


class Rests(threading.Event):
    """Notes how long a sweep would rest, and lets the time pass at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.noted: list[float] = []
        self.writers: list[threading.Thread] = []

    def monotonic(self) -> float:
        """Return the time that passed."""
        return self.now

    def wait(self, timeout: float | None = None) -> bool:
        """Rest, until those who waited have had their turn."""
        assert timeout is not None
        while self.writers:
            self.writers.pop().join(30)
        self.noted.append(round(timeout, 6))
        self.now += timeout
        return super().is_set()


def fill(database: Database, clock: FakeClock, count: int) -> None:
    """Add nonces, and let them die."""
    with database.unit_of_work() as unit:
        for number in range(count):
            unit.nonces.consume("lamp", f"n{number}", expires_at=START + MINUTE)
    clock.advance(hours=2)


class Batches:
    """Makes every batch take three milliseconds, and lets another unit wait for some of them."""

    def __init__(self, database: Database, rests: Rests, monkeypatch: pytest.MonkeyPatch) -> None:
        self.database = database
        self.rests = rests
        self.awaited: set[int] = set()
        self.counts: list[int] = []
        self._delete = NonceStore.delete_expired
        monkeypatch.setattr(NonceStore, "delete_expired", lambda store, *, limit: self.delete(store, limit))

    def delete(self, store: NonceStore, limit: int) -> int:
        """Do a batch."""
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
        """Sweep, with these options."""
        given = {"time_budget": None, "stop": self.rests, "monotonic": self.rests.monotonic, **options}
        try:
            return sweep(self.database._settings, **given)
        finally:
            self.rests.wait(0)
            self.rests.noted.pop()


def test_a_sweep_that_somebody_waited_for_rests_longer(
    sqlite_database: Database, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a batch that held a writer up, writers have four times as long; after others a millisecond."""
    fill(sqlite_database, clock, 50)
    rests = Rests()
    batches = Batches(sqlite_database, rests, monkeypatch)
    batches.awaited = {1, 3}
    assert batches.sweep(batch_size=10).nonces == 50
    assert batches.counts == [10, 10, 10, 10, 10, 0]
    assert rests.noted == [0.001, 0.012, 0.001, 0.012, 0.001]


def test_a_rest_that_would_outlast_the_budget_ends_the_sweep(
    sqlite_database: Database, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither is a budget overslept, nor is there another batch after it."""
    fill(sqlite_database, clock, 50)
    rests = Rests()
    batches = Batches(sqlite_database, rests, monkeypatch)
    batches.awaited = {1}
    report = batches.sweep(batch_size=10, time_budget=timedelta(milliseconds=19))
    assert (report.nonces, report.more) == (20, True)
    assert rests.noted == [0.001]


def test_a_stopped_sweep_ends_in_its_rest(
    sqlite_database: Database, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever stops a sweeper waits for no more than a batch."""
    fill(sqlite_database, clock, 50)
    rests = Rests()
    rests.set()
    batches = Batches(sqlite_database, rests, monkeypatch)
    report = batches.sweep(batch_size=10)
    assert (report.nonces, report.more) == (10, True)


def test_the_log_is_emptied_in_turns_of_its_own_where_somebody_waits(
    sqlite_database: Database, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every few hundred rows, and with a rest after it like after a batch; where nobody waits, by commits alone."""
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


def test_emptying_the_log_moves_its_content_into_the_file(sqlite_database: Database) -> None:
    """What was committed is in the file itself then, and a forked or closed database is refused as ever."""
    look = "import sys; print(open(sys.argv[1], 'rb').read().count(b'/srv/in-the-log'))"

    def found() -> int:
        # In a process of its own: closing the file here would drop SQLite's locks on it.
        location = sqlite_database.status().location
        ran = subprocess.run([sys.executable, "-c", look, location], stdout=subprocess.PIPE, text=True, check=True)
        return int(ran.stdout)

    add_agent(sqlite_database, "in-the-log")
    assert found() == 0
    sqlite_database._engine.empty_log(1)
    assert found() > 0
    assert add_agent(sqlite_database, "later").id == "later"
    sqlite_database.close()
    with pytest.raises(DatabaseClosedError):
        sqlite_database._engine.empty_log(1)


def test_waits_for_this_process_and_for_another_one_are_contention(sqlite_database: Database) -> None:
    """A writer's wait for its lane counts, and one for another process's lock; a unit that meets nobody does not."""
    engine = sqlite_database._engine
    add_agent(sqlite_database, "ada")
    assert engine.contention == 0
    writer = threading.Thread(target=add_agent, args=(sqlite_database, "bob"))
    with sqlite_database.unit_of_work():
        writer.start()
        while not engine.writers._waiters:
            time.sleep(0.001)
    writer.join(30)
    assert engine.contention == 1
    with closing(connect(sqlite_database.status().location)) as other:
        other.execute("BEGIN IMMEDIATE")
        writer = threading.Thread(target=add_agent, args=(sqlite_database, "eve"))
        writer.start()
        while engine.contention == 1:
            time.sleep(0.001)
        other.execute("COMMIT")
    writer.join(30)
    assert engine.contention == 2


def test_a_sweep_on_postgresql_waits_for_nobody(
    empty_postgres_url: str, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There a batch locks its own rows only, and there is no log to empty."""
    with Database.open(empty_postgres_url, clock=clock) as database:
        fill(database, clock, 30)
        rests = Rests()
        assert Batches(database, rests, monkeypatch).sweep(batch_size=10).nonces == 30
        assert rests.noted == [0.001] * 3
        database._engine.empty_log(1)


@pytest.mark.parametrize("deferrable", ["", "DEFERRABLE INITIALLY DEFERRED"])
def test_a_sweep_skips_the_rows_that_an_own_table_refers_to(
    database: Database, clock: FakeClock, caplog: pytest.LogCaptureFixture, deferrable: str
) -> None:
    """The other expired rows go, also if the foreign key is checked at COMMIT; the report counts what stays."""
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


def test_a_sweeper_that_got_no_thread_is_in_nobodys_way(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system has no thread left, the sweeper does not run, and stopping it and closing are fine."""
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


def test_a_signal_s_handler_may_close_the_database_while_a_sweeper_starts(
    sqlite_template: Path, tmp_path: Path
) -> None:
    """Wherever it comes, it waits for no lock that its own thread holds, and no sweeper is left.

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
