"""Restore: a backup is checked, brought up to date and put in the place of the database, which is kept aside.

What was consumed, revoked or finished since the backup was taken is not in it. So a restore begins a new epoch, and
writes down when: the replay guard refuses what may have been consumed before that.
"""

from __future__ import annotations

import glob
import hashlib
import logging
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict
from sqlalchemy import URL, update

from homeagent.engine.backup import Contents, discard, read_contents
from homeagent.engine.directories import prepare_directory
from homeagent.engine.driver import choose_driver
from homeagent.engine.faults import sqlite_fault, translated
from homeagent.engine.files import (
    OPEN_FLAGS,
    create_descriptor,
    give_to_owner,
    judge_file,
    locate_file,
    secure_sidecars,
    sidecars,
)
from homeagent.engine.filesystems import refuse_network_filesystem
from homeagent.engine.locks import FileLock
from homeagent.engine.manifests import Manifest, read_manifest
from homeagent.engine.presence import alone, kept_from_sqlite, presence_path
from homeagent.engine.sqlite import APPLICATION_ID, SQLiteEngine, sidecar_lock
from homeagent.engine.swapping import aside_path, epoch_of_marker, new_path, swap_in
from homeagent.engine.syncing import fsync_directory, sync
from homeagent.engine.system_errors import explained, quoted
from homeagent.engine.target import resolve_target
from homeagent.errors import (
    CorruptDatabaseError,
    DatabaseBusyError,
    DatabaseError,
    DiskFullError,
    ForeignDatabaseError,
    HomeAgentError,
    InvalidArgumentError,
)
from homeagent.migrations import VERSION_TABLE, revision_of, upgrade_copy
from homeagent.models import DATA_TABLES, StoreRecord
from homeagent.models.types import check_duration, check_instant

if TYPE_CHECKING:
    from homeagent.clock import Clock

__all__ = ["RestoreReport", "restore"]

logger = logging.getLogger("homeagent")

_HEADER = b"SQLite format 3\0"
_HEADER_SIZE = 100
_WAL_FORMAT = b"\x02\x02"  # the read and write versions in a header: https://sqlite.org/fileformat2.html, section 1.3
_APPLICATION_ID = slice(68, 72)

_table: Any = StoreRecord.__table__


class RestoreReport(BaseModel):
    """What a restore did.

    Attributes:
        database: the file that holds the backup's data now.
        backup: where that came from; it is as it was.
        kept_aside: the database that was there before, with its -wal and -shm beside it under the same name; None
            where there was none.
        taken_at: when the backup was taken; None without a manifest.
        epoch: the store's epoch from now on.
        restored_at: when it began.
        upgraded_from: the schema revision of the backup, where it was an older one than this version's.
        schema_revision: the revision now.
        rows: how many rows each table holds.
    """

    model_config = ConfigDict(frozen=True)

    database: Path
    backup: Path
    kept_aside: Path | None
    taken_at: datetime | None
    epoch: int
    restored_at: datetime
    upgraded_from: str | None
    schema_revision: str
    rows: dict[str, int]


