"""A second SQLite library in the process cannot harm an open database: its access is harmless or refused.

Linux only, because open file description locks are needed. All in child processes: an audit hook cannot be removed.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest

from homeagent import Database, errors
from homeagent.engine.sqlite import foreign_access
from tests.conftest import Children, add_agent, in_threads
from tests.fork_server import Process
from tests.interrupts import interrupt_at

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="F_OFD_SETLK and /proc are Linux's")

BEGIN = """
import contextlib, os, sqlite3, sys
from homeagent import AgentCreate, Database, errors
path = sys.argv[1]
def write(database, name):
    database.agents.create(AgentCreate(id=name, name=name, workspace_path="/a"))
def print_whether_refused(target=path, **options):
    try:
        sqlite3.connect(target, **options).close()
    except errors.ForeignAccessError as error:
        assert "read_connection" in str(error)
        print("refused", flush=True)
    else:
        print("let in", flush=True)
"""

# Opens the database, runs `act` before each commit, prints the name of each committed agent, and waits for a SIGKILL,
# so that no clean end follows.
HOST = """
database = Database.open(path)
{act}
write(database, "first")
for number in range(5):
    act()
    write(database, f"a{{number}}")
    print(f"a{{number}}", flush=True)
act()
print("told", flush=True)
sys.stdin.readline()
"""

READ_THE_FILES = """
def act():
    for name in (path, path + "-wal"):
        descriptor = os.open(name, os.O_RDONLY)
        os.read(descriptor, 4096)
        os.close(descriptor)
"""

OPEN_THE_INDEX = """
def act():
    os.close(os.open(path + "-shm", os.O_RDWR))
"""

ATTACH = """
def act():
    with contextlib.closing(sqlite3.connect(path + ".other", isolation_level=None)) as other:
        other.execute("ATTACH ? AS store", (path,))
        assert other.execute("SELECT count(*) FROM store.agents").fetchone()[0] > 0
"""

# Another process: opens the database and closes it, which deletes the WAL if no lock marks the database as in use.
VISITOR = """
import sys
from homeagent import Database
with Database.open(sys.argv[1]) as database:
    print(*sorted(agent.id for agent in database.agents.list()))
"""

PLAIN_VISITOR = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1])
print(*[row[0] for row in connection.execute("SELECT id FROM agents ORDER BY id")])
connection.close()
"""


def agents(path: Path, host: Process | None = None) -> set[str]:
    """Kill the process, and return the agents that the next process finds."""
    if host is not None:
        host.kill()
        host.wait()
    with Database.open(path) as database:
        return {agent.id for agent in database.agents.list()}


