"""Check, create or upgrade a SQLite file, in one process at a time. Before an upgrade, back up the file."""

from __future__ import annotations

import glob
import logging
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from homeagent.engine.files import database_file
from homeagent.engine.files.locks import FileLock
from homeagent.engine.files.system_errors import quoted
from homeagent.engine.sqlite.diagnosis import corrupt_after_all, naming_newest_backup
from homeagent.engine.sqlite.engine import lock_path, read_transaction, sidecar_lock
from homeagent.engine.sqlite.foreign_access import protect
from homeagent.engine.sqlite.in_use import hold_in_use_lock, in_use_path
from homeagent.engine.sqlite.integrity import check_content, refuse_unclean_damage
from homeagent.errors import (
    CorruptDatabaseError,
    DatabaseBusyError,
    DiskFullError,
    HomeAgentError,
    MigrationError,
    ReadOnlyError,
    SchemaOutdatedError,
)
from homeagent.migrations.application import NO_APPLICATION, Application
from homeagent.migrations.rehearsal import kept_objects, refuse_broken_objects, refuse_unconvertible_rows
from homeagent.migrations.revisions import (
    REVISION,
    SPEAK_FOR_THEMSELVES,
    RevisionFailedError,
    broken_references,
    reason_of,
    revision_of,
    suits,
    tables,
    upgrade,
)
from homeagent.migrations.schema_drift import refuse_changed_schema
from homeagent.models import TABLES

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from homeagent.clock import Clock
    from homeagent.engine.sqlite.engine import SQLiteEngine

logger: logging.Logger = logging.getLogger("homeagent")


def open_sqlite(
    engine: SQLiteEngine,
    *,
    clock: Clock,
    timeout: timedelta,
    migrate: bool,
    temporary: bool,
    application: Application = NO_APPLICATION,
) -> None:
    """Check a SQLite file, and create or upgrade the schema.

    A temporary file is private, and needs no in-use lock or backup. If homeagent refuses the file, the content stays
    unchanged.
    """
    try:
        with naming_newest_backup(engine.path):
            _open_sqlite(engine, application, clock=clock, timeout=timeout, migrate=migrate, temporary=temporary)
    except BaseException:
        if engine.in_use_lock is not None and engine.in_use_lock.held:
            engine.in_use_lock.withdraw()  # remove the new lock file, because the database file was refused
        raise
    protect(engine.identity_check)


def _open_sqlite(
    engine: SQLiteEngine, application: Application, *, clock: Clock, timeout: timedelta, migrate: bool, temporary: bool
) -> None:
    path = engine.path
    identified = identify_or_wait(engine)
    if not temporary and (in_use_path(path).exists() or database_file.size_of(path)):
        # First take the in-use lock. The function `hold_in_use_lock()` also finishes an interrupted restore. If the
        # file has sidecar files, take the lock exclusively if possible. Other processes must wait until this process
        # has checked the file (see `test_no_process_skips_the_check_of_another_process`).
        has_sidecars = any(map(os.path.lexists, database_file.sidecars(path)))
        engine.keep_in_use_lock(hold_in_use_lock(path, timeout=timeout, exclusive_if_free=has_sidecars))
    state = database_file.look_at(path) if identified else identify(engine)
    if state is not None and state.st_size:
        database_file.inspect_file(path)
        # If the lock is exclusive, no other process has the file open. In a read-only directory, SQLite can't write the
        # file.
        lock = engine.in_use_lock
        is_unclean = database_file.secure_sidecars(path) and lock is not None and lock.is_exclusive
        is_checked = is_unclean and os.access(path.parent, os.W_OK) and refuse_unclean_damage(engine)
        _hold_in_use_lock(engine, timeout=timeout, temporary=temporary)
        with engine.translated(), engine.connect() as connection:
            if not is_checked:
                check_content(path, connection.connection.driver_connection)
            # Use one snapshot, because another process can upgrade the file.
            with read_transaction(connection):
                revision = revision_of(connection)
                is_lost = revision is None and bool(database_file.size_of(lock_path(path)) or tables(connection))
                suitable, pending = suits(connection, revision), application.is_pending(connection)
                if suitable and pending and not migrate:
                    raise application.outdated(connection)
                if revision is not None and not suitable and migrate and not temporary:
                    refuse_changed_schema(connection, revision, quoted(path), application.acknowledged)
                    refuse_broken_objects(connection, f"upgrading {quoted(path)} from {revision!r}")
        if suitable and not pending and (temporary or not migrate or database_file.size_of(lock_path(path))):
            return
        if not migrate:
            if is_lost:
                raise _schema_lost(path)
            raise SchemaOutdatedError(revision, needed=REVISION, location=str(path))
    elif not migrate:
        if not temporary and database_file.size_of(lock_path(path)):
            # The database file is lost. The remedy in SchemaOutdatedError would tell the administrator to create a
            # database.
            raise corrupt_after_all(path)
        raise SchemaOutdatedError(None, needed=REVISION, location=str(path))
    else:
        _hold_in_use_lock(engine, timeout=timeout, temporary=temporary)
    with sidecar_lock(path, timeout=timeout) as marked:
        _make_or_upgrade(engine, marked, application, clock=clock, temporary=temporary)


