"""The methods of `Database` for maintenance: sweeps, backups, copies, the doctor, counters and status."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from homeagent import maintenance
from homeagent.clock import Clock
from homeagent.engine.engine import Engine
from homeagent.errors import CorruptDatabaseError, DatabaseClosedError, InvalidArgumentError
from homeagent.frame_locals import clears_locals
from homeagent.models.limits import Limits
from homeagent.models.types import check_duration
from homeagent.stores.nonces import FIND_RECORD
from homeagent.unit_of_work import UnitOfWork, UnitSettings

if TYPE_CHECKING:
    from homeagent.maintenance.content_check import ContentCheck

__all__ = ["DatabaseMaintenance"]


class DatabaseMaintenance:
    """Base class of `Database`, which sets the attributes: sweep, back up, copy and inspect the open database."""

    _engine: Engine
    _clock: Clock
    _limits: Limits
    _timeout: float
    _settings: UnitSettings
    _mutex: threading.RLock
    _sweepers: list[maintenance.Sweeper]
    _closed: bool

    def ping(self) -> None:
        """Check that the database answers: read the one row of the table `store`, without a lock.

        Raises:
            DatabaseError: the database cannot be read, was moved or is closed.
        """
        if self._engine.read_alone("one", FIND_RECORD, {}, self._settings.timeout) is None:
            raise CorruptDatabaseError("the table `store` has lost its row: restore the newest good backup")

    def sweep(self, *, batch_size: int = 100, time_budget: timedelta | None = None) -> maintenance.SweepReport:
        """Remove expired nonces and idempotency keys, and devices that waited for longer than `Limits.pending_ttl`.

        It works in small batches, so that no writer waits long.

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

        report = sweep(
            self._settings,
            batch_size=batch_size,
            time_budget=time_budget,
            pending_ttl=self._limits.pending_ttl,
            stop=stop,
        )
        self._engine.counters.cleaned(report.nonces + report.idempotency_keys + report.pending_devices)
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

    @clears_locals
    def copy_to(
        self,
        target: DatabaseMaintenance,
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

        if not isinstance(target, DatabaseMaintenance):
            raise InvalidArgumentError(
                f"target must be an open Database, not {type(target).__name__}: see Database.open"
            )
        return copy_store(
            (self._engine, target._engine),
            lambda: UnitOfWork(self._settings, read_only=True),
            lambda: UnitOfWork(target._settings, read_only=False),
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
            lambda: UnitOfWork(self._settings, read_only=True),
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

        with UnitOfWork(self._settings, read_only=True) as unit:
            return report_status(self._engine, unit)
