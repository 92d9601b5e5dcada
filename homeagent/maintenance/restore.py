"""Restore a backup, and keep the old database in quarantine.

A backup lacks the nonces that devices used later. Therefore a restore begins a new epoch. The replay guard refuses
messages from before the new epoch.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Collection, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from homeagent.engine.files.database_file import (
    inspect_file,
    locate_file,
    look_at,
    refuse_insecure,
    secure_sidecars,
    size_of,
)
from homeagent.engine.files.directories import prepare_directory
from homeagent.engine.files.filesystems import refuse_network_filesystem
from homeagent.engine.files.locks import FileLock
from homeagent.engine.files.owners import backup_owners
from homeagent.engine.files.system_errors import explained, quoted
from homeagent.engine.sqlite.dialect import DRIVER_ERRORS
from homeagent.engine.sqlite.engine import SQLiteEngine, lock_path, sidecar_lock
from homeagent.engine.sqlite.in_use import (
    alone,
    epoch_of_marker,
    in_use_path,
    kept_from_sqlite,
    quarantine_path,
    replace_database,
)
from homeagent.engine.sqlite.inspection import inspect_sqlite
from homeagent.engine.sqlite.manifests import Manifest, read_manifest
from homeagent.engine.target import Given, refuse_address, resolve_target
from homeagent.errors import (
    ConflictError,
    CorruptDatabaseError,
    DatabaseBusyError,
    DatabaseError,
    ForeignDatabaseError,
    InvalidArgumentError,
)
from homeagent.maintenance.epochs import check_expected_epoch
from homeagent.maintenance.staging import Devices, check_header, devices_of, stage
from homeagent.models.types import check_names, check_timestamp, check_wait

if TYPE_CHECKING:
    from homeagent.clock import Clock

logger: logging.Logger = logging.getLogger("homeagent")


class RestoreReport(BaseModel, frozen=True):
    """Result of a restore.

    Attributes:
        database: path of the restored database.
        backup: path of the backup. The restore did not change the backup.
        kept_aside: path of the old database in quarantine, next to its -wal and -shm. None if no old database existed.
        taken_at: time of the backup, or None if the backup has no manifest.
        epoch: new epoch of the store.
        restored_at: start of the new epoch.
        upgraded_from: schema revision of the backup, or None if no upgrade was necessary.
        schema_revision: schema revision after the restore.
        rows: number of rows of each table, including the application's tables.
        readmitted_devices: ids of devices that the restore approved again. The list also contains devices to which the
            restore gave another role. After the backup, the devices were revoked, deleted or paired again. None if
            homeagent could not read the old database.
        old_secret_devices: ids of approved devices whose secret changed after the backup. The restore brought back the
            older secret of each device. None if homeagent could not read the old database.
    """

    database: Path
    backup: Path
    kept_aside: Path | None
    taken_at: datetime | None
    epoch: int
    restored_at: datetime
    upgraded_from: str | None
    schema_revision: str
    rows: dict[str, int]
    readmitted_devices: list[str] | None
    old_secret_devices: list[str] | None


def restore(
    backup: str | os.PathLike[str],
    target: Given,
    *,
    clock: Clock,
    busy_timeout: timedelta,
    acknowledged: Collection[str] = (),
    expected_epoch: int | None = None,
) -> RestoreReport:
    """Restore a backup over a closed database (see `Database.restore`)."""
    busy_timeout = check_wait(busy_timeout, "busy_timeout", zero=True)
    acknowledged = check_names(acknowledged, "acknowledged", "audit_devices")
    check_expected_epoch(expected_epoch)
    source, database, manifest = check_paths(backup, target)
    with _not_in_use(source):
        check_header(source, database, manifest)
        # Check the file before homeagent creates a lock file next to it.
        _refuse_foreign_target(database, initialised=any(map(size_of, (lock_path(database), in_use_path(database)))))
        if not any(map(os.path.lexists, (database, lock_path(database), in_use_path(database)))):
            # Check the epoch before homeagent creates a directory and lock files.
            _refuse_other_epoch(database, 0, expected_epoch)
        prepare_directory(database.parent)
        refuse_network_filesystem(database)
        with alone(database, timeout=busy_timeout) as lock:
            # Release the sidecar lock after the read. The exclusive in-use lock already keeps other processes out.
            with sidecar_lock(database, timeout=busy_timeout) as sidecar:
                marker = sidecar.read_marker()
            _refuse_foreign_target(database, initialised=marker is not None)
            inspect_file(database, is_database=False)
            secure_sidecars(database)
            old_epoch, before = _read_old_database(database)
            _refuse_other_epoch(database, old_epoch, expected_epoch)
            known_epoch = max(epoch_of_marker(marker), old_epoch)
            with kept_from_sqlite(database):
                has_old_database = os.path.lexists(database)
                restored_at = _now(clock, manifest)
                stamp = _free_stamp(database, restored_at)
                facts, devices = stage(
                    source, manifest, database, stamp, acknowledged, restored_at=restored_at, known_epoch=known_epoch
                )
                replace_database(lock, database, stamp=stamp, epoch=facts["epoch"], timeout=busy_timeout)
    logger.info(
        "%s was restored from %s: epoch %d begins",
        database,
        source,
        facts["epoch"],
        extra={"event": "restored", "path": str(database), "backup": str(source), "epoch": facts["epoch"]},
    )
    readmitted, old_secret = _compared(before, devices)
    return RestoreReport(
        database=database,
        backup=source,
        kept_aside=quarantine_path(database, stamp) if has_old_database else None,
        taken_at=None if manifest is None else manifest.taken_at,
        restored_at=restored_at,
        **facts,
        readmitted_devices=readmitted,
        old_secret_devices=old_secret,
    )


def _read_old_database(database: Path) -> tuple[int, Devices | None]:
    """Return the epoch and the devices of the old database. Return 0 for an unreadable epoch, and None for unreadable
    devices.
    """
    epoch = 0
    if not size_of(database):
        return epoch, None
    try:
        with inspect_sqlite(database, is_closed=True) as connection:
            raw: Any = connection.connection.driver_connection
            with suppress(*DRIVER_ERRORS, TypeError, ValueError):  # the file is damaged, or has no epoch column
                epoch = int(raw.execute("SELECT epoch FROM store").get)
            return epoch, devices_of(raw)
    except (*DRIVER_ERRORS, DatabaseError, TypeError, ValueError):  # the database is damaged, or the disk failed
        return epoch, None


def _compared(before: Devices | None, now: Devices) -> tuple[list[str] | None, list[str] | None]:
    """Return the values of the report's fields `readmitted_devices` and `old_secret_devices`."""
    if before is None:
        return None, None
    readmitted = [name for name, (role, _) in now.items() if name not in before or before[name][0] != role]
    old_secret = [name for name, (_, hashed) in now.items() if name in before and before[name][1] != hashed]
    return sorted(readmitted), sorted(old_secret)


