"""Public entry point: open a database, run units of work and effects. Base classes add the other methods."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from datetime import timedelta
from functools import cached_property, partial
from os import PathLike
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn, Self, TypeVar

from pydantic import JsonValue
from sqlalchemy import URL, Connection

from homeagent import maintenance
from homeagent.callables import check_function
from homeagent.clock import Clock, system_clock
from homeagent.database_maintenance import DatabaseMaintenance
from homeagent.device_secrets import DeviceSecrets
from homeagent.engine.engine import Engine
from homeagent.engine.postgresql.engine import POOL_SIZE
from homeagent.engine.sqlite.engine import Durability
from homeagent.engine.target import conceal
from homeagent.errors import InvalidArgumentError
from homeagent.frame_locals import clears_locals
from homeagent.idempotency import ARUN_ONCE, LeaseTimer, OnAbandoned, OnceCall, arun_once, run_once
from homeagent.models.idempotency_key import Attempt, IdempotencyScope, Outcome
from homeagent.models.limits import Limits
from homeagent.models.types import check_limit, check_wait
from homeagent.one_call import one_call_store
from homeagent.opening import open_engine
from homeagent.retry import Runner
from homeagent.stores.agents import AgentStore
from homeagent.stores.devices import DeviceStore
from homeagent.stores.idempotency_keys import IdempotencyKeyStore
from homeagent.stores.nonces import NonceStore
from homeagent.stores.sessions import SessionStore
from homeagent.stores.store import Store
from homeagent.unit_of_work import UnitOfWork
from homeagent.unit_settings import UnitSettings

if TYPE_CHECKING:
    from homeagent.pairing import Pairing

__all__ = ["Database"]

_DEFAULT_LIMITS = Limits()

S = TypeVar("S", bound=Store)
T = TypeVar("T")


class Database(DeviceSecrets, DatabaseMaintenance):
    """An open operational store. All threads of a process can share it; a forked child must open the database again.

    Open a database with `Database.open`. Close it with `close`, or use a `with` block.
    """

    def __init__(self, engine: Engine, *, clock: Clock, busy_timeout: timedelta, limits: Limits) -> None:
        self._engine = engine
        self._limits = limits
        self._clock = clock
        self._timeout = busy_timeout.total_seconds()
        self._settings = UnitSettings(engine, clock, self._timeout)
        self._runner = Runner(self._settings)
        self._lease_timer = LeaseTimer(partial(self._runner.run, idempotent=True))
        # Reentrant: a signal handler may close the database while its thread holds the mutex.
        self._mutex = threading.RLock()
        self._sweepers: list[maintenance.Sweeper] = []
        self._made_pairing: Pairing | None = None
        self._closed = False

    @classmethod
    def open(
        cls,
        target: str | PathLike[str] | URL | None = None,
        *,
        clock: Clock = system_clock,
        busy_timeout: timedelta = timedelta(seconds=30),
        durability: Durability = "full",
        migrate: bool = True,
        pool_size: int = POOL_SIZE,
        limits: Limits = _DEFAULT_LIMITS,
    ) -> Self:
        """Open a database. Create or upgrade its schema first if necessary.

        Args:
            target: path, URL, or `":memory:"` for a private temporary database. None for `$HOMEAGENT_DATABASE`, or
                without that variable `~/.homeagent/homeagent.db`.
            clock: function that returns the current time. Each store method calls `clock` once.
            busy_timeout: longest wait of a unit for the write lock or a connection. Longer waits than 24 days are
                shortened to 24 days.
            durability: `full` syncs every commit to the disk. With `normal`, a power cut may lose the last commits, and
                a message whose nonce is lost can be replayed.
            migrate: whether to create or upgrade the schema. A file that holds data is backed up before an upgrade.
            pool_size: on PostgreSQL, the maximum number of writing units and also of reading units at the same time, 1
                to 1,000 each. SQLite ignores this number: it has one writer.
            limits: limits for callers that an administrator has not approved yet.

        Raises:
            InvalidArgumentError: if `target` or another argument is invalid.
            SchemaTooNewError, SchemaOutdatedError, SchemaChangedError, MigrationError: if the schema cannot be used.
            ForeignDatabaseError, CorruptDatabaseError, InsecureFileError: if the file cannot be used. The file is
                unchanged.
            DatabaseError: if the database cannot be opened for another reason.
        """
        given = conceal(target)
        del target
        busy_timeout = check_wait(busy_timeout, "busy_timeout", zero=True)
        if durability not in ("full", "normal"):
            raise InvalidArgumentError("durability must be 'full' or 'normal'")
        if check_limit(pool_size, "pool_size") > 1000:
            raise InvalidArgumentError("pool_size must be 1 to 1000")
        check_function(clock, "clock")
        if not isinstance(limits, Limits):
            raise InvalidArgumentError(f"limits must be Limits(…), not {type(limits).__name__}")
        engine = open_engine(
            given,
            clock=clock,
            busy_timeout=busy_timeout,
            durability=durability,
            migrate=migrate,
            pool_size=pool_size,
        )
        return cls(engine, clock=clock, busy_timeout=busy_timeout, limits=limits)

    @staticmethod
    def restore(
        backup: str | PathLike[str],
        target: str | PathLike[str] | URL | None = None,
        *,
        clock: Clock = system_clock,
        busy_timeout: timedelta = timedelta(seconds=5),
    ) -> maintenance.RestoreReport:
        """Replace a database that no process has open by a backup, and keep the old database in quarantine.

        The backup is verified and upgraded to this version's schema first. A new epoch begins: from then on the replay
        guard refuses messages that were signed before. After a crash, either the old or the new database is in place.

        Args:
            backup: file that `backup` made, or a copy of a closed database. If the backup has a manifest file, its
                size, SHA-256 and row counts are compared with the backup.
            target: database to replace, as for `open`. The database may be damaged or absent.
            clock: clock for the start of the new epoch. It must be right, because messages are refused by this time.
            busy_timeout: longest wait for a process that has the target open.

        Returns:
            Report of the restore, with the path of the old database.

        Raises:
            InvalidArgumentError: if the backup is absent or is the target, or if the target is not a file.
            DatabaseBusyError: if a process has the target or the backup open. On Linux the message names the process.
            CorruptDatabaseError, SchemaTooNewError: if the backup is damaged, or of a newer version.
            SchemaChangedError: if the backup's schema was changed by hand, for example by a trigger on devices.
            ForeignDatabaseError: if the backup or the target belongs to another application.
            DatabaseError: if another step failed. The target is unchanged; only if the last step failed, the next
                opening finishes the restore.
        """
        from homeagent.maintenance.restore import restore

        given = conceal(target)
        del target
        return restore(backup, given, clock=clock, busy_timeout=busy_timeout)

    @staticmethod
    def begin_epoch(
        target: str | PathLike[str] | URL | None = None,
        *,
        clock: Clock = system_clock,
        busy_timeout: timedelta = timedelta(seconds=5),
    ) -> maintenance.EpochReport:
        """Begin a new epoch after the database was set back without `restore`. No process may have the database open.

        Call this after a restore with PostgreSQL's tools, or from a snapshot of a disk or a virtual machine. Nonces
        that were consumed after the backup are absent again; in a new epoch the replay guard refuses their messages.

        Args:
            target: database, as for `open`.
            clock: clock for the start of the epoch.
            busy_timeout: longest wait for a process that has the database open.

        Raises:
            DatabaseBusyError: if a process has the database open, and would continue in the old epoch.
            SchemaOutdatedError: if the database is absent, or of an older version.
            DatabaseError: if the database cannot be opened for another reason.
        """
        from homeagent.maintenance.epochs import begin_epoch

        given = conceal(target)
        del target
        return begin_epoch(given, clock=clock, busy_timeout=busy_timeout)

    def close(self) -> None:
        """Stop the sweepers and close every connection. Later calls raise DatabaseClosedError, except `close`."""
        if self._engine.is_forked_copy:
            return  # in a forked child, where a thread of the parent may hold the mutex
        with self._mutex:
            self._closed = True
            sweepers, self._sweepers = self._sweepers, []
        for sweeper in sweepers:
            sweeper.stop()
        self._lease_timer.close()
        try:
            self._engine.close()
        finally:
            self._runner.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Database can't be pickled: pass the target, and open the database in the other process")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # One call, one unit

    @cached_property
    def devices(self) -> DeviceStore:
        """The devices. Each call is a separate unit; see `store`."""
        return self.store(DeviceStore)

    @cached_property
    def agents(self) -> AgentStore:
        """The agents. Each call is a separate unit."""
        return self.store(AgentStore)

    @cached_property
    def sessions(self) -> SessionStore:
        """The index of sessions. Each call is a separate unit."""
        return self.store(SessionStore)

    @cached_property
    def nonces(self) -> NonceStore:
        """The consumed nonces. Each call is a separate unit, so a consumed nonce cannot be rolled back."""
        return self.store(NonceStore)

    @cached_property
    def idempotency_keys(self) -> IdempotencyKeyStore:
        """The idempotency keys. Each call is a separate unit."""
        return self.store(IdempotencyKeyStore)

    def store(self, kind: type[S]) -> S:
        """Return a store whose every method call is a separate unit of work.

        A read is one statement in autocommit mode and takes no lock. If a write depends on a read, use a unit of work
        for both. A write goes through `run`; inside a write unit of the same thread, it raises UnitStateError.

        Args:
            kind: class of the store, such as `DeviceStore`.

        Raises:
            InvalidArgumentError: if `kind` is not the class of a store.
        """
        if not isinstance(kind, type) or not issubclass(kind, Store):
            raise InvalidArgumentError("kind must be the class of a store, such as homeagent.stores.DeviceStore")
        return one_call_store(kind, self._settings, self._runner)

    def read_connection(self) -> AbstractContextManager[Connection]:
        """Return a read-only connection for reports, pandas or ad-hoc SQL, to use in a `with` block.

        The connection sees one snapshot until a commit or rollback. On SQLite, ATTACH is not possible. At most two
        such connections are in use at a time.

        Raises (when the block is entered):
            DatabaseBusyError: if both connections are in use for the whole `busy_timeout`.
            DatabaseClosedError: if the database was closed, or was opened before a fork.
        """
        return self._engine.read_connection(self._timeout)

    # Units of work

    def unit_of_work(self, *, read_only: bool = False) -> UnitOfWork:
        """Return a unit of work, which is one transaction, to use in a `with` block.

        At the end of the block the unit commits. After an exception it rolls back.

        Args:
            read_only: whether to read one snapshot and write nothing. Read-only units and writers do not wait for each
                other.

        Raises (when the block is entered):
            DatabaseBusyError: if the unit did not get the write lock or a connection within `busy_timeout`.
            UnitStateError: if this thread already has an open write unit.
            DatabaseClosedError: if the database was closed, or was opened before a fork.
        """
        return UnitOfWork(self._settings, read_only=read_only)

    def run(self, work: Callable[[UnitOfWork], T], *, read_only: bool = False, idempotent: bool = False) -> T:
        """Call your function inside a unit of work, and call it again after an error that a new try can solve.

        Such errors are: the database is busy, a serialization failure, a deadlock, a connection that was lost before
        COMMIT was sent, and a server that restarts or fails over. The pauses between tries grow; the last try begins
        before `busy_timeout` is over.

        On SQLite, waiting write units share a commit, each in a savepoint. The database's writer thread calls the
        functions, with the context variables of their callers. An exception undoes only its own unit. If the commit
        fails, or a function uses the ORM session, that unit runs alone.

        Args:
            work: function of the unit, which may be called several times. It must have no side effect outside the unit.
            read_only: as in `unit_of_work`.
            idempotent: whether two runs have the same result as one. Then `work` also runs again if the connection was
                lost during COMMIT, so that the outcome of the first run is unknown.

        Returns:
            Return value of `work`, after the commit.

        Raises:
            InvalidArgumentError: if `work` is a coroutine function. No change was made.
            DatabaseBusyError: if the database was busy for the whole `busy_timeout`, or if another function of the
                batch delayed the common commit for as long. No change was made.
            ConnectionLostError: if the server was not reachable within `busy_timeout`. No change was made.
            CommitUnknownError: if the connection was lost during COMMIT. Check whether the commit took place.
        """
        return self._runner.run(work, read_only=read_only, idempotent=idempotent)

    async def arun(self, work: Callable[[UnitOfWork], T], *, read_only: bool = False, idempotent: bool = False) -> T:
        """Do the same as `run` for a coroutine, under asyncio or trio. `work` runs in another thread.

        If the caller is cancelled under asyncio before its unit begins, the unit does not run. Otherwise the caller
        waits for the end of its unit, so that no transaction stays open.

        Args:
            work: ordinary function. It runs with the caller's context variables.
            read_only: as in `unit_of_work`.
            idempotent: as in `run`.

        Raises:
            InvalidArgumentError, DatabaseBusyError, ConnectionLostError, CommitUnknownError: as in `run`.
        """
        return await self._runner.arun(work, read_only=read_only, idempotent=idempotent)

    # Effects that happen once

    @clears_locals
    def run_once(
        self,
        scope: IdempotencyScope,
        effect: Callable[[Attempt], JsonValue],
        *,
        params: JsonValue = None,
        lease: timedelta = timedelta(minutes=1),
        ttl: timedelta = timedelta(hours=24),
        on_abandoned: OnAbandoned = "refuse",
    ) -> Outcome:
        """Run a side effect once for all calls of one scope. Later calls return the stored outcome.

        The claim is committed before the effect begins, and the outcome after the effect ended. Meanwhile a background
        thread renews the lease.

        Args:
            scope: identity of the call: device, method, and the key that the device chose.
            effect: function of the attempt, which returns any JSON value and may pass `attempt.downstream_key` to
                another service. EffectFailedError is stored and replayed. EffectNotStartedError frees the key. Any
                other exception leaves the outcome unknown.
            params: parameters of the call. The same key with other parameters raises FingerprintMismatchError.
            lease: time after the last renewal after which an attempt counts as abandoned.
            ttl: time for which the outcome is replayed.
            on_abandoned: action after an abandoned attempt: `refuse`, `rerun`, or a function of the new attempt that
                returns the outcome.

        Raises:
            InvalidArgumentError: if an argument is invalid. For a coroutine function, use `arun_once`.
            FingerprintMismatchError: if the key was used with other parameters.
            IdempotencyInProgressError: if another caller runs the effect now. Try again after `retry_after`.
            OutcomeUnknownError: if an attempt was abandoned, and `on_abandoned` is `refuse`.
            LeaseLostError: if the effect ran, but its key was taken over or deleted meanwhile.
            EffectFailedError, EffectNotStartedError: if the effect raised this error.
        """
        call = OnceCall.of(
            scope,
            params=params,
            lease=lease,
            ttl=ttl,
            on_abandoned=on_abandoned,
            effect=effect,
            instead=ARUN_ONCE,
        )
        return run_once(partial(self._runner.run, idempotent=True), self._lease_timer, call, effect)

    @clears_locals
    async def arun_once(
        self,
        scope: IdempotencyScope,
        effect: Callable[[Attempt], Awaitable[JsonValue]],
        *,
        params: JsonValue = None,
        lease: timedelta = timedelta(minutes=1),
        ttl: timedelta = timedelta(hours=24),
        on_abandoned: OnAbandoned = "refuse",
    ) -> Outcome:
        """Do the same as `run_once` for an effect that is a coroutine function, under asyncio or trio.

        If the caller is cancelled, the effect is cancelled too. An outcome that is known is still recorded.
        """
        call = OnceCall.of(scope, params=params, lease=lease, ttl=ttl, on_abandoned=on_abandoned, effect=effect)
        return await arun_once(partial(self._runner.arun, idempotent=True), self._lease_timer, call, effect)
