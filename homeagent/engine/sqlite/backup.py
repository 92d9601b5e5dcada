"""Write one backup. Read the source in one transaction. In WAL mode, the transaction does not block writers. Without
the transaction, another connection's write would restart SQLite's backup (https://sqlite.org/backup.html).
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import apsw

from homeagent.engine.driver_errors import sqlite_code, sqlite_error, translated
from homeagent.engine.files.database_file import OPEN_FLAGS, create_file, secure_sidecars, sidecars
from homeagent.engine.files.sync import fsync_directory, sync
from homeagent.engine.files.system_errors import explained, quoted
from homeagent.engine.sqlite.diagnosis import diagnosed_error, newest_backup_hint
from homeagent.engine.sqlite.dialect import connect
from homeagent.engine.sqlite.manifests import Kind, Manifest, manifest_path, write_manifest
from homeagent.errors import (
    BackupStoppedError,
    CorruptDatabaseError,
    DatabaseError,
    DiskFullError,
    HomeAgentError,
    InvalidArgumentError,
)
from homeagent.models import APPLICATION_VERSION_TABLE, TABLES, VERSION_TABLE

if TYPE_CHECKING:
    from homeagent.engine.sqlite.engine import SQLiteEngine

# Number of pages between two calls of the function `stop()`. Copying 2,000 pages takes some milliseconds.
_STEP = 2000
# SQLite calls the function `stop()` after this number of bytecode instructions.
_INSTRUCTIONS = 100_000

_STOPPED = "the backup was stopped before it was complete: the partial copy was removed"

Stop = Callable[[], bool]


def never_stop() -> bool:
    """Let a backup run to its end."""
    return False


@dataclass(frozen=True, slots=True)
class Contents:
    """The fields of a manifest that describe the content of the database."""

    rows: dict[str, int]
    schema_revision: str | None
    application_revision: str | None
    epoch: int | None
    schema_version: int = field(compare=False)


def backup_name(database: Path, revision: str, taken_at: datetime) -> str:
    """Return the file name of a backup. For one revision, sorting the names also sorts the backups by time."""
    return f"{database.name}.{revision}-{taken_at.strftime('%Y%m%dT%H%M%S%fZ')}.backup"


def write_backup(
    engine: SQLiteEngine,
    target: Path,
    *,
    partial: Path,
    taken_at: datetime,
    kind: Kind,
    replace: bool = False,
    stop: Stop = never_stop,
) -> Manifest:
    """Copy an open database, and write the copy's manifest. The copy is in rollback mode and needs no WAL. The argument
    `partial=` is the path of the unfinished copy. After the verification, rename the copy to `target=`. Both paths must
    be in the same directory. If `stop()` returns True, raise BackupStoppedError.
    """
    if not replace and os.path.lexists(target):
        raise InvalidArgumentError(f"{quoted(target)} exists already: name another file, or replace the old one")
    if not create_file(partial, database=engine.path):
        raise DatabaseError(f"{quoted(partial)} is in the way of a backup: remove the file")
    try:
        # Refuse another user's sidecar files. SQLite would apply another user's journal to the copy.
        secure_sidecars(partial)
        contents = _copy(engine, partial, stop, needs_schema=kind != "adoption")
        manifest = _describe(partial, engine.path, contents, taken_at=taken_at, kind=kind, stop=stop)
        write_manifest(partial, manifest)
        _put_in_place(partial, target, replace=replace)
    except BaseException:
        discard(partial)
        raise
    return manifest


def _put_in_place(partial: Path, target: Path, *, replace: bool) -> None:
    # Sync after each step. After a power cut, each backup must match its manifest.
    with explained("put a backup in place at", target):
        if replace:
            manifest_path(target).unlink(missing_ok=True)
            fsync_directory(target.parent)
        elif os.path.lexists(target):
            raise InvalidArgumentError(f"{quoted(target)} was created during the backup: name another file")
        partial.replace(target)
        try:
            fsync_directory(target.parent)
            manifest_path(partial).replace(manifest_path(target))
            fsync_directory(target.parent)
        except BaseException:
            # Keep a copy that has replaced an older backup.
            if not replace:
                discard(target)
            raise


def discard(partial: Path) -> None:
    """Remove a failed copy, its manifest and its sidecar files."""
    for path in (partial, manifest_path(partial), *sidecars(partial)):
        try:
            path.unlink(missing_ok=True)
        except OSError:
            # In a read-only directory, truncate the file. An empty file is not a valid backup.
            with suppress(OSError):
                os.truncate(path, 0)


def read_contents(raw: Any) -> Contents:
    """Read the row counts, revisions and epoch. All values must come from one snapshot. If another connection can
    write, begin a transaction before the call.
    """
    query = "SELECT name, replace(name, '\"', '\"\"') FROM sqlite_master WHERE type = 'table' ORDER BY name"
    escaped = {str(name): str(text) for name, text in raw.execute(query) if not str(name).startswith("sqlite_")}

    def column(name: str, table: str) -> list[Any]:
        query = f"SELECT {name} FROM {table} ORDER BY {name}"  # noqa: S608  constants
        return [value for (value,) in raw.execute(query)] if table in escaped else []

    versions, epochs = column("version_num", VERSION_TABLE), column("epoch", "store")
    return Contents(
        rows={
            name: int(raw.execute(f'SELECT count(*) FROM "{text}"').get)  # noqa: S608  a name, escaped
            for name, text in escaped.items()
            if name != VERSION_TABLE
        },
        schema_revision=str(versions[0]) if len(versions) == 1 else None,
        application_revision=", ".join(map(str, column("version_num", APPLICATION_VERSION_TABLE))) or None,
        epoch=int(epochs[0]) if len(epochs) == 1 else None,
        schema_version=int(raw.execute("PRAGMA schema_version").get),
    )


def find_damage(raw: Any) -> str | None:
    """Return the first problem that SQLite finds in the database, or None. Ignore broken references of the
    application's tables, which the doctor reports.
    """
    verdict = str(raw.execute("PRAGMA integrity_check(1)").get)
    if verdict != "ok":
        return verdict.splitlines()[0]
    children = {str(row[0]) for row in raw.execute("PRAGMA foreign_key_check").fetchall()}
    return None if children.isdisjoint(TABLES) else "a row refers to a row that does not exist"


def _copy(engine: SQLiteEngine, partial: Path, stop: Stop, *, needs_schema: bool) -> Contents:
    with (
        _explained_copy(engine, partial, stop),
        engine.driver_connection() as source,
        closing(connect(str(partial))) as copy,
    ):
        for raw in (source, copy):
            raw.set_progress_handler(stop, _INSTRUCTIONS)
        source.execute("PRAGMA query_only=ON")
        # Skip the journal and the syncs, because homeagent removes an incomplete copy.
        copy.execute("PRAGMA journal_mode=OFF")
        copy.execute("PRAGMA synchronous=OFF")
        source.execute("BEGIN")
        contents = read_contents(source)
        require_room(source.pragma("page_count") * source.pragma("page_size"), partial.parent)
        with copy.backup("main", source, "main") as steps:
            while not steps.done:
                steps.step(_STEP)
                _raise_if_stopped(stop)
        source.execute("ROLLBACK")
        # The header of the copy still says WAL mode.
        copy.execute("PRAGMA journal_mode=DELETE")
        _verify(engine.path, copy, contents, needs_schema=needs_schema)
    return contents


def _raise_if_stopped(stop: Stop) -> None:
    """Raise BackupStoppedError if `stop()` returns True. After the error, the caller must remove the partial copy."""
    if stop():
        raise BackupStoppedError(_STOPPED)


def _verify(source: Path, copy: Any, expected: Contents, *, needs_schema: bool) -> None:
    problem = find_damage(copy)
    if problem is None and read_contents(copy) != expected:
        problem = "the row counts of the copy and of the snapshot differ"
    if problem is None and needs_schema and expected.schema_revision is None:
        problem = "the schema is missing"
    if problem is None:
        return
    raise CorruptDatabaseError(
        f"{quoted(source)} is damaged ({problem}), so the copy was removed: stop, move the file and its -wal and -shm "
        f"to another directory, and restore the newest good backup; {newest_backup_hint(source)}"
    )


def _describe(
    partial: Path, database: Path, contents: Contents, *, taken_at: datetime, kind: Kind, stop: Stop
) -> Manifest:
    """Sync the copy, read every byte back, and return the manifest."""
    digest = hashlib.sha256()
    # Do not call this function while SQLite has the copy open. Closing the file would release SQLite's locks.
    with explained("read back a backup at", partial), os.fdopen(os.open(partial, os.O_RDWR | OPEN_FLAGS), "rb") as file:
        sync(file.fileno())
        while block := file.read(1 << 20):
            digest.update(block)
            _raise_if_stopped(stop)
        size = file.tell()
    # Import `homeagent.version` lazily, because the import is slow.
    from homeagent.version import __version__

    return Manifest(
        kind=kind,
        database=str(database),
        taken_at=taken_at,
        size=size,
        sha256=digest.hexdigest(),
        package_version=__version__,
        **asdict(contents),
    )


def require_room(size: int, directory: Path, what: str = "a backup") -> None:
    """Raise DiskFullError if a copy would fill the disk. A full disk can also stop the writes of a database."""
    with explained("check the free space of", directory):
        free = shutil.disk_usage(directory).free
    if free < size:
        raise DiskFullError(
            f"there is no room for {what} in {quoted(directory)}: it takes {size:,} bytes and {free:,} are free. "
            "Free some space, or name another directory"
        )


@contextmanager
def _explained_copy(engine: SQLiteEngine, partial: Path, stop: Stop) -> Iterator[None]:
    def translate(error: BaseException) -> HomeAgentError:
        code = sqlite_code(error)
        if code == apsw.SQLITE_INTERRUPT:
            return BackupStoppedError(_STOPPED)  # only the function `stop()` interrupts a statement
        translation = sqlite_error(error)
        if code in (apsw.SQLITE_IOERR, apsw.SQLITE_CANTOPEN):
            translation = diagnosed_error(error, partial, find_moved=lambda: None)
        if isinstance(translation, DiskFullError):
            return DiskFullError(
                f"there was no room for a backup in {quoted(partial.parent)}, or the file exceeds a size limit: free "
                "some space or raise the limit. The partial copy was removed"
            )
        return translation

    with translated(engine.driver_errors, translate):
        yield
