"""A SQLite file is made ready: judged, made or upgraded by one process at a time, and backed up before an upgrade."""

from __future__ import annotations

import glob
import logging
import os
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import text

from homeagent.engine.files import database_file
from homeagent.engine.files.locks import FileLock
from homeagent.engine.files.system_errors import quoted
from homeagent.engine.sqlite.diagnosis import corrupt_after_all
from homeagent.engine.sqlite.engine import lock_path, sidecar_lock
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
from homeagent.migrations.revisions import (
    REVISION,
    SPEAK_FOR_THEMSELVES,
    VERSION_TABLE,
    reason_of,
    revision_of,
    suits,
    tables,
    upgrade,
)

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from homeagent.clock import Clock
    from homeagent.engine.sqlite.engine import SQLiteEngine

__all__ = ["identify_or_wait", "open_sqlite", "upgrade_copy"]

logger = logging.getLogger("homeagent")


def open_sqlite(engine: SQLiteEngine, *, clock: Clock, timeout: timedelta, migrate: bool, temporary: bool) -> None:
    """Make the file ready: ours, private, write-ahead logged and at this version's revision.

    Args:
        engine: on the file, which may be absent or empty.
        clock: for the name of a backup.
        timeout: how long to wait for another process that makes or upgrades the same file.
        migrate: whether it may be made or upgraded.
        temporary: whether nobody else can know of the file.

    Raises:
        SchemaTooNewError, SchemaOutdatedError, SchemaChangedError, MigrationError, ForeignDatabaseError,
        CorruptDatabaseError, InsecureFileError, DatabaseBusyError: as their names say. The file is as it was.
    """
    try:
        _open_sqlite(engine, clock=clock, timeout=timeout, migrate=migrate, temporary=temporary)
    except BaseException:
        if engine.in_use_lock is not None and engine.in_use_lock.held:
            engine.in_use_lock.withdraw()  # what is refused has nothing new beside it
        raise


def _open_sqlite(engine: SQLiteEngine, *, clock: Clock, timeout: timedelta, migrate: bool, temporary: bool) -> None:
    path = engine.path
    identified = identify_or_wait(engine)
    if not temporary and in_use_path(path).exists():
        # A restore that was cut off is finished first.
        engine.keep_in_use_lock(hold_in_use_lock(path, timeout=timeout))
    state = identify(engine) if not identified else database_file.judge_file(path, is_database=True, repair=False)
    if state is not None and not state.is_empty:
        database_file.inspect_file(path)
        is_checked = database_file.secure_sidecars(path) and not temporary and _check_unclean_end(engine)
        _hold_in_use_lock(engine, timeout=timeout, temporary=temporary)
        with engine.translated(), engine.connect() as connection:
            revision, suitable = _look_up(connection)
            if not is_checked:
                check_content(path, connection.connection.driver_connection)
        if suitable and (temporary or not migrate or _is_remembered(path)):
            return
        if not migrate:
            raise SchemaOutdatedError(revision, needed=REVISION, location=str(path))
        if revision is not None and not suitable and not temporary:
            from homeagent.migrations.schema_drift import refuse_changed_schema

            with engine.reading() as connection:
                # Read again, in one snapshot with the schema: another process may have upgraded the file meanwhile.
                revision = revision_of(connection)
                if revision is not None and not suits(connection, revision):
                    refuse_changed_schema(connection, revision, quoted(path))
    elif not migrate:
        if not temporary and _is_remembered(path):
            raise corrupt_after_all(path)  # to say that there is none yet would be an invitation to make one
        raise SchemaOutdatedError(None, needed=REVISION, location=str(path))
    else:
        _hold_in_use_lock(engine, timeout=timeout, temporary=temporary)
    lock = sidecar_lock(path, timeout=timeout)
    with lock:
        _make_or_upgrade(engine, lock, clock=clock, temporary=temporary)


def identify(engine: SQLiteEngine) -> database_file.FileState | None:
    """Judge a file, which must be homeagent's, empty or absent, and change nothing of it or next to it.

    Raises:
        ForeignDatabaseError, CorruptDatabaseError, InsecureFileError, DatabaseError: as `open_sqlite`.
    """
    state = database_file.judge_file(engine.path, is_database=True, repair=False)
    if state is not None and not state.is_empty:
        engine.refuse_foreign()
    return state


