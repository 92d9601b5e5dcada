"""Public entry point of the package. `Database` opens a database and runs units of work and effects."""

from __future__ import annotations

import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from functools import cached_property, partial
from os import PathLike
from typing import Any, Generic, NoReturn, Self

from pydantic import JsonValue
from sqlalchemy import URL, Connection, MetaData

from homeagent import maintenance
from homeagent.callables import check_function
from homeagent.canonical_json import fingerprint_of
from homeagent.clock import Clock, system_clock
from homeagent.credentials import FailedChecks
from homeagent.database_maintenance import DatabaseMaintenance
from homeagent.device_changes import DeviceChanges, DeviceWatcher
from homeagent.device_secrets import DeviceSecrets
from homeagent.engine.engine import Engine
from homeagent.engine.target import conceal
from homeagent.environment import (
    BUSY_TIMEOUT,
    DURABILITY,
    POOL_SIZE,
    Durability,
    busy_timeout_or_default,
)
from homeagent.errors import InvalidArgumentError
from homeagent.frame_locals import clears_locals
from homeagent.idempotency import ARUN_ONCE, LeaseTimer, OnAbandoned, OnceCall, arun_once, run_once
from homeagent.models.device_change import DeviceChange
from homeagent.models.idempotency_key import Attempt, IdempotencyScope, Outcome
from homeagent.models.limits import Limits
from homeagent.models.types import check_flag, check_wait
from homeagent.one_call import one_call_store
from homeagent.opening import open_engine
from homeagent.retry import Runner
from homeagent.stores.agents import AgentStore
from homeagent.stores.device_statements import check_number
from homeagent.stores.devices import DeviceStore
from homeagent.stores.idempotency_keys import IdempotencyKeyStore
from homeagent.stores.nonces import NonceStore
from homeagent.stores.sessions import SessionStore
from homeagent.stores.store import Store
from homeagent.transaction import UnitSettings
from homeagent.unit_of_work import UnitOfWork, add_stores

if sys.version_info >= (3, 13):
    from typing import TypeVar
else:
    from typing_extensions import TypeVar

_DEFAULT_LIMITS = Limits()
_NO_COROUTINE = "make it an ordinary function, and await outside the unit"

S = TypeVar("S", bound=Store)
T = TypeVar("T")
U = TypeVar("U", bound=UnitOfWork, default=UnitOfWork, covariant=True)
V = TypeVar("V", bound=UnitOfWork, default=UnitOfWork)