def identify(engine: SQLiteEngine) -> os.stat_result | None:
    """Return the `lstat` result of the file without changing the file. If the content is not a homeagent database,
    raise an error.
    """
    state = database_file.inspect_file(engine.path, repair=False)
    if state is not None and state.st_size:
        engine.refuse_foreign()
    return state


def identify_or_wait(engine: SQLiteEngine) -> bool:
    """Try to call `identify()` without the in-use lock. If `identify()` needs the in-use lock, return False."""
    if database_file.size_of(in_use_path(engine.path)):
        return False  # a restore can have added a hard link, which `identify()` would refuse
    try:
        identify(engine)
    except CorruptDatabaseError:
        if not in_use_path(engine.path).exists():
            raise
        return False  # a restore that is replacing the file can make the file look damaged
    return True


def _hold_in_use_lock(engine: SQLiteEngine, *, timeout: timedelta, temporary: bool) -> None:
    if engine.in_use_lock is not None and engine.in_use_lock.is_exclusive:
        engine.in_use_lock.release()
        engine.in_use_lock = None
    if engine.in_use_lock is None and not temporary:
        engine.keep_in_use_lock(hold_in_use_lock(engine.path, timeout=timeout))


def _prepare_file(engine: SQLiteEngine, lock: FileLock) -> bool:
    """Create the file if it is missing, and prepare the header. Return True if the lock file has a marker."""
    path = engine.path
    database_file.refuse_orphaned_log(path)
    state = identify(engine)
    # A marker in the lock file proves that a database existed. If the file is missing or empty, the database is lost.
    initialised = lock.read_marker() is not None
    if initialised and (state is None or state.st_size == 0):
        raise corrupt_after_all(path)
    if state is None:
        database_file.create_file(path)
    database_file.inspect_file(path)
    database_file.secure_sidecars(path)  # SQLite must not replay another user's journal
    engine.prepare_header()
    return initialised


def _make_or_upgrade(
    engine: SQLiteEngine, lock: FileLock, application: Application, *, clock: Clock, temporary: bool
) -> None:
    """Create or upgrade the schema if necessary. The caller must hold the lock `sidecar_lock`."""
    path = engine.path
    initialised = _prepare_file(engine, lock)
    with engine.translated(), engine.reading() as connection:
        revision = revision_of(connection)
        suitable, pending = suits(connection, revision), application.is_pending(connection)
        has_tables = bool(tables(connection))
    if revision is not None and not initialised and not temporary:
        # Write the marker before the upgrade. If the disk is full, the upgrade does not start.
        lock.write_marker("initialised")
        initialised = True
    if suitable and not pending:
        return
    if revision is None and (initialised or has_tables):
        raise _schema_lost(path)
    _upgrade(engine, application, None if temporary else clock)
    if not initialised and not temporary:
        lock.write_marker("initialised")


def _schema_lost(path: Path) -> CorruptDatabaseError:
    """Return the error for a database whose version table was lost."""
    return CorruptDatabaseError(
        f"{path} has lost its schema: move the file and its -wal and -shm to another directory, and restore "
        "the newest good backup"
    )


def _upgrade(engine: SQLiteEngine, application: Application, backup_clock: Clock | None) -> None:
    """Run the missing revisions in one transaction, after a backup. With `backup_clock=None`, make no backup."""
    path = engine.path
    with upgrade_transaction(engine, f"upgrading {path}") as attempt:
        connection = attempt.connection
        # The transaction holds the write lock, so no other process can upgrade.
        revision = revision_of(connection)
        attempt.act = f"upgrading {path} from {revision!r}"
        suitable = suits(connection, revision)
        if suitable and not application.is_pending(connection):
            return
        if revision is not None and not suitable:
            refuse_unconvertible_rows(connection, revision)
        if revision is not None and backup_clock is not None:
            attempt.backup = back_up(engine, revision, backup_clock)
        if not suitable:
            with kept_objects(connection, revision) if revision is not None else nullcontext():
                upgrade(connection)
        attempt.act = f"upgrading {path}"  # the application's error names the failed revision
        application.upgrade(connection)
    logger.info(
        "upgraded the schema of %s to revision %s (from %s)%s",
        path,
        REVISION,
        revision,
        f", and the application {application.name} to {application.head}" if application.name else "",
        extra={
            "event": "schema_upgraded",
            "path": str(path),
            "revision": REVISION,
            "revision_before": revision,
            "application_revision": application.head,
        },
    )


