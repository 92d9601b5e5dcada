"""The pauses of a sweep, the rows that a sweep skips, and the thread that sweeps."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from homeagent import Database, IdempotencyScope
from homeagent.errors import DatabaseClosedError
from homeagent.maintenance.sweep import Sweeper, SweepReport, sweep
from homeagent.stores import NonceStore
from tests.conftest import START, FakeClock, add_device, copy_template, dump
from tests.interrupts import interrupt_at

MINUTE = timedelta(minutes=1)


class Rests(threading.Event):
    """Records the length of each rest, and advances the clock instead of waiting."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.noted: list[float] = []

    def monotonic(self) -> float:
        """Return the time that passed."""
        return self.now

    def wait(self, timeout: float | None = None) -> bool:
        """Advance the clock."""
        assert timeout is not None
        self.noted.append(timeout)
        self.now += timeout
        return super().is_set()


def fill(database: Database, clock: FakeClock, count: int) -> None:
    """Add nonces and let them expire."""
    with database.unit_of_work() as unit:
        for number in range(count):
            unit.nonces.consume("lamp", f"n{number}", expires_at=START + MINUTE)
    clock.advance(hours=2)


@pytest.fixture
def rests() -> Rests:
    """The rests of a sweep."""
    return Rests()


@pytest.fixture
def sweep_slowly(
    database: Database, clock: FakeClock, rests: Rests, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., SweepReport]:
    """Sweeps 50 expired nonces in batches of 10. Each batch takes `seconds=`."""
    fill(database, clock, 50)
    delete = NonceStore.delete_expired

    def sweep_slowly(*, seconds: float, **options: Any) -> SweepReport:
        def delete_slowly(store: NonceStore, *, limit: int) -> int:
            rests.now += seconds
            return delete(store, limit=limit)

        monkeypatch.setattr(NonceStore, "delete_expired", delete_slowly)
        return sweep(database._settings, batch_size=10, stop=rests, monotonic=rests.monotonic, **options)

    return sweep_slowly


@pytest.mark.parametrize(("seconds", "rest"), [(0.0, 0.001), (0.003, 0.012), (60.0, 0.25)])
def test_sweep_rests_after_each_batch(
    sweep_slowly: Callable[..., SweepReport], rests: Rests, seconds: float, rest: float
) -> None:
    """A rest takes four times as long as the batch before, at least a millisecond and at most a quarter second."""
    assert sweep_slowly(seconds=seconds).nonces == 50
    assert rests.noted == pytest.approx([rest] * 5)


def test_sweep_ends_early(sweep_slowly: Callable[..., SweepReport], rests: Rests) -> None:
    """A sweep ends before a rest that would exceed the time budget, and in its first rest after a stop."""
    report = sweep_slowly(seconds=0.003, time_budget=timedelta(milliseconds=19))
    assert (report.nonces, report.more) == (20, True)
    assert rests.noted == pytest.approx([0.012])
    rests.set()
    report = sweep_slowly(seconds=0.003)
    assert (report.nonces, report.more) == (10, True)


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


def test_sweep_skips_devices_with_references(database: Database, clock: FakeClock) -> None:
    """If an application's table refers to a pending device, the sweep keeps the device, and deletes the others."""
    for number in range(5):
        add_device(database, f"d{number}")
    with database.unit_of_work() as unit:
        for statement in (
            "CREATE TABLE own (id TEXT REFERENCES devices (id))",
            "INSERT INTO own VALUES ('d1')",
        ):
            unit.session.execute(text(statement))
    clock.advance(days=40)
    report = database.sweep(batch_size=2)
    assert (report.pending_devices, report.skipped, report.more) == (4, 1, False)


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