def raising(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize("act", [READ_THE_FILES, OPEN_THE_INDEX, ATTACH], ids=["files", "index", "attach"])
def test_no_commit_is_lost_after_foreign_access(sqlite_path: Path, children: Children, act: str) -> None:
    """If a host opens the files without homeagent, visitors close and the host is killed, no commit is lost."""
    host = children.start(BEGIN + HOST.format(act=act), sqlite_path)
    told = {"first"}
    while (line := host.stdout.readline().strip()) != "told":
        assert line, host.communicate()[1]
        told.add(line)
        # SQLite's own locks would show no other process than each visitor, had the host's locks been dropped.
        if line in ("a0", "a3"):
            assert told <= set(children.run(PLAIN_VISITOR if line == "a0" else VISITOR, sqlite_path).split())
    for visitor in (PLAIN_VISITOR, VISITOR):
        assert children.run(visitor, sqlite_path).split() == sorted(told)
        assert sqlite_path.with_name(sqlite_path.name + "-wal").exists()
    assert agents(sqlite_path, host) == told


@pytest.mark.parametrize("locks", [True, False], ids=["", "without open file description locks"])
def test_sqlite3_is_refused_in_the_process(sqlite_path: Path, children: Children, locks: bool) -> None:
    """`sqlite3.connect` to the open file raises ForeignAccessError in each spelling, before sqlite3 opens the file."""
    printed = children.run(
        BEGIN
        + f"""
from pathlib import Path
from homeagent.engine.sqlite import foreign_access
foreign_access._HAS_OFD_LOCKS &= {locks}
path = Path(path)
os.chdir(path.parent)
os.symlink(path, "link.db")
os.mkdir("inner")
spellings = [str(path), os.fsencode(path), path, path.name, "inner/../" + path.name, "link.db"]
uris = [
    f"file:{{path}}", f"file:{{path}}?mode=ro", f"file://{{path}}", f"file://localhost{{path}}", f"file:{{path.name}}",
    f"file:{{str(path).replace('.', '%2e')}}?immutable=1",
]
def try_all():
    for spelling in spellings:
        print_whether_refused(spelling)
    for spelling in uris:
        print_whether_refused(spelling, uri=True)
database = Database.open(path)
try_all()
database.agents.list()
before = sorted(os.listdir("/proc/self/fd"))
try_all()
assert sorted(os.listdir("/proc/self/fd")) == before
for target in ("other.db", ":memory:", "", Path("other.db"), b"other.db"):
    print_whether_refused(target)
database.close()
try_all()
with Database.open(path) as database:
    database.agents.list()
    print_whether_refused()
""",
        sqlite_path,
    )
    assert printed.splitlines() == ["refused"] * 24 + ["let in"] * 17 + ["refused"]


@pytest.mark.parametrize("how", ["os.open(path, os.O_RDONLY)", "sqlite3.connect(path)"])
def test_open_descriptor_refuses_open(sqlite_path: Path, children: Children, how: str) -> None:
    """If the process already has the file open, `Database.open` raises ForeignAccessError until that is closed."""
    printed = children.run(
        BEGIN
        + f"""
foreign = {how}
try:
    Database.open(path)
except errors.ForeignAccessError as error:
    assert path in str(error)
    print("refused")
os.close(foreign) if isinstance(foreign, int) else foreign.close()
with Database.open(path) as database:
    print(len(database.agents.list()))
""",
        sqlite_path,
    )
    assert printed.split() == ["refused", "0"]


@pytest.mark.parametrize("where", ["os.scandir", "homeagent.engine.sqlite.foreign_access.open_existing"])
def test_a_signal_handler_can_open_the_file(sqlite_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """A signal handler can open the database while its thread opens the database's first connection."""
    Database.open(sqlite_path).close()
    real = resolve_name(where)
    opened: list[Database] = []

    def interrupted(*arguments: Any, **options: Any) -> Any:
        monkeypatch.setattr(where, real)
        result = real(*arguments, **options)
        opened.append(Database.open(sqlite_path))
        opened[0].agents.list()
        return result

    monkeypatch.setattr(where, interrupted)
    with Database.open(sqlite_path) as database:
        add_agent(database)
        opened[0].close()


# An interrupt can come before a `with` statement has taken the iterator of `os.scandir()`.
@pytest.mark.filterwarnings("ignore:.*ScandirIterator:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("module", ["connection", "sqlite.dialect", "sqlite.foreign_access"])
def test_an_interrupted_read_blocks_no_later_read(
    sqlite_database: Database, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    """If a signal handler raises during a read, each thread can read while the exception is in memory."""
    monkeypatch.setattr(foreign_access, "_guards", {})
    add_agent(sqlite_database)
    turn, came = 0, True
    while came:
        sqlite_database._engine.discard_free()
        interrupt = KeyboardInterrupt()
        came = interrupt_at(
            turn, [f"homeagent.engine.{module}"], sqlite_database.agents.list, partial(raising, interrupt)
        )
        sqlite_database._engine.discard_free()
        assert len(sqlite_database.agents.list()) == 1
        sqlite_database._engine.discard_free()
        in_threads(sqlite_database.agents.list)
        turn += 1
    assert turn > 5


def test_a_failed_close_blocks_no_later_read(sqlite_path: Path, children: Children) -> None:
    """If SQLite can't close a connection, because the application uses its own cursor, later reads work."""
    printed = children.run(
        BEGIN
        + """
import apsw
database = Database.open(path)
with database._engine.connect() as connection:
    cursor = apsw.Cursor(connection.connection.driver_connection)
    cursor.execute("SELECT 1 UNION SELECT 2")
print(len(database.agents.list()))
print_whether_refused()
""",
        sqlite_path,
    )
    assert printed.split() == ["0", "refused"]


def test_forked_child_may_use_sqlite3(sqlite_path: Path, children: Children) -> None:
    """A forked child can use sqlite3 on the file, and its end drops no lock of the parent."""
    host = children.start(
        BEGIN
        + """
database = Database.open(path)
write(database, "before")
child = os.fork()
if child == 0:
    connection = sqlite3.connect(path)
    found = connection.execute("SELECT count(*) FROM agents").fetchone()[0]
    connection.close()
    os.close(os.open(path, os.O_RDONLY))
    os._exit(found)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
write(database, "after")
print_whether_refused()
sys.stdin.readline()
""",
        sqlite_path,
    )
    assert [host.stdout.readline().strip() for _ in range(2)] == ["1", "refused"]
    assert children.run(PLAIN_VISITOR, sqlite_path) == "after before"
    assert sqlite_path.with_name(sqlite_path.name + "-wal").exists()
    assert agents(sqlite_path, host) == {"after", "before"}


def test_every_descriptor_is_closed(sqlite_path: Path, children: Children) -> None:
    """After 50 openings, and after several databases on one file, every descriptor is closed."""
    printed = children.run(
        """
import os, sys, threading
from homeagent import Database
def open_descriptors():
    return len(os.listdir("/proc/self/fd"))
path = sys.argv[1]
def once():
    with Database.open(path) as database:
        database.agents.list()
        database.sweep()
once()
before = open_descriptors()
for _ in range(50):
    once()
several = [Database.open(path) for _ in range(5)]
for database in several:
    database.sweep()
for database in several:
    database.close()
threads = [threading.Thread(target=once) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
from homeagent.engine.sqlite import foreign_access
print(open_descriptors() - before, sum(guard.connections for guard in foreign_access._guards.values()))
""",
        sqlite_path,
    )
    assert printed == "0 0"


def test_the_last_database_on_a_file_keeps_the_locks(sqlite_path: Path, children: Children) -> None:
    """If one of several databases on a file is closed, the others keep the locks and the refusal."""
    host = children.start(
        BEGIN
        + """
first, second = Database.open(path), Database.open(path)
write(first, "a0")
write(second, "a1")
first.close()
os.close(os.open(path, os.O_RDONLY))
os.close(os.open(path + "-shm", os.O_RDONLY))
print_whether_refused()
sys.stdin.readline()
write(second, "a2")
print("written", flush=True)
sys.stdin.readline()
""",
        sqlite_path,
    )
    assert host.stdout.readline() == "refused\n"
    assert children.run(PLAIN_VISITOR, sqlite_path) == "a0 a1"
    host.stdin.write("go\n")
    host.stdin.flush()
    assert host.stdout.readline() == "written\n"
    assert children.run(PLAIN_VISITOR, sqlite_path) == "a0 a1 a2"
    assert agents(sqlite_path, host) == {"a0", "a1", "a2"}


def test_last_close_removes_the_wal(sqlite_path: Path, children: Children) -> None:
    """The last close still copies the WAL into the file and deletes the WAL, in spite of the locks."""
    with Database.open(sqlite_path) as database:
        add_agent(database)
        children.run(VISITOR, sqlite_path)
    assert [path.name for path in sqlite_path.parent.glob("*-wal")] == []
    assert children.run(PLAIN_VISITOR, sqlite_path) == "ada"


@pytest.mark.parametrize("noticed", [True, False], ids=["noticed", "unnoticed"])
@pytest.mark.parametrize("how", ["moved", "replaced", "overwritten"])
def test_another_file_is_not_written_at_close(
    sqlite_path: Path, sqlite_template: Path, children: Children, how: str, noticed: bool
) -> None:
    """If a database's file was moved, replaced or overwritten, a close changes neither the new file nor another WAL."""
    database = Database.open(sqlite_path)
    add_agent(database)
    for path in (sqlite_path, *(sqlite_path.with_name(sqlite_path.name + suffix) for suffix in ("-wal", "-shm"))):
        if how == "moved":
            path.rename(path.with_name("kept-" + path.name))
        elif how == "replaced" or path != sqlite_path:
            path.unlink()
    # Run in a separate process: in this process the test would drop the locks.
    children.run("import shutil, sys; shutil.copyfile(*sys.argv[1:])", sqlite_template, sqlite_path)
    sqlite_path.chmod(0o600)
    other = children.start(
        BEGIN
        + """
database = Database.open(path)
for number in range(20):
    write(database, f"n{number:02}")
print("written", flush=True)
sys.stdin.readline()
""",
        sqlite_path,
    )
    assert other.stdout.readline() == "written\n", other.communicate()[1]
    other.kill()  # the lock must not block a checkpoint; the process's commits are in its WAL
    other.wait()
    log = sqlite_path.with_name(sqlite_path.name + "-wal")
    before = sqlite_path.read_bytes(), log.read_bytes()
    if noticed:
        with pytest.raises(errors.DatabaseMovedError, match=r"moved|replaced"):
            add_agent(database, "lost")
    database.close()
    assert (sqlite_path.read_bytes(), log.read_bytes()) == before
    assert agents(sqlite_path) == {f"n{number:02}" for number in range(20)}
