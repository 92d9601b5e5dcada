"""Diagnose a database, repair the findings on request, and diagnose again."""

from __future__ import annotations

import logging
import os
import shlex
import stat
from collections.abc import Collection, Iterator
from contextlib import ExitStack, closing, contextmanager
from datetime import timedelta
from os import PathLike
from pathlib import Path
from typing import Any

from sqlalchemy import URL, exists, update

from homeagent.callables import check_function
from homeagent.clock import Clock, system_clock
from homeagent.engine.files.database_file import FILE_MODE, change_mode
from homeagent.engine.files.system_errors import explained
from homeagent.engine.sqlite.engine import SQLiteEngine, sidecar_lock
from homeagent.engine.sqlite.inspection import Stopwatch
from homeagent.engine.target import Target, conceal, resolve_target
from homeagent.environment import BUSY_TIMEOUT
from homeagent.errors import DatabaseClosedError, DatabaseError, HomeAgentError, InvalidArgumentError
from homeagent.maintenance.doctor.files import database_files, is_public
from homeagent.maintenance.doctor.postgresql import check_postgresql
from homeagent.maintenance.doctor.report import Collector, Diagnosis, Repair, Severity
from homeagent.maintenance.doctor.sqlite import check_sqlite
from homeagent.maintenance.doctor.store import STORE_CHECKS, stale_routes
from homeagent.models import AgentSession
from homeagent.models.limits import Limits
from homeagent.models.types import check_flag, check_names, check_timestamp
from homeagent.opening import open_engine
from homeagent.transaction import UnitSettings
from homeagent.unit_of_work import UnitOfWork

logger: logging.Logger = logging.getLogger("homeagent")

_FILE_CHECKS = ("directory", "files", "backup", "filesystem", "disk_space", "wal", "integrity")
CHECKS: tuple[str, ...] = ("database", *STORE_CHECKS, *_FILE_CHECKS, "write_access")
"""The names of all checks, in the order of the report. The last check is for PostgreSQL."""

QUICK = timedelta(seconds=10)
"""Longest time for one check, unless the diagnosis is thorough."""


def diagnose(
    target: str | PathLike[str] | URL | None = None,
    *,
    clock: Clock = system_clock,
    thorough: bool = False,
    fix: bool = False,
    acknowledged: Collection[str] = (),
) -> Diagnosis:
    """Check a database in any state, and report problems with their remedies.

    With `fix=False`, the doctor does not change a file or a row. A missing, damaged or incompatible database causes a
    finding, not an error. Findings do not contain secrets, hashes, nonces, idempotency keys or results.

    Args:
        target: path or URL of the database to check, as for `Database.open()`. If the calling process has the database
            open, call `Database.doctor()` instead.
        clock: clock of the store.
        thorough: True to run SQLite's full integrity check without a time limit. The full check also compares the
            indexes with their tables. With `thorough=False`, the doctor stops a check after 10 seconds. The attribute
            `Diagnosis.not_checked` lists the stopped checks.
        fix: True to repair problems that can be repaired without loss. The doctor corrects file modes, route keys and
            the journal mode. The returned findings describe the database after the repair.
        acknowledged: names of the application's triggers on homeagent's tables (see `Database.open()`).

    Raises:
        InvalidArgumentError: if the target is invalid, or names a temporary database.
    """
    given = conceal(target)
    del target
    where = resolve_target(given)
    if where.is_temporary:
        raise InvalidArgumentError("a temporary database exists only while it is open: use Database.doctor()")
    check_function(clock, "clock")
    return _diagnose(
        where, clock, check_names(acknowledged, "acknowledged", "audit_devices"), thorough=thorough, fix=fix
    )


def diagnose_open(settings: UnitSettings, *, thorough: bool, fix: bool) -> Diagnosis:
    """Check a database that the calling process has open (see `Database.doctor`)."""
    engine = settings.engine
    target = Target(path=engine.path) if isinstance(engine, SQLiteEngine) else Target(url=engine.sa_engine.url)
    return _diagnose(target, settings.now, engine.acknowledged, thorough=thorough, fix=fix, settings=settings)


@contextmanager
def _reading(settings: UnitSettings | None) -> Iterator[None]:
    """If possible, keep a read-only unit open during the block. Otherwise the doctor could create the file of the WAL
    index.
    """
    with ExitStack() as stack:
        try:
            if settings is not None:
                stack.enter_context(UnitOfWork(settings, read_only=True))
        except DatabaseClosedError:
            raise
        except DatabaseError as error:
            text = "the doctor checks a database without a reader, because a unit can't be opened: %s"
            logger.debug(text, error, extra={"event": "doctor_without_reader", "error": type(error).__name__})
        yield