class Database(DeviceSecrets, DatabaseMaintenance, Generic[U]):
    """An open database of homeagent. All threads of a process can share one `Database`.

    The units of a `Database[HubUnit]` have the class `HubUnit`, a subclass of `UnitOfWork`. A parameter of the type
    `Database` also accepts a `Database[HubUnit]`.

    A forked child process must open the database again. Open a database with `Database.open`. Close a database with
    `close()` or a `with` block.
    """

    def __init__(self, engine: Engine, *, clock: Clock, busy_timeout: timedelta, limits: Limits, unit: type[U]) -> None:
        self._engine = engine
        self._limits = limits
        self._timeout = busy_timeout.total_seconds()
        self._unit = unit
        self._settings = UnitSettings(engine, clock, self._timeout, unit, limits)
        self._clock: Clock = self._settings.now
        self._runner = Runner(self._settings)
        self._lease_timer = LeaseTimer(partial(self._runner.run, idempotent=True))
        # The mutex is reentrant, because a signal handler can close the database.
        self._mutex = threading.RLock()
        self._sweepers: list[maintenance.Sweeper] = []
        self._device_watcher = DeviceWatcher(engine, timeout=self._timeout)
        self._failed_checks = FailedChecks(self._clock, per_minute=limits.failed_checks_per_minute)
        self._closed = False

    @classmethod
    def open(
        cls,
        target: str | PathLike[str] | URL | None = None,
        *,
        clock: Clock = system_clock,
        busy_timeout: timedelta = BUSY_TIMEOUT,
        durability: Durability = DURABILITY,
        migrate: bool = True,
        pool_size: int = POOL_SIZE,
        unit: type[V] | None = None,
        migrations: str | PathLike[str] | None = None,
        metadata: Sequence[MetaData] = (),
        acknowledged: Collection[str] = (),
        limits: Limits = _DEFAULT_LIMITS,
    ) -> Database[V]:
        """Open a database, and create or upgrade its schema if necessary.

        Args:
            target: path, URL, or `":memory:"` for a private temporary database. The default is the environment variable
                `HOMEAGENT_DATABASE`. Without the variable, the default is `~/.homeagent/homeagent.db`.
            clock: function that returns the current time. Each store method calls the clock once.
            busy_timeout: longest wait for the write lock or a connection, capped at 24 days.
            durability: `durability="full"` syncs every commit to the disk. With `durability="normal"`, a power cut can
                lose the last commits. An attacker can replay a message whose nonce was lost.
            migrate: True to create or upgrade the schema. Before an upgrade, homeagent makes a backup of a SQLite file.
            pool_size: maximum number of connections for write units, from 1 to 1,000. Read-only units have a separate
                pool with the same maximum. SQLite ignores `pool_size`.
            unit: subclass of `UnitOfWork` with the application's own stores. None means `UnitOfWork`.
            migrations: folder of the application's Alembic revisions, as "package:folder" or a path. An upgrade runs
                these revisions after homeagent's revisions.
            metadata: metadata of the application's tables that do not derive from `homeagent.Table`.
            acknowledged: names of the application's triggers on homeagent's tables, in the exact case. If a trigger's
                name is missing, upgrades, copies and restores fail. A trigger must not suppress homeagent's writes.
            limits: limits on rows that devices create, and on work that callers cause.

        Raises:
            InvalidArgumentError: if the target or another argument is invalid.
            SchemaTooNewError, SchemaOutdatedError, SchemaChangedError, MigrationError: if the schema cannot be used.
            ForeignDatabaseError, CorruptDatabaseError, InsecureFileError: if homeagent refuses the file, which stays
                unchanged.
            DatabaseError: if the database cannot be opened for another reason.
        """
        given, target = conceal(target), None
        busy_timeout = check_wait(busy_timeout_or_default(busy_timeout), "busy_timeout", zero=True)
        check_function(clock, "clock")
        if not isinstance(limits, Limits):
            raise InvalidArgumentError(f"limits must be Limits(…), not {type(limits).__name__}")
        kind: type[Any] = UnitOfWork if unit is None else add_stores(unit)
        engine = open_engine(
            given,
            clock=clock,
            busy_timeout=busy_timeout,
            durability=durability,
            migrate=migrate,
            pool_size=pool_size,
            migrations=migrations,
            metadata=metadata,
            acknowledged=acknowledged,
        )
        return Database(engine, clock=clock, busy_timeout=busy_timeout, limits=limits, unit=kind)

    def close(self) -> None:
        """Stop sweepers and iterators of device changes, and close every connection.

        After a call of `close()`, each use of the database except `counters()` raises DatabaseClosedError. The methods
        `unit_of_work()`, `store()`, `read_connection()` and `watch_devices(after=n)` still return an object. The use of
        the object raises DatabaseClosedError. A unit that is open during the call of `close()` stays usable and can
        commit. Its connection is closed at the end of the unit.
        """
        if self._engine.is_forked_copy:
            # A forked child must not take the mutex, which can stay locked.
            return
        with self._mutex:
            self._closed = True
            sweepers, self._sweepers = self._sweepers, []
        for sweeper in sweepers:
            sweeper.stop()
        self._device_watcher.close()
        self._lease_timer.close()
        try:
            self._engine.close()
        finally:
            self._runner.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Database can't be pickled: pass the target, and open the database in the other process")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # Stores in which each call is a separate unit of work

    @cached_property
    def devices(self) -> DeviceStore:
        """The store of devices. Each call of a method is a separate unit of work (see `Database.store()`)."""
        return self.store(DeviceStore)

    @cached_property
    def agents(self) -> AgentStore:
        """The store of agents. Each call of a method is a separate unit of work."""
        return self.store(AgentStore)

    @cached_property
    def sessions(self) -> SessionStore:
        """The store of sessions. Each call of a method is a separate unit of work."""
        return self.store(SessionStore)

    @cached_property
    def nonces(self) -> NonceStore:
        """The store of consumed nonces. Each call of a method is a separate unit of work. The application can't roll
        back a consumed nonce.
        """
        return self.store(NonceStore)

    @cached_property
    def idempotency_keys(self) -> IdempotencyKeyStore:
        """The store of idempotency keys. Each call of a method is a separate unit of work."""
        return self.store(IdempotencyKeyStore)

    def store(self, kind: type[S]) -> S:
        """Return a store whose calls are separate units of work.

        A read is one statement in autocommit mode, without a lock. A write runs in `Database.run()`. With an iterator
        as an argument, a write runs in a unit without retries. In a thread with an open write unit, a write raises
        `UnitStateError`. If a write depends on a read, use one unit of work for both.

        A write or a second statement can stop a method of the application's store. Then homeagent calls the method
        again in a unit of work.

        Args:
            kind: class of the store, such as `DeviceStore` or an application's store.

        Raises:
            InvalidArgumentError: if the argument is not a subclass of `Store`.
        """
        if not isinstance(kind, type) or not issubclass(kind, Store):
            raise InvalidArgumentError("kind must be the class of a store, such as homeagent.stores.DeviceStore")
        return one_call_store(kind, self._settings, self._runner)

    def watch_devices(self, *, after: int | None = None) -> AsyncIterator[DeviceChange]:
        """Return an asynchronous iterator of device changes, under asyncio or trio.

        The iterator returns the changes of all processes in the order of commits. A change arrives within 0.3 s of the
        commit. Only one task at a time can use the iterator. After a restore, the iterator returns a change of the kind
        `reset`. The iterator also returns a `reset` change if unread changes were deleted. After a `reset` change, read
        all devices again. The method `aclose()` ends the iteration.

        Args:
            after: number of the last change that the caller has read. The default is the newest change in the database.

        Raises:
            InvalidArgumentError: if the argument is not the number of a change.
            DatabaseError: if the database cannot be read. The iterator raises DatabaseError after 5 s without a
                successful read.
            DatabaseClosedError: if the database was closed, or was opened before a fork. When the database is closed, a
                waiting iterator raises DatabaseClosedError.
        """
        number = self.devices.newest_change() if after is None else check_number(after)
        return DeviceChanges(self._device_watcher, number)

    def read_connection(self) -> AbstractContextManager[Connection]:
        """Return a read-only connection for reports, pandas or ad-hoc SQL. Use the connection as a context manager.

        The connection reads one snapshot until the caller commits or rolls back. On SQLite, the connection refuses
        ATTACH. At most two callers at a time can use connections for reports.

        Raises (when the block is entered):
            DatabaseBusyError: if two other callers use the read-only connections for the whole `busy_timeout`.
            DatabaseClosedError: if the database was closed, or was opened before a fork.
        """
        return self._engine.read_connection(self._timeout)

    # Units of work

    def unit_of_work(self, *, read_only: bool = False) -> AbstractContextManager[U, None]:
        """Return a unit of work, which is one transaction. Use the unit as a context manager.

        At the end of the block the unit commits. If an exception leaves the block, the unit rolls back.

        Args:
            read_only: True if the unit only reads. All reads of a read-only unit see one snapshot. Read-only units and
                writers do not wait for each other.

        Raises (when the block is entered):
            DatabaseBusyError: if the unit got no write lock or connection within the `busy_timeout`.
            UnitStateError: if this thread already has an open write unit.
            DatabaseClosedError: if the database was closed, or was opened before a fork.
        """
        # mypy does not see that the method `__enter__` of a `U` returns a `U`.
        return self._unit(self._settings, read_only)  # type: ignore[return-value]

    def run(self, work: Callable[[U], T], *, read_only: bool = False, idempotent: bool = False) -> T:
        """Call your function in a unit of work, and retry after a temporary error.

        Temporary errors are a serialization failure, a deadlock and a busy database. A failover and a connection lost
        before COMMIT are also temporary errors. The pauses between tries grow. The last try begins before the
        `busy_timeout` is over.

        On SQLite, waiting write units share one commit. Each unit has a savepoint. The writer thread can call the
        function, with the caller's context variables. If a function raises an exception, only its unit is undone. If a
        shared commit fails, each unit runs again separately.

        Args:
            work: function that gets the unit. A retry calls the function again. The function must have no side effect
                outside the unit.
            read_only: see `unit_of_work()`.
            idempotent: True if a second run of the function makes no further change. With `idempotent=True`, the
                function runs again even after CommitUnknownError.

        Returns:
            Return value of the function, after the commit.

        Raises:
            InvalidArgumentError: if `work` is not callable, or is a coroutine or generator function.
            DatabaseBusyError: if the database was busy for the whole `busy_timeout`. A slow function in the same shared
                commit can also cause the error. The failed call changed no row.
            ConnectionLostError: if the server was not reachable within the `busy_timeout`. The failed call changed no
                row.
            CommitUnknownError: if the connection was lost during COMMIT. Before you repeat the call, check whether the
                commit took place.
        """
        check_function(work, "work", coroutine=_NO_COROUTINE)
        check_flag(idempotent, "idempotent")
        return self._runner.run(work, read_only=read_only, idempotent=idempotent)  # type: ignore[arg-type]  # a unit is a U

    async def arun(self, work: Callable[[U], T], *, read_only: bool = False, idempotent: bool = False) -> T:
        """Run a unit like `Database.run()`, without blocking the event loop. The function runs in another thread, under
        asyncio or trio.

        Under asyncio, a unit that has not begun does not run after a cancellation. If the unit has begun, the cancelled
        caller waits for its end.

        Args:
            work: ordinary function, which runs with the caller's context variables.
            read_only: see `unit_of_work()`.
            idempotent: see `run()`.

        Raises:
            UnitStateError: if this asyncio task already has an open write unit and `read_only=False`.
            InvalidArgumentError, DatabaseBusyError, ConnectionLostError, CommitUnknownError: in the same cases as for
                `Database.run()`.
        """
        check_function(work, "work", coroutine=_NO_COROUTINE)
        check_flag(idempotent, "idempotent")
        # mypy does not see that a unit of this database is a `U`.
        return await self._runner.arun(work, read_only=read_only, idempotent=idempotent)  # type: ignore[arg-type]

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
        """Run a side effect once for each device, method and key. Later calls return the stored outcome.

        Before the effect, homeagent commits a record that claims the key. After the effect, homeagent commits the
        outcome. During the effect, a background thread renews the lease of the key.

        Args:
            scope: identity of the call: device, method and idempotency key.
            effect: function that gets the attempt and returns any JSON value. The idempotency key for another service
                is `attempt.downstream_key`. If the function raises `EffectFailedError`, later calls raise the stored
                error. If the function raises `EffectNotStartedError`, the next call can run the effect. After any other
                exception, the outcome of the effect is unknown.
            params: parameters of the call. A later call with the same key must have equal parameters.
            lease: duration of the lease. If the lease ends without a renewal, the attempt counts as abandoned.
            ttl: time for which a retry of the call returns the stored outcome.
            on_abandoned: action after an abandoned attempt: "refuse", "rerun" or a function. The function gets the new
                attempt and returns the outcome.

        Raises:
            InvalidArgumentError: if an argument is invalid. For a coroutine function, use the method `arun_once()`.
            FingerprintMismatchError: if an earlier call used the key with different parameters.
            IdempotencyInProgressError: if another caller is running the effect.
            OutcomeUnknownError: if an earlier attempt was abandoned and `on_abandoned="refuse"`.
            LeaseLostError: if the effect ran, but this call could not record the outcome. Another caller had taken over
                or deleted the key.
            EffectFailedError, EffectNotStartedError: if the effect raised the error. The stored EffectFailedError of an
                earlier call is raised again.
        """
        call = OnceCall(scope, fingerprint_of(params), lease, ttl, on_abandoned)
        call.check(effect, ARUN_ONCE)
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
        """Run a coroutine function like `run_once()`, under asyncio or trio.

        A cancellation of the caller also cancels the effect. After the end of the effect, homeagent records the outcome
        despite a cancellation.
        """
        call = OnceCall(scope, fingerprint_of(params), lease, ttl, on_abandoned)
        call.check(effect)
        return await arun_once(partial(self._runner.arun, idempotent=True), self._lease_timer, call, effect)
