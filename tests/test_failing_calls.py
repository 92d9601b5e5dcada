"""A sync, an unlock or a close fails in the operating system: a child process runs with `failing_calls.c` preloaded.

SQLite only: the server handles its own files.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from homeagent import Database
from homeagent.errors import SchemaOutdatedError
from tests import fork_server
from tests.conftest import ROOT, add_agent

pytestmark = pytest.mark.skipif(sys.platform != "linux" or shutil.which("gcc") is None, reason="needs Linux and gcc")

PLAN = """
import ctypes, errno, gc, json, os, signal, sys
from homeagent import AgentCreate, Database, errors
_library = ctypes.CDLL(None)
_KINDS = {"sync": 1, "unlock": 2, "close": 3, "write": 4}
def plan(kind, part, error, first=1, times=10**9):
    _library.plan_failures(_KINDS[kind], str(part).encode(), ctypes.c_long(first), ctypes.c_long(times), error)
def failures():
    return _library.failures()
def done():
    plan("sync", "/", 0, 10**9, 0)
def add(database, name, size=0):
    database.agents.create(AgentCreate(id=name, name="A", workspace_path="/", config={"pad": "x" * size}))
def names(database):
    return [agent.id for agent in database.agents.list()]
def print_and_kill(answer):
    print(json.dumps(answer), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
def refused(act):
    "Return the name of the error of homeagent's that it raises, None without one; another exception ends the process."
    try:
        act()
    except errors.HomeAgentError as error:
        return type(error).__name__
    return None
path = sys.argv[1]
"""

Failing = Callable[..., Any]


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = tmp_path_factory.mktemp("failing_calls") / "failing_calls.so"
    source = Path(__file__).with_name("failing_calls.c")
    subprocess.run(["gcc", "-Wall", "-Werror", "-shared", "-fPIC", "-o", library, source], check=True, timeout=60)
    return library


@pytest.fixture
def failing(library: Path, sqlite_path: Path) -> Failing:
    """Run a script whose system calls fail, and return the JSON that the script printed last."""

    def run(script: str, *arguments: object, status: int = 0) -> Any:
        ended = fork_server.run(PLAN + script, sqlite_path, *arguments, preload=str(library))
        assert ended.returncode == status, ended.stderr
        return json.loads(ended.stdout.splitlines()[-1])

    return run


def names(path: Path) -> list[str]:
    with Database.open(path) as database:
        return [agent.id for agent in database.agents.list()]


@pytest.mark.parametrize(
    ("way", "end"), [("run", "go on"), ("run", "close"), ("run", "kill"), ("session", "close"), ("fresh log", "kill")]
)
def test_failed_commit_does_not_reappear(failing: Failing, sqlite_path: Path, way: str, end: str) -> None:
    """If a unit raises DatabaseIOError, its rows do not appear later, even if no sync succeeds until the last close."""
    found = failing(
        """
database = Database.open(path)
add(database, "before")
if sys.argv[2] == "fresh log":
    # As another program would: homeagent itself leaves a header in the log that it empties.
    link = database._engine.writers.acquire(1.0)
    link.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    database._engine.writers.release(link)
def by_session():
    with database.unit_of_work() as unit:
        add(unit, "session")
        unit.session
plan("sync", path, errno.EIO, 2 if sys.argv[2] == "fresh log" else 1)
act = by_session if sys.argv[2] == "session" else lambda: add(database, "first", 20_000)
error = refused(act)
there = names(database)
if sys.argv[3] == "go on":
    refused(lambda: add(database, "second"))
    done()
    add(database, "after")
    there = names(database)
elif sys.argv[3] == "close":
    refused(database.close)
answer = [error, failures() > 0, there]
if sys.argv[3] == "kill":
    print_and_kill(answer)
print(json.dumps(answer), flush=True)
os._exit(0)
""",
        way,
        end,
        status=-9 if end == "kill" else 0,
    )
    expected = ["after", "before"] if end == "go on" else ["before"]
    assert found == ["DatabaseIOError", end != "go on", expected]
    assert names(sqlite_path) == expected


def test_failed_commits_do_not_count_as_lost(failing: Failing, sqlite_path: Path) -> None:
    """Frames of several failed commits in the WAL of a killed process do not count as lost commits."""
    found = failing(
        """
database, other = Database.open(path), Database.open(path)
names(other)  # keeps the log in place when the connections of the first are replaced
add(database, "before")
errors_met = []
for name, size in (("first", 200_000), ("second", 50_000)):
    plan("sync", path, errno.EIO, times=1)
    errors_met.append(refused(lambda: add(database, name, size)))
done()
add(database, "after")
print_and_kill(errors_met)
""",
        status=-9,
    )
    assert found == ["DatabaseIOError", "DatabaseIOError"]
    assert names(sqlite_path) == ["after", "before"]


def test_commit_that_stays_in_the_wal_is_unknown(failing: Failing, sqlite_path: Path) -> None:
    """If the sync fails and the WAL can't be written after it, the error says that the commit may reappear."""
    found = failing(
        """
from homeagent.engine.sqlite import dialect
database = Database.open(path)
add(database, "before")
erase = dialect.Connection._erase_failed_commit
def failing_write(connection):
    plan("write", path, errno.EIO)
    return erase(connection)
dialect.Connection._erase_failed_commit = failing_write
plan("sync", path, errno.EIO)
error = refused(lambda: add(database, "first"))
done()
there = names(database)
add(database, "after")
print(json.dumps([error, there, names(database)]))
database.close()
"""
    )
    assert found == ["CommitUnknownError", ["before"], ["after", "before"]]
    assert names(sqlite_path) == ["after", "before"]


def test_a_new_epoch_whose_commit_fails_has_not_begun(failing: Failing, sqlite_path: Path) -> None:
    """If the commit of a new epoch fails outside of units of work, the epoch does not appear later."""
    failing('add(Database.open(path), "before"); print_and_kill(None)', status=-9)  # leaves a log
    found = failing(
        """
plan("sync", path + "-wal", errno.EIO)
error = refused(lambda: Database.begin_epoch(path))
print(json.dumps([error, failures() > 0]))
"""
    )
    assert found == ["DatabaseIOError", True]
    with Database.open(sqlite_path) as database:
        assert database.status().epoch == 1


def test_large_unit_needs_no_temporary_file(failing: Failing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A unit that changes many pages needs no temporary directory, as SQLite keeps the savepoint in memory."""
    monkeypatch.setenv("SQLITE_TMPDIR", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    found = failing(
        """
import pathlib
from homeagent import AgentUpdate
def change(unit, size):
    with unit.savepoint():
        for number in range(100):
            unit.agents.update(f"a{number}", AgentUpdate(config={"pad": "y" * size}))
with Database.open(path) as database:
    database.run(lambda unit: [add(unit, f"a{number}", 4000) for number in range(100)] and None)
    plan("write", sys.argv[2], errno.EROFS)
    error = refused(lambda: database.run(lambda unit: change(unit, 3000)))
    print(json.dumps([error, failures()]))
""",
        tmp_path / "temporary",
    )
    assert found == [None, 0]


def test_an_upgrade_that_cannot_be_noted_leaves_the_schema(failing: Failing, sqlite_path: Path) -> None:
    """If the disk is too full to note the upgrade in the lock file, the error leaves the schema unchanged."""
    sqlite_path.parent.mkdir(mode=0o700, exist_ok=True)
    shutil.copyfile(ROOT / "tests" / "fixtures" / "revisions" / "0001.db", sqlite_path)
    sqlite_path.chmod(0o600)
    found = failing(
        """
plan("write", path + ".lock", errno.ENOSPC)
print(json.dumps([refused(lambda: Database.open(path)), failures()]))
"""
    )
    assert found == ["DiskFullError", 1]
    with pytest.raises(SchemaOutdatedError, match="'0001'"):
        Database.open(sqlite_path, migrate=False)
    Database.open(sqlite_path).close()


@pytest.mark.parametrize(
    ("kind", "part"),
    [("unlock", ".lock"), ("unlock", ".open"), ("unlock", "-shm"), ("close", ".lock"), ("close", ".open")],
)
def test_failing_unlock_is_an_error_of_homeagent(failing: Failing, sqlite_path: Path, kind: str, part: str) -> None:
    """If an unlock fails, the caller gets no raw OSError, and all other locks are released."""
    failing(
        """
kind, part, backup = sys.argv[2:]
def opened():
    links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    return [each for each in map(os.path.realpath, links) if each.startswith(os.path.dirname(path))]
met = 0
database = Database.open(path)
add(database, "before")
kept = gc.get_objects()  # no lock may depend on the garbage collector
for act in (
    lambda: database.backup(backup, replace=True),
    database.close,
    lambda: Database.open(path).close(),
    lambda: Database.restore(backup, path),
    lambda: Database.begin_epoch(path),
):
    plan(kind, part, errno.ENOLCK if kind == "unlock" else errno.EIO)
    error = refused(act)
    met += failures()
    done()
    # SQLAlchemy logs what fails when it closes a connection, and raises nothing.
    assert error or not failures() or part == "-shm"
    if database._closed:
        assert opened() == [], opened()
assert met
with Database.open(path) as database:
    assert names(database) == ["before"]
print("null")
""",
        kind,
        part,
        sqlite_path.parent / "kept.backup",
    )


@pytest.mark.parametrize("replace", [False, True])
def test_failed_backup_leaves_no_part(failing: Failing, tmp_path: Path, replace: bool) -> None:
    """If any of its syncs fails, the backup leaves no `.partial` file, and a name that was free is free again."""
    target = tmp_path / "backups"
    target.mkdir(mode=0o700)
    count = failing(
        """
directory, replace = sys.argv[2], sys.argv[3] == "True"
target = os.path.join(directory, "b.backup")
with Database.open(path) as database:
    for number in range(1, 100):
        if replace:
            database.backup(target, replace=True)
        plan("sync", directory, errno.EIO, number, 1)
        error = refused(lambda: database.backup(target, replace=replace))
        if not failures():
            break
        left = sorted(os.listdir(directory))
        assert error == "DatabaseError", (number, error)
        assert not [name for name in left if ".partial" in name], (number, left)
        assert replace or "b.backup" not in left, (number, left)
        assert "b.backup.json" not in left or "b.backup" in left, (number, left)
print(number)
""",
        target,
        replace,
    )
    assert count > 4


def test_failed_creation_leaves_no_file(failing: Failing, tmp_path: Path) -> None:
    """If the directory of a new database can't be synced, the file is removed, and the next opening succeeds."""
    path = tmp_path / "new" / "homeagent.db"
    found = failing(
        """
path = sys.argv[2]
os.mkdir(os.path.dirname(path), 0o700)
plan("sync", os.path.dirname(path), errno.EIO, 1, 1)
error = refused(lambda: Database.open(path).close())
print(json.dumps([error, os.path.exists(path)]))
""",
        path,
    )
    assert found == ["DatabaseError", False]
    with Database.open(path) as database:
        add_agent(database)
