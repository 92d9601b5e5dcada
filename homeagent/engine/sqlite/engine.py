"""The SQLite engine. The engine sets equal pragmas on all connections. The engine refuses other applications' files."""

from __future__ import annotations

import logging
import shutil
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from copy import copy
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import apsw
import sqlalchemy
from sqlalchemy import URL, event
from sqlalchemy.exc import StatementError
from sqlalchemy.pool import NullPool

from homeagent.clock import monotonic
from homeagent.engine.conversions import hide_values
from homeagent.engine.driver_errors import conversion_error, remove_private
from homeagent.engine.engine import Engine
from homeagent.engine.files import database_file
from homeagent.engine.files.directories import make_temporary_directory
from homeagent.engine.files.file_identity import FileIdentityCheck
from homeagent.engine.files.locks import FileLock
from homeagent.engine.fork import inherit, refuse_inherited
from homeagent.engine.instrumented_cursor import FailureContext
from homeagent.engine.sqlite.connection import SQLiteConnection, busy_handler, end_with_transactions
from homeagent.engine.sqlite.constraints import named_conflict
from homeagent.engine.sqlite.diagnosis import diagnosed_error, newest_backup_hint
from homeagent.engine.sqlite.dialect import DRIVER_ERRORS, DRIVER_NAME, deny_attach
from homeagent.engine.sqlite.dialect import Connection as DriverConnection
from homeagent.engine.sqlite.foreign_access import guard_of, open_guarded, unprotect
from homeagent.engine.sqlite.write_ahead_log import has_frames, read_start
from homeagent.environment import Durability
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

logger: logging.Logger = logging.getLogger("homeagent")

APPLICATION_ID = 0x48414731
"""The text `HAG1`, in each homeagent database's header (https://sqlite.org/pragma.html#pragma_application_id)."""

READERS = 16
_JOURNAL_SIZE_LIMIT = 64 * 1024 * 1024
_WAL_PAUSE = 0.002  # seconds
_JOURNAL_MAGIC = bytes.fromhex("d9d505f920a163d7")
_FIRST_READ = "SELECT 1 FROM sqlite_master WHERE 0"


def lock_path(database: Path) -> Path:
    """Return the path of a database's lock file. The marker in the lock file proves that the database was created."""
    return database.with_name(database.name + ".lock")


def sidecar_lock(path: Path, *, timeout: timedelta) -> FileLock:
    """Return the lock for the creation, upgrade or restore of the database."""
    return FileLock(lock_path(path), timeout=timeout)


@contextmanager
def read_transaction(connection: Connection) -> Iterator[None]:
    """Run the block in a transaction that takes no write lock."""
    raw: Any = connection.connection.driver_connection
    raw.execute("BEGIN")  # otherwise the listener `_on_begin()` would take the write lock
    with connection.begin() as transaction:
        yield
        transaction.rollback()


