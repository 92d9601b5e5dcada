"""The SQLite engine: a file that is ours is opened privately, and every connection gets the same pragmas."""

from __future__ import annotations

import logging
import os
import shutil
import time
import weakref
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote

import apsw
import sqlalchemy
from sqlalchemy import URL, event
from sqlalchemy.pool import NullPool

from homeagent.clock import monotonic
from homeagent.engine.driver_errors import translated
from homeagent.engine.engine import Engine
from homeagent.engine.files import database_file
from homeagent.engine.files.directories import make_temporary_directory
from homeagent.engine.files.file_identity import FileIdentityCheck
from homeagent.engine.files.locks import FileLock
from homeagent.engine.files.system_errors import explained
from homeagent.engine.fork import inherit, refuse_inherited
from homeagent.engine.sqlite.connection import SQLiteConnection
from homeagent.engine.sqlite.constraints import named_conflict
from homeagent.engine.sqlite.diagnosis import diagnosed_error
from homeagent.engine.sqlite.dialect import DRIVER_ERRORS, DRIVER_NAME, deny_attach
from homeagent.engine.sqlite.dialect import Connection as DriverConnection
from homeagent.engine.sqlite.foreign_access import guard_of, open_guarded
from homeagent.engine.sqlite.lock_wait import LockWait
from homeagent.engine.sqlite.open_statements import end_with_transactions
from homeagent.engine.sqlite.write_ahead_log import has_frames
from homeagent.errors import (
    CorruptDatabaseError,
    DatabaseError,
    DatabaseIOError,
    ForeignDatabaseError,
    HomeAgentError,
)
from homeagent.frame_locals import clear_locals

if TYPE_CHECKING:
    from sqlalchemy import Connection
    from sqlalchemy.engine.interfaces import ExceptionContext
    from sqlalchemy.pool import ConnectionPoolEntry

logger = logging.getLogger("homeagent")

__all__ = ["APPLICATION_ID", "Durability", "SQLiteEngine", "lock_path", "sidecar_lock"]

Durability = Literal["full", "normal"]

APPLICATION_ID = 0x48414731
"""`HAG1`, in the header of every file of ours: https://sqlite.org/pragma.html#pragma_application_id"""

READERS = 16
_JOURNAL_SIZE_LIMIT = 64 * 1024 * 1024
_WAL_PAUSE = 0.002  # seconds
_JOURNAL_MAGIC = bytes.fromhex("d9d505f920a163d7")


def lock_path(database: Path) -> Path:
    """Return where the lock file of a database is. Its content tells that the database was made, or is to give way."""
    return database.with_name(database.name + ".lock")


def sidecar_lock(path: Path, *, timeout: timedelta) -> FileLock:
    """Return the lock under which one process at a time makes, upgrades or restores this database."""
    return FileLock(lock_path(path), timeout=timeout)


