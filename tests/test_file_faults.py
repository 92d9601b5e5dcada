"""The open database loses its file, its disk space or its descriptors: units are refused, and later work continues.

SQLite only: on a server, these files belong to the server.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from homeagent import AgentCreate, Database
from homeagent.engine.files import file_identity
from homeagent.engine.sqlite.engine import SQLiteEngine
from homeagent.errors import CorruptDatabaseError, DatabaseMovedError, DiskFullError, ReadOnlyError
from tests.conftest import add_agent, copy_template, dump

if TYPE_CHECKING:
    from tests.conftest import Children, FakeClock


@pytest.fixture(autouse=True)
def every_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the file in each unit instead of once in ten milliseconds."""
    monkeypatch.setattr(file_identity, "_INTERVAL", 0.0)


@pytest.fixture
def opened(sqlite_path: Path, clock: FakeClock) -> Iterator[Database]:
    """An open database with a row, a writer's connection and a reader's connection."""
    with Database.open(sqlite_path, clock=clock, busy_timeout=timedelta(seconds=5)) as database:
        add_agent(database, "before")
        assert names(database) == ["before"]
        yield database


def names(database: Database) -> list[str]:
    """Return the agents that a read-only unit reads."""
    with database.unit_of_work(read_only=True) as unit:
        return [agent.id for agent in unit.agents.list()]


def refused(database: Database, *words: str, kind: type[CorruptDatabaseError] = DatabaseMovedError) -> None:
    """Assert that a writer and a reader are both refused with the reason."""
    for act in (lambda: add_agent(database, "lost"), lambda: names(database)):
        with pytest.raises(kind) as refusal:
            act()
        for word in words:
            assert word in str(refusal.value)


# The file under the name is no longer the open file


def test_deleted_file_is_neither_written_nor_recreated(opened: Database, sqlite_path: Path) -> None:
    """If the file is deleted, units neither write nor create it again; if it is put back, units work again."""
    kept = sqlite_path.with_name("kept")
    sqlite_path.rename(kept)
    refused(opened, "deleted or moved away", str(sqlite_path))
    # A second reader needs a new connection, which would create an empty file.
    with pytest.raises(DatabaseMovedError):
        opened.run(lambda unit: names(opened), read_only=True)
    assert not sqlite_path.exists()
    kept.rename(sqlite_path)
    assert names(opened) == ["before"]
    add_agent(opened, "after")
    assert names(opened) == ["after", "before"]


@pytest.mark.parametrize("with_links", [True, False], ids=["in use", "idle"])
def test_replaced_file_is_left_alone(
    sqlite_path: Path, clock: FakeClock, with_links: bool, sqlite_template: Path
) -> None:
    """If another file replaces the database, units neither write nor read the file, and closing does not either."""
    with Database.open(sqlite_path, clock=clock) as database:
        if with_links:
            add_agent(database, "before")
        other = sqlite_path.with_name("other")
        shutil.copy(sqlite_template, other)
        other.replace(sqlite_path)
        before = sqlite_path.read_bytes()
        refused(database, "replaced by another file")
    assert sqlite_path.read_bytes() == before


def linked(path: Path) -> None:
    path.symlink_to(path.rename(path.with_name("kept")))


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (linked, "replaced by another file"),
        (lambda path: os.truncate(path, 0), "was emptied"),
        (lambda path: path.parent.rename(path.parent.with_name("kept")), "deleted or moved away"),
    ],
    ids=["symbolic link to the same file", "emptied in place", "moved directory"],
)
def test_changed_path_is_refused(
    opened: Database, sqlite_path: Path, act: Callable[[Path], object], words: str
) -> None:
    """If the path no longer leads to the whole open file, units neither write nor read; later they can work again."""
    act(sqlite_path)
    refused(opened, words)
    kept = sqlite_path.parent.with_name("kept")
    if kept.exists():
        kept.rename(sqlite_path.parent)
        add_agent(opened, "after")
    elif not sqlite_path.is_symlink():
        assert sqlite_path.stat().st_size == 0


@pytest.mark.parametrize("suffix", ["-wal", "-shm"])
@pytest.mark.parametrize("act", ["deleted", "replaced"])
def test_lost_wal_is_reported(opened: Database, sqlite_path: Path, suffix: str, act: str) -> None:
    """If the WAL or its index is gone, other processes see another state, so no further unit is acknowledged."""
    beside = sqlite_path.with_name(sqlite_path.name + suffix)
    content = beside.read_bytes()
    beside.unlink()
    if act == "replaced":
        beside.with_name("new").write_bytes(content)
        beside.with_name("new").rename(beside)
    refused(opened, suffix, "deleted or replaced")


