"""If the path names another application's file by mistake, homeagent refuses the file and changes no file there.

SQLite only: on PostgreSQL the server owns the files.
"""

from __future__ import annotations

import stat
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from homeagent import Database, diagnose
from homeagent.engine.files.locks import FileLock
from homeagent.engine.sqlite.dialect import connect
from homeagent.engine.sqlite.in_use import in_use_path, new_path
from homeagent.engine.sqlite.manifests import PARTIAL
from homeagent.errors import CorruptDatabaseError, DatabaseError, ForeignDatabaseError, HomeAgentError
from homeagent.migrations import REVISION
from tests.conftest import FakeClock
from tests.engine.files.conftest import snapshot


def sqlite(path: Path, *statements: str) -> None:
    """Create another application's SQLite file."""
    with closing(connect(str(path))) as raw:
        for statement in ("CREATE TABLE t (i)", *statements):
            raw.execute(statement)


def logged(path: Path) -> None:
    """Create another application's database in WAL mode, with its WAL and index next to it."""
    sqlite(path, "PRAGMA journal_mode=WAL")
    path.with_name("other.db-wal").write_bytes(b"")
    path.with_name("other.db-shm").write_bytes(bytes(32768))


FOREIGN: dict[str, Callable[[Path], object]] = {
    "sqlite": sqlite,
    "sqlite with a log": logged,
    "picture": lambda path: path.write_bytes(b"\xff\xd8" * 5000),
    "short text": lambda path: path.write_text("dear diary"),
}


@pytest.fixture(params=FOREIGN)
def other(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A file of another application, next to files whose names resemble the names of homeagent's files."""
    directory = tmp_path / "theirs"
    directory.mkdir(0o755)
    path = directory / "other.db"
    FOREIGN[request.param](path)
    for name in (".lock", ".bak"):
        path.with_name(f"other.db{name}").write_text("")
    for each in directory.iterdir():
        each.chmod(0o664)
    return path


CALLS: dict[str, Callable[[Path, Path], Any]] = {
    "open": lambda other, ours: Database.open(other),
    "open, migrate=False": lambda other, ours: Database.open(other, migrate=False),
    "begin_epoch": lambda other, ours: Database.begin_epoch(other),
    "restore to it": lambda other, ours: Database.restore(ours, other),
    "restore it": lambda other, ours: Database.restore(other, ours.with_name("restored.db")),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_foreign_file_stays_as_it_was(other: Path, sqlite_path: Path, call: str) -> None:
    """If a foreign file is refused, no mode, byte or name changes in its directory."""
    before, ours = snapshot(other.parent), snapshot(sqlite_path.parent)
    with pytest.raises((ForeignDatabaseError, CorruptDatabaseError)):
        CALLS[call](other, sqlite_path)
    assert snapshot(other.parent) == before
    assert snapshot(sqlite_path.parent) == ours


def test_the_doctor_repairs_no_foreign_file(other: Path, clock: FakeClock) -> None:
    """If a file is not homeagent's, `--fix` changes neither its mode nor the modes of the files next to it."""
    stale = other.with_name("other.db.copy.partial")
    stale.write_text("")
    before = snapshot(other.parent)
    clock.advance(days=10_000)
    assert diagnose(other, clock=clock, fix=True).repairs == []
    assert snapshot(other.parent) == before


def test_an_empty_file_stays_as_it_was(tmp_path: Path) -> None:
    """If a file is empty, the file stays unchanged until homeagent creates a database there."""
    path = tmp_path / "empty.db"
    path.touch()
    path.chmod(0o664)
    before = snapshot(tmp_path)
    with pytest.raises(DatabaseError):
        Database.open(path, migrate=False)
    assert snapshot(tmp_path) == before
    Database.open(path).close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_failed_backup_leaves_the_file_that_it_would_replace(other: Path, sqlite_database: Database) -> None:
    """If a backup that would replace a file fails, the file stays unchanged, and only the lock file is new."""
    other.with_name(f".other.db{PARTIAL}").mkdir()
    before = snapshot(other.parent)
    with pytest.raises(HomeAgentError):
        sqlite_database.backup(other, replace=True)
    after = snapshot(other.parent)
    del after[".homeagent-backups.lock"]
    assert after == before


def test_a_damaged_file_is_replaced_by_an_unfinished_restore(sqlite_path: Path) -> None:
    """A damaged file is refused without new files next to it, unless opening completes an unfinished restore."""
    whole, content = new_path(sqlite_path, "1"), sqlite_path.read_bytes()
    sqlite_path.write_bytes(b"\xff" * 8192)
    for open_or_begin in (Database.open, Database.begin_epoch):
        with pytest.raises(CorruptDatabaseError):
            open_or_begin(sqlite_path)
        assert [path.name for path in sqlite_path.parent.iterdir()] == ["homeagent.db"]
    whole.write_bytes(content)
    whole.chmod(0o600)
    with FileLock(in_use_path(sqlite_path)) as lock:
        lock.write_marker("swap 1 2 end")
    with Database.open(sqlite_path) as database:
        assert database.status().schema_revision == REVISION