class SQLiteEngine(Engine):
    """One SQLite file, one writer, and readers that see a snapshot each.

    Args:
        path: the file; it exists, is private and ours (`prepare`).
        busy_timeout: how long a statement waits for a lock of another process.
        durability: `full` syncs at every commit; `normal` may lose the last commits at a power cut, never more.
        temporary: whether the file's directory is removed when the engine is closed.
    """

    # There is one writer, and a sync costs many times what a small unit does.
    shares_commits = True
    write_connection_type = SQLiteConnection
    read_connection_type = SQLiteConnection

    def __init__(self, path: Path, *, busy_timeout: timedelta, durability: Durability, temporary: bool = False) -> None:
        refuse_inherited(path)
        self.path = path
        self.durability = durability
        self._open: weakref.WeakSet[DriverConnection] = weakref.WeakSet()
        self._lock_waits = 0
        self._busy_ms = min(int(busy_timeout.total_seconds() * 1000), 2**31 - 1)
        self.is_temporary = temporary
        self.watch = FileIdentityCheck(path, strict=durability == "full", on_moved=self._keep_from_checkpoints)
        self.presence: FileLock | None = None
        sa_engine = sqlalchemy.create_engine(
            URL.create(DRIVER_NAME, database=str(path)),
            poolclass=NullPool,
            hide_parameters=True,
            creator=self._open_existing,
        )
        event.listen(sa_engine, "connect", self._on_connect)
        event.listen(sa_engine, "close", self._on_close)
        event.listen(sa_engine, "begin", self._on_begin)
        # Returned and not raised, so that the listeners of others, such as instrumentation, are called too.
        event.listen(sa_engine, "handle_error", self._on_error)
        super().__init__(
            sa_engine,
            driver_errors=DRIVER_ERRORS,
            translate=self.fault,
            writers=1,
            readers=READERS,
            # A deferred BEGIN that turns into a write fails at once when another process wrote in between, and
            # busy_timeout does not apply to it: https://sqlite.org/lang_transaction.html
            begin_write=("BEGIN IMMEDIATE",),
            # BEGIN takes no snapshot, the first read does: this one yields no row that has to be fetched.
            begin_read=("BEGIN; SELECT 1 FROM sqlite_master WHERE 0",),
            watch=self.watch,
        )

    def fault(self, error: BaseException) -> HomeAgentError:
        """Return ours for an exception of the driver."""
        fault = diagnosed_error(error, self.path, find_moved=self.watch.find_moved)
        if isinstance(fault, DatabaseIOError):
            self.require_reconnect()
        return fault

    def _open_existing(self, options: str = "mode=rw") -> DriverConnection:
        """Open the file, and never create one: an empty file would take the place of one that has disappeared."""
        return open_guarded(self.path, self._uri(options), timeout=self.busy_seconds, refuse=True)

    def _uri(self, options: str) -> str:
        return f"file:{quote(os.fsencode(self.path))}?{options}"

    def _on_begin(self, connection: Connection) -> None:
        raw: Any = connection.connection.driver_connection
        # A link has begun by itself before it lends its connection to an ORM session.
        if not raw.in_transaction:
            with self.translated():
                raw.execute("BEGIN" if raw.readonly("main") else "BEGIN IMMEDIATE")
        end_with_transactions(connection)

    def _on_close(self, connection: Any, record: ConnectionPoolEntry) -> None:
        # The last one to close would move its log into the file, and delete another process's log with its commits.
        moved: HomeAgentError | None
        try:
            moved = self.watch.find_moved(beside=True)
        except HomeAgentError as error:
            moved = error  # what can't be looked at is left as it is
            self._keep_from_checkpoints()
        self._open.discard(connection)
        if moved is None and not self._open:
            self.watch.disconnected()
        elif self.watch.remembers_log and not self._open:  # and goes on to, so that another log is refused
            logger.error("%s", moved, extra={"event": "closed_without_checkpoint", "path": str(self.path)})

    def _on_connect(self, connection: Any, record: ConnectionPoolEntry) -> None:
        with closing(connection.cursor()) as cursor:
            # busy_timeout first: the other pragmas may have to wait for a lock themselves.
            cursor.execute(f"PRAGMA busy_timeout={self._busy_ms}")
            cursor.execute("PRAGMA foreign_keys=ON")
            cursor.execute(f"PRAGMA synchronous={self.durability.upper()}")
            cursor.execute("PRAGMA trusted_schema=OFF")
            cursor.execute("PRAGMA cell_size_check=ON")
            cursor.execute(f"PRAGMA journal_size_limit={_JOURNAL_SIZE_LIMIT}")
        self._open.add(connection)  # not before it has read: until then the close of another one may delete the log

    def _keep_from_checkpoints(self) -> None:
        """Have no connection move its log into the file when it is closed: the file is another one by now."""
        for connection in list(self._open):
            with suppress(apsw.ConnectionClosedError):
                connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)

    @property
    def busy_seconds(self) -> float:
        """How long a statement waits for a lock of another process."""
        return self._busy_ms / 1000

    def connect(self) -> Connection:
        """Return a connection of its own; the caller closes it."""
        # Before and after: to open another file that is in its place would replay our log over that one.
        self.watch.before_connect()
        try:
            with self.translated():
                connection = self.sa_engine.connect()
        except HomeAgentError as fault:
            # SQLAlchemy chains the driver's own.
            fault.__cause__ = fault.__context__ = None
            raise
        try:
            self.watch.connected()
        except BaseException:
            connection.close()
            raise
        return connection

    def open_read_connection(self) -> Connection:
        """Return a connection that was opened read-only, in one snapshot. It can attach no other file."""

        def open_file() -> DriverConnection:
            raw = self._open_existing("mode=ro")
            raw.authorizer = deny_attach
            return raw

        self.watch.before_connect()
        sa_engine = sqlalchemy.create_engine(
            f"{DRIVER_NAME}://", poolclass=NullPool, hide_parameters=True, creator=open_file
        )
        event.listen(sa_engine, "handle_error", self._on_error)
        event.listen(sa_engine, "close", self._on_close)
        with self.translated():
            connection = sa_engine.connect()
        try:
            with self.translated():
                connection.exec_driver_sql("SELECT 1 FROM sqlite_master WHERE 0")  # takes the snapshot
            self._open.add(connection.connection.driver_connection)  # type: ignore[arg-type]
            self.watch.connected()
        except BaseException:
            connection.close()
            raise
        return connection

    @contextmanager
    def looking(self) -> Iterator[Connection]:
        """Lend a connection of its own that only looks: it waits for no writer, and no writer waits for it."""
        with self.connect() as connection:
            raw: Any = connection.connection.driver_connection
            # A reader's BEGIN: the engine's own is a writer's.
            with self.translated():
                raw.execute("BEGIN")
            try:
                yield connection
            finally:
                connection.rollback()
                if raw.in_transaction:
                    raw.execute("ROLLBACK")

    def prepare_connection(self, connection: Connection, *, read_only: bool) -> None:
        """Keep a reader's connection from writing, and have a writer's connection wait as `LockWait` does."""
        raw: Any = connection.connection.driver_connection
        with self.translated():
            raw.execute("SELECT 1 FROM sqlite_master WHERE 0")  # opens the WAL index
        if self.watch.identity is not None:
            guard_of(self.path, self.watch.identity).hold()
        if read_only:
            raw.execute("PRAGMA query_only=ON")
        else:
            self._wait_for_locks(raw, self.busy_seconds)

    def _wait_for_locks(self, raw: DriverConnection, timeout: float) -> None:
        def count() -> None:
            self._lock_waits += 1

        raw.set_busy_handler(LockWait(timeout, count))

    @property
    def contention(self) -> int:
        """How often a unit that writes had to wait so far, for another one of this process or for another process."""
        return self.writers.waits + self._lock_waits

    def empty_log(self, timeout: float, *, truncate: bool = False) -> bool:
        """Move what the log holds into the file, in a turn of its own; see `Engine.empty_log`."""
        pool = self.pool(read_only=False)
        # On the link that writes: no two connections of a process write and checkpoint.
        connection = pool.acquire(timeout)
        try:
            connection.check_file()
            # https://sqlite.org/pragma.html#pragma_wal_checkpoint
            if truncate:
                self._wait_for_locks(connection.driver_connection, timeout)
                ((blocked, _, _),) = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
                # A commit gives the log a header again. Otherwise a power cut could leave an empty log with an older
                # index, and these two look like a log that lost its commits.
                connection.execute(f"PRAGMA application_id={APPLICATION_ID}")
                self._wait_for_locks(connection.driver_connection, self.busy_seconds)
            else:
                ((blocked, _, _),) = connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
        except BaseException:
            pool.discard(connection)
            raise
        pool.release(connection)
        return not blocked

    @contextmanager
    def translated(self) -> Iterator[None]:
        """Raise ours instead of the driver's exceptions."""
        with translated(self.driver_errors, self.fault):
            yield

    def prepare_header(self) -> None:
        """Mark a file without content as ours, and switch it to write-ahead logging. Only under `sidecar_lock`.

        The mark is written in rollback mode, so that it is in the file itself and not in a log: a file with content
        and without the mark is never ours.
        """
        with self.translated(), closing(self._bare()) as raw:
            if not self.path.stat().st_size:
                raw.execute(f"PRAGMA application_id={APPLICATION_ID}")
            mode = self._switch_to_wal(raw)
        if mode != "wal":
            raise DatabaseError(
                f"{self.path} can't use a write-ahead log (its journal mode stays {mode!r}): "
                "put it on a local file system"
            )

    def _switch_to_wal(self, raw: Any) -> str:
        """Return the journal mode that it came to."""
        deadline = monotonic() + self._busy_ms / 1000
        while True:
            try:
                return str(raw.execute("PRAGMA journal_mode=WAL").get)
            except apsw.BusyError:
                # SQLite wants the file for itself here, and doesn't ask its busy handler: another process that only
                # reads a file still in rollback mode, to look at its revision, would make this fail.
                if monotonic() >= deadline:
                    raise
            time.sleep(_WAL_PAUSE)

    def _bare(self) -> Any:
        raw = self._open_existing()
        raw.execute(f"PRAGMA synchronous={self.durability.upper()}")
        return raw

    def open_source(self) -> Any:
        """Return a bare connection of the driver's to the very file that is open, for a backup of it.

        Raises:
            DatabaseMovedError: another file has the name now, or none.
        """
        self.watch.before_connect()
        raw = self._bare()
        try:
            self.watch.connected(beside=False)
        except BaseException:
            raw.close()
            raise
        return raw

    def refuse_foreign(self) -> None:
        """Refuse a file with content that is not ours, without changing a byte of it.

        Raises:
            ForeignDatabaseError: it is another application's database.
            CorruptDatabaseError: it is no database, or a damaged one.
        """
        try:
            found = self._application_id("immutable=1")
        except CorruptDatabaseError:
            if self._waits_to_be_emptied():
                return
            # That took no lock: while another process writes the header a sound file may look damaged.
            found = self._application_id_while_locked()
        if found != APPLICATION_ID:
            raise ForeignDatabaseError(
                f"{self.path} is another application's SQLite database (application_id {found:#x}): "
                "name another path; it was not changed"
            )

    def _waits_to_be_emptied(self) -> bool:
        """Tell whether SQLite will empty the file: its first transaction was cut off, and no database was made yet.

        After a power cut only a part of the first page may be there. The first connection undoes the transaction.
        """
        lock = database_file.look_at(lock_path(self.path))
        journal = database_file.sidecars(self.path)[2]
        if (lock is not None and lock.st_size) or database_file.look_at(journal) is None:
            return False
        with explained("read", journal):
            descriptor = os.open(journal, os.O_RDONLY | database_file.OPEN_FLAGS)
            try:
                header = os.read(descriptor, 20)
            finally:
                os.close(descriptor)
        # It ends with the size of the file before, in pages: https://sqlite.org/fileformat2.html#the_rollback_journal
        return header[:8] == _JOURNAL_MAGIC and header[16:] == bytes(4)

    def _application_id_while_locked(self) -> int:
        if database_file.look_at(database_file.sidecars(self.path)[1]) is not None and has_frames(self.path):
            # It takes SQLite's locks, and can write neither the file nor the index. Without a log SQLite makes one.
            return self._application_id("readonly_shm=1")
        lock = FileLock(lock_path(self.path), timeout=timedelta(milliseconds=self._busy_ms), writable=False)
        if database_file.look_at(lock.path) is None:
            return self._application_id("immutable=1")
        with lock:  # who makes a database holds it
            return self._application_id("immutable=1")

    def _application_id(self, option: str) -> int:
        uri = self._uri(f"mode=ro&{option}")
        with self.translated(), closing(open_guarded(self.path, uri, timeout=self.busy_seconds)) as raw:
            return int(raw.execute("PRAGMA application_id").get)

    def _on_error(self, context: ExceptionContext) -> BaseException | None:
        original = context.original_exception
        if isinstance(context.original_exception, HomeAgentError):
            raise context.original_exception  # from what a forked child has in the place of a connection
        clear_locals(original)  # homeagent's frames hold the parameters of the statement
        # Before a statement runs, a column type of the application may raise exceptions that are Python's own.
        kinds = apsw.Error if context.execution_context is None else DRIVER_ERRORS
        if not isinstance(original, kinds):
            return None
        raw = None if context.connection is None else context.connection.connection.driver_connection
        conflict = None if raw is None else named_conflict(raw, original, context.statement)
        return conflict or self.fault(original)

    def before_fork(self) -> None:
        """Close what no unit uses, so that a child inherits none of SQLite's locks where nothing is under way."""
        # What can't be closed counts as in use.
        with suppress(HomeAgentError, *self.driver_errors):
            self.discard_free()

    def after_fork_in_child(self) -> None:
        """Make the connections unusable. If the parent was using the file, refuse to open the file in this process."""
        if len(self._open) and self.watch.identity is not None:
            inherit(self.watch.identity)
        super().after_fork_in_child()

    def announced(self, presence: FileLock | None) -> None:
        """Keep the lock that says that the database is open, until this engine is closed or forgotten."""
        self.presence = presence
        if presence is not None:
            weakref.finalize(self, presence.release)

    def after_close(self) -> None:
        """Say that the database is not open here any more; remove the private directory of a temporary one."""
        try:
            if self.presence is not None:
                self.presence.release()
        finally:
            if self.is_temporary:
                shutil.rmtree(self.path.parent, ignore_errors=True)

    @classmethod
    def temporary(cls, *, busy_timeout: timedelta, durability: Durability) -> SQLiteEngine:
        """Return an engine on a private file that is removed when it is closed: what `:memory:` means here.

        A real `:memory:` database is one per connection, and behaves unlike a file in locking and in WAL.
        """
        directory = make_temporary_directory()
        try:
            path = directory / "homeagent.db"
            database_file.create_file(path)
            return cls(path, busy_timeout=busy_timeout, durability=durability, temporary=True)
        except BaseException:
            shutil.rmtree(directory, ignore_errors=True)
            raise
