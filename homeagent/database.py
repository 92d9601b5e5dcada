"""The door of the package: open a database, do units of work, pair devices and check their secrets, clean up."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from datetime import datetime, timedelta
from functools import cached_property, partial
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn, Self, TypeVar

from pydantic import JsonValue, SecretStr
from sqlalchemy import URL, Connection

from homeagent import maintenance, models
from homeagent.callables import check_function
from homeagent.clock import Clock, system_clock
from homeagent.engine.engine import Engine
from homeagent.engine.files.directories import prepare_directory
from homeagent.engine.files.filesystems import refuse_network_filesystem
from homeagent.engine.postgresql.engine import POOL_SIZE, PostgreSQLEngine
from homeagent.engine.sqlite.engine import Durability, SQLiteEngine
from homeagent.engine.target import resolve_target
from homeagent.errors import DatabaseClosedError, InvalidArgumentError
from homeagent.idempotency import ARUN_ONCE, LeaseTimer, OnAbandoned, OnceCall, arun_once, run_once
from homeagent.migrations.sqlite import open_sqlite
from homeagent.models.device import Device
from homeagent.models.idempotency_key import Attempt, IdempotencyScope, Outcome
from homeagent.models.types import check_duration, check_limit, check_wait
from homeagent.one_call import one_call_store
from homeagent.retry import Runner
from homeagent.stores.agents import AgentStore
from homeagent.stores.devices import DeviceStore
from homeagent.stores.idempotency_keys import IdempotencyKeyStore
from homeagent.stores.nonces import NonceStore
from homeagent.stores.sessions import SessionStore
from homeagent.stores.store import Store
from homeagent.unit_of_work import UnitOfWork, UnitSettings

if TYPE_CHECKING:
    from homeagent.maintenance.content_check import ContentCheck
    from homeagent.pairing import Pairing

__all__ = ["Database"]

S = TypeVar("S", bound=Store)
T = TypeVar("T")


class Database:
    """One open operational store. Share one among all threads of a process; open another one in a forked child.

    Use `Database.open`, and close it, or let a `with` block do that.
    """

    def __init__(self, engine: Engine, *, clock: Clock, busy_timeout: timedelta) -> None:
        self._engine = engine
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

        Raises:
            InvalidArgumentError: the target or an argument is of no use.
            SchemaTooNewError, SchemaOutdatedError, SchemaChangedError, MigrationError: the schema, see there.
            ForeignDatabaseError, CorruptDatabaseError, InsecureFileError: the file, which was not touched.
            DatabaseError: anything else that keeps it from being opened.
        """
        busy_timeout = check_wait(busy_timeout, "busy_timeout", zero=True)
        if durability not in ("full", "normal"):
            raise InvalidArgumentError("durability must be 'full' or 'normal'")
        if check_limit(pool_size, "pool_size") > 1000:
            raise InvalidArgumentError("pool_size must be 1 to 1000")
        check_function(clock, "clock")
        where = resolve_target(target)
        engine: SQLiteEngine | PostgreSQLEngine
        if where.url is not None:
            engine = PostgreSQLEngine(where.url, busy_timeout=busy_timeout, pool_size=pool_size)
        elif where.path is None:
            engine = SQLiteEngine.temporary(busy_timeout=busy_timeout, durability=durability)
        else:
            if migrate:
                prepare_directory(where.path.parent)
                refuse_network_filesystem(where.path)
            engine = SQLiteEngine(where.path, busy_timeout=busy_timeout, durability=durability)
        try:
            if isinstance(engine, SQLiteEngine):
                open_sqlite(
                    engine,
                    clock=clock,
                    timeout=busy_timeout,
                    migrate=migrate or where.is_temporary,
                    temporary=where.is_temporary,
                )
            else:
                from homeagent.migrations.postgresql import open_postgresql

                open_postgresql(engine, timeout=busy_timeout, migrate=migrate)
        except BaseException:
            engine.close()
            raise
        return cls(engine, clock=clock, busy_timeout=busy_timeout)

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

        return restore(backup, target, clock=clock, busy_timeout=busy_timeout)

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

        return begin_epoch(target, clock=clock, busy_timeout=busy_timeout)

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

    # Devices and their secrets

    @property
    def _pairing(self) -> Pairing:
        if self._made_pairing is None:
            # A process that checks no secret starts sooner without it.
            from homeagent.pairing import Pairing

            # Two threads must not make two: each would count failed checks by itself.
            with self._mutex:
                if self._made_pairing is None:
                    self._made_pairing = Pairing(self._runner, self._clock)
        return self._made_pairing

    def pair(self, request: models.DevicePair) -> models.PairedDevice:
        """Add a device that waits for its approval. Only a hash of its secret is stored.

        What calls of an earlier device under this id recorded after it was deleted is removed.

        Args:
            request: with the secret that a human chose, or without one: then 256 random bits are made.

        Returns:
            The device and its secret, which can't be asked for again.

        Raises:
            DeviceExistsError: the id is taken. So `pair` tells its caller that the id exists.
            InvalidArgumentError: the secret is too long or has a control character.
            TooManyAttemptsError: a human chose the secret, and 16 slow hashes wait for their turn already.
        """
        return self._pairing.pair(request)

    async def apair(self, request: models.DevicePair) -> models.PairedDevice:
        """Do as `pair` does without blocking the event loop, under asyncio or trio."""
        return await self._pairing.apair(request)

    def verify_secret(self, device_id: str, shared_secret: SecretStr | str) -> Device | None:
        """Return the device if it is approved and this is its secret, else None.

        `check_secret` also tells a caller with the right secret that the device is pending or revoked.

        Args:
            device_id: who it claims to be.
            shared_secret: what it presents. During the overlap of a rotation the old secret serves too.

        Raises:
            TooManyAttemptsError, DatabaseBusyError: as in `check_secret`.
        """
        return self._pairing.verify_secret(device_id, shared_secret)

    def check_secret(self, device_id: str, shared_secret: SecretStr | str) -> models.SecretCheck:
        """Tell whether this is the device's secret, and whether the device is approved, pending or revoked.

        What a check of a wrong secret costs, and whether it is refused, depends on the id and the secret that are
        presented, and not on the device: not on whether it exists, is approved, or has a generated secret.

        Args:
            device_id: the id that is presented.
            shared_secret: the secret that is presented. During the overlap of a rotation the old secret serves too.

        Returns:
            True only if the secret is right and the device is approved. If the secret is wrong or the device is
            absent, `status` is `denied` and `device` is None.

        Raises:
            TooManyAttemptsError: 30 checks of this id failed within a minute in this process, or 16 slow hashes wait
                for their turn already. No hash was computed, and the right secret is refused too. A secret in the
                generated form is never refused.
            DatabaseBusyError: no turn to hash the secret came within 30 seconds.
        """
        return self._pairing.check_secret(device_id, shared_secret)

    async def acheck_secret(self, device_id: str, shared_secret: SecretStr | str) -> models.SecretCheck:
        """Do as `check_secret` does without blocking the event loop, under asyncio or trio.

        Slow hashes run in threads of their own, and take none from `arun` or from checks of generated secrets.
        """
        return await self._pairing.acheck_secret(device_id, shared_secret)

    def verify_proof(self, device_id: str, *, nonce: str, timestamp: datetime, proof: bytes) -> Device | None:
        """Return the device if it is approved and the proof is made with its secret, else None.

        The proof is the client's of SCRAM (RFC 5802, section 3) over the device's id, the nonce and the timestamp:
        `homeagent.scram.make_proof` makes it. What is stored can check a proof and can't make one. Consume the nonce
        after this, before access is given. After a rotation only the new secret's proofs serve, at once.

        Args:
            device_id: who it claims to be.
            nonce: the number used once that was signed.
            timestamp: the instant that was signed.
            proof: 32 bytes; of any other length it is wrong.

        Raises:
            InvalidArgumentError: one of them can't be what it is to be, whatever the device: the nonce is no text that
                could be consumed, the timestamp has no time zone, or the proof is no `bytes`.
        """
        return self._pairing.verify_proof(device_id, nonce=nonce, timestamp=timestamp, proof=proof)

    def rotate_secret(
        self, device_id: str, shared_secret: SecretStr | None = None, *, overlap: timedelta = timedelta(0)
    ) -> SecretStr:
        """Give a device a new secret, and return it, once.

        Args:
            device_id: the device; it keeps its role and its approval.
            shared_secret: the secret that a human chose; None to have one made.
            overlap: how long the old secret serves as well; not at all by default. One that still served from an
                earlier rotation ends at once.

        Raises:
            DeviceNotFoundError: it is absent.
            DeviceNotApprovedError: an overlap was given and the device is pending or revoked.
            InvalidArgumentError: the secret has fewer than 8 characters, is too long or has a control character.
            TooManyAttemptsError: a human chose the secret, and 16 slow hashes wait for their turn already.
        """
        return self._pairing.rotate_secret(device_id, shared_secret, overlap=overlap)

    async def arotate_secret(
        self, device_id: str, shared_secret: SecretStr | None = None, *, overlap: timedelta = timedelta(0)
    ) -> SecretStr:
        """Do as `rotate_secret` does without blocking the event loop, under asyncio or trio."""
        return await self._pairing.arotate_secret(device_id, shared_secret, overlap=overlap)

    # Maintenance

    def sweep(self, *, batch_size: int = 100, time_budget: timedelta | None = None) -> maintenance.SweepReport:
        """Remove dead nonces and idempotency keys, in small batches that hold no writer up.

        While others write it goes slower, with smaller batches where the disk is slow and longer rests between them.

        Args:
            batch_size: how many rows one unit removes at most.
            time_budget: when to end early; None to go on until all is done.
        """
        return self._sweep(batch_size=batch_size, time_budget=time_budget)

    def _sweep(
        self, *, batch_size: int, time_budget: timedelta | None, stop: threading.Event | None = None
    ) -> maintenance.SweepReport:
        from homeagent.maintenance.sweep import sweep

        report = sweep(self._settings, batch_size=batch_size, time_budget=time_budget, stop=stop)
        self._engine.counters.cleaned(report.nonces + report.idempotency_keys)
        return report

    def sweeper(
        self,
        every: timedelta = timedelta(minutes=5),
        *,
        backups: maintenance.BackupSchedule | None = None,
        check_every: timedelta | None = timedelta(hours=24),
    ) -> maintenance.Sweeper:
        """Return a thread that sweeps periodically: `start()` and `stop()` it, or use it as a context manager.

        Closing the database stops it.

        Args:
            every: how long to wait between two sweeps, 24 days at most; the first is done at once.
            backups: makes backups too, after a sweep, whenever the newest one is old enough by the database's clock.
                One that fails is logged and tried again after the next sweep.
            check_every: checks the content of a SQLite file too, after a sweep, whenever the last check is that old;
                None for never. A file that is found damaged serves nobody any more: every unit of this database then
                gets CorruptDatabaseError.

        Raises:
            DatabaseError: backups are asked for, and the database is on PostgreSQL.
        """
        from homeagent.maintenance.sweep import Sweeper

        if backups is not None:
            from homeagent.maintenance.backups import back_up_on_schedule, require_file

            require_file(self._engine)

        check: ContentCheck | None = None
        if check_every is not None:
            from homeagent.maintenance.content_check import ContentCheck

            check = ContentCheck(self._engine, every=check_duration(check_every, "check_every"))

        def run(stop: threading.Event) -> maintenance.SweepReport:
            report = self._sweep(batch_size=100, time_budget=None, stop=stop)
            if backups is not None:
                back_up_on_schedule(self._engine, backups, clock=self._clock, stop=stop.is_set)
            if check is not None:
                check.run_if_due(stop.is_set)
            return report

        sweeper = Sweeper(run, every)
        with self._mutex:
            if self._closed:
                raise DatabaseClosedError("the database was closed: open it again")
            self._sweepers.append(sweeper)
        return sweeper

    def backup(self, destination: str | PathLike[str], *, keep: int | None = None, replace: bool = False) -> Path:
        """Make a backup while others write: one snapshot, verified, private, and in its place whole or not at all.

        It needs no other file, and can be read where nothing can be written. A manifest beside it, the same name and
        `.json`, has its time, its schema's revision, its rows, its size and its SHA-256.

        Args:
            destination: a directory, in which it gets a name with the schema's revision and the time; or a file that
                does not exist. What ends in a slash is a directory, made 0700 where it is missing.
            keep: remove this database's oldest backups in that directory afterwards, until so many are left. Files
                without a manifest, copies made by upgrades and other databases' backups stay.
            replace: whether a file that exists is replaced.

        Returns:
            Where the backup is.

        Raises:
            InvalidArgumentError: the destination can't be one, or exists.
            CorruptDatabaseError: the database is damaged; a copy of it would pass for a backup.
            DiskFullError, ReadOnlyError, InsecureFileError, DatabaseError: it can't be written there. Nothing of it
                is left behind, and no older backup was removed.
            DatabaseError: the database is on PostgreSQL, which has its own tools; the message names them.
        """
        from homeagent.maintenance.backups import back_up

        with self._mutex:
            if self._closed:
                raise DatabaseClosedError("the database was closed: open it again")
        return back_up(
            self._engine,
            destination,
            clock=self._clock,
            keep=keep,
            replace=replace,
            timeout=timedelta(seconds=self._timeout),
        )

    def copy_to(
        self,
        target: Database,
        *,
        live: bool = False,
        progress: Callable[[maintenance.CopyProgress], object] | None = None,
    ) -> maintenance.CopyReport:
        """Copy the whole store into another one, which is empty and may be of the other engine.

        All of it is one transaction on the target. Before that commits, every row is compared; where anything fails,
        the target stays empty, and the copy can be made again. Nothing of the source changes.

        Args:
            target: at the same revision, and without a device, agent, session, nonce or key.
            live: whether the source may be written meanwhile. The target then gets what it held at the beginning,
                which serves for a trial; moving house needs a source that nobody writes to any more.
            progress: called after each page of rows.

        Returns:
            How many rows of each table were copied.

        Raises:
            TargetNotEmptyError: the target holds data.
            SourceChangedError: the source was written meanwhile.
            InvalidArgumentError: both are the same database.
            SchemaOutdatedError, SchemaTooNewError: one of them has the schema of another version.
            SchemaChangedError: if the schema of one was changed by hand; on PostgreSQL, by a trigger or rule.
            CorruptDatabaseError: the source holds what no store writes.
        """
        from homeagent.maintenance.copy_store import copy_store

        if not isinstance(target, Database):
            raise InvalidArgumentError(
                f"target must be an open Database, not {type(target).__name__}: see Database.open"
            )
        return copy_store(
            (self._engine, target._engine),
            lambda: self.unit_of_work(read_only=True),
            target.unit_of_work,
            live=live,
            progress=progress,
        )

    def doctor(self, *, thorough: bool = False, fix: bool = False) -> maintenance.Diagnosis:
        """Look the database over while it is open: `homeagent.diagnose`, by this database's clock.

        Args:
            thorough: make the long checks too.
            fix: mend what can be mended without losing anything; nothing is changed otherwise.

        Returns:
            What was found, each with its remedy, and what was mended.
        """
        from homeagent.maintenance.doctor.diagnosis import diagnose_open

        return diagnose_open(
            self._engine,
            lambda: self.unit_of_work(read_only=True),
            clock=self._clock,
            thorough=thorough,
            fix=fix,
        )

    def counters(self) -> maintenance.DatabaseCounters:
        """Return what this process did with the database since it opened it: cheap enough to be asked every second."""
        from homeagent.maintenance.status import report_counters

        return report_counters(self._engine)

    def status(self) -> maintenance.DatabaseStatus:
        """Describe the database: where it is, its engine and schema, its rows, and what waits for cleanup."""
        from homeagent.maintenance.status import report_status

        with self.unit_of_work(read_only=True) as unit:
            return report_status(self._engine, unit)
