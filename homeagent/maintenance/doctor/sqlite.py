"""The diagnosis of a SQLite file: first from outside, then from inside, and nothing of it is changed."""

from __future__ import annotations

import shlex
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from homeagent.engine.disk.files import SMALLEST_DATABASE, look_at, sidecars
from homeagent.engine.disk.locks import FileLock
from homeagent.engine.disk.owners import backup_owners
from homeagent.engine.disk.privacy import FILE_MODE
from homeagent.engine.sqlite.dialect import APSW_VERSION, SQLITE_VERSION
from homeagent.engine.sqlite.engine import APPLICATION_ID, lock_path
from homeagent.engine.sqlite.inspection import inspect_sqlite, journal_mode
from homeagent.engine.sqlite.presence import presence_path
from homeagent.engine.sqlite.write_ahead_log import find_lost_commits
from homeagent.errors import CorruptDatabaseError, DatabaseBusyError, HomeAgentError
from homeagent.maintenance.doctor.backup import check_backup
from homeagent.maintenance.doctor.chart import RESTORE, Chart
from homeagent.maintenance.doctor.disk import check_disk, check_wal_size
from homeagent.maintenance.doctor.findings import STORE_CHECKS, Severity
from homeagent.maintenance.doctor.restores import check_restores
from homeagent.maintenance.doctor.revision import check_revision
from homeagent.maintenance.doctor.rows import check_rows
from homeagent.maintenance.doctor.schema import check_schema
from homeagent.migrations.schema_drift import columns_found

if TYPE_CHECKING:
    from sqlalchemy import Connection

__all__ = ["examine_sqlite"]

_INSIDE = (*STORE_CHECKS, "journal_mode", "integrity", "foreign_keys")


def examine_sqlite(chart: Chart, path: Path) -> None:
    """Make all checks on a file, whatever state it is in."""
    check_backup(chart, path)
    check_disk(chart, path)
    _check_version(chart)
    check_wal_size(chart, path)
    check_restores(chart, path)
    is_closed = False
    with chart.attempt("log"):
        is_closed = _check_log(chart, path)
    if not _is_worth_opening(chart, path):
        chart.skip("the database can't be opened", *_INSIDE)
        return
    _examine_inside(chart, path, assume_closed=True, is_closed=is_closed)
    if _is_damaged(chart) and look_at(sidecars(path)[0]) is not None:
        # Somebody opened it meanwhile, and a file that is read without locks looks damaged while it is written.
        for check in ("database", *_INSIDE):
            chart.findings.pop(check, None)
            chart.not_checked.pop(check, None)
        _examine_inside(chart, path, assume_closed=False, is_closed=is_closed)


def _is_damaged(chart: Chart) -> bool:
    inside = (chart.findings.get(check) for check in ("database", "integrity", *_INSIDE))
    return any(finding is not None and finding.severity is Severity.CRITICAL for finding in inside)


def _check_version(chart: Chart) -> None:
    chart.ok(
        "sqlite_version",
        f"SQLite {SQLITE_VERSION}, apsw {APSW_VERSION}.",
        version=SQLITE_VERSION,
        apsw_version=APSW_VERSION,
    )


def _check_log(chart: Chart, path: Path) -> bool:
    """Check the log, and return whether no process of homeagent's has the database open."""
    log, index, _ = sidecars(path)
    if look_at(log) is None and look_at(index) is None:
        chart.ok("log", "The database was closed cleanly: its log is empty.")
        return False
    note = presence_path(path)
    state = look_at(note)
    if state is None or state.st_mode & 0o777 != FILE_MODE:
        # To make the lock file, or its mode right, would be a change.
        chart.skip("it can't be told whether somebody has the database open", "log")
        return state is None  # every open database has this file
    try:
        with FileLock(note, timeout=timedelta(0)):
            lost = find_lost_commits(path)
    except DatabaseBusyError:
        chart.ok("log", "The database is open: who has it open writes the log.")
        return False
    if lost is None:
        chart.ok("log", "The database was not closed cleanly, and its log is whole.")
        return True
    accepted = "; after a power cut, durability='normal' opens it without what was lost" if lost.by_power_cut else ""
    chart.alarm(
        "log",
        "The log lost commits.",
        meaning=f"revocations and used nonces may be among them, and the store refuses to open it: {lost.problem}",
        remedy=f"{RESTORE}{accepted}",
        command=chart.restore_command,
        frames=lost.frames,
        by_power_cut=lost.by_power_cut,
    )
    return True


def _is_worth_opening(chart: Chart, path: Path) -> bool:
    log, _, journal = sidecars(path)
    lock = lock_path(path)
    try:
        states = {file: look_at(file) for file in (path, log, journal, lock)}
        owners = backup_owners(path)
    except HomeAgentError as error:
        chart.alarm(
            "database",
            f"{str(path)!r} can't be looked at.",
            meaning=str(error),
            remedy="run as the owner of the database",
        )
        return False
    sizes = {file: 0 if status is None else status.st_size for file, status in states.items()}
    if "file_names" in chart.findings and chart.findings["file_names"].severity is not Severity.OK:
        chart.alarm(
            "database",
            f"{str(path)!r} is not opened: a link or no regular file is among what belongs to it.",
            meaning="the store refuses it, and so it can't start",
            remedy="see file_names",
        )
        return False
    if any(state is not None and state.st_uid not in owners for file, state in states.items() if file != lock):
        chart.alarm(
            "database",
            f"{str(path)!r} is not opened: it, its log or its journal belongs to another user.",
            meaning="the store refuses it, and so it can't start",
            remedy="see file_owners",
        )
        return False
    if sizes[path] == 0:
        _tell_absent(chart, path, was_there=bool(sizes[log] or sizes[lock]))
        return False
    if sizes[path] < SMALLEST_DATABASE:
        chart.alarm(
            "database",
            f"{str(path)!r} has {sizes[path]} bytes, too few for a database.",
            meaning="it was cut off, or is another kind of file",
            remedy=RESTORE,
            bytes=sizes[path],
        )
        return False
    if sizes[journal]:
        chart.warn(
            "database",
            "A transaction was cut off and waits to be undone: there is a rollback journal with content.",
            meaning="until then nothing in the file can be judged; SQLite undoes it when the file is opened to write",
            remedy="open the database once, then look again",
            command=f"homeagent status --database {shlex.quote(str(path))}",
        )
        return False
    return True