def identify_or_wait(engine: SQLiteEngine) -> bool:
    """Identify a file before its first lock is taken; see `identify`.

    Returns:
        False if a restore was cut off, or if the file is damaged and a restore that is under way may replace it:
        identify it again under the lock that a restore takes.
    """
    intent = database_file.look_at(in_use_path(engine.path))
    if intent is not None and intent.st_size:
        return False  # the restore may have given the old file a second name, which is refused otherwise
    try:
        identify(engine)
    except CorruptDatabaseError:
        if not in_use_path(engine.path).exists():
            raise
        return False
    return True


def upgrade_copy(engine: SQLiteEngine, *, clock: Clock) -> None:
    """Bring a file that nobody else knows of to this version's revision, without a backup of it.

    Raises:
        SchemaTooNewError, MigrationError, ForeignDatabaseError, CorruptDatabaseError: as in `open_sqlite`.
    """
    try:
        open_sqlite(engine, clock=clock, timeout=timedelta(0), migrate=True, temporary=True)
    finally:
        lock_path(engine.path).unlink(missing_ok=True)


def _check_unclean_end(engine: SQLiteEngine) -> bool:
    """Check a file beside which a log lies if no process has it open: its last end was no clean one then.

    Returns:
        False if it was not checked.

    Raises:
        CorruptDatabaseError: it is damaged, or its log lost commits.
    """
    if engine.in_use_lock is not None:
        engine.in_use_lock.release()
        engine.in_use_lock = None
    if not os.access(engine.path.parent, os.W_OK):
        return False  # SQLite can't change anything either
    lock = FileLock(in_use_path(engine.path), timeout=timedelta(0))
    try:
        lock.acquire()
    except DatabaseBusyError:
        return False  # somebody has it open, and the log is what it must be
    try:
        # A marker is left by a restore that was cut off, which is finished first.
        is_checked = not lock.has_marker() and refuse_unclean_damage(engine)
    except BaseException:
        lock.withdraw()
        raise
    lock.release()
    return is_checked


def _hold_in_use_lock(engine: SQLiteEngine, *, timeout: timedelta, temporary: bool) -> None:
    if engine.in_use_lock is None and not temporary:
        engine.keep_in_use_lock(hold_in_use_lock(engine.path, timeout=timeout))


def _look_up(connection: Connection) -> tuple[str | None, bool]:
    """Return the revision of the schema, and whether this version works with it as it is."""
    # A reader's BEGIN: the engine's own would wait for whoever writes, only to look.
    raw: Any = connection.connection.driver_connection
    raw.execute("BEGIN")
    try:
        revision = revision_of(connection)
        return revision, suits(connection, revision)
    finally:
        connection.rollback()
        if raw.in_transaction:
            raw.execute("ROLLBACK")


def _is_remembered(path: Path) -> bool:
    """Tell whether the lock file has its marker. A restored file has none beside it, nor one whose maker was killed."""
    try:
        return lock_path(path).lstat().st_size > 0
    except FileNotFoundError:
        return False


def _make_or_upgrade(engine: SQLiteEngine, lock: FileLock, *, clock: Clock, temporary: bool) -> None:
    path = engine.path
    database_file.refuse_orphaned_log(path)
    state = identify(engine)
    # The lock file remembers that a database was made here: one that lost its content is never read as a new one.
    initialised = lock.read_marker() is not None
    if initialised and (state is None or state.is_empty):
        raise corrupt_after_all(path)
    if state is None:
        database_file.create_file(path)
    database_file.inspect_file(path)
    database_file.secure_sidecars(path)  # before SQLite would replay a journal that another user put there
    engine.prepare_header()
    backup: Path | None = None
    with engine.translated(), engine.connect() as connection:
        raw: Any = connection.connection.driver_connection
        revision, suitable = _look_up(connection)
        if revision is not None and not initialised and not temporary:
            # Before the upgrade: if the disk is full, the error leaves the schema as it was.
            lock.write_marker("initialised")
            initialised = True
        if suitable:
            return
        if revision is None and (initialised or _any_tables(connection)):
            raise CorruptDatabaseError(
                f"{path} has lost its schema: keep it aside with its -wal and -shm, and restore the newest good backup"
            )
        # It is ignored inside a transaction; while it is on, rebuilding a parent table fails or deletes its children.
        raw.execute("PRAGMA foreign_keys=OFF")
        # Zeros take the place of a table that a revision recreates: its rows hold hashes, and its text is no schema.
        raw.execute("PRAGMA secure_delete=ON")
        try:
            with connection.begin():
                # BEGIN IMMEDIATE: from here on the revision can't change.
                revision = revision_of(connection)
                if suits(connection, revision):
                    return
                if revision is not None:
                    _refuse_unconvertible_rows(connection, revision)
                if revision is not None and not temporary:
                    backup = _back_up(engine, revision, clock)
                upgrade(connection)
                _verify(connection, backup)
        except SPEAK_FOR_THEMSELVES:
            raise
        except Exception as error:  # noqa: BLE001  whatever a revision raises, the upgrade failed and was undone
            raise MigrationError(
                f"upgrading {path} from {revision!r} failed and was undone ({reason_of(error)}): "
                f"the file has the schema it had; its backup is {backup or 'not needed'}",
                backup=backup,
            ) from (None if isinstance(error, engine.driver_errors) else error)
        finally:
            raw.execute("PRAGMA foreign_keys=ON")
    if not initialised and not temporary:
        lock.write_marker("initialised")
    logger.info(
        "%s is at schema revision %s now (it was at %s)",
        path,
        REVISION,
        revision,
        extra={"event": "schema_upgraded", "path": str(path), "revision": REVISION, "revision_before": revision},
    )


