"""Public entry point: open a database, run units of work and one-time effects. Base classes add the other methods."""

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
    """One open operational store. Share one among all threads of a process; open another one in a forked child.

    Use `Database.open`, and close it, or let a `with` block do that.
    """

    def __init__(self, engine: Engine, *, clock: Clock, busy_timeout: timedelta, limits: Limits) -> None:
        self._engine = engine
        self._limits = limits
        self._clock = clock
        self._timeout = busy_timeout.total_seconds()
        self._settings = UnitSettings(engine, clock, self._timeout)
        self._runner = Runner(self._settings)
        self._lease_timer = LeaseTimer(partial(self._runner.run, idempotent=True))
        # A signal's handler may come while its own thread holds it, and close the database.
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
        """Open a database, made or upgraded first where that is needed.

        Args:
            target: None for `$HOMEAGENT_DATABASE`, else `~/.homeagent/homeagent.db`; a path; `":memory:"` for a
                private temporary database; or a URL.
            clock: returns the present instant; read once per store method.
            busy_timeout: how long a unit waits for its turn; 24 days at most, whatever is asked for.
            durability: `full` syncs every commit to the disk. `normal` may lose the last commits at a power cut,
                which reopens the window for a replay.
            migrate: whether the schema may be made or upgraded. A file that holds data is backed up first.
            pool_size: on PostgreSQL, how many units may write at once and how many may read, 1 to 1,000 each; at most
                twice as many connections are kept open. SQLite has one writer, whatever this is.
            limits: how much callers can create or use up before an administrator lets them in.

        Raises:
            InvalidArgumentError: the target or an argument is of no use.
            SchemaTooNewError, SchemaOutdatedError, SchemaChangedError, MigrationError: the schema, see there.
            ForeignDatabaseError, CorruptDatabaseError, InsecureFileError: the file, which was not touched.
            DatabaseError: anything else that keeps it from being opened.
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
        """Put a backup in the place of a database that nobody has open, and keep what was there aside.

        The backup is verified first, and brought to this version's schema. A new epoch begins, which `status` shows:
        from then on the replay guard refuses what was signed before. A crash at any instant leaves the old database
        in place or the new one.

        Args:
            backup: a file that `backup` made, or any copy of a closed database. Its manifest, where there is one
                beside it, is held against it.
            target: which database, as `open` takes it; it may be damaged, or absent.
            clock: tells when the new epoch begins. Set it right first: messages are refused by that instant.
            busy_timeout: how long to wait for who has the target open.

        Returns:
            What it came to, and where the old database is kept.

        Raises:
            InvalidArgumentError: the backup is absent or is the target itself, or the target is no file.
            DatabaseBusyError: somebody has the target open, or the backup; the message says who, where it can.
            CorruptDatabaseError, SchemaTooNewError: the backup is damaged, or of a newer version.
            SchemaChangedError: if the backup's schema was changed by hand, for example by a trigger on devices.
            ForeignDatabaseError: the backup, or the target, is another application's.
            DatabaseError: anything else. Unless the very last step failed, which the next opening finishes, the
                target is as it was.
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
        """Begin a new epoch of a store that was set back by other means than `restore`, and that nobody has open.

        After a PostgreSQL server's own tools, or a snapshot of a disk or a virtual machine: what was consumed since
        is fresh again, and the replay guard has to know.

        Args:
            target: which database, as `open` takes it.
            clock: tells when the epoch begins.
            busy_timeout: how long to wait for who has it open.

        Raises:
            DatabaseBusyError: somebody has it open, and would go on in the epoch before.
            SchemaOutdatedError: it is absent, or of an older version.
            DatabaseError: anything else that keeps it from being opened.
        """
        from homeagent.maintenance.epochs import begin_epoch

        given = conceal(target)
        del target
        return begin_epoch(given, clock=clock, busy_timeout=busy_timeout)

    def close(self) -> None:
        """Stop the sweepers and close every connection. Closing twice is fine; what is used after it is refused."""
        if self._engine.is_forked_copy:
            return  # a forked child's copy; somebody who is not there may hold the mutex
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
        raise TypeError("a Database can't be pickled: pass its target, and open it in the other process")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # One call, one unit

    @cached_property
    def devices(self) -> DeviceStore:
        """The devices, each call a unit of its own: a read takes no lock, a write goes through `run`."""
        return self.store(DeviceStore)

    @cached_property
    def agents(self) -> AgentStore:
        """The agents, each call a unit of its own."""
        return self.store(AgentStore)

    @cached_property
    def sessions(self) -> SessionStore:
        """The index of sessions, each call a unit of its own."""
        return self.store(SessionStore)

    @cached_property
    def nonces(self) -> NonceStore:
        """The consumed nonces, each call a unit of its own: a nonce that was consumed here can't be rolled back."""
        return self.store(NonceStore)

    @cached_property
    def idempotency_keys(self) -> IdempotencyKeyStore:
        """The idempotency keys, each call a unit of its own."""
        return self.store(IdempotencyKeyStore)

    def store(self, kind: type[S]) -> S:
        """Return a store whose every method call is a unit of work of its own.

        A read is one statement in autocommit mode, which takes no lock: code that decides on what it has read needs a
        unit of work. A write goes through `run`; inside a write unit of the same thread it raises UnitStateError.

        Args:
            kind: the class of the store, such as `DeviceStore`.

        Raises:
            InvalidArgumentError: `kind` is not a store's class.
        """
        if not isinstance(kind, type) or not issubclass(kind, Store):
            raise InvalidArgumentError("kind must be the class of a store, such as homeagent.stores.DeviceStore")
        return one_call_store(kind, self._settings, self._runner)

    def read_connection(self) -> AbstractContextManager[Connection]:
        """Return a connection for reports, pandas or ad-hoc SQL, to use as a context manager.

        It is opened read-only and sees one snapshot until it is committed or rolled back. On SQLite it can attach no
        other file. At most two are lent at a time.

        Raises (when the block is entered):
            DatabaseBusyError: none was given back within `busy_timeout`.
            DatabaseClosedError: the database was closed, or opened before a fork.
        """
        return self._engine.read_connection(self._timeout)

    # Units of work

    def unit_of_work(self, *, read_only: bool = False) -> UnitOfWork:
        """Return a unit of work to use as a context manager: one transaction.

        It commits when the block ends cleanly, and rolls everything back on any exception.

        Args:
            read_only: see one snapshot, and write nothing. Such units wait for no writer, and no writer for them.

        Raises (when the block is entered):
            DatabaseBusyError: no turn came within `busy_timeout`.
            UnitStateError: this thread has a write unit open already.
            DatabaseClosedError: the database was closed, or opened before a fork.
        """
        return UnitOfWork(self._settings, read_only=read_only)

    def run(self, work: Callable[[UnitOfWork], T], *, read_only: bool = False, idempotent: bool = False) -> T:
        """Do a unit of work as a function, run again whole where it took no effect.

        That is so while the database is busy, after a serialization failure or a deadlock, and where the connection
        was lost before COMMIT was sent or while the server restarts or fails over. It is tried until `busy_timeout`
        is over, with growing pauses.

        On SQLite, write units that wait for one another share a commit, each in a savepoint: one that raises is
        undone alone, and where the commit fails, each is run again by itself. The writer thread of the database runs
        them, with their callers' context variables. A unit that asks for its ORM session is done alone.

        Args:
            work: is given the unit and may be called several times: it has no effect but on the unit.
            read_only: as in `unit_of_work`.
            idempotent: whether doing it twice is the same as doing it once. It is run again then also where the
                connection was lost in the middle of COMMIT, so that nobody knows whether that took place.

        Returns:
            What `work` returned, once that is committed.

        Raises:
            InvalidArgumentError: `work` is a coroutine function; nothing took place.
            DatabaseBusyError: the database was still busy after `busy_timeout`, or another caller's function kept the
                common commit waiting for as long; nothing took place.
            ConnectionLostError: the server still could not be reached after `busy_timeout`; nothing took place.
            CommitUnknownError: the connection was lost in the middle of COMMIT: look whether it took place.
        """
        return self._runner.run(work, read_only=read_only, idempotent=idempotent)

    async def arun(self, work: Callable[[UnitOfWork], T], *, read_only: bool = False, idempotent: bool = False) -> T:
        """Do a unit of work from a coroutine, under asyncio or trio: `run`, in another thread.

        A caller that is cancelled before its unit's turn under asyncio leaves the queue, and nothing took place.
        Otherwise it waits for its unit to end, so that no transaction is left open.

        Args:
            work: an ordinary function; it runs in another thread, with the caller's context variables.
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
        """Run a side effect once for all calls of one scope, and answer the others with what it returned.

        The claim is committed before the effect begins, and its outcome after it ended. The lease is renewed in the
        background meanwhile.

        Args:
            scope: what makes it the same call: device, method, and the key that the device chose.
            effect: is given the attempt, whose `downstream_key` may be passed on; returns any JSON value. An
                EffectFailedError is stored and replayed, an EffectNotStartedError frees the key, and anything else
                leaves the outcome unknown.
            params: the call's parameters: the same key with other ones is refused.
            lease: how long after its last sign of life an attempt counts as abandoned.
            ttl: how long the outcome is replayed.
            on_abandoned: what to do about an abandoned attempt: `refuse`, `rerun`, or a function that finds out; it
                is given the new attempt, and what it returns is the outcome.

        Raises:
            InvalidArgumentError: a bad argument, a coroutine function among them, which `arun_once` takes.
            FingerprintMismatchError: the key was used with other parameters.
            IdempotencyInProgressError: another caller runs it now; `retry_after` says when to ask again.
            OutcomeUnknownError: an attempt was abandoned, and `on_abandoned` is `refuse`.
            LeaseLostError: the effect ran, but its key had been taken over or deleted meanwhile.
            EffectFailedError, EffectNotStartedError: the effect's own.
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
        """Do as `run_once` does, for an effect that is a coroutine function, under asyncio or trio.

        A cancelled caller cancels the effect. What is known of its outcome is recorded all the same.
        """
        call = OnceCall.of(scope, params=params, lease=lease, ttl=ttl, on_abandoned=on_abandoned, effect=effect)
        return await arun_once(partial(self._runner.arun, idempotent=True), self._lease_timer, call, effect)