def restore(
    backup: str | os.PathLike[str],
    target: str | os.PathLike[str] | URL | None,
    *,
    clock: Clock,
    busy_timeout: timedelta,
) -> RestoreReport:
    """Put a backup in the place of a database that nobody has open, and keep what was there aside.

    Args:
        backup: the file. Its manifest beside it is believed; without one, SQLite's own checks have to do.
        target: which database, as `Database.open` takes it; it may be damaged, or absent.
        clock: tells when the new epoch begins. Set it right first: messages are refused by that instant.
        busy_timeout: how long to wait for who has the target open.

    Raises:
        InvalidArgumentError: the backup is absent or is the target itself, or the target is no file's name.
        DatabaseBusyError: somebody has the target open, or the backup.
        CorruptDatabaseError, ForeignDatabaseError, SchemaTooNewError: the backup is damaged, another application's,
            or of a newer version.
        ForeignDatabaseError: the target is another application's file.
        DatabaseError: anything else. The target is as it was, unless the last step itself failed: then whoever opens
            it next finishes that.
    """
    check_duration(busy_timeout, "busy_timeout", zero=True)
    database = _target(target)
    source = _source(backup, database)
    manifest = read_manifest(source)
    with _not_in_use(source):
        _look_at(source, manifest)
        prepare_directory(database.parent)
        refuse_network_filesystem(database)
        with alone(database, timeout=busy_timeout) as lock:
            marker = _marker(database, busy_timeout)
            _refuse_target(database, marker)
            known_epoch = max(epoch_of_marker(marker), _epoch(database))
            with kept_from_sqlite(database):
                there_was_one = os.path.lexists(database)
                restored_at = _now(clock, manifest)
                stamp = _free_stamp(database, restored_at)
                staged = _stage(source, manifest, database, stamp, restored_at=restored_at, known_epoch=known_epoch)
                swap_in(lock, database, stamp=stamp, epoch=staged.epoch, timeout=busy_timeout)
    logger.info(
        "%s was restored from %s: epoch %d begins",
        database,
        source,
        staged.epoch,
        extra={"event": "restored", "path": str(database), "backup": str(source), "epoch": staged.epoch},
    )
    return RestoreReport(
        database=database,
        backup=source,
        kept_aside=aside_path(database, stamp) if there_was_one else None,
        taken_at=None if manifest is None else manifest.taken_at,
        epoch=staged.epoch,
        restored_at=restored_at,
        upgraded_from=staged.upgraded_from,
        schema_revision=staged.revision,
        rows=staged.rows,
    )


# What is named


def _target(target: str | os.PathLike[str] | URL | None) -> Path:
    where = resolve_target(target)
    if where.url is not None:
        raise InvalidArgumentError(
            "a PostgreSQL database is restored with its own tools, pg_restore or a base backup and the archive of its "
            "write-ahead log; see docs/operations.md for what must follow"
        )
    if where.path is None:
        raise InvalidArgumentError("a temporary database ends when it is closed: name the file to restore to")
    return where.path


def _source(backup: str | os.PathLike[str], database: Path) -> Path:
    source = Path(os.path.realpath(locate_file(backup)))
    with explained("look at", source):
        try:
            status = source.stat()
        except FileNotFoundError:
            raise InvalidArgumentError(f"there is no {quoted(source)}: name the backup to restore") from None
    if not stat.S_ISREG(status.st_mode):
        raise InvalidArgumentError(f"{quoted(source)} is no file: name the backup to restore")
    if os.path.lexists(database) and source.samefile(database):
        raise InvalidArgumentError(f"{quoted(source)} is the database itself: name one of its backups")
    return source


@contextmanager
def _not_in_use(source: Path) -> Iterator[None]:
    """Refuse a file that is open anywhere, and keep ours from opening it while its bytes are read.

    Bytes are never read of a file that this process has open through SQLite: that would drop SQLite's locks.
    """
    lock = FileLock(presence_path(source), timeout=timedelta(0)) if os.path.lexists(presence_path(source)) else None
    try:
        if lock is not None:
            lock.acquire()
    except DatabaseBusyError:
        raise DatabaseBusyError(
            f"{quoted(source)} is open: close it first, or make a backup of it and restore that"
        ) from None
    try:
        if os.access(source, os.W_OK):  # on a medium that can only be read nobody changes it
            with kept_from_sqlite(source):
                pass
        yield
    finally:
        if lock is not None:
            lock.release()


