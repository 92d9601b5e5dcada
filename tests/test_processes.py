"""Forks, signals, interrupts and the end of the interpreter, in real processes: a clear error or correct work, no hang.

SQLite only, except for tests of either engine: a second process can harm only the file and its locks.
"""

from __future__ import annotations

import pickle
import signal
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from homeagent import AgentCreate, Database
from homeagent.engine.files.locks import FileLock
from homeagent.engine.sqlite.in_use import in_use_path
from homeagent.errors import DatabaseBusyError

if TYPE_CHECKING:
    from tests.conftest import Children

# Start of every script; add() runs a unit, and names() returns the agents.
BEGIN = """
import atexit, os, signal, sys, threading, time, warnings
from datetime import timedelta
from homeagent import AgentCreate, Database
from homeagent.errors import DatabaseBusyError, DatabaseClosedError, HomeAgentError, UnitStateError
warnings.simplefilter("ignore")
target = sys.argv[1]
def create(unit, name):
    unit.agents.create(AgentCreate(id=name, name=name, workspace_path="/srv"))
def add(database, name):
    with database.unit_of_work() as unit:
        create(unit, name)
def names(database):
    with database.unit_of_work(read_only=True) as unit:
        return sorted(agent.id for agent in unit.agents.list(limit=100000))
def refused(*acts):
    count = 0
    for act in acts:
        try:
            act()
        except DatabaseClosedError:
            count += 1
    return count
def in_child(act):
    "Return the exit status of a forked child, which is the number that the function returns."
    child = os.fork()
    if not child:
        signal.alarm(30)  # a child that hangs is killed, and shows in its status
        os._exit(act())
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
def load_until(stop, work, threads):
    "Start threads, each of which calls the function with new names until the event is set."
    def load(number):
        count = 0
        while not stop.is_set():
            work(f"t{number}-{count}")
            count += 1
    started = [threading.Thread(target=load, args=(number,)) for number in range(threads)]
    for thread in started:
        thread.start()
    return started
"""


def names(path: Path | str) -> list[str]:
    """Return the agents in a database, opened for this call, and assert that the database is sound."""
    with Database.open(path) as database, database.unit_of_work(read_only=True) as unit:
        if database._engine.dialect_name == "sqlite":
            assert unit._require_connection().execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        return sorted(agent.id for agent in unit.agents.list(limit=100_000))


@pytest.mark.parametrize("orm", [False, True], ids=["stores", "ORM session"])
def test_fork_in_the_middle_of_a_unit(target: str, children: Children, orm: bool) -> None:
    """If a process forks in a unit, the child is refused every use of the unit and its end (either engine)."""
    script = """
database = Database.open(target)
with database.unit_of_work() as unit:
    create(unit, "before-fork")
    session = unit.session if orm else None
    def use():
        global database, unit, session
        from sqlmodel import select
        from homeagent import Agent
        count = refused(
            lambda: unit.agents.get("before-fork"),
            lambda: create(unit, "child"),
            lambda: unit.agents.delete("before-fork"),
            lambda: unit.savepoint().__enter__(),
            lambda: unit.session.exec(select(Agent)).all(),
            lambda: add(database, "child"),
            lambda: names(database),
            lambda: unit.__exit__(None, None, None),
        )
        database.close()
        del database, unit, session
        return count
    print(in_child(use))
    create(unit, "after-fork")
print(*names(database))
database.close()
"""
    assert children.run(BEGIN + f"orm = {orm}" + script, target).split() == ["8", "after-fork", "before-fork"]
    assert names(target) == ["after-fork", "before-fork"]


def test_fork_while_other_threads_are_busy(target: str, children: Children) -> None:
    """If another thread holds a lock at the fork, the child is refused at once, without waiting."""
    script = """
database = Database.open(target)
stop = threading.Event()
def work(name):
    database.run(lambda unit: create(unit, name))
    names(database)
def use():
    count = refused(
        lambda: add(database, "lost"),
        lambda: names(database),
        lambda: database.run(lambda unit: None),
        database.sweep,
        database.sweeper,
        database.doctor,
        lambda: database.backup(target + ".backup"),
    )
    database.close()
    return count
threads = load_until(stop, work, threads=4)
for _ in range(15):
    time.sleep(0.005)
    print(in_child(use))
stop.set()
for thread in threads:
    thread.join()
database.close()
"""
    assert children.run(BEGIN + script, target).split() == ["7"] * 15
    assert "lost" not in names(target)


