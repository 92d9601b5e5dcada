"""Diagnose a SQLite database: first check the files, then open the database. No check changes a file."""

from __future__ import annotations

from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from homeagent.engine.files.database_file import FILE_MODE, SMALLEST_DATABASE, look_at, sidecars, size_of
from homeagent.engine.files.locks import FileLock
from homeagent.engine.sqlite.dialect import APSW_VERSION, SQLITE_VERSION
from homeagent.engine.sqlite.engine import APPLICATION_ID, lock_path
from homeagent.engine.sqlite.in_use import in_use_path
from homeagent.engine.sqlite.inspection import inspect_sqlite, journal_mode
from homeagent.engine.sqlite.write_ahead_log import find_lost_commits, open_without_locks
from homeagent.errors import CorruptDatabaseError, DatabaseBusyError, HomeAgentError
from homeagent.maintenance.doctor.files import check_files, megabytes
from homeagent.maintenance.doctor.report import RESTORE, Collector, Severity
from homeagent.maintenance.doctor.store import STORE_CHECKS, check_store, report_orphans
from homeagent.migrations.revisions import broken_references
from homeagent.models import TABLES

if TYPE_CHECKING:
    from sqlalchemy import Connection

WAL_LIMIT = 64 * 1024 * 1024  # SQLite truncates the WAL to this size after a checkpoint (`journal_size_limit`)


def check_sqlite(collector: Collector, path: Path) -> None:
    """Run all checks on a database file in any state."""
    may_open = check_files(collector, path)
    is_interrupted = False
    with collector.attempt("database"):
        is_interrupted = size_of(in_use_path(path)) > 0  # the content of the lock file describes an unfinished restore
    if is_interrupted:
        summary = "A restore was interrupted and is not finished."
        meaning = "the next program that opens the database finishes the restore; until then the checks can't read it"
        collector.warn("database", summary, meaning, "open the database once, then check again", "homeagent status")
    elif not may_open:
        summary = f"homeagent does not open {str(path)!r}, because it refuses one of the files."
        collector.critical("database", summary, "the gateway can't start", "see the check 'files'")
    elif _may_hold_database(collector, path):
        is_closed = False
        with collector.attempt("wal"):
            is_closed = _check_wal(collector, path)
        before, skipped = dict(collector.findings), dict(collector.not_checked)
        _check_inside(collector, path, is_closed=is_closed)
        inside = [finding.severity for check, finding in collector.findings.items() if finding != before.get(check)]
        if Severity.CRITICAL in inside and look_at(sidecars(path)[0]) is not None:
            # Another process has opened the database. Without locks, a concurrent write looks like damage.
            collector.findings, collector.not_checked = before, skipped
            _check_inside(collector, path, is_closed=is_closed)
    collector.skip("the database can't be opened", "wal", *STORE_CHECKS, "integrity")


def _check_wal(collector: Collector, path: Path) -> bool:
    """Check the WAL. Return False if a process of homeagent can have the database open."""
    log, index, _ = sidecars(path)
    size = size_of(log)
    if size > WAL_LIMIT:
        summary = f"The write-ahead log (WAL) has {megabytes(size)}."
        meaning = "a reader holds its snapshot open, or no checkpoint moved the WAL into the file: reads get slow"
        remedy = "end long read-only units; a checkpoint and the next write then shorten the WAL"
        collector.warn("wal", summary, meaning, remedy, wal_bytes=size)
    if look_at(log) is None and look_at(index) is None:
        collector.add("wal", "The database was closed cleanly: its WAL is empty.", wal_bytes=0)
        return False
    in_use = look_at(in_use_path(path))
    if in_use is None or in_use.st_mode & 0o777 != FILE_MODE:
        # Do not take the in-use lock, because the doctor changes no file.
        collector.skip("the 'database in use' lock file is missing or not private", "wal")
        return in_use is None  # while a process has the database open, the lock file exists
    try:
        with FileLock(in_use_path(path), timeout=timedelta(0)), open_without_locks(path) as raw:
            lost = find_lost_commits(path, raw)
    except DatabaseBusyError:
        collector.add("wal", "A process has the database open and uses the WAL.", wal_bytes=size)
        return False
    if lost is None:
        collector.add("wal", "The database was not closed cleanly, and its WAL is complete.", wal_bytes=size)
        return True
    meaning = f"revocations and used nonces may be lost, and homeagent refuses to open the database: {lost.problem}"
    remedy = RESTORE
    if lost.by_power_cut:
        remedy += "; after a power cut, durability='normal' opens it without the lost commits"
    facts = {"wal_bytes": size, "by_power_cut": lost.by_power_cut}
    collector.critical("wal", "The WAL lost commits.", meaning, remedy, collector.restore_command, **facts)
    return True


