"""Backups: where one goes and what it is called, how many are kept, and when the next one is due."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from homeagent.engine.files.database_file import judge_file, locate_file, sidecars
from homeagent.engine.files.directories import prepare_directory
from homeagent.engine.files.locks import FileLock
from homeagent.engine.files.system_errors import explained, quoted
from homeagent.engine.sqlite.backup import Stop, backup_name, discard, write_backup
from homeagent.engine.sqlite.engine import SQLiteEngine, lock_path
from homeagent.engine.sqlite.in_use import in_use_path
from homeagent.engine.sqlite.manifests import PARTIAL, Manifest, backups_in, manifest_path, note_path, remember_backup
from homeagent.engine.target import refuse_address
from homeagent.errors import DatabaseBusyError, DatabaseError, HomeAgentError, InvalidArgumentError
from homeagent.migrations import VERSION_TABLE, revision_of
from homeagent.models.types import check_limit

if TYPE_CHECKING:
    from homeagent.clock import Clock
    from homeagent.engine.engine import Engine
    from homeagent.maintenance.sweep import BackupSchedule

__all__ = ["back_up", "back_up_if_due", "back_up_on_schedule", "require_file"]

logger = logging.getLogger("homeagent")

_LOCK = ".homeagent-backups.lock"


def require_file(engine: Engine) -> SQLiteEngine:
    """Return the engine if its database is a file.

    Raises:
        DatabaseError: it is on a server, which has its own tools; the message names them.
    """
    if not isinstance(engine, SQLiteEngine):
        raise DatabaseError(
            "a PostgreSQL database is backed up with its own tools: pg_dump for one database, pg_basebackup and an "
            "archive of the write-ahead log for the server at any instant; see docs/operations.md"
        )
    return engine


def back_up(
    engine: Engine,
    destination: str | os.PathLike[str],
    *,
    clock: Clock,
    keep: int | None = None,
    replace: bool = False,
    timeout: timedelta,
    stop: Stop = lambda: False,
) -> Path:
    """Make a verified backup while others write, and return where it is.

    Args:
        engine: on the database.
        destination: a directory, for a name with the schema's revision and the time; or a file that does not exist.
            A path that ends in a slash is a directory, made where it is missing.
        clock: tells when it was taken.
        keep: remove this database's oldest backups in that directory afterwards, until so many are left. Only what
            has its manifest is one; copies made by upgrades stay, and files that `restore` refuses for their owner.
        replace: whether a file that exists is replaced.
        timeout: how long to wait for another backup into the same directory.
        stop: asked now and then; where it answers True, there will be no backup.

    Raises:
        InvalidArgumentError: the destination can't be one, or exists.
        CorruptDatabaseError, DiskFullError, ReadOnlyError, DatabaseError: as their names say. Nothing is left behind.
    """
    engine = require_file(engine)
    if keep is not None:
        check_limit(keep, "keep")
    refuse_address(destination)
    where = locate_file(destination)
    given = os.fspath(destination)
    into_directory = where.is_dir() or given.endswith(("/", os.sep))
    directory = where if into_directory else where.parent
    prepare_directory(directory)
    with FileLock(directory / _LOCK, timeout=timeout):
        if into_directory:
            return _make_in(directory, engine, clock=clock, keep=keep, stop=stop)
        _refuse_files_in_use(engine.path, where)
        if replace:
            judge_file(where, is_database=False, repair=False)
        discard(_partial(where))
        return _make(where, engine, taken_at=clock(), keep=keep, replace=replace, stop=stop)


def back_up_if_due(engine: Engine, schedule: BackupSchedule, *, clock: Clock, stop: Stop) -> Path | None:
    """Make the backup of a schedule if none in its directory is young enough, and return where it is.

    Returns:
        None where none is due, or another process makes one at this moment.
    """
    engine = require_file(engine)
    directory = locate_file(schedule.directory)
    if not _is_due(engine.path, directory, schedule, clock()):
        return None
    prepare_directory(directory)
    lock = FileLock(directory / _LOCK, timeout=timedelta(0))
    try:
        lock.acquire()
    except DatabaseBusyError:
        return None
    try:
        # Another process may have made it since, and be done.
        if not _is_due(engine.path, directory, schedule, clock()):
            return None
        return _make_in(directory, engine, clock=clock, keep=schedule.keep, stop=stop)
    finally:
        lock.release()


def back_up_on_schedule(engine: Engine, schedule: BackupSchedule, *, clock: Clock, stop: Stop) -> None:
    """Make the backup of a schedule if it is due. One that fails is logged, for the work beside it goes on."""
    try:
        back_up_if_due(engine, schedule, clock=clock, stop=stop)
    except HomeAgentError as error:
        if not stop():
            logger.warning(
                "a scheduled backup failed and will be tried again after the next sweep: %s",
                error,
                extra={"event": "backup_failed", "error": type(error).__name__},
            )


def _make_in(directory: Path, engine: SQLiteEngine, *, clock: Clock, keep: int | None, stop: Stop) -> Path:
    _remove_stale(directory, engine.path)
    taken_at = clock()
    target = _free_name(directory / backup_name(engine.path, _revision(engine), taken_at))
    return _make(target, engine, taken_at=taken_at, keep=keep, replace=False, stop=stop)


def _make(
    target: Path, engine: SQLiteEngine, *, taken_at: datetime, keep: int | None, replace: bool, stop: Stop
) -> Path:
    manifest = write_backup(
        engine,
        target,
        partial=_partial(target),
        version_table=VERSION_TABLE,
        taken_at=taken_at,
        kind="backup",
        replace=replace,
        stop=stop,
    )
    if keep is not None:
        _remove_oldest(target, manifest, keep)
    if not engine.is_temporary:
        _remember(engine.path, target)
    logger.info(
        "backed %s up to %s (%d bytes)",
        engine.path,
        target,
        manifest.size,
        extra={"event": "backup_made", "path": str(engine.path), "backup": str(target), "bytes": manifest.size},
    )
    return target


def _is_due(database: Path, directory: Path, schedule: BackupSchedule, now: datetime) -> bool:
    # One from the future was made while the clock was ahead, and tells nothing.
    ages = [now - manifest.taken_at for _, manifest in _backups_of(database, directory) if manifest.taken_at <= now]
    return not ages or min(ages) >= schedule.every


def _backups_of(database: Path, directory: Path) -> Iterator[tuple[Path, Manifest]]:
    for backup, manifest in backups_in(directory, database):
        if manifest.kind == "backup" and manifest.database == str(database):
            yield backup, manifest


def _revision(engine: SQLiteEngine) -> str:
    with engine.looking() as connection:
        return revision_of(connection) or "none"


def _partial(target: Path) -> Path:
    return target.with_name(f".{target.name}{PARTIAL}")


def _free_name(path: Path) -> Path:
    """Return the path, or one with a number in it where the clock stood still since the last backup."""
    free, number = path, 1
    while os.path.lexists(free):
        number += 1
        free = path.with_name(f"{path.name.removesuffix('.backup')}-{number}.backup")
    return free


def _refuse_files_in_use(database: Path, target: Path) -> None:
    own = {database, *sidecars(database), lock_path(database), in_use_path(database), note_path(database)}
    if target in own:
        raise InvalidArgumentError(f"{quoted(target)} belongs to the database itself: name another file")
    for beside in sidecars(target):
        # Whoever opened the backup by that name would have another database's log put into it.
        if os.path.lexists(beside):
            raise InvalidArgumentError(
                f"{quoted(target)} is a database that somebody has open or that was not closed cleanly, for there is "
                f"{quoted(beside)}: name another file; to replace a database, restore a backup to it"
            )


def _remove_stale(directory: Path, database: Path) -> None:
    """Remove what a backup that was killed left behind: under the lock, no other one is under way."""
    with explained("look into the directory", directory):
        names = [entry.name for entry in os.scandir(directory)]
    for name in names:
        if name.startswith(f".{database.name}.") and name.endswith(f".backup{PARTIAL}"):
            discard(directory / name)


def _remove_oldest(made: Path, manifest: Manifest, keep: int) -> None:
    # The one just made stays, even if the clock was set back and it looks like the oldest.
    found = [one for one in _backups_of(Path(manifest.database), made.parent) if one[0] != made]
    # One from the future is surely older than it looks, and would keep all others from staying.
    others = [backup for backup, _ in sorted(found, key=lambda one: one[1].taken_at <= manifest.taken_at)]
    for backup in others[: max(len(others) - (keep - 1), 0)]:
        with explained("remove the old backup", backup):
            backup.unlink(missing_ok=True)
            manifest_path(backup).unlink(missing_ok=True)
        logger.info(
            "removed %s, of which there are %d newer ones",
            backup,
            keep,
            extra={"event": "backup_removed", "backup": str(backup), "keep": keep},
        )


def _remember(database: Path, backup: Path) -> None:
    try:
        remember_backup(database, backup)
    except HomeAgentError as error:
        # The backup is good all the same. What is lost is that an error could name it.
        logger.warning(
            "where the last backup is could not be noted beside the database: %s",
            error,
            extra={"event": "backup_not_noted", "path": str(database), "error": type(error).__name__},
        )
