"""One backup: copied in one snapshot while others write, verified, and put in its place whole or not at all.

SQLite's online backup starts over when another connection writes between two of its steps
(https://sqlite.org/backup.html), so that under constant writes it may never end. In write-ahead-log mode a reader
holds nobody up: the source stays in one read transaction for all of the steps, and each step copies from that.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import apsw

from homeagent.engine.driver_errors import sqlite_code, sqlite_error, translated
from homeagent.engine.files.database_file import OPEN_FLAGS, create_file, secure_sidecars, sidecars
from homeagent.engine.files.sync import fsync_directory, sync
from homeagent.engine.files.system_errors import explained, quoted
from homeagent.engine.sqlite.dialect import connect
from homeagent.engine.sqlite.manifests import Manifest, manifest_path, write_manifest
from homeagent.errors import (
    BackupStoppedError,
    CorruptDatabaseError,
    DatabaseError,
    DiskFullError,
    HomeAgentError,
    InvalidArgumentError,
)

if TYPE_CHECKING:
    from homeagent.engine.sqlite.engine import SQLiteEngine

__all__ = ["Contents", "backup_name", "discard", "read_contents", "write_backup"]

_STEP = 2000  # pages between two looks at whether to stop: some milliseconds
_INSTRUCTIONS = 100_000  # of SQLite's virtual machine, likewise

# What a copy that could not grow is made to grow by, to find out why: one more of SQLite's largest pages.
_PROBE, _PROBES = 4096, 16

Stop = Callable[[], bool]


@dataclass(frozen=True, slots=True)
class Contents:
    """What a database holds, as far as a manifest tells.

    Attributes:
        rows: how many rows each table has, by name.
        revision: what the version table says; None without one.
        epoch: the store's; None where its schema has none yet.
    """

    rows: dict[str, int]
    revision: str | None
    epoch: int | None


def backup_name(database: Path, revision: str, taken_at: datetime) -> str:
    """Return what a backup in a directory is called: names of one revision sort by time."""
    return f"{database.name}.{revision}-{taken_at.strftime('%Y%m%dT%H%M%S%fZ')}.backup"


def write_backup(
    engine: SQLiteEngine,
    target: Path,
    *,
    partial: Path,
    version_table: str,
    taken_at: datetime,
    kind: Literal["backup", "upgrade"],
    replace: bool = False,
    stop: Stop = lambda: False,
) -> Manifest:
    """Copy an open database to a file of its own, and its manifest beside it.

    The copy needs no log of its own: it is in rollback mode, so that it can be read where nothing can be written.

    Args:
        engine: on the database.
        target: the copy. Its directory exists.
        partial: its name until it is whole and verified; in the same directory.
        version_table: which table has the schema's revision.
        taken_at: for the manifest.
        kind: likewise.
        replace: whether what is there already is replaced.
        stop: asked now and then; where it answers True, there will be no backup.

    Raises:
        InvalidArgumentError: `target` exists, and is not to be replaced.
        CorruptDatabaseError: the database is damaged. There is no backup of it, since one would pass for good.
        DiskFullError, ReadOnlyError, DatabaseError: the copy can't be written.
        BackupStoppedError: `stop` answered True.
    """
    if not replace and os.path.lexists(target):
        raise InvalidArgumentError(f"{quoted(target)} exists already: name another file, or ask for it to be replaced")
    if not create_file(partial, database=engine.path):
        raise DatabaseError(f"{quoted(partial)} is in the way of a backup: remove it")
    try:
        secure_sidecars(partial)  # before SQLite would replay a journal that another user put there
        contents = _copy(engine, partial, version_table, stop)
        manifest = _describe(partial, engine.path, contents, taken_at=taken_at, kind=kind, stop=stop)
        write_manifest(partial, manifest)
        _put_in_place(partial, target, replace=replace)
    except BaseException:
        discard(partial)
        raise
    return manifest


def _put_in_place(partial: Path, target: Path, *, replace: bool) -> None:
    # A file that is called a backup must be one, and a manifest must never speak of another file: so each of these
    # steps is on the disk before the next one is taken.
    with explained("put a backup in place at", target):
        if replace:
            manifest_path(target).unlink(missing_ok=True)
            fsync_directory(target.parent)
        elif os.path.lexists(target):
            raise InvalidArgumentError(f"{quoted(target)} was made by another program meanwhile: name another file")
        partial.replace(target)
        try:
            fsync_directory(target.parent)
            manifest_path(partial).replace(manifest_path(target))
            fsync_directory(target.parent)
        except BaseException:
            # If it replaced a backup, that one is gone, and this copy is the only one.
            if not replace:
                discard(target)
            raise


def discard(partial: Path) -> None:
    """Remove what is left of a copy that came to nothing, and what SQLite keeps beside it."""
    for path in (partial, manifest_path(partial), *sidecars(partial)):
        try:
            path.unlink(missing_ok=True)
        except OSError:
            # Its directory may not be written any more. Then at least nothing in it can be taken for a database.
            with suppress(OSError):
                os.truncate(path, 0)


def read_contents(raw: Any, version_table: str) -> Contents:
    """Count the rows of a database, over a bare connection that is in a transaction, or that nobody else writes.

    Args:
        raw: the driver's connection.
        version_table: which table has the schema's revision; it is not counted.
    """
    tables = [
        str(row[0])
        for row in raw.execute(
            "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite~_%' ESCAPE '~' ORDER BY name"
        )
    ]
    quoted_names = {name: name.replace('"', '""') for name in tables if name != version_table}
    rows = {
        name: int(raw.execute(f'SELECT count(*) FROM "{escaped}"').get)  # noqa: S608  a name, escaped
        for name, escaped in quoted_names.items()
    }
    revisions = raw.execute(f"SELECT version_num FROM {version_table}").fetchall() if version_table in tables else []  # noqa: S608  a constant
    epochs = raw.execute("SELECT epoch FROM store").fetchall() if "store" in tables else []
    return Contents(
        rows=rows,
        revision=str(revisions[0][0]) if len(revisions) == 1 else None,
        epoch=int(epochs[0][0]) if len(epochs) == 1 else None,
    )


def _copy(engine: SQLiteEngine, partial: Path, version_table: str, stop: Stop) -> Contents:
    with (
        _explained_copy(engine, partial, stop),
        closing(engine.open_source()) as source,
        closing(connect(str(partial))) as copy,
    ):
        for raw in (source, copy):
            raw.set_progress_handler(stop, _INSTRUCTIONS)
        source.execute("PRAGMA query_only=ON")
        # Whatever happens to the copy before it is whole, it is thrown away.
        copy.execute("PRAGMA journal_mode=OFF")
        copy.execute("PRAGMA synchronous=OFF")
        source.execute("BEGIN")
        contents = read_contents(source, version_table)
        _require_room(_size(source), partial.parent)
        with copy.backup("main", source, "main") as steps:
            while not steps.done:
                steps.step(_STEP)
                _proceed(stop)
        source.execute("ROLLBACK")
        # The copy of a file with a write-ahead log says that it has one too.
        copy.execute("PRAGMA journal_mode=DELETE")
        _verify(engine.path, copy, contents, version_table)
    return contents


def _proceed(stop: Stop) -> None:
    if stop():
        raise _stopped()


def _stopped() -> BackupStoppedError:
    return BackupStoppedError("the backup was stopped before it was whole: nothing of it was kept")


def _verify(source: Path, copy: Any, expected: Contents, version_table: str) -> None:
    verdict = str(copy.execute("PRAGMA integrity_check(1)").get)
    if verdict != "ok":
        problem = verdict.splitlines()[0]
    elif copy.execute("PRAGMA foreign_key_check").fetchall():
        problem = "a row refers to one that is not there"
    elif read_contents(copy, version_table) != expected:
        problem = "a table has another number of rows than in the snapshot that was copied"
    elif expected.revision is None:
        problem = "it has lost its schema"
    else:
        return
    raise CorruptDatabaseError(
        f"{quoted(source)} is damaged ({problem}), so that a copy of it is no backup and none was kept: "
        "stop, keep it aside with its -wal and -shm, and restore the newest good backup"
    )


def _describe(
    partial: Path,
    database: Path,
    contents: Contents,
    *,
    taken_at: datetime,
    kind: Literal["backup", "upgrade"],
    stop: Stop,
) -> Manifest:
    """Sync the copy to the disk, and read back every byte of it."""
    digest = hashlib.sha256()
    # No connection has it open any more, or closing this descriptor would drop SQLite's locks.
    with explained("read back a backup at", partial), os.fdopen(os.open(partial, os.O_RDWR | OPEN_FLAGS), "rb") as file:
        sync(file.fileno())
        while block := file.read(1 << 20):
            digest.update(block)
            _proceed(stop)
        size = file.tell()
    # Not at the top: its import costs more than the rest of this module's.
    from homeagent.version import __version__

    return Manifest(
        kind=kind,
        database=str(database),
        taken_at=taken_at,
        schema_revision=contents.revision,
        epoch=contents.epoch,
        rows=contents.rows,
        size=size,
        sha256=digest.hexdigest(),
        package_version=__version__,
    )


def _require_room(size: int, directory: Path) -> None:
    # Asked before, since the directory may be on the database's own disk: a copy must not be what fills it.
    with explained("look for room in", directory):
        free = shutil.disk_usage(directory).free
    if free < size:
        raise DiskFullError(
            f"there is no room for a backup in {quoted(directory)}: it takes {size:,} bytes and {free:,} are "
            "free; free some space, or name another directory"
        )


def _size(source: Any) -> int:
    pages, page_size = (int(source.execute(f"PRAGMA {name}").get) for name in ("page_count", "page_size"))
    return pages * page_size


@contextmanager
def _explained_copy(engine: SQLiteEngine, partial: Path, stop: Stop) -> Iterator[None]:
    def fault(error: BaseException) -> HomeAgentError:
        code = sqlite_code(error)
        if stop() and code == apsw.SQLITE_INTERRUPT:
            return _stopped()
        if code in (apsw.SQLITE_FULL, apsw.SQLITE_IOERR):
            refused = _refused_growth(partial)
            if refused is not None:
                return refused
        return sqlite_error(error)

    with translated(engine.driver_errors, fault):
        yield


def _refused_growth(partial: Path) -> HomeAgentError | None:
    """Find out whether the copy may not grow, by making it grow: SQLite tells of any failed write alike."""
    try:
        descriptor = os.open(partial, os.O_WRONLY | OPEN_FLAGS)
        try:
            size = os.fstat(descriptor).st_size
            os.lseek(descriptor, max(size, 0), os.SEEK_SET)
            for _ in range(_PROBES):
                os.write(descriptor, b"\0" * _PROBE)
        finally:
            os.close(descriptor)
    except OSError as error:
        return DiskFullError(
            f"there was no room for a backup in {quoted(partial.parent)}, or its file may not grow so large "
            f"({os.strerror(error.errno or 0)}): free some space or raise the limit; nothing of it was kept"
        )
    return None