# Another process deletes both files, commits to new files, and is killed: only the new WAL has these commits.
COMMIT_TO_A_NEW_LOG = """
import os, sys
from homeagent.engine.sqlite.dialect import connect
for suffix in ("-wal", "-shm"):
    os.unlink(sys.argv[1] + suffix)
raw = connect(sys.argv[1])
raw.execute("INSERT INTO agents (id, name, workspace_path, created_at) VALUES ('theirs', 'T', '/t', 1)")
os._exit(0)
"""


@pytest.mark.parametrize("idle", ["all", "no writer", "no reader"])
def test_the_commits_in_a_new_wal_are_kept(
    opened: Database, sqlite_path: Path, children: Children, caplog: pytest.LogCaptureFixture, idle: str
) -> None:
    """In any order of closing connections, homeagent does not write to the file and does not delete the new WAL."""
    engine = opened._engine
    if idle != "all":  # whether another connection was closed before makes no difference
        (engine.writers if idle == "no writer" else engine.readers).discard_free()
    children.run(COMMIT_TO_A_NEW_LOG, sqlite_path)
    for act in (lambda: names(opened), lambda: add_agent(opened)):
        with pytest.raises(DatabaseMovedError):
            act()
    engine.before_fork()  # closes all connections
    opened.close()
    assert [vars(record)["event"] for record in caplog.records] == ["closed_without_checkpoint"]
    with Database.open(sqlite_path) as database:
        assert "theirs" in names(database)


@pytest.mark.parametrize("durability", ["full", "normal"])
def test_unit_during_which_the_file_disappears_is_rolled_back(
    sqlite_path: Path, clock: FakeClock, durability: Any
) -> None:
    """If the file disappears during a unit, the unit is rolled back and not acknowledged."""
    kept = sqlite_path.with_name("kept")
    with Database.open(sqlite_path, clock=clock, durability=durability) as database:
        with pytest.raises(DatabaseMovedError), database.unit_of_work() as unit:
            unit.agents.create(AgentCreate(id="a", name="A", workspace_path="/a"))
            sqlite_path.rename(kept)
        kept.rename(sqlite_path)
        assert names(database) == []


def test_file_check_is_not_older_than_ten_milliseconds(
    sqlite_path: Path, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At `normal`, and for readers, a check covers the units of ten milliseconds; at `full` each commit checks."""
    monkeypatch.setattr(file_identity, "_INTERVAL", 0.01)
    looks = 0
    look = file_identity._status

    def counted(name: str) -> Any:
        nonlocal looks
        looks += name == str(sqlite_path)
        return look(name)

    monkeypatch.setattr(file_identity, "_status", counted)
    for durability, each in (("full", 1), ("normal", 0)):
        with Database.open(sqlite_path, clock=clock, durability=durability) as database:  # type: ignore[arg-type]
            now = 1000.0
            assert isinstance(database._engine, SQLiteEngine)
            database._engine.identity_check.monotonic = lambda: now  # noqa: B023
            names(database)
            add_agent(database, f"{durability}-first")
            looks = 0
            names(database)
            add_agent(database, durability)
            assert looks == each
            now += 0.011
            names(database)
            assert looks == each + 1


# No space left


def fill(database: Database, prefix: str, count: int = 10_000) -> int:
    """Add agents of a given size until the space is used up, and return their number."""
    for number in range(count):
        try:
            with database.unit_of_work() as unit:
                unit.agents.create(
                    AgentCreate(id=f"{prefix}{number}", name="x", workspace_path="/x", config={"pad": "x" * 20_000})
                )
                unit.agents.create(AgentCreate(id=f"{prefix}{number}-too", name="x", workspace_path="/x"))
        except DiskFullError:
            return number
    raise AssertionError("it is never full")


def verified(database: Database, prefix: str, count: int) -> None:
    """Assert that the file is sound and holds exactly the acknowledged rows."""
    with database.unit_of_work(read_only=True) as unit:
        found = {agent.id for agent in unit.agents.list(limit=1000) if agent.id.startswith(prefix)}
        wanted = {f"{prefix}{number}{suffix}" for number in range(count) for suffix in ("", "-too")}
        assert found == wanted
        assert unit._require_connection().execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def take_descriptors() -> list[int]:
    """Open all file descriptors up to a limit of 64."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    taken: list[int] = []
    with suppress(OSError):
        while True:
            taken.append(os.open("/dev/null", os.O_RDONLY))
    return taken


FULL = """
import os, resource, sys
from datetime import timedelta
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from homeagent import Database
from tests.test_file_faults import fill, take_descriptors, verified
path = Path(sys.argv[1])
"""


def test_limit_of_file_size(sqlite_path: Path, children: Children) -> None:
    """If a unit exceeds RLIMIT_FSIZE, DiskFullError rolls the whole unit back, and units within the limit work."""
    output = children.run(
        FULL
        + """
with Database.open(path) as database:
    resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, resource.RLIM_INFINITY))
    count = fill(database, "a")
    verified(database, "a", count)
    assert fill(database, "a0-") == 0
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    with database.unit_of_work() as unit:
        unit.agents.delete("a0")
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_000_000, resource.RLIM_INFINITY))
    more = fill(database, "b")
    verified(database, "b", more)
    print(count, more)
""",
        sqlite_path,
        Path(__file__).parent.parent,
    )
    count, more = map(int, output.split())
    assert count > 3
    assert more > count


def test_full_disk(small_disk: Path, sqlite_template: Path, clock: FakeClock) -> None:
    """If the disk is full, DiskFullError rolls a unit back; with space again, the same database works."""
    path = copy_template(sqlite_template, small_disk / "database")
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(400_000))
    with Database.open(path, clock=clock) as database:
        count = fill(database, "a")
        assert count > 0
        verified(database, "a", count)
        ballast.unlink()
        more = fill(database, "b")
        assert more > 0
    with Database.open(path, clock=clock) as database:
        verified(database, "a", count)
        verified(database, "b", more)