# The arguments


def check_paths(backup: str | os.PathLike[str], target: Given) -> tuple[Path, Path, Manifest | None]:
    """Check the backup's path and the target's path. Return the two paths and the manifest of the backup."""
    where = resolve_target(target)
    if where.url is not None:
        raise InvalidArgumentError(
            "homeagent can't restore a PostgreSQL database: use pg_restore, or a base backup and the archive of the "
            "write-ahead log, then follow docs/how-to/back-up-and-restore.md"
        )
    database = where.path
    if database is None:
        raise InvalidArgumentError("a temporary database is removed when it is closed: name the file to restore to")
    refuse_address(backup)
    source = locate_file(backup)
    status = look_at(source)
    if status is None:
        raise InvalidArgumentError(f"{quoted(source)} does not exist: name the backup to restore")
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISLNK(status.st_mode):
        raise InvalidArgumentError(f"{quoted(source)} is not a regular file: name the backup to restore")
    refuse_insecure(source, status, backup_owners(database))
    with explained("inspect", database):
        if os.path.lexists(database) and source.samefile(database):
            raise InvalidArgumentError(f"{quoted(source)} is the database itself: name one of its backups")
    return source, database, read_manifest(source, database)


@contextmanager
def _not_in_use(source: Path) -> Iterator[None]:
    """Refuse a file that a process has open. While the block runs, prevent homeagent from opening the file."""
    with ExitStack() as locks:
        if os.path.lexists(in_use_path(source)):
            try:
                # Do not open the lock file for writing: the disk can be read-only.
                locks.enter_context(FileLock(in_use_path(source), timeout=timedelta(0), writable=False))
            except DatabaseBusyError:
                raise DatabaseBusyError(
                    f"{quoted(source)} is open: close the database first, or back it up and restore the backup"
                ) from None
        if os.access(source, os.W_OK):  # on a read-only medium, no process can change the file
            with kept_from_sqlite(source):
                pass
        yield


# The target


def _refuse_foreign_target(database: Path, *, initialised: bool) -> None:
    """Refuse a file of another application. Pass `initialised=True` if homeagent left a marker for the database. With
    `initialised=True`, accept the file, even with a damaged header.
    """
    state = inspect_file(database, is_database=False, repair=False)
    if initialised or state is None or state.st_size == 0:
        return
    # Do not use `open()`: closing the file would release other threads' locks.
    with closing(SQLiteEngine(database, busy_timeout=timedelta(0), durability="full")) as engine:
        try:
            engine.refuse_foreign()
        except (CorruptDatabaseError, ForeignDatabaseError):
            raise ForeignDatabaseError(
                f"{quoted(database)} is not a homeagent database, or its header is damaged: name another path, or move "
                "the file away first. No file was changed"
            ) from None


def _refuse_other_epoch(database: Path, epoch: int, expected: int | None) -> None:
    if expected not in (None, epoch):
        reason = "" if epoch else ", because no epoch could be read"
        raise ConflictError(
            f"{quoted(database)} has epoch {epoch}{reason}, but epoch {expected} was expected: check that you name the "
            "right database and its epoch. The database was not changed"
        )


def _now(clock: Clock, manifest: Manifest | None) -> datetime:
    now = check_timestamp(clock(), "the clock's time")
    if manifest is not None and now < manifest.taken_at:
        logger.warning(
            "the clock says %s, before the backup was taken (%s). If the clock is wrong, set it and restore again",
            now.isoformat(timespec="seconds"),
            manifest.taken_at.isoformat(timespec="seconds"),
            extra={"event": "clock_before_backup", "seconds": (manifest.taken_at - now).total_seconds()},
        )
    return now


def _free_stamp(database: Path, now: datetime) -> str:
    stamp = now.strftime("%Y%m%dT%H%M%S%fZ")
    number = 1
    while os.path.lexists(quarantine_path(database, free := stamp if number == 1 else f"{stamp}_{number}")):
        number += 1
    return free