@pytest.mark.parametrize("failing", ["discard_free", "after_fork_in_child"])
def test_an_error_in_a_fork_hook(sqlite_path: Path, tmp_path: Path, children: Children, failing: str) -> None:
    """If the fork hook of a database fails, the child refuses every database, and the parent uses all of them.

    SQLite only: the hooks are the same for both engines.
    """
    script = """
from homeagent.engine.sqlite.engine import SQLiteEngine
others = (f"{sys.argv[2]}/{number}.db" for number in range(2))
databases = [Database.open(path, busy_timeout=timedelta(seconds=3)) for path in (target, *others)]
for database in databases:
    add(database, "before")
told = []
sys.unraisablehook = lambda what: told.append(what.exc_type is MemoryError)
real = getattr(SQLiteEngine, failing)
def fail(engine):
    if engine is databases[1]._engine:
        raise MemoryError
    real(engine)
setattr(SQLiteEngine, failing, fail)
print(in_child(lambda: refused(*(lambda d=d: add(d, "lost") for d in databases)) + 10 * (told != [True])))
for database in databases:
    add(database, "after")
print(*names(databases[1]))
for database in databases:
    database.close()
"""
    printed = children.run(BEGIN + f"failing = {failing!r}" + script, sqlite_path, tmp_path / "others")
    assert printed.split() == ["3", "after", "before"]


def test_child_that_outlives_the_parent_s_database(sqlite_path: Path, children: Children) -> None:
    """If a child outlives the parent's database, its end does not delete the WAL of a later process."""
    script = """
database = Database.open(target)
add(database, "before")
names(database)
read, write = os.pipe()
child = os.fork()
if not child:
    os.read(read, 1)
    del database
    sys.exit(0)  # frees all that is left, unlike os._exit
database.close()
second = os.fork()
if not second:
    later = Database.open(target)
    add(later, "in the log")
    os.kill(os.getpid(), signal.SIGKILL)  # a crash: what was acknowledged is in the log alone
os.waitpid(second, 0)
log = os.stat(target + "-wal").st_size
os.write(write, b"x")
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
print(log > 0, os.stat(target + "-wal").st_size == log)
"""
    assert children.run(BEGIN + script, sqlite_path).split() == ["True", "True"]
    assert names(sqlite_path) == ["before", "in the log"]


def test_child_that_works_on_when_the_parent_ends(sqlite_path: Path, children: Children) -> None:
    """If a child opens the file itself, it holds separate locks, and the parent's end does not delete the WAL.

    SQLite only: a server manages its locks.
    """
    script = """
database = Database.open(target)
add(database, "before")
names(database)
to_child, to_parent = os.pipe(), os.pipe()
child = os.fork()
if not child:
    own = Database.open(target)
    add(own, "first")
    os.write(to_parent[1], b"x")
    os.read(to_child[0], 1)
    for count in range(20):
        add(own, f"later-{count}")
    os.kill(os.getpid(), signal.SIGKILL)
os.read(to_parent[0], 1)
database.close()
os.write(to_child[1], b"x")
os.waitpid(child, 0)
"""
    children.run(BEGIN + script, sqlite_path)
    assert set(names(sqlite_path)) == {"before", "first", *(f"later-{count}" for count in range(20))}


def test_a_closed_connection_does_not_count_at_a_fork(sqlite_path: Path, children: Children) -> None:
    """If a unit is open at the fork, opening the file in the child raises and names the remedy; otherwise it opens.

    A remaining reference to a closed connection makes no difference. SQLite only: a server manages its locks.
    """
    script = """
from homeagent.errors import DatabaseError
database = Database.open(target)
add(database, "before")
with database.unit_of_work() as unit:
    remembered = unit._require_connection()
database._engine.discard_free()
def use():
    try:
        add(Database.open(target), "child")
    except DatabaseError as error:
        return 7 if "spawn" in str(error) else 8
    return 0
for read_only in (True, False):
    with database.unit_of_work(read_only=read_only):
        print(in_child(use))
print(in_child(use))
print(*names(database))
database.close()
"""
    assert children.run(BEGIN + script, sqlite_path).split() == ["7", "7", "0", "before", "child"]