def _diagnose(
    target: Target,
    clock: Clock,
    acknowledged: frozenset[str],
    *,
    thorough: bool,
    fix: bool,
    settings: UnitSettings | None = None,
) -> Diagnosis:
    """Run the checks, and return the diagnosis. With `fix=True`, make safe repairs, and check again."""
    check_flag(thorough, "thorough")
    check_flag(fix, "fix")

    def check(repairs: list[Repair]) -> Diagnosis:
        limit = None if thorough else QUICK
        now = check_timestamp(clock(), "the clock's time")
        collector = Collector(now, acknowledged, thorough=thorough, watch=Stopwatch(limit))
        collector.database_option = _database_option(target)
        if target.path is not None:
            with _reading(settings):
                check_sqlite(collector, target.path)
        elif target.url is not None:
            check_postgresql(collector, target.url, limit=limit)
        findings = [collector.findings[check] for check in CHECKS if check in collector.findings]
        return Diagnosis(
            location=target.location,
            engine="postgresql" if target.path is None else "sqlite",
            checked_at=now,
            thorough=thorough,
            severity=max((finding.severity for finding in findings), key=list(Severity).index, default=Severity.OK),
            findings=findings,
            not_checked={check: collector.not_checked[check] for check in CHECKS if check in collector.not_checked},
            repairs=repairs,
        )

    found = check([])
    repairs = _repair(found, target, clock, settings) if fix else []
    return check(repairs) if repairs else found


def _database_option(target: Target) -> str:
    """Return the option --database for the checked database. Leave out the password."""
    shown = target.location
    if target.url is not None and shown != target.url.render_as_string(hide_password=False):
        # A URL without its hidden part can name another database. A connection to the host `…` always fails.
        shown = "postgresql://…"
    return f" --database {shlex.quote(shown)}"


# After a critical finding of these checks, the doctor changes no rows.
_HANDS_OFF = {
    "database",
    "integrity",
    "references",
    "rows",
    "schema",
    "schema_revision",
    "store_record",
    "clock",
    "wal",
}


def _repair(diagnosis: Diagnosis, target: Target, clock: Clock, settings: UnitSettings | None) -> list[Repair]:
    """Repair the problems in the diagnosis if a repair is safe. Return all repairs, including failed repairs."""
    done: list[Repair] = []
    bad = {finding.check: finding for finding in diagnosis.findings if finding.severity is not Severity.OK}
    critical = {check for check, finding in bad.items() if finding.severity is Severity.CRITICAL}
    # If the database can belong to another application, change no files.
    if target.path is not None and "database" not in critical:
        _record(done, "files", _make_private(target.path))
    if diagnosis.finding("schema_revision") is None or "schema_revision" in bad or critical & _HANDS_OFF:
        return done
    if target.path is not None and settings is None and "wal" in bad and "mode" in bad["wal"].facts:
        _record(done, "wal", _switch_to_wal(target.path))
    if "routes" in bad:
        _record(done, "routes", _correct_routes(target, clock, settings))
    return done


def _record(done: list[Repair], check: str, actions: Iterator[str]) -> None:
    """Make a repair, and record each of its actions. Also record the error of a repair that failed."""
    try:
        for action in actions:
            done.append(Repair(check=check, action=action))
    except HomeAgentError as error:
        done.append(Repair(check=check, action=f"gave up: {error}"))


def _make_private(path: Path) -> Iterator[str]:
    for file, status in database_files(path).items():
        if is_public(status) and status.st_nlink == 1 and status.st_uid == os.geteuid():
            mode = stat.S_IMODE(status.st_mode)
            with explained("make private", file):
                change_mode(file, mode & FILE_MODE)
            yield f"gave {file.name!r} mode {mode & FILE_MODE:04o}; it had {mode:04o}"


def _switch_to_wal(path: Path) -> Iterator[str]:
    timeout = timedelta(seconds=5)
    engine = SQLiteEngine(path, busy_timeout=timeout, durability="full")
    with closing(engine), sidecar_lock(path, timeout=timeout):
        engine.prepare_header()
    yield "switched the file to a write-ahead log"


@contextmanager
def _opened(target: Target, clock: Clock, settings: UnitSettings | None) -> Iterator[UnitSettings]:
    if settings is not None:
        yield settings
        return
    with closing(open_engine(target.url or target.path, clock=clock, migrate=False)) as engine:
        yield UnitSettings(engine, clock, BUSY_TIMEOUT.total_seconds(), UnitOfWork, Limits())


def _correct_routes(target: Target, clock: Clock, settings: UnitSettings | None) -> Iterator[str]:
    routes: Any = AgentSession.__table__
    taken = 0
    with _opened(target, clock, settings) as used, UnitOfWork(used, read_only=False) as unit:
        connection = unit.session.connection()
        stale = list(stale_routes(connection))
        # First release all stale keys: another session can need the key.
        for session_id, _ in stale:
            connection.execute(update(routes).where(routes.c.session_id == session_id).values(route_key=None))
        for session_id, route in stale:
            is_free = ~exists().where(routes.c.route_key == route).correlate(None)
            take = update(routes).where(routes.c.session_id == session_id, is_free).values(route_key=route)
            taken += connection.execute(take).rowcount
    yield f"gave {taken:,} sessions the key of their route, and left {len(stale) - taken:,} without a route"