# A revision, a table, and the columns whose text the revision reads into Python; the first is the key.
_CONVERTED = (
    ("0003", "sessions", ("session_id", "agent_id", "sender_id", "channel_id")),
    ("0006", "devices", ("id",)),
)


def _refuse_unconvertible_rows(connection: Connection, revision: str) -> None:
    """Refuse rows that a later revision can't convert: a BLOB, or text that is not UTF-8, in the place of text.

    PostgreSQL stores neither in a column of text.

    Raises:
        MigrationError: there is such a row. Nothing was changed.
    """
    for later, table, columns in _CONVERTED:
        if later <= revision:
            continue
        parts = ", ".join(f"typeof({name}), CAST({name} AS BLOB)" for name in columns)
        for row in connection.exec_driver_sql(f"SELECT {parts} FROM {table}"):  # noqa: S608  constants
            texts = [_text(kind, value) for kind, value in zip(row[::2], row[1::2], strict=True)]
            bad = [name for name, value in zip(columns, texts, strict=True) if isinstance(value, bytes)]
            if bad:
                raise MigrationError(
                    f"upgrading from {revision!r} can't convert {table}.{bad[0]} in the row with {columns[0]} "
                    f"{texts[0]!r}: it holds a BLOB, or text that is not UTF-8. Correct or delete that row with "
                    "another program, then open the database again. Nothing was changed"
                )


def _text(kind: str, value: bytes | None) -> str | bytes | None:
    """Return a stored text, as bytes if it is a BLOB or not UTF-8."""
    if value is None or kind == "blob":
        return value
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value


def _any_tables(connection: Connection) -> bool:
    found = bool(tables(connection))
    connection.rollback()
    return found


def _verify(connection: Connection, backup: Path | None) -> None:
    broken = connection.execute(text("PRAGMA foreign_key_check")).fetchall()
    found = revision_of(connection)
    if broken:
        problem = f"left {len(broken)} broken reference(s)"
    elif found != REVISION:
        problem = f"ended at revision {found!r} instead of {REVISION!r}"
    else:
        return
    raise MigrationError(
        f"the upgrade {problem} and was undone: the file has the schema it had; its backup is {backup or 'not needed'}",
        backup=backup,
    )


def _back_up(engine: SQLiteEngine, revision: str, clock: Clock) -> Path:
    """Copy the file as it was committed last, over another connection: the upgrade's own would wait for itself."""
    from homeagent.engine.sqlite.backup import backup_name, discard, write_backup
    from homeagent.engine.sqlite.manifests import PARTIAL

    path, now = engine.path, clock()
    target = path.with_name(backup_name(path, revision, now))
    partial = target.with_name(target.name + PARTIAL)
    for stale in path.parent.glob(f"{glob.escape(path.name)}.*.backup{PARTIAL}"):
        discard(stale)  # of an upgrade that was killed: the lock is held, so none is under way
    try:
        write_backup(engine, target, partial=partial, version_table=VERSION_TABLE, taken_at=now, kind="upgrade")
    except (CorruptDatabaseError, DatabaseBusyError, DiskFullError, ReadOnlyError):
        raise  # of the database, or they say by themselves what to do
    except HomeAgentError as error:
        raise MigrationError(f"the schema was not upgraded, since its backup can't be made: {error}") from None
    return target