def test_forks_under_load(sqlite_path: Path, tmp_path: Path, children: Children) -> None:
    """If a process forks under load, the child works on the file or is refused, and keeps every acknowledged row.

    SQLite only: a server manages its locks.
    """
    ledger = tmp_path / "ledger"
    script = """
from homeagent.errors import DatabaseError
database = Database.open(target)
stop = threading.Event()
def work(name):
    add(database, name)
    time.sleep(0.002)
def use():
    try:
        own = Database.open(target)
    except DatabaseError:
        return 1
    for each in range(5):
        add(own, f"c{number}-{each}")
        os.write(ledger, f"c{number}-{each}\\n".encode())
    return 0
ledger = os.open(sys.argv[2], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
threads = load_until(stop, work, threads=2)
for number in range(20):
    if number == 19:
        stop.set()
        for thread in threads:
            thread.join()
    print(in_child(use))
database.close()
"""
    codes = children.run(BEGIN + script, sqlite_path, ledger).split()
    assert set(codes) <= {"0", "1"}
    # The last child was forked while no unit was open.
    assert codes[-1] == "0"
    told = ledger.read_text().split()
    assert len(told) == 5 * codes.count("0")
    assert set(told) <= set(names(sqlite_path))


@pytest.mark.parametrize(
    "method", ["fork", *(pytest.param(method, marks=pytest.mark.slow) for method in ("forkserver", "spawn"))]
)
def test_multiprocessing(tmp_path: Path, sqlite_path: Path, children: Children, method: str) -> None:
    """With each start method, the processes of a pool open the database by its path."""
    script = tmp_path / "pooled.py"
    script.write_text(
        BEGIN
        + """
import multiprocessing
def work(number):
    with Database.open(target) as own:
        for each in range(5):
            own.run(lambda unit: create(unit, f"{number}-{each}"))
    return number
if __name__ == "__main__":
    database = Database.open(target)
    add(database, "parent")
    with multiprocessing.get_context(sys.argv[2]).Pool(2) as pool:
        print(sum(pool.map(work, range(6))))
    print(len(names(database)))
    database.close()
"""
    )
    run = f"import runpy, sys; sys.argv[0] = {str(script)!r}; runpy.run_path({str(script)!r}, run_name='__main__')"
    if method != "fork":
        # These start methods import the script by its name.
        run = f"import os, sys; os.execv(sys.executable, [sys.executable, {str(script)!r}, *sys.argv[1:]])"
    assert children.run(run, sqlite_path, method).split() == ["15", "31"]


def test_database_can_not_be_pickled(sqlite_database: Database) -> None:
    """If a database is pickled, the error advises to pass the target to the other process."""
    with pytest.raises(TypeError, match="open the database in the other process"):
        pickle.dumps(sqlite_database)


# The end of the interpreter

ENDS = {
    "a daemon thread in the middle of units": """
def load():
    count = 0
    while True:
        database.run(lambda unit: create(unit, f"daemon-{count}"))
        count += 1
threading.Thread(target=load, daemon=True).start()
time.sleep(0.1)
""",
    "a thread that goes on after the main one": """
def load():
    time.sleep(0.1)
    for count in range(20):
        add(database, f"late-{count}")
    print(len(names(database)))
threading.Thread(target=load).start()
""",
    "a sweeper": """
database.sweeper(timedelta(milliseconds=1)).start()
time.sleep(0.05)
""",
    "an open unit": """
unit = database.unit_of_work().__enter__()
unit.session.connection()
create(unit, "unfinished")
""",
    "atexit": """
atexit.register(lambda: (add(database, "at exit"), print(*names(database)), database.close()))
""",
    "a generator that is not finished": """
def rows():
    with database.unit_of_work() as unit:
        create(unit, "unfinished")
        yield 1
generator = rows()
next(generator)
""",
}


