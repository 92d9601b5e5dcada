"""The schema's versions: find the revisions, lock, back up, upgrade, verify.

An up-to-date database is told by one SELECT, and Alembic is not even imported: that saves 80 ms at every start.
"""

from __future__ import annotations

import glob
import logging
import os
import random
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import text

from homeagent.engine.disk import files
from homeagent.engine.disk.locks import FileLock
from homeagent.engine.faults import TransientError
from homeagent.engine.postgresql.engine import PostgreSQLEngine
from homeagent.engine.sqlite.engine import SQLiteEngine, corrupt_after_all, lock_path, sidecar_lock
from homeagent.engine.sqlite.integrity import check_content, refuse_unclean_damage
from homeagent.engine.sqlite.presence import announce, presence_path
from homeagent.errors import (
    ConnectionLostError,
    CorruptDatabaseError,
    DatabaseBusyError,
    DiskFullError,
    ForeignDatabaseError,
    InvalidArgumentError,
    MigrationError,
    ReadOnlyError,
    SchemaOutdatedError,
    SchemaTooNewError,
)

if TYPE_CHECKING:
    from alembic.config import Config
    from sqlalchemy import Connection

    from homeagent.clock import Clock
    from homeagent.engine.engine import Engine

__all__ = [
    "REVISION",
    "VERSION_TABLE",
    "alembic_config",
    "open_postgresql",
    "open_sqlite",
    "revision_of",
    "schema_revision",
    "upgrade_copy",
]

REVISION = "0005"
"""The revision that this version of the package works with: the newest in `alembic/versions`."""

VERSION_TABLE = "homeagent_schema_version"

_ADVISORY_LOCK = 0x686F6D656167656E  # "homeagen": one lock for all who upgrade one database

logger = logging.getLogger("homeagent")

_SPEAK_FOR_THEMSELVES = (
    ConnectionLostError,
    CorruptDatabaseError,
    DatabaseBusyError,
    DiskFullError,
    ForeignDatabaseError,
    InvalidArgumentError,
    MigrationError,
    ReadOnlyError,
    SchemaTooNewError,
)

# Alembic keeps the running migration in module globals.
_alembic_lock = threading.Lock()


def script_directory() -> Path:
    """Return the directory of `env.py` and the revisions: the wheel's own, or the checkout's `alembic/`.

    Raises:
        MigrationError: neither is there.
    """
    package = Path(__file__).parent
    for candidate in (package / "_migrations", package.parent / "alembic"):
        # Beside an installed package, `alembic` is the library of that name: it has no env.py at its top.
        if (candidate / "env.py").is_file():
            return candidate
    raise MigrationError("this installation has no migrations: install homeagent anew")


def alembic_config(connection: Connection | None = None) -> Config:
    """Return Alembic's configuration for this package, on a live connection or on none."""
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(script_directory()).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


def _tables(connection: Connection) -> set[str]:
    if connection.dialect.name == "sqlite":
        query = "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite~_%' ESCAPE '~'"
    else:
        query = "SELECT tablename FROM pg_catalog.pg_tables WHERE schemaname = current_schema()"
    return {row[0] for row in connection.execute(text(query))}


def revision_of(connection: Connection) -> str | None:
    """Return the revision of the schema, None where there is no schema of ours yet.

    Raises:
        CorruptDatabaseError: the version table does not hold exactly one row.
    """
    if VERSION_TABLE not in _tables(connection):
        return None
    rows = connection.execute(text(f"SELECT version_num FROM {VERSION_TABLE}")).fetchall()  # noqa: S608  a constant
    if len(rows) != 1:
        raise CorruptDatabaseError(
            f"{VERSION_TABLE} holds {len(rows)} rows where one belongs: restore the newest good backup"
        )
    return str(rows[0][0])


def _suits(connection: Connection, revision: str | None) -> bool:
    """Tell whether this version works with the schema as it is: at its own revision, or at a newer one that allows it.

    A newer version says in `store.oldest_revision` how old the code may be that works beside it.

    Args:
        connection: on the database, for that row.
        revision: of the schema, as `revision_of` returned it.

    Returns:
        False where it is to be made or upgraded.

    Raises:
        SchemaTooNewError: it is newer, and this version is too old for it.
    """
    if revision is None or revision == REVISION:
        return revision is not None
    from alembic.script import ScriptDirectory

    known = {script.revision for script in ScriptDirectory.from_config(alembic_config()).walk_revisions()}
    if revision in known:
        return False
    if "store" not in _tables(connection):
        raise SchemaTooNewError(revision, known=REVISION)
    oldest = connection.execute(text("SELECT oldest_revision FROM store")).scalar()
    # This version's own revision is the newest that it knows.
    if oldest not in known:
        raise SchemaTooNewError(revision, known=REVISION)
    logger.info(
        "the schema is at revision %s, which this version, made for %s, may work with",
        revision,
        REVISION,
        extra={"event": "newer_schema_opened", "revision": revision, "known": REVISION},
    )
    return True


