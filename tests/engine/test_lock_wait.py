"""Wait for another process's write lock: each process gets a turn, and the wait has a bound.

SQLite only: a PostgreSQL server has many writers and its own queues.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from homeagent import AgentCreate, Database
from homeagent.engine.sqlite import connection as lock_wait
from homeagent.engine.sqlite.dialect import connect
from homeagent.errors import DatabaseBusyError
from tests import fork_server
from tests.conftest import FakeClock, add_agent
from tests.engine.files.conftest import Waiting
from tests.fork_server import Child

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


@contextmanager
def locked(database: Database) -> Iterator[Any]:
    """Hold the write lock on a separate connection, as another process would."""
    with closing(connect(database.status().location)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield connection


@pytest.mark.parametrize(("seconds", "least", "most"), [(3, 300, 1_500), (0, 0, 0)])
def test_wait_is_bounded_by_busy_timeout(
    sqlite_path: Path, clock: FakeClock, monkeypatch: pytest.MonkeyPatch, seconds: int, least: int, most: int
) -> None:
    """If the lock stays taken for `busy_timeout`, the unit raises DatabaseBusyError, and the next unit works."""
    with Database.open(sqlite_path, clock=clock, busy_timeout=timedelta(seconds=seconds)) as database:
        with locked(database):
            waiting = Waiting(monkeypatch, lock_wait)
            with pytest.raises(DatabaseBusyError, match="locked by another process"):
                add_agent(database)
            assert waiting.now == pytest.approx(seconds)
            assert max(waiting.pauses, default=0) <= 0.010
            assert least <= len(waiting.pauses) <= most
        add_agent(database)


def test_wait_ends_under_a_frozen_clock(sqlite_path: Path) -> None:
    """If a test freezes `time.monotonic`, a unit, a file lock and a follower still time out."""
    done = fork_server.run(FROZEN, sqlite_path, timeout=60)
    assert done.returncode == 0, done.stderr


def test_waiter_begins_when_the_lock_is_free(sqlite_database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """A waiting unit begins at the first attempt after the other process commits, and works like any other unit."""
    with locked(sqlite_database) as other:
        waiting = Waiting(monkeypatch, lock_wait)
        waiting.on_pause = lambda: len(waiting.pauses) == 5 and other.execute("COMMIT")
        add_agent(sqlite_database)
    assert len(waiting.pauses) == 5
    assert sqlite_database.counters().commits == 1


def test_writer_gets_turns_next_to_a_busy_process(sqlite_path: Path) -> None:
    """If another process commits and begins again without a pause, the writer gets each of its turns."""
    # The writer waited 0.03 s for a turn on average, and 0.7 s at most.
    with Database.open(sqlite_path, busy_timeout=timedelta(seconds=5)) as database:
        with database.unit_of_work() as unit:
            unit.agents.create(AgentCreate(id="n", name="n", workspace_path="/n", config={"n": 0}))

        def done_by_other(*, read_only: bool) -> int:
            with database.unit_of_work(read_only=read_only) as unit:
                config: Any = unit.agents.get("n").config
                return int(config["n"])

        missed: list[int] = []
        with Child(HOG, database.status().location) as hog:
            try:
                assert hog.stdout.readline() == "busy\n"
                for _ in range(20):
                    begun = asked = done_by_other(read_only=True)
                    while asked == begun:
                        asked = done_by_other(read_only=True)
                    missed.append(done_by_other(read_only=False) - asked)
            finally:
                hog.kill()
        assert max(missed) > 0
