"""Make backups on request or on a schedule. Remove old backups."""

from __future__ import annotations

import glob
import logging
import os
from contextlib import ExitStack
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from homeagent.engine.files.database_file import inspect_file, locate_file, sidecars
from homeagent.engine.files.directories import prepare_directory
from homeagent.engine.files.locks import FileLock
from homeagent.engine.files.system_errors import explained, quoted
from homeagent.engine.sqlite.backup import Stop, backup_name, discard, never_stop, write_backup
from homeagent.engine.sqlite.engine import SQLiteEngine, lock_path
from homeagent.engine.sqlite.in_use import in_use_path
from homeagent.engine.sqlite.manifests import (
    PARTIAL,
    Manifest,
    backup_number,
    backups_in,
    manifest_path,
    note_path,
    remember_backup,
)
from homeagent.engine.target import refuse_address
from homeagent.errors import DatabaseBusyError, DatabaseError, HomeAgentError, InvalidArgumentError
from homeagent.migrations import revision_of
from homeagent.models.types import check_limit

if TYPE_CHECKING:
    from homeagent.clock import Clock
    from homeagent.engine.engine import Engine
    from homeagent.maintenance.sweep import BackupSchedule
    from homeagent.transaction import UnitSettings

logger: logging.Logger = logging.getLogger("homeagent")

_LOCK = ".homeagent-backups.lock"


def require_file(engine: Engine) -> SQLiteEngine:
    """Return the engine if the database is a SQLite file. For PostgreSQL, raise DatabaseError."""
    if not isinstance(engine, SQLiteEngine):
        raise DatabaseError(
            "a PostgreSQL database is backed up with its own tools: pg_dump for one database, pg_basebackup and an "
            "archive of the write-ahead log for the server at any time; see docs/how-to/back-up-and-restore.md"
        )
    return engine


def back_up(settings: UnitSettings, destination: str | os.PathLike[str], *, keep: int | None, replace: bool) -> Path:
    """Make a verified backup, and return its path (see `Database.backup`)."""
    engine = require_file(settings.engine)
    if keep is not None:
        check_limit(keep, "keep")
    refuse_address(destination)
    where = locate_file(destination)
    with explained("inspect", where):
        into_directory = where.is_dir() or os.fspath(destination).endswith("/")
    directory = where if into_directory else where.parent
    prepare_directory(directory)
    with FileLock(directory / _LOCK, timeout=timedelta(seconds=settings.timeout)):
        if into_directory:
            return _make_in(directory, engine, settings.now, keep)
        _refuse_files_in_use(engine.path, where)
        if replace:
            inspect_file(where, is_database=False, repair=False)
        discard(_partial(where))
        return _make(where, engine, settings.now(), keep, replace=replace)


def back_up_if_due(settings: UnitSettings, schedule: BackupSchedule, stop: Stop = never_stop) -> Path | None:
    """Make a backup if the schedule requires a backup. Return None if this process makes no backup."""
    engine, clock = require_file(settings.engine), settings.now
    directory = locate_file(schedule.directory)
    prepare_directory(directory)
    with ExitStack() as lock:
        try:
            lock.enter_context(FileLock(directory / _LOCK, timeout=timedelta(0)))
        except DatabaseBusyError:
            return None  # another process makes a backup
        due = _is_due(engine.path, directory, schedule, clock())
        return _make_in(directory, engine, clock, schedule.keep, stop) if due else None


def back_up_on_schedule(settings: UnitSettings, schedule: BackupSchedule, stop: Stop) -> None:
    """Make a scheduled backup if it is due. If the backup fails, only log the error."""
    try:
        back_up_if_due(settings, schedule, stop)
    except HomeAgentError as error:
        if not stop():
            settings.engine.counters.failed(error)
            logger.warning(
                "a scheduled backup failed and will be tried again after the next sweep: %s",
                error,
                extra={"event": "backup_failed", "error": type(error).__name__},
            )


def _found(directory: Path, pattern: str) -> list[Path]:
    with explained("read", directory):
        return list(directory.glob(pattern))