def _tell_absent(chart: Chart, path: Path, *, was_there: bool) -> None:
    if was_there:
        chart.alarm(
            "database",
            f"{str(path)!r} held a database and is gone or empty now.",
            meaning="a new one would have forgotten every device, revocation and nonce; none is made by itself",
            remedy=RESTORE,
        )
        return
    chart.alarm(
        "database",
        f"There is no database at {str(path)!r}.",
        meaning="nothing can be opened here",
        remedy="check the path, or make the database",
        command=f"homeagent init --database {shlex.quote(str(path))}",
    )


def _examine_inside(chart: Chart, path: Path, *, assume_closed: bool, is_closed: bool) -> None:
    chart.watch.start()
    try:
        with inspect_sqlite(path, watch=chart.watch, assume_closed=assume_closed, is_closed=is_closed) as connection:
            if _is_ours(chart, path, connection):
                _examine_open(chart, path, connection)
    except CorruptDatabaseError as error:
        chart.alarm("database", f"{str(path)!r} can't be read.", meaning=str(error), remedy=RESTORE)
    except HomeAgentError as error:
        chart.alarm(
            "database",
            f"{str(path)!r} can't be opened.",
            meaning=str(error),
            remedy="mend its owner and mode, or wait until the one who holds it is done",
        )
    chart.skip("the database can't be opened", *_INSIDE)


def _is_ours(chart: Chart, path: Path, connection: Connection) -> bool:
    found = connection.exec_driver_sql("PRAGMA application_id").scalar_one()
    if found == APPLICATION_ID:
        return True
    chart.alarm(
        "database",
        f"{str(path)!r} is another application's SQLite database (application_id {found:#x}).",
        meaning="the store refuses it",
        remedy="name another path",
        application_id=found,
    )
    return False


def _examine_open(chart: Chart, path: Path, connection: Connection) -> None:
    pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
    free = connection.exec_driver_sql("PRAGMA freelist_count").scalar_one()
    size = connection.exec_driver_sql("PRAGMA page_size").scalar_one()
    chart.ok("database", "It can be opened and is ours.", pages=pages, free_pages=free, page_size=size)
    with chart.attempt("journal_mode"):
        _check_journal_mode(chart, path, connection)
    with chart.attempt("integrity"):
        _check_integrity(chart, connection)
    with chart.attempt("foreign_keys"):
        _check_foreign_keys(chart, connection)
    if check_revision(chart, connection):
        check_schema(chart, connection)
    with chart.attempt("schema"):
        check_rows(chart, connection, columns_found(connection))


def _check_journal_mode(chart: Chart, path: Path, connection: Connection) -> None:
    mode = journal_mode(path, connection)
    if mode is None:
        chart.skip("this process has it open: use Database.doctor()", "journal_mode")
        return
    if mode == "wal":
        chart.ok("journal_mode", "It has a write-ahead log.", mode=mode)
        return
    chart.warn(
        "journal_mode",
        f"Its journal mode is {mode!r} and not 'wal'.",
        meaning="readers and the writer wait for each other; a copy that was put in place by hand is like this",
        remedy="switch it to a write-ahead log, while nobody has it open",
        command="homeagent doctor --fix",
        mode=mode,
    )


def _check_integrity(chart: Chart, connection: Connection) -> None:
    pragma = "integrity_check" if chart.thorough else "quick_check"
    problems = [str(row[0]) for row in connection.exec_driver_sql(f"PRAGMA {pragma}(100)")]
    if problems == ["ok"]:
        chart.ok("integrity", f"SQLite's {pragma} finds nothing.", pragma=pragma, problems=0)
        return
    first = problems[0].splitlines()[0]
    chart.alarm(
        "integrity",
        f"The file is damaged: SQLite's {pragma} finds faults: {len(problems)}, the first is {first!r}.",
        meaning="rows may be missing or wrong, and each write may make it worse",
        remedy=RESTORE,
        pragma=pragma,
        problems=len(problems),
    )


def _check_foreign_keys(chart: Chart, connection: Connection) -> None:
    broken = len(connection.exec_driver_sql("PRAGMA foreign_key_check").fetchall())
    if not broken:
        chart.ok("foreign_keys", "Every reference leads somewhere.", broken=0)
        return
    chart.alarm(
        "foreign_keys",
        f"References that lead nowhere: {broken:,}.",
        meaning="something else wrote to the database with foreign keys switched off; an upgrade will fail",
        remedy="see orphaned_sessions",
        broken=broken,
    )