class SQLiteEngine(Engine):
    """Engine of one SQLite file with one writer. Each read-only connection sees a snapshot."""

    # SQLite allows one writer. Small units share a commit, because a sync is slow.
    shares_commits = True
    connection_type: type[SQLiteConnection] = SQLiteConnection
    # After a deferred BEGIN, the first write can fail at once (https://sqlite.org/lang_transaction.html).
    begin_write: Sequence[str] = ("BEGIN IMMEDIATE",)
    # SQLite takes the snapshot at the first read, not at BEGIN.
    begin_read: Sequence[str] = (f"BEGIN; {_FIRST_READ}",)
    driver_errors: tuple[type[BaseException], ...] = DRIVER_ERRORS
    identity_check: FileIdentityCheck

    def __init__(self, path: Path, *, busy_timeout: timedelta, durability: Durability, temporary: bool = False) -> None:
        refuse_inherited(path)
        self.path = path
        self.durability = durability
        self._open: weakref.WeakSet[DriverConnection] = weakref.WeakSet()
        self._closing: weakref.WeakSet[DriverConnection] = weakref.WeakSet()
        self.busy_seconds: float = min(busy_timeout.total_seconds(), (2**31 - 1) / 1000)
        """Longest wait of a statement for a lock of another process, in seconds."""
        self.is_temporary = temporary
        self.identity_check = FileIdentityCheck(path, strict=durability == "full", on_moved=self._on_moved)
        self.in_use_lock: FileLock | None = None
        super().__init__(self._create_engine(self._open_existing), writers=1, readers=READERS)
        event.listen(self.sa_engine, "begin", self._on_begin)

    def translate(self, error: BaseException) -> HomeAgentError:
        """Return homeagent's error for an exception that the driver raised."""
        translation = diagnosed_error(error, self.path, find_moved=self.identity_check.find_moved)
        if isinstance(translation, DatabaseIOError):
            self.require_reconnect()
        return translation

    def _create_engine(self, open_file: Callable[[], DriverConnection]) -> sqlalchemy.Engine:
        """Return a new SQLAlchemy engine with homeagent's listeners. `open_file()` opens each connection."""
        url = URL.create(DRIVER_NAME, database=str(self.path))
        sa_engine = sqlalchemy.create_engine(url, poolclass=NullPool, hide_parameters=True, creator=open_file)
        hide_values(sa_engine.dialect)
        event.listen(sa_engine, "connect", self._on_connect)
        event.listen(sa_engine, "close", self._on_close)
        # Use a weak reference to this engine. The caches of compiled statements keep this listener in memory. A strong
        # reference would keep a closed engine in memory.
        on_error = weakref.WeakMethod(self._on_error)
        event.listen(sa_engine, "handle_error", lambda context: (method := on_error()) and method(context))
        return sa_engine

    def _open_existing(self, options: str = "mode=rw") -> DriverConnection:
        """Open the file, but do not create a missing file. An empty file must not replace a deleted database."""
        return open_guarded(self.path, options, timeout=self.busy_seconds, refuse=True)

    def _on_begin(self, connection: Connection) -> None:
        """Send BEGIN, unless a transaction is open. On a writable connection, take the write lock at once."""
        raw: Any = connection.connection.driver_connection
        # The class `StoreConnection` can already have begun the transaction.
        if not raw.in_transaction:
            with self.translated():
                raw.execute("BEGIN" if raw.readonly("main") else "BEGIN IMMEDIATE")
        end_with_transactions(connection)

    def _on_close(self, connection: Any, record: ConnectionPoolEntry | None) -> None:
        """If a file was replaced, prevent SQLite's checkpoint at the close."""
        # When the last connection is closed, SQLite checkpoints and deletes the WAL. The WAL can contain commits of
        # another process.
        try:
            moved: HomeAgentError | None = self.identity_check.find_moved(beside=True)
        except HomeAgentError as error:
            moved = error  # if the files can't be inspected, leave the files unchanged
            self._keep_from_checkpoints()
        self._closing.add(connection)
        connection.closing = partial(self._closing_connection, connection, connection.closing)
        self._open.discard(connection)
        if moved is None and not self._open:
            self.identity_check.disconnected()
        elif self.identity_check.remembers_log and not self._open:  # keep the WAL's identity, to refuse a new WAL
            logger.error("%s", moved, extra={"event": "closed_without_checkpoint", "path": str(self.path)})

    @contextmanager
    def _closing_connection(self, connection: DriverConnection, guarded: Any) -> Iterator[None]:
        try:
            with guarded():
                yield
                self._closing.discard(connection)  # the connection is closed, even if the unlock fails
        finally:
            self._release_in_use_lock()

    def _on_connect(self, connection: Any, record: ConnectionPoolEntry | None) -> None:
        """Set homeagent's pragmas on a new connection, and record the connection."""
        connection.execute(
            f"PRAGMA foreign_keys=ON; PRAGMA synchronous={self.durability.upper()}; PRAGMA trusted_schema=OFF;"
            f"PRAGMA cell_size_check=ON; PRAGMA journal_size_limit={_JOURNAL_SIZE_LIMIT}"
        ).fetchall()
        self._open.add(connection)  # do not check files yet: another process can still delete the WAL

    def _on_moved(self) -> str:
        """Prevent checkpoints of the moved file. Return a clause about the newest backup."""
        self._keep_from_checkpoints()
        return f"; {newest_backup_hint(self.path)}"

    def _keep_from_checkpoints(self) -> None:
        """Prevent SQLite from copying the WAL when a connection is closed."""
        for connection in list(self._open):
            with suppress(apsw.ConnectionClosedError):
                connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)

    def connect(self) -> Connection:
        """Return a new connection. The caller must close the connection."""
        return self._connect(self.sa_engine)

    def _connect(self, sa_engine: sqlalchemy.Engine, *, take_snapshot: bool = False) -> Connection:
        """Return a new connection. With `take_snapshot=True`, also begin a transaction and take the snapshot."""
        # Check the file before and after opening. For a replaced file, SQLite would use the old file's WAL.
        self.identity_check.before_connect()
        with self.translated():
            connection = sa_engine.connect()
            try:
                if take_snapshot:
                    connection.exec_driver_sql(_FIRST_READ)
                self.identity_check.connected()
            except BaseException:
                connection.close()
                raise
        return connection

    @contextmanager
    def driver_connection(self) -> Iterator[DriverConnection]:
        """Yield a driver's connection with the same pragmas as `connect()`."""
        self.identity_check.before_connect()
        with closing(self._open_existing()) as raw:
            try:
                self._on_connect(raw, None)
                self.identity_check.connected()
                yield raw
            finally:
                self._on_close(raw, None)

    def open_read_connection(self) -> Connection:
        """Return a new read-only connection with a snapshot. SQLite refuses ATTACH on the returned connection."""

        def open_file() -> DriverConnection:
            raw = self._open_existing("mode=ro")
            raw.authorizer = deny_attach
            return raw

        return self._connect(self._create_engine(open_file), take_snapshot=True)

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """Yield a new connection in a read transaction, which does not block writers."""
        with self.connect() as connection, read_transaction(connection):
            yield connection

    def prepare_connection(self, connection: Connection, *, read_only: bool) -> None:
        """Make a reader's connection read-only. Install `busy_handler()` on a writer's connection."""
        raw: Any = connection.connection.driver_connection
        with self.translated():
            raw.execute(_FIRST_READ)  # SQLite opens the WAL index at the first read.
        if self.identity_check.identity is not None:
            guard_of(self.identity_check.identity).hold()
        if read_only:
            raw.execute("PRAGMA query_only=ON")
        else:
            raw.set_busy_handler(busy_handler(self.busy_seconds))

    def prepare_header(self) -> None:
        """Write the application id into an empty file. Switch to WAL mode. The caller must hold `sidecar_lock`."""
        deadline = monotonic() + self.busy_seconds
        with self.translated(), closing(self._open_existing()) as raw:
            raw.execute(f"PRAGMA synchronous={self.durability.upper()}")
            # Write the application id before the switch to WAL mode. In WAL mode, SQLite would write the id only to the
            # WAL.
            if not self.path.stat().st_size:
                raw.execute(f"PRAGMA application_id={APPLICATION_ID}")
            mode = None
            while mode is None:
                try:
                    mode = raw.pragma("journal_mode", "WAL")
                except apsw.BusyError:
                    # SQLite does not call the busy handler for `PRAGMA journal_mode`. Another process can hold a lock
                    # for a moment.
                    if monotonic() >= deadline:
                        raise
                    time.sleep(_WAL_PAUSE)
        if mode != "wal":
            raise DatabaseError(
                f"{self.path} can't be switched to a write-ahead log (its journal mode stays {mode!r}): "
                "move the database to a local file system"
            )

    def refuse_foreign(self) -> None:
        """Refuse a non-empty file that does not belong to homeagent. Do not change the file."""
        try:
            found = self._application_id("immutable=1")
        except CorruptDatabaseError:
            if self._sqlite_will_empty():
                return
            # The header can look damaged during a write of another process. Take the lock, and read the header again.
            found = self._application_id_while_locked()
        if found != APPLICATION_ID:
            raise ForeignDatabaseError(
                f"{self.path} is another application's SQLite database (application_id {found:#x}): name another path, "
                "or add homeagent's tables with 'homeagent init --adopt'; the file was not changed"
            )

    def _sqlite_will_empty(self) -> bool:
        """Return True if a crash interrupted the file's first transaction. SQLite's rollback will empty the file."""
        journal = database_file.sidecars(self.path)[2]
        if database_file.size_of(lock_path(self.path)) or database_file.look_at(journal) is None:
            return False
        header = read_start(journal, 20)
        # In a journal, bytes 16 to 19 contain the database's old size (https://sqlite.org/fileformat2.html, section 3).
        return header[:8] == _JOURNAL_MAGIC and header[16:] == bytes(4)

    def _application_id_while_locked(self) -> int:
        if database_file.look_at(database_file.sidecars(self.path)[1]) is not None and has_frames(self.path):
            # With `readonly_shm=1`, SQLite takes locks, but does not change existing files. If the WAL were missing,
            # SQLite would create a WAL.
            return self._application_id("readonly_shm=1")
        lock = FileLock(lock_path(self.path), timeout=timedelta(seconds=self.busy_seconds), writable=False)
        if database_file.look_at(lock.path) is None:
            return self._application_id("immutable=1")
        with lock:  # wait for a process that creates the database
            return self._application_id("immutable=1")

    def _application_id(self, option: str) -> int:
        """Read the application id over a read-only connection. The argument `option=` is a URI parameter for SQLite."""
        with (
            self.translated(),
            closing(open_guarded(self.path, f"mode=ro&{option}", timeout=self.busy_seconds)) as raw,
        ):
            return int(raw.pragma("application_id"))

    def _on_error(self, context: ExceptionContext) -> BaseException | None:
        """Return homeagent's error, or None if the exception must stay untranslated."""
        # Do not raise the new error, because SQLAlchemy would then skip later listeners.
        if isinstance(context, FailureContext):
            return None  # `StoreConnection` translates the exception of the instrumented cursor
        original = context.original_exception
        clear_locals(original)  # A traceback could show stored values in local variables of homeagent.
        if isinstance(original, HomeAgentError):
            raise copy(original)  # SQLAlchemy makes `original` the cause, and no error may be its own cause.
        if type(context.sqlalchemy_exception) is StatementError:
            return conversion_error(original)
        if not isinstance(original, DRIVER_ERRORS):
            return None
        connection = context.connection
        # The connection of a unit that has ended is invalidated. The application can still read a result.
        raw = None if connection is None or connection.invalidated else connection.connection.driver_connection
        conflict = None if raw is None else named_conflict(raw, original, context.statement)
        failure = conflict or self.translate(original)
        remove_private(original)
        return failure

    def before_fork(self) -> None:
        """Close the connections that no unit uses."""
        # If closing a connection fails, the connection counts as in use.
        with suppress(HomeAgentError, *self.driver_errors):
            self.discard_free()
            self.feed_connections.discard_free()

    def after_fork_in_child(self) -> None:
        """Invalidate the connections. If a parent's unit used the file, refuse to open the file."""
        if len(self._open) and self.identity_check.identity is not None:
            inherit(self.identity_check.identity)
        super().after_fork_in_child()

    def keep_in_use_lock(self, lock: FileLock | None) -> None:
        """Hold the in-use lock until this engine is closed or garbage-collected."""
        self.in_use_lock = lock
        if lock is not None:
            weakref.finalize(self, lock.release)

    def after_close(self) -> None:
        """Release the in-use lock, and remove the private directory of a temporary database."""
        unprotect(self.identity_check)
        try:
            self._release_in_use_lock()
        finally:
            if self.is_temporary:
                shutil.rmtree(self.path.parent, ignore_errors=True)

    def _release_in_use_lock(self) -> None:
        """Release the in-use lock of a closed engine without open connections."""
        # Keep the lock while another thread uses a connection. A restore in this process could release SQLite's locks
        # on the file.
        if self._closed and not self._open and not self._closing and self.in_use_lock is not None:
            self.in_use_lock.release()

    @classmethod
    def temporary(cls, *, busy_timeout: timedelta, durability: Durability) -> SQLiteEngine:
        """Return an engine for `:memory:`. The database is a private file, which the method `after_close()` deletes."""
        directory = make_temporary_directory()
        try:
            path = directory / "homeagent.db"
            database_file.create_file(path)
            return cls(path, busy_timeout=busy_timeout, durability=durability, temporary=True)
        except BaseException:
            shutil.rmtree(directory, ignore_errors=True)
            raise