def _may_hold_database(collector: Collector, path: Path) -> bool:
    """Check the sizes of the files. If a check fails, add a finding, and return False."""
    log, _, journal = sidecars(path)
    lock = lock_path(path)
    try:
        sizes = {file: size_of(file) for file in (path, log, journal, lock)}
    except HomeAgentError as error:
        remedy = "run as the owner of the database"
        collector.critical("database", f"The files of {str(path)!r} can't be read.", str(error), remedy)
        return False
    if sizes[path] == 0 and (sizes[log] or sizes[lock]):
        meaning = "a new database would have no devices, revocations and nonces; homeagent does not create it"
        collector.critical("database", f"{str(path)!r} held a database, and is missing or empty now.", meaning, RESTORE)
    elif sizes[path] == 0:
        summary, meaning = f"There is no database at {str(path)!r}.", "the gateway can't open it"
        collector.critical("database", summary, meaning, "check the path, or create the database", "homeagent init")
    elif sizes[path] < SMALLEST_DATABASE:
        summary = f"{str(path)!r} has {sizes[path]} bytes, too few for a database."
        meaning = "the file was truncated, or is another kind of file"
        collector.critical("database", summary, meaning, RESTORE, bytes=sizes[path])
    elif sizes[journal]:
        summary = "A transaction was interrupted and must be rolled back: there is a rollback journal with content."
        meaning = "SQLite rolls it back when the file is opened for writing; until then the checks can't read the file"
        collector.warn("database", summary, meaning, "open the database once, then check again", "homeagent status")
    else:
        return True
    return False


def _check_inside(collector: Collector, path: Path, *, is_closed: bool) -> None:
    collector.watch.start()
    try:
        with inspect_sqlite(path, watch=collector.watch, is_closed=is_closed) as connection:
            found = connection.exec_driver_sql("PRAGMA application_id").scalar_one()
            if found == APPLICATION_ID:
                _check_open(collector, connection)
            else:
                summary = f"{str(path)!r} is another application's SQLite database (application_id {found:#x})."
                remedy = "name another path, or add homeagent's tables with 'homeagent init --adopt'"
                collector.critical("database", summary, "homeagent refuses it", remedy, application_id=found)
    except CorruptDatabaseError as error:
        collector.critical("database", f"{str(path)!r} can't be read.", str(error), RESTORE)
    except HomeAgentError as error:
        remedy = "correct its owner and mode, or wait until the process that has it locked ends"
        collector.critical("database", f"{str(path)!r} can't be opened.", str(error), remedy)


def _check_open(collector: Collector, connection: Connection) -> None:
    summary = f"SQLite {SQLITE_VERSION} (apsw {APSW_VERSION}) can open the file, and it is a homeagent database."
    collector.add("database", summary, sqlite_version=SQLITE_VERSION, apsw_version=APSW_VERSION)
    with collector.attempt("wal"):
        _check_journal_mode(collector, connection)
    with collector.attempt("integrity"):
        _check_integrity(collector, connection)
    with collector.attempt("references"):
        _check_foreign_keys(collector, connection)
    check_store(collector, connection)


def _check_journal_mode(collector: Collector, connection: Connection) -> None:
    mode = journal_mode(connection)
    if mode != "wal":
        summary = f"The journal mode is {mode!r} and not 'wal'."
        meaning = "readers and the writer wait for each other; a copy made by another tool may be in this mode"
        remedy = "switch the database to WAL mode while no process has it open"
        collector.warn("wal", summary, meaning, remedy, "homeagent doctor --fix", mode=mode)


def _check_integrity(collector: Collector, connection: Connection) -> None:
    pragma = "integrity_check" if collector.thorough else "quick_check"
    problems = [str(row[0]) for row in connection.exec_driver_sql(f"PRAGMA {pragma}(100)") if row[0] != "ok"]
    found = f"damage: {problems[0].splitlines()[0]!r}" if problems else "no damage"
    summary = f"SQLite's {pragma} finds {found}."
    meaning = "rows may be missing or wrong, and each write may increase the damage"
    facts: dict[str, Any] = {"pragma": pragma, "problems": len(problems)}
    collector.add("integrity", summary, meaning, RESTORE, critical=problems, **facts)


def _check_foreign_keys(collector: Collector, connection: Connection) -> None:
    found = broken_references(connection)
    broken = sum(rows for (child, _), rows in found.items() if child in TABLES)
    report_orphans(collector, Counter({keys: rows for keys, rows in found.items() if keys[0] not in TABLES}))
    summary = f"Foreign keys that refer to a row that does not exist: {broken:,}."
    meaning = "another program wrote to the database without foreign keys; an upgrade will fail"
    remedy = "create the missing rows again, or remove the rows that refer to them"
    collector.add("references", summary, meaning, remedy, critical=broken, broken=broken)