def _look_at(source: Path, manifest: Manifest | None) -> None:
    """Refuse what can't be a backup of ours, before anything is made."""
    header = _header(source)
    size = source.stat().st_size
    if manifest is not None and manifest.size != size:
        raise _damaged(source, f"it has {size:,} bytes and its manifest says {manifest.size:,}")
    if not header.startswith(_HEADER) or len(header) < _HEADER_SIZE:
        raise _damaged(source, "it is no SQLite database")
    if not _is_ours(header):
        raise ForeignDatabaseError(
            f"{quoted(source)} is another application's SQLite database: name a backup of this one; nothing was changed"
        )


def _header(path: Path) -> bytes:
    with explained("read", path), path.open("rb") as file:
        return file.read(_HEADER_SIZE)


def _is_ours(header: bytes) -> bool:
    return header.startswith(_HEADER) and int.from_bytes(header[_APPLICATION_ID], "big") == APPLICATION_ID


def _damaged(source: Path, how: str) -> CorruptDatabaseError:
    return CorruptDatabaseError(
        f"{quoted(source)} is damaged ({how}): restore another backup; the database was not changed"
    )


# What is there


def _marker(database: Path, timeout: timedelta) -> str | None:
    # Held for this look alone: who makes or upgrades a database passes the presence lock first.
    with sidecar_lock(database, timeout=timeout) as lock:
        return lock.read_marker()


def _refuse_target(database: Path, marker: str | None) -> None:
    state = judge_file(database, is_database=False)
    secure_sidecars(database)
    if state is None or state.is_empty or marker is not None:
        return  # where the marker says that a database of ours was made, what is there now is what is left of it
    if not _is_ours(_header(database)):
        raise ForeignDatabaseError(
            f"{quoted(database)} is no database of this application, or damaged beyond recognition: name another "
            "path, or move it away first; nothing was changed"
        )


def _epoch(database: Path) -> int:
    """Return the epoch that a database says it is in, 0 where it can't be asked. It is not changed by that."""
    driver = choose_driver()
    uri = f"file:{quote(str(database))}?mode=ro&immutable=1"
    try:
        with closing(driver.module.connect(uri, uri=True)) as raw:
            return int(raw.execute("SELECT epoch FROM store").fetchone()[0])
    except (driver.module.Error, TypeError, ValueError):
        return 0  # absent, damaged, or older than the epochs


def _now(clock: Clock, manifest: Manifest | None) -> datetime:
    now = check_instant(clock(), "the clock's instant")
    if manifest is not None and now < manifest.taken_at:
        logger.warning(
            "the clock says %s, before the backup was taken (%s): where it is wrong, set it and restore once more",
            now.isoformat(timespec="seconds"),
            manifest.taken_at.isoformat(timespec="seconds"),
            extra={"event": "clock_before_backup", "seconds": (manifest.taken_at - now).total_seconds()},
        )
    return now


def _free_stamp(database: Path, now: datetime) -> str:
    stamp = now.strftime("%Y%m%dT%H%M%S%fZ")
    number = 1
    while os.path.lexists(aside_path(database, free := stamp if number == 1 else f"{stamp}_{number}")):
        number += 1
    return free


# The new database


@dataclass(frozen=True, slots=True)
class _Staged:
    epoch: int
    revision: str
    upgraded_from: str | None
    rows: dict[str, int]


def _stage(
    source: Path, manifest: Manifest | None, database: Path, stamp: str, *, restored_at: datetime, known_epoch: int
) -> _Staged:
    """Make the new database beside the old one: checked, upgraded, in its new epoch, whole in one file and synced."""
    for stale in database.parent.glob(f"{glob.escape(database.name)}.*.restoring"):
        discard(stale)  # of a restore that was killed before it had decided anything
    new = new_path(database, stamp)
    try:
        _copy(source, new, manifest, owner_of=database)
        engine = SQLiteEngine(new, busy_timeout=timedelta(0), durability="full")
        try:
            with translated(engine.driver_errors, lambda error: _fault(error, source)):
                found = _verify(engine, source, manifest)
            engine.prepare_header()
            upgrade_copy(engine, clock=lambda: restored_at)
            epoch = max(known_epoch, found.epoch or 1) + 1
            with engine.connect() as connection, connection.begin():
                connection.execute(update(_table).values(epoch=epoch, restored_at=restored_at))
                revision = revision_of(connection)
        finally:
            engine.close()
        _require_whole(new)
    except BaseException:
        discard(new)
        raise
    return _Staged(
        epoch=epoch,
        revision=str(revision),
        upgraded_from=None if revision == found.revision else found.revision,
        rows={name: count for name, count in found.rows.items() if name in DATA_TABLES},
    )