@pytest.mark.parametrize(
    ("engine_name", "end"),
    [*(("sqlite", end) for end in ENDS), ("postgresql", "a sweeper"), ("postgresql", "an open unit")],
)
def test_interpreter_ends(target: str, children: Children, end: str) -> None:
    """If a process ends without closing its database, it ends soon and quietly, with whole units (either engine)."""
    process = children.start(BEGIN + 'database = Database.open(target)\nadd(database, "first")\n' + ENDS[end], target)
    output, complaints = process.communicate(timeout=30)
    assert (process.returncode, complaints) == (0, "")
    if end == "a thread that goes on after the main one":
        assert output.split() == ["21"]
    if end == "atexit":
        assert output.split() == ["at", "exit", "first"]
    found = names(target)
    assert "first" in found
    assert "unfinished" not in found


def test_dropped_generator_releases_the_write_lock(database: Database) -> None:
    """If a generator with an open unit is dropped, the unit ends, and the next writer gets the write lock."""

    def rows() -> object:
        with database.unit_of_work() as unit:
            unit.agents.create(AgentCreate(id="unfinished", name="A", workspace_path="/a"))
            yield unit

    generator = rows()
    next(generator)  # type: ignore[call-overload]  # a generator
    del generator
    with database.unit_of_work() as unit:
        assert unit.agents.find_by_id("unfinished") is None


# Signals
def test_signal_handler_that_uses_the_database(target: str, children: Children) -> None:
    """A signal handler in a unit may read; its write unit is refused, and no call hangs (either engine)."""
    script = """
database = Database.open(target, busy_timeout=timedelta(seconds=20))
answers = []
inside = False
def handler(number, frame):
    global inside
    if not inside:
        inside = True
        use()
        inside = False
def use():
    names(database)
    try:
        add(database, f"handler-{len(answers)}")
    except UnitStateError:
        answers.append("refused")
    except DatabaseBusyError:
        answers.append("busy")
    else:
        answers.append("added")
signal.signal(signal.SIGALRM, handler)
signal.setitimer(signal.ITIMER_REAL, 0.001, 0.0007)
began = time.monotonic()
count = 0
while time.monotonic() - began < 0.5 or len(answers) <= 20:
    add(database, f"main-{count}")
    names_now = database.run(lambda unit: unit.agents.find_by_id(f"main-{count}"), read_only=True)
    assert names_now is not None
    count += 1
signal.setitimer(signal.ITIMER_REAL, 0)
found = names(database)
print(answers.count("busy"), len(found) == count + answers.count("added"), "refused" in answers)
database.close()
"""
    assert children.run(BEGIN + script, target).split() == ["0", "True", "True"]


@pytest.mark.parametrize("way", ["block", "function"])
def test_interrupt_in_the_middle_of_a_unit(target: str, children: Children, way: str) -> None:
    """If Ctrl-C arrives in a unit, the unit is rolled back, and the write lock is free (either engine)."""
    script = """
# A shell starts what it runs in the background with this signal ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
database = Database.open(target, busy_timeout=timedelta(seconds=5))
def work(unit):
    create(unit, "interrupted")
    print("inside", flush=True)
    time.sleep(30)
for _ in range(3):
    try:
        if way == "function":
            database.run(work)
        else:
            with database.unit_of_work() as unit:
                work(unit)
    except KeyboardInterrupt:
        add(database, f"after-{len(names(database))}")
print(*names(database))
database.close()
"""
    process = children.start(BEGIN + f"way = {way!r}" + script, target)
    for _ in range(3):
        assert process.stdout.readline() == "inside\n"
        process.send_signal(signal.SIGINT)
    assert children.finish(process).split() == ["after-0", "after-1", "after-2"]


def test_a_running_unit_keeps_the_in_use_lock(sqlite_path: Path) -> None:
    """While a unit runs in a closed database, a restore finds the file in use, and a second open works. The end of the
    unit releases the lock.
    """
    database = Database.open(sqlite_path)
    lock = FileLock(in_use_path(sqlite_path), timeout=timedelta(0))
    with database.unit_of_work() as unit:
        unit.agents.list()
        database.close()
        with pytest.raises(DatabaseBusyError):
            lock.acquire()
        Database.open(sqlite_path).close()
    with lock:
        pass