@dataclass
class _Attempt:
    connection: Connection
    act: str
    backup: Path | None = None

    def error(self, problem: str) -> MigrationError:
        kept = f"the schema is unchanged; the backup is {self.backup or 'not needed'}"
        return MigrationError(f"{problem}: {kept}", backup=self.backup)


@contextmanager
def upgrade_transaction(engine: SQLiteEngine, act: str) -> Iterator[_Attempt]:
    """Run the block in one transaction, and verify the schema. Convert errors that are not in `SPEAK_FOR_THEMSELVES` to
    MigrationError.
    """
    with engine.translated(), engine.connect() as connection:
        raw: Any = connection.connection.driver_connection
        # A revision can drop and recreate a table. With `foreign_keys=ON`, DROP TABLE would fail or delete rows of
        # other tables. The pragma `foreign_keys` has no effect inside a transaction.
        raw.execute("PRAGMA foreign_keys=OFF")
        # SQLite must overwrite the secret hashes of a dropped table.
        raw.execute("PRAGMA secure_delete=ON")
        attempt = _Attempt(connection, act)
        try:
            with connection.begin():
                broken = broken_references(connection)
                yield attempt
                _verify_upgrade(attempt, broken)
        except SPEAK_FOR_THEMSELVES:
            raise
        except Exception as error:  # noqa: BLE001  a revision can raise any error, and was rolled back.
            # After Ctrl-C, Alembic still runs a statement, which fails. Raise the KeyboardInterrupt and not this error.
            first: BaseException | None = error
            while isinstance(first, Exception):
                first = first.__context__
            if isinstance(first, KeyboardInterrupt):
                raise first from None
            cause = error.__cause__ if isinstance(error, RevisionFailedError) else error
            shown_cause = None if isinstance(cause, engine.driver_errors) else cause
            raise attempt.error(f"{attempt.act} failed and was undone ({reason_of(error)})") from shown_cause


def _verify_upgrade(attempt: _Attempt, broken_before: Counter[tuple[str, str]]) -> None:
    """Raise MigrationError for a broken reference or an unexpected revision."""
    broken = broken_references(attempt.connection)
    # The application's tables may have as many broken references as before.
    worse = [keys for keys, rows in broken.items() if keys[0] in TABLES or rows > broken_before[keys]]
    revision = revision_of(attempt.connection)
    if worse:
        shown = ", ".join(f"{broken[keys]:,} from {keys[0]} to {keys[1]}" for keys in worse[:10])
        raise attempt.error(f"the upgrade left broken references ({shown}) and was undone")
    if not suits(attempt.connection, revision):
        raise attempt.error(f"the upgrade ended at revision {revision!r} instead of {REVISION!r} and was undone")


def back_up(
    engine: SQLiteEngine, revision: str, clock: Clock, kind: Literal["upgrade", "adoption"] = "upgrade"
) -> Path:
    """Back up the last committed state through another connection. Then remove the backups of failed upgrades."""
    from homeagent.engine.sqlite.backup import backup_name, discard, write_backup
    from homeagent.engine.sqlite.manifests import PARTIAL, backups_in

    path, now = engine.path, clock()
    target = path.with_name(backup_name(path, revision, now))
    partial = target.with_name(target.name + PARTIAL)
    for stale in path.parent.glob(f"{glob.escape(path.name)}.*.backup{PARTIAL}"):
        # No other process writes a partial backup, because this process holds the upgrade lock.
        discard(stale)
    try:
        manifest = write_backup(engine, target, partial=partial, taken_at=now, kind=kind)
        # A backup for each restart of the gateway would fill the disk.
        for backup, earlier in backups_in(path.parent, path) if kind == "upgrade" else ():
            # Do not remove a backup that the administrator has renamed.
            named = backup.name == backup_name(path, revision, earlier.taken_at)
            # A successful upgrade, restore or downgrade changes at least one of the following values.
            facts = ("kind", "database", "epoch", "schema_revision", "application_revision", "schema_version")
            is_same = all(getattr(earlier, name) == getattr(manifest, name) for name in facts)
            if named and backup != target and is_same and earlier.schema_version is not None:
                discard(backup)
                logger.info(
                    "removed the backup %s of a failed upgrade: %s replaces the backup",
                    backup,
                    target,
                    extra={"event": "failed_upgrade_backup_removed", "backup": str(backup)},
                )
    except (CorruptDatabaseError, DatabaseBusyError, DiskFullError, ReadOnlyError):
        raise  # the error's message already tells the administrator what to do
    except HomeAgentError as error:
        raise MigrationError(f"the schema was not upgraded, since its backup can't be made: {error}") from None
    return target