def _copy(source: Path, new: Path, manifest: Manifest | None, *, owner_of: Path) -> None:
    needed = source.stat().st_size
    with explained("look for room in", new.parent):
        free = shutil.disk_usage(new.parent).free
    if free < needed:
        raise DiskFullError(
            f"there is no room to restore in {quoted(new.parent)}: it takes {needed:,} bytes beside the old database, "
            f"and {free:,} are free; free some space"
        )
    digest = _copy_file(source, new, owner_of=owner_of)
    if manifest is not None:
        if digest != manifest.sha256:
            raise _damaged(source, "its SHA-256 is not the one in its manifest")
        return  # one of ours is whole by itself: what lies beside it belongs to something else
    log, _, journal = sidecars(source)
    new_log, _, new_journal = sidecars(new)
    is_logged = _header(source)[18:20] == _WAL_FORMAT
    beside, kept = (log, new_log) if is_logged else (journal, new_journal)
    if os.path.lexists(beside):
        _copy_file(beside, kept, owner_of=owner_of)


def _copy_file(source: Path, new: Path, *, owner_of: Path) -> str:
    digest = hashlib.sha256()
    with explained("copy the backup to", new):
        descriptor = create_descriptor(new)
        if descriptor is None:
            raise DatabaseError(f"{quoted(new)} is in the way: remove it")
        with os.fdopen(descriptor, "wb") as copy, source.open("rb") as original:
            give_to_owner(descriptor, owner_of)
            while block := original.read(1 << 20):
                digest.update(block)
                copy.write(block)
    return digest.hexdigest()


def _verify(engine: SQLiteEngine, source: Path, manifest: Manifest | None) -> Contents:
    module: Any = engine.driver.module
    with closing(module.connect(str(engine.path), isolation_level=None)) as raw:
        raw.execute("PRAGMA trusted_schema=OFF")
        raw.execute("PRAGMA cell_size_check=ON")
        verdict = str(raw.execute("PRAGMA integrity_check(1)").fetchone()[0])
        if verdict != "ok":
            raise _damaged(source, verdict.splitlines()[0])
        if raw.execute("PRAGMA foreign_key_check").fetchone() is not None:
            raise _damaged(source, "a row refers to one that is not there")
        found = read_contents(raw, VERSION_TABLE)
    if found.revision is None:
        raise _damaged(source, "it holds no store")
    if manifest is not None and (found.rows, found.revision) != (manifest.rows, manifest.schema_revision):
        raise _damaged(source, "it does not hold what its manifest says")
    return found


def _fault(error: BaseException, source: Path) -> HomeAgentError:
    ours = sqlite_fault(error)
    return _damaged(source, "SQLite can't read it") if isinstance(ours, CorruptDatabaseError) else ours


def _require_whole(new: Path) -> None:
    """See to it that all of a closed database is in its one file, and that on the disk."""
    for beside in sidecars(new):
        with explained("remove", beside):
            if os.path.lexists(beside):
                if beside.stat().st_size:
                    raise DatabaseError(f"{quoted(beside)} was left over: something else has the new database open")
                beside.unlink()
    with explained("sync", new):
        descriptor = os.open(new, os.O_RDWR | OPEN_FLAGS)
        try:
            sync(descriptor)
        finally:
            os.close(descriptor)
    fsync_directory(new.parent)