def _upgrade(connection: Connection, target: str) -> None:
    from alembic import command

    with _alembic_lock:
        command.upgrade(alembic_config(connection), target)


# SQLite


def open_sqlite(engine: SQLiteEngine, *, clock: Clock, timeout: timedelta, migrate: bool, temporary: bool) -> None:
    """Make the file ready: ours, private, write-ahead logged and at this version's revision.

    Args:
        engine: on the file, which may be absent or empty.
        clock: for the name of a backup.
        timeout: how long to wait for another process that makes or upgrades the same file.
        migrate: whether it may be made or upgraded.
        temporary: whether nobody else can know of the file.

    Raises:
        SchemaTooNewError, SchemaOutdatedError, MigrationError, ForeignDatabaseError, CorruptDatabaseError,
        InsecureFileError, DatabaseBusyError: as their names say. The file is as it was.
    """
    try:
        _open_sqlite(engine, clock=clock, timeout=timeout, migrate=migrate, temporary=temporary)
    except BaseException:
        if engine.presence is not None and engine.presence.held:
            engine.presence.withdraw()  # what is refused has nothing new beside it
        raise


def _open_sqlite(engine: SQLiteEngine, *, clock: Clock, timeout: timedelta, migrate: bool, temporary: bool) -> None:
    path = engine.path
    if not temporary and presence_path(path).exists():
        # Before it is looked at: a restore that was cut off is finished first.
        engine.announced(announce(path, timeout=timeout))
    state = files.inspect_file(path)
    if state is not None and not state.is_empty:
        engine.refuse_foreign()
        if files.secure_sidecars(path) and not temporary:
            _examine_leftovers(engine)
        _announce(engine, timeout=timeout, temporary=temporary)
        with engine.translated(), engine.connect() as connection:
            revision, suits = _look_up(connection)
            check_content(path, connection.connection.driver_connection)
        if suits and (temporary or not migrate or _is_remembered(path)):
            return
        if not migrate:
            raise SchemaOutdatedError(revision, needed=REVISION)
    elif not migrate:
        if not temporary and _is_remembered(path):
            raise corrupt_after_all(path)  # to say that there is none yet would be an invitation to make one
        raise SchemaOutdatedError(None, needed=REVISION)
    else:
        _announce(engine, timeout=timeout, temporary=temporary)
    lock = sidecar_lock(path, timeout=timeout)
    with lock:
        _make_or_upgrade(engine, lock, clock=clock, temporary=temporary)


def upgrade_copy(engine: SQLiteEngine, *, clock: Clock) -> None:
    """Bring a file that nobody else knows of to this version's revision, without a backup of it.

    Raises:
        SchemaTooNewError, MigrationError, ForeignDatabaseError, CorruptDatabaseError: as in `open_sqlite`.
    """
    try:
        open_sqlite(engine, clock=clock, timeout=timedelta(0), migrate=True, temporary=True)
    finally:
        lock_path(engine.path).unlink(missing_ok=True)


def _examine_leftovers(engine: SQLiteEngine) -> None:
    """Judge a log that lies beside the file, where nobody has that open: its last end was no clean one then."""
    if engine.presence is not None:
        engine.presence.release()
        engine.presence = None
    if not os.access(engine.path.parent, os.W_OK):
        return  # SQLite can't change anything either
    lock = FileLock(presence_path(engine.path), timeout=timedelta(0), owner_of=engine.path)
    try:
        lock.acquire()
    except DatabaseBusyError:
        return  # somebody has it open, and the log is what it must be
    try:
        if not lock.has_marker():  # left by a restore that was cut off, which is finished first
            refuse_unclean_damage(engine)
    except BaseException:
        lock.withdraw()
        raise
    lock.release()


def _announce(engine: SQLiteEngine, *, timeout: timedelta, temporary: bool) -> None:
    if engine.presence is None and not temporary:
        engine.announced(announce(engine.path, timeout=timeout))


