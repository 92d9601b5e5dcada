"""Waiting for another process's write lock: everybody gets a turn, for a bounded time, and nothing else is waited for.

SQLite only: a PostgreSQL server has many writers, and queues of its own.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from homeagent import AgentCreate, Database
from homeagent.engine.sqlite import lock_wait
from homeagent.engine.sqlite.dialect import connect
from homeagent.errors import DatabaseBusyError
from tests.conftest import FakeClock, add_agent

HOG = """
import sys
from homeagent import AgentUpdate, Database
with Database.open(sys.argv[1], durability="normal") as database:
    number = 0
    while True:
        number += 1
        with database.unit_of_work() as unit:
            unit.agents.update("n", AgentUpdate(config={"n": number}))
        if number == 10:
            print("busy", flush=True)
"""


FROZEN = """
import sys, threading, time
from datetime import timedelta
now = time.monotonic()
time.monotonic = lambda: now  # as freezegun does
from homeagent import Database, errors
from homeagent.engine.sqlite.dialect import connect
from homeagent.engine.sqlite.engine import sidecar_lock
path = sys.argv[1]
wait = timedelta(milliseconds=50)
database = Database.open(path, busy_timeout=wait)

def refused(act):
    try:
        act()
    except errors.DatabaseBusyError:
        return
    sys.exit("not refused")

database.run(lambda unit: None)  # opens the connection: homeagent refuses a file that is open by other means
connection = connect(path)
connection.execute("BEGIN IMMEDIATE")
refused(lambda: database.run(lambda unit: unit.agents.delete("a") and None))
connection.close()
with sidecar_lock(database._engine.path, timeout=wait):
    refused(sidecar_lock(database._engine.path, timeout=wait).acquire)
begun, end = threading.Event(), threading.Event()
holder = threading.Thread(target=lambda: database.run(lambda unit: begun.set() or end.wait() and None))
holder.start()
begun.wait()
refused(lambda: database.run(lambda unit: None))
end.set()
holder.join()
database.close()
"""


class Time:
    """A monotonic clock that goes on only while somebody sleeps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.slept: list[float] = []
        monkeypatch.setattr(lock_wait, "monotonic", lambda: self.now)
        monkeypatch.setattr(lock_wait, "sleep", self.sleep)

    def sleep(self, seconds: float) -> None:
        """Pass the time."""
        self.slept.append(seconds)
        self.now += seconds


@contextmanager
def locked(database: Database) -> Iterator[Any]:
    """Hold the write lock as another process would, on a connection of its own."""
    with closing(connect(database.status().location)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield connection


def test_the_wait_is_bounded_by_the_timeout(
    sqlite_path: Path, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tries go on for `busy_timeout` and end in a DatabaseBusyError, and the next unit has its turn as ever."""
    with Database.open(sqlite_path, clock=clock, busy_timeout=timedelta(seconds=3)) as database:
        with locked(database):
            time = Time(monkeypatch)
            with pytest.raises(DatabaseBusyError, match="locked by another process"):
                add_agent(database)
            assert time.now == pytest.approx(3)
            assert max(time.slept) <= 0.005
            assert 600 <= len(time.slept) <= 3_000
        add_agent(database)


def test_the_wait_ends_under_a_frozen_clock(sqlite_path: Path) -> None:
    """An application's tests may freeze `time.monotonic`: a unit, a lock of a file and a follower still give up."""
    done = subprocess.run(
        [sys.executable, "-c", FROZEN, str(sqlite_path)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


def test_no_patience_means_one_try(sqlite_path: Path, clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a timeout of nothing a unit that meets a lock is told so at once."""
    with (
        Database.open(sqlite_path, clock=clock, busy_timeout=timedelta(0)) as database,
        locked(database),
    ):
        time = Time(monkeypatch)
        with pytest.raises(DatabaseBusyError):
            add_agent(database)
        assert time.slept == []


def test_who_waits_gets_the_lock_once_it_is_free(sqlite_database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """The unit begins at the first try after the other one's end, and is a unit like any other."""
    with locked(sqlite_database) as other:
        time = Time(monkeypatch)
        sleep = time.sleep

        def end_other(seconds: float) -> None:
            sleep(seconds)
            if len(time.slept) == 5:
                other.execute("COMMIT")

        monkeypatch.setattr(lock_wait, "sleep", end_other)
        add_agent(sqlite_database)
    assert len(time.slept) == 5
    assert sqlite_database.counters().commits == 1


def test_a_writer_gets_its_turns_beside_a_process_that_never_pauses(sqlite_database: Database) -> None:
    """Beside one that commits and begins again at once, it does not wait for thousands of the other's units."""
    with sqlite_database.unit_of_work() as unit:
        unit.agents.create(AgentCreate(id="n", name="n", workspace_path="/n", config={"n": 0}))

    def done_by_other(*, read_only: bool) -> int:
        with sqlite_database.unit_of_work(read_only=read_only) as unit:
            config: Any = unit.agents.get("n").config
            return int(config["n"])

    missed: list[int] = []
    with subprocess.Popen(
        [sys.executable, "-c", HOG, sqlite_database.status().location],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    ) as hog:
        try:
            assert hog.stdout is not None
            assert hog.stdout.readline() == "busy\n"
            for _ in range(20):
                begun = asked = done_by_other(read_only=True)
                while asked == begun:
                    asked = done_by_other(read_only=True)
                missed.append(done_by_other(read_only=False) - asked)
        finally:
            hog.kill()
    assert max(missed) > 0
    # With SQLite's own waiting 1,300 here, and at last every 100 ms a try.
    assert sum(missed) / len(missed) < 1_000