def _make_in(directory: Path, engine: SQLiteEngine, clock: Clock, keep: int | None, stop: Stop = never_stop) -> Path:
    """Make a backup under a free name, and return the backup's path. The caller must hold the directory's lock."""
    # Delete unfinished backups of killed processes. The caller holds the directory's lock, so no other backup runs.
    for partial in _found(directory, f".{glob.escape(engine.path.name)}.*.backup{PARTIAL}"):
        discard(partial)
    with engine.reading() as connection:
        revision = revision_of(connection) or "none"
    taken_at = clock()
    target = directory / backup_name(engine.path, revision, taken_at)
    stem = target.name.removesuffix(".backup")
    # Do not use a smaller free number: `_remove_oldest()` would delete the new backup before older backups.
    taken = [backup_number(path) for path in _found(directory, f"{glob.escape(stem)}*.backup")]
    if taken:
        target = target.with_name(f"{stem}-{max(taken) + 1}.backup")
    return _make(target, engine, taken_at, keep, stop=stop)


def _make(
    target: Path,
    engine: SQLiteEngine,
    taken_at: datetime,
    keep: int | None,
    *,
    replace: bool = False,
    stop: Stop = never_stop,
) -> Path:
    """Make the backup `target`. If `keep` is given, remove old backups. The caller must hold the directory's lock."""
    manifest = write_backup(
        engine, target, partial=_partial(target), taken_at=taken_at, kind="backup", replace=replace, stop=stop
    )
    if keep is not None:
        _remove_oldest(target, manifest, keep)
    if not engine.is_temporary:
        try:
            remember_backup(engine.path, target)
        except HomeAgentError as error:
            # Do not raise the error: the backup is valid without the note.
            logger.warning(
                "could not write the path of the last backup to a note next to the database: %s",
                error,
                extra={"event": "backup_not_noted", "path": str(engine.path), "error": type(error).__name__},
            )
    logger.info(
        "backed %s up to %s (%d bytes)",
        engine.path,
        target,
        manifest.size,
        extra={"event": "backup_made", "path": str(engine.path), "backup": str(target), "bytes": manifest.size},
    )
    return target


def _is_due(database: Path, directory: Path, schedule: BackupSchedule, now: datetime) -> bool:
    # Ignore backups with a time in the future: the clock was wrong.
    ages = [now - manifest.taken_at for _, manifest in _backups_of(database, directory) if manifest.taken_at <= now]
    return not ages or min(ages) >= schedule.every


def _backups_of(database: Path, directory: Path) -> list[tuple[Path, Manifest]]:
    """Return the database's ordinary backups and their manifests, oldest first."""
    found = backups_in(directory, database)
    return [entry for entry in found if entry[1].kind == "backup" and entry[1].database == str(database)]


def _partial(target: Path) -> Path:
    """Return the path of the hidden file for an incomplete backup."""
    return target.with_name(f".{target.name}{PARTIAL}")


def _refuse_files_in_use(database: Path, target: Path) -> None:
    own = {database, *sidecars(database), lock_path(database), in_use_path(database), note_path(database)}
    if target in own:
        raise InvalidArgumentError(f"{quoted(target)} belongs to the database itself: name another file")
    for sidecar in sidecars(target):
        # SQLite would apply another database's sidecar file to the new backup.
        if os.path.lexists(sidecar):
            raise InvalidArgumentError(
                f"{quoted(target)} is a database that is open or was not closed cleanly, since {quoted(sidecar)} "
                "exists: name another file; to replace a database, restore a backup to it"
            )


def _remove_oldest(made: Path, manifest: Manifest, keep: int) -> None:
    # Keep the new backup, even if the clock was set back.
    found = [entry for entry in _backups_of(Path(manifest.database), made.parent) if entry[0] != made]
    # First remove backups with a time in the future. Otherwise homeagent would always keep such backups.
    others = [backup for backup, _ in sorted(found, key=lambda entry: entry[1].taken_at <= manifest.taken_at)]
    for backup in others[: max(len(others) - (keep - 1), 0)]:
        with explained("remove the old backup", backup):
            backup.unlink(missing_ok=True)
            manifest_path(backup).unlink(missing_ok=True)
        logger.info(
            "removed the old backup %s: the %d newest backups stay",
            backup,
            keep,
            extra={"event": "backup_removed", "backup": str(backup), "keep": keep},
        )