def _look_up(connection: Connection) -> tuple[str | None, bool]:
    """Return the revision of the schema, and whether this version works with it as it is."""
    # A reader's BEGIN: the engine's own would wait for whoever writes, only to look.
    raw: Any = connection.connection.driver_connection
    raw.execute("BEGIN")
    try:
        revision = revision_of(connection)
        return revision, _suits(connection, revision)
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
    files.refuse_orphaned_log(path)
    state = files.inspect_file(path)
    # The lock file remembers that a database was made here: one that lost its content is never read as a new one.
    initialised = lock.read_marker() is not None
    if initialised and (state is None or state.is_empty):
        raise corrupt_after_all(path)
    if state is None:
        files.create_file(path)
    elif not state.is_empty:
        engine.refuse_foreign()
    engine.prepare_header()
    files.secure_sidecars(path)
    backup: Path | None = None
    with engine.translated(), engine.connect() as connection:
        raw: Any = connection.connection.driver_connection
        revision, suits = _look_up(connection)
        if suits:
            if not initialised and not temporary:
                lock.write_marker("initialised")
            return
        if revision is None and (initialised or _any_tables(connection)):
            raise CorruptDatabaseError(
                f"{path} has lost its schema: keep it aside with its -wal and -shm, and restore the newest good backup"
            )
        # It is ignored inside a transaction; while it is on, rebuilding a parent table fails or deletes its children.
        raw.execute("PRAGMA foreign_keys=OFF")
        try:
            with connection.begin():
                # BEGIN IMMEDIATE: from here on the revision can't change.
                revision = revision_of(connection)
                if _suits(connection, revision):
                    return
                if revision is not None and not temporary:
                    backup = _back_up(engine, revision, clock)
                _upgrade(connection, "head")
                _verify_sqlite(connection, backup)
        except _SPEAK_FOR_THEMSELVES:
            raise
        except Exception as error:  # noqa: BLE001  whatever a revision raises, the upgrade failed and was undone
            raise MigrationError(
                f"upgrading {path} from {revision!r} failed and was undone ({type(error).__name__}): "
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


def _any_tables(connection: Connection) -> bool:
    found = bool(_tables(connection))
    connection.rollback()
    return found


def _verify_sqlite(connection: Connection, backup: Path | None) -> None:
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
    except InvalidArgumentError as error:
        raise MigrationError(f"the schema was not upgraded, since its backup can't be made: {error}") from None
    return target


# PostgreSQL

# How long a revision waits for the lock of a table, in seconds, before the whole upgrade steps back and tries again:
# whoever comes after it to read or write that table waits in line behind it.
_TABLE_LOCK_PATIENCE = 2

# A statement of a revision that takes longer than this has gone wrong, and holds locks.
_STATEMENT_PATIENCE = timedelta(minutes=15)


def open_postgresql(engine: PostgreSQLEngine, *, timeout: timedelta, migrate: bool) -> None:
    """Bring the schema to this version's revision, one host at a time.

    Args:
        engine: on the database.
        timeout: how long to wait for another host that upgrades it, and for units that hold its tables.
        migrate: whether it may be made or upgraded.

    Raises:
        SchemaTooNewError, SchemaOutdatedError, MigrationError, ForeignDatabaseError, DatabaseBusyError.
    """
    deadline = time.monotonic() + timeout.total_seconds()
    with engine.translated(), engine.connect() as connection:
        with connection.begin():
            revision = revision_of(connection)
            if _suits(connection, revision):
                return
        if not migrate:
            raise SchemaOutdatedError(revision, needed=REVISION)
        while True:
            try:
                with connection.begin():
                    _make_or_upgrade_postgresql(connection, deadline)
                    return
            except TransientError as error:
                busy = error
            except _SPEAK_FOR_THEMSELVES:
                raise
            except Exception as error:  # noqa: BLE001  whatever a revision raises, the upgrade failed and was undone
                raise MigrationError(
                    f"upgrading the schema from {revision!r} failed and was undone ({type(error).__name__})"
                ) from (None if isinstance(error, engine.driver_errors) else error)
            if busy.sqlstate == _STATEMENT_CANCELLED:
                raise MigrationError(
                    f"upgrading the schema from {revision!r} was cancelled and undone: a statement took longer than "
                    f"{_STATEMENT_PATIENCE}, or somebody cancelled it; try it when the server has less to do"
                )
            if time.monotonic() >= deadline:
                raise DatabaseBusyError(
                    f"the schema could not be upgraded from {revision!r} within {timeout}: another host upgrades it, "
                    "or a unit holds a table. Open it again later, end long transactions first, or raise busy_timeout"
                )
            time.sleep(random.uniform(0, _PAUSE))  # noqa: S311  it parts the hosts, it keeps no secret


_STATEMENT_CANCELLED = "57014"
_PAUSE = 0.2  # seconds; the longest between two tries


def _make_or_upgrade_postgresql(connection: Connection, deadline: float) -> None:
    """Upgrade within the transaction that has begun, or find that another host did."""
    left = max(1, int((deadline - time.monotonic()) * 1000))
    connection.execute(text(f"SET LOCAL lock_timeout = {left}"))
    connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _ADVISORY_LOCK})
    revision = revision_of(connection)
    if _suits(connection, revision):
        return
    if revision is None and _tables(connection) & {"devices", "agents", "sessions", "nonces"}:
        raise ForeignDatabaseError(
            "the schema holds tables of these names that are not ours: name another database or schema"
        )
    connection.execute(text(f"SET LOCAL lock_timeout = {min(left, _TABLE_LOCK_PATIENCE * 1000)}"))
    connection.execute(text(f"SET LOCAL statement_timeout = {int(_STATEMENT_PATIENCE.total_seconds() * 1000)}"))
    _upgrade(connection, "head")
    # What COMMIT waits for, a standby for example, is no statement that has gone wrong.
    connection.execute(text("SET LOCAL statement_timeout = 0"))


def schema_revision(engine: Engine) -> str | None:
    """Return the revision of an open database."""
    with engine.connect() as connection:
        return revision_of(connection)