@pytest.mark.parametrize("exists", [True, False])
def test_opening_on_a_full_disk(small_disk: Path, sqlite_template: Path, exists: bool) -> None:
    """Without space for the WAL index or a new schema, opening raises DiskFullError; with space it succeeds."""
    path = small_disk / "homeagent.db"
    if exists:
        path = copy_template(sqlite_template, small_disk / "database")
        before = path.read_bytes()
    ballast = small_disk / "ballast"
    with pytest.raises(OSError, match="space"), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    with pytest.raises(DiskFullError) as refusal:
        Database.open(path)
    if exists:
        assert (refusal.value.__cause__, refusal.value.__context__) == (None, None)
        assert path.read_bytes() == before
    ballast.unlink()
    with Database.open(path) as database:
        add_agent(database, "first")


def test_read_only_disk(small_disk: Path, sqlite_template: Path, clock: FakeClock) -> None:
    """While the file system is read-only, as after a disk failure, a unit raises ReadOnlyError."""
    path = copy_template(sqlite_template, small_disk / "database")
    with Database.open(path, clock=clock) as database:
        add_agent(database, "before")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    try:
        with pytest.raises(ReadOnlyError), Database.open(path, clock=clock) as database:
            add_agent(database, "lost")
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    with Database.open(path, clock=clock) as database:
        add_agent(database, "after")
        assert names(database) == ["after", "before"]


# Out of descriptors


def test_too_many_open_files(sqlite_path: Path, children: Children) -> None:
    """Without a descriptor for a new connection a unit raises TooManyFilesError; with a descriptor it works."""
    children.run(
        FULL
        + """
from homeagent.errors import TooManyFilesError
from homeagent import AgentCreate
with Database.open(path) as database:
    taken = take_descriptors()
    for read_only in (False, True) * 3:
        try:
            with database.unit_of_work(read_only=read_only):
                raise SystemExit("it must not begin")
        except TooManyFilesError:
            pass
    for descriptor in taken:
        os.close(descriptor)
    database.agents.create(AgentCreate(id="after", name="A", workspace_path="/a"))
    with database.unit_of_work(read_only=True) as unit:
        assert unit.agents.get("after")
""",
        sqlite_path,
        Path(__file__).parent.parent,
    )


def test_few_descriptors_for_a_backup(sqlite_path: Path, children: Children) -> None:
    """With few descriptors a backup or a restore raises TooManyFilesError; a valid backup never counts as damaged."""
    printed = children.run(
        FULL
        + """
from homeagent.errors import TooManyFilesError
with Database.open(path) as database:
    backup = database.backup(f"{path}.backup")
    Database.restore(backup, f"{path}.restored")  # imports the modules
    taken = take_descriptors()
    for free in range(12):
        for call in (lambda: database.backup(f"{path}.{free}"), lambda: Database.restore(backup, f"{path}.r{free}")):
            try:
                call()
            except TooManyFilesError:
                print("refused")
        os.close(taken.pop())
    for descriptor in taken:
        os.close(descriptor)
""",
        sqlite_path,
        Path(__file__).parent.parent,
    )
    assert printed.count("refused") > 6


def test_database_marked_corrupt_is_refused(opened: Database) -> None:
    """If a database is marked corrupt, every unit is refused, and the refusal changes no byte."""
    before = dump(opened)
    assert isinstance(opened._engine, SQLiteEngine)
    opened._engine.identity_check.marked_corrupt = "it was found to be damaged"
    refused(opened, "damaged", kind=CorruptDatabaseError)
    opened._engine.identity_check.marked_corrupt = None
    assert dump(opened) == before
