"""Methods of `Database` for sweeps, backups, restores, copies, checks and reports."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from datetime import timedelta
from functools import partial
from os import PathLike
from pathlib import Path

from sqlalchemy import URL

from homeagent import maintenance
from homeagent.callables import check_function
from homeagent.clock import Clock, system_clock
from homeagent.engine.engine import Engine
from homeagent.engine.target import conceal
from homeagent.errors import CorruptDatabaseError, DatabaseClosedError, InvalidArgumentError
from homeagent.frame_locals import clears_locals
from homeagent.models.types import check_duration, check_flag, check_names
from homeagent.stores.nonces import FIND_RECORD
from homeagent.transaction import UnitSettings
from homeagent.unit_of_work import UnitOfWork


class DatabaseMaintenance:
    """Base class of `Database` with the methods for maintenance. `Database.__init__` sets the attributes."""

    _engine: Engine
    _settings: UnitSettings
    _mutex: threading.RLock
    _sweepers: list[maintenance.Sweeper]
    _closed: bool

    def ping(self) -> None:
        """Check that the database answers. The method reads one row without a lock.

        Raises:
            DatabaseError: if the database cannot be read, was moved or is closed.
        """
        if not self._engine.read_alone(FIND_RECORD, {}, self._settings.timeout):
            raise CorruptDatabaseError("the table `store` has lost its row: restore the newest good backup")

    def sweep(
        self, *, batch_size: int = 100, time_budget: timedelta | None = None, dry_run: bool = False
    ) -> maintenance.SweepReport:
        """Delete expired nonces, expired idempotency keys and other old rows.

        A sweep deletes a pending device after `Limits.pending_ttl`. A sweep deletes a device change after
        `Limits.changes_kept`. Other writers wait only briefly, because the batches are small, and the sweep pauses
        after each batch.

        Args:
            batch_size: maximum number of rows that one unit deletes.
            time_budget: maximum duration. With `time_budget=None`, the sweep continues until no expired row is left.
            dry_run: True to count the rows without deleting the rows.
        """
        from homeagent.maintenance.sweep import sweep

        return sweep(self._settings, batch_size=batch_size, time_budget=time_budget, dry_run=dry_run)

    def sweeper(
        self,
        every: timedelta = timedelta(minutes=5),
        *,
        backups: maintenance.BackupSchedule | None = None,
        check_every: timedelta | None = timedelta(hours=24),
    ) -> maintenance.Sweeper:
        """Return a thread that calls `sweep()` periodically. Call `start()` and `stop()`, or use a `with` block.

        `Database.close` stops the thread.

        Args:
            every: time between two sweeps, at most 24 days. The first sweep begins when the thread starts.
            backups: schedule of the backups that the thread makes after a sweep. With `backups=None`, the thread makes
                no backups. A failed backup is logged and tried again after the next sweep.
            check_every: time between two checks of a SQLite file's content. The thread makes a check after a sweep.
                With `check_every=None`, the thread makes no checks. If a check finds damage, every later unit of this
                database raises CorruptDatabaseError.

        Raises:
            DatabaseError: if a schedule of backups is given for a database on PostgreSQL.
            InvalidArgumentError: if an argument is invalid, for example if `backups` is a path.
            DatabaseClosedError: if the database was closed.
        """
        from homeagent.maintenance.sweep import BackupSchedule, Sweeper, sweep

        jobs: list[Callable[[Callable[[], bool]], None]] = []
        if backups is not None:
            from homeagent.maintenance.backups import back_up_on_schedule, require_file

            if not isinstance(backups, BackupSchedule):
                raise InvalidArgumentError("backups must be a BackupSchedule, such as BackupSchedule('backups/')")
            require_file(self._engine)
            jobs.append(partial(back_up_on_schedule, self._settings, backups))
        if check_every is not None:
            from homeagent.engine.sqlite.integrity import ContentCheck

            jobs.append(ContentCheck(self._engine, every=check_duration(check_every, "check_every")).run_if_due)

        def run(stop: threading.Event) -> maintenance.SweepReport:
            report = sweep(self._settings, stop=stop)
            for job in jobs:
                job(stop.is_set)
            return report

        sweeper = Sweeper(run, every)
        self._require_open()
        with self._mutex:
            self._require_open()
            self._sweepers.append(sweeper)
        return sweeper

    def _require_open(self) -> None:
        """Raise DatabaseClosedError after `close()` and in a forked child."""
        self._engine.pool(read_only=True)
        if self._closed:
            raise DatabaseClosedError("the database was closed: open it again")

    def backup(self, destination: str | PathLike[str], *, keep: int | None = None, replace: bool = False) -> Path:
        """Make a verified backup of one snapshot while other units write. The file gets its final name after the backup
        is complete.

        The backup is a single file with mode 0600. A program can open the backup on a read-only medium. The manifest
        file `<backup>.json` is next to the backup. The manifest records time, schema revision, size, SHA-256 and row
        counts.

        Args:
            destination: path of a new file or a directory. With a final slash, the path is a directory. Absent
                directories are created with mode 0700. In a directory, the file name contains the schema revision and
                the time.
            keep: number of this database's backups to keep in the directory. Older backups are deleted. Files without a
                manifest and copies from upgrades stay.
            replace: True to replace an existing file.

        Returns:
            Path of the backup.

        Raises:
            InvalidArgumentError: if the destination exists or is not a valid path of a backup.
            CorruptDatabaseError: if the database is damaged.
            DiskFullError, ReadOnlyError, InsecureFileError, DatabaseError: if the backup cannot be written. No part of
                the new backup remains. Every older backup still exists.
            DatabaseError: if the database is on PostgreSQL. The error message names PostgreSQL's tools for backups.
        """
        from homeagent.maintenance.backups import back_up

        self._require_open()
        return back_up(self._settings, destination, keep=keep, replace=check_flag(replace, "replace"))

    @clears_locals
    def copy_to(
        self,
        target: DatabaseMaintenance,
        *,
        live: bool = False,
        leave: Collection[str] = (),
        progress: Callable[[maintenance.CopyProgress], object] | None = None,
    ) -> maintenance.CopyReport:
        """Copy the whole store into an empty store of any engine. The source does not change.

        The copy is one transaction on the target database. Before the commit, homeagent compares every row with the
        source. After an error, the target is unchanged, and a new copy is possible. The copy includes the application's
        tables, which the target must have (`migrations=…`). The copy does not run the application's triggers.

        Args:
            target: open `Database` with the schema revision of the source. The target must contain no devices, agents,
                sessions, nonces or idempotency keys. The application's tables that the copy fills must also be empty.
            live: True to allow writes to the source during the copy. The target then lacks the writes that were made
                during the copy. For a move to another database, stop all writers and pass `live=False`.
            leave: names of the application's tables that the copy leaves out.
            progress: function that homeagent calls after each page of copied or compared rows.

        Returns:
            Number of copied rows of each table.

        Raises:
            TargetNotEmptyError: if the target holds data.
            SourceChangedError: if the source changed during a copy with `live=False`.
            InvalidArgumentError: if source and target are equal, or if the target lacks a table. The error message
                names the missing table.
            SchemaOutdatedError, SchemaTooNewError: if the source or the target has another version's schema.
            SchemaChangedError: if a schema was changed by hand. On PostgreSQL, homeagent checks only triggers, rules
                and columns.
            CorruptDatabaseError: if a value in the source is invalid or unreadable.
        """
        from homeagent.maintenance.copy_store import copy_store

        if not isinstance(target, DatabaseMaintenance):
            raise InvalidArgumentError(
                f"target must be an open Database, not {type(target).__name__}: see Database.open"
            )
        if progress is not None:
            check_function(progress, "progress")
        return copy_store(
            self._settings,
            target._settings,
            live=check_flag(live, "live"),
            leave=check_names(leave, "leave", "notes"),
            progress=progress,
        )

    def doctor(self, *, thorough: bool = False, fix: bool = False) -> maintenance.Diagnosis:
        """Check the open database like `homeagent.diagnose()`, with the clock of the database.

        Args:
            thorough: True to include the slow checks.
            fix: True to make the repairs that lose no data. With `fix=False`, the doctor changes no file.

        Returns:
            Report with the findings, their remedies and the repairs.
        """
        from homeagent.maintenance.doctor.diagnosis import diagnose_open

        self._require_open()
        return diagnose_open(self._settings, thorough=thorough, fix=fix)

    def counters(self) -> maintenance.DatabaseCounters:
        """Return the counters of this process since the database was opened. A program can call this cheap method every
        second.
        """
        return self._engine.counters.snapshot()

    def status(self) -> maintenance.DatabaseStatus:
        """Return the database's location, engine, schema, row counts and expired rows."""
        from homeagent.maintenance.status import report_status

        with UnitOfWork(self._settings, read_only=True) as unit:
            return report_status(self._engine, unit)

    # Methods for a database that no process has open

    @staticmethod
    def restore(
        backup: str | PathLike[str],
        target: str | PathLike[str] | URL | None = None,
        *,
        clock: Clock = system_clock,
        busy_timeout: timedelta = timedelta(seconds=5),
        acknowledged: Collection[str] = (),
        expected_epoch: int | None = None,
    ) -> maintenance.RestoreReport:
        """Replace a closed database by a backup. The old database stays in quarantine.

        The restore first verifies the backup. The restore upgrades a copy of the backup, if necessary. The restore
        begins a new epoch. The replay guard refuses all messages that devices signed before the restore. After a crash,
        the old or the new database is in place.

        Args:
            backup: file that `Database.backup()` made, or a copy of a closed database. If the backup has a manifest
                file, the restore compares the backup with the manifest.
            target: path of the database to replace, as for `Database.open`. The database can be damaged or absent.
            clock: clock for the start of the new epoch. The clock must be right. With a wrong clock, the replay guard
                can accept old messages.
            busy_timeout: longest wait for other processes to close the target.
            acknowledged: names of the application's triggers on homeagent's tables, as for `Database.open()`.
            expected_epoch: epoch that the target must have, by default any epoch. With `expected_epoch=0`, the target
                must be absent, or its epoch must be unreadable.

        Returns:
            Report of the restore, with the path of the old database.

        Raises:
            InvalidArgumentError: if the backup is absent, or if the target is not another file.
            ConflictError: if the epoch of the target is not `expected_epoch`.
            DatabaseBusyError: if a process has the target or the backup open. On Linux the error message names the
                process.
            CorruptDatabaseError: if the backup is damaged.
            SchemaTooNewError: if a newer version of homeagent made the backup.
            SchemaChangedError: if the schema of the backup was changed by hand.
            ForeignDatabaseError: if the backup or the target belongs to another application.
            DatabaseError: if the restore failed for another reason. If the last step failed, the next `Database.open()`
                finishes the restore. If an earlier step failed, the target is unchanged.
        """
        from homeagent.maintenance.restore import restore

        given = conceal(target)
        del target
        return restore(
            backup,
            given,
            clock=check_function(clock, "clock"),
            busy_timeout=busy_timeout,
            acknowledged=acknowledged,
            expected_epoch=expected_epoch,
        )

    @staticmethod
    def begin_epoch(
        target: str | PathLike[str] | URL | None = None,
        *,
        clock: Clock = system_clock,
        busy_timeout: timedelta = timedelta(seconds=5),
        expected_epoch: int | None = None,
    ) -> maintenance.EpochReport:
        """Begin a new epoch after another program restored the database. Before the call, close the database in all
        processes.

        For example, call `begin_epoch()` after a restore from a disk snapshot or by PostgreSQL's tools. The restored
        database lacks the newest nonces, so an attacker could replay messages. The replay guard refuses all messages
        that devices signed before the new epoch.

        Args:
            target: path or URL of the database, as for `Database.open`.
            clock: clock for the start of the epoch.
            busy_timeout: longest wait for other processes to close the database.
            expected_epoch: epoch that the database must have. Default: any epoch.

        Raises:
            ConflictError: if the epoch of the database is not `expected_epoch`.
            DatabaseBusyError: if a process still has the database open.
            SchemaOutdatedError: if the database is absent, or has an older schema.
            DatabaseError: if the database cannot be opened for another reason.
        """
        from homeagent.maintenance.epochs import begin_epoch

        given = conceal(target)
        del target
        check_function(clock, "clock")
        return begin_epoch(given, clock=clock, busy_timeout=busy_timeout, expected_epoch=expected_epoch)
