"""Diagnose a database, repair the findings on request, and diagnose again."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from datetime import timedelta
from os import PathLike
from typing import TYPE_CHECKING

from homeagent.clock import Clock, system_clock
from homeagent.engine.sqlite.engine import SQLiteEngine
from homeagent.engine.sqlite.inspection import Stopwatch
from homeagent.engine.target import Target, conceal, resolve_target
from homeagent.errors import DatabaseClosedError, DatabaseError, InvalidArgumentError
from homeagent.maintenance.doctor.postgresql import check_postgresql
from homeagent.maintenance.doctor.repair import repair
from homeagent.maintenance.doctor.report import Collector, Diagnosis, Repair
from homeagent.maintenance.doctor.sqlite import check_sqlite
from homeagent.models.types import check_timestamp
from homeagent.unit_of_work import UnitOfWork
from homeagent.unit_settings import UnitSettings

if TYPE_CHECKING:
    from sqlalchemy import URL

logger: logging.Logger = logging.getLogger("homeagent")

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

    With `fix=False`, the doctor does not change a file or a row. A missing, damaged, too old or too new database is a
    finding, not an error. Findings do not contain secrets, hashes, nonces, idempotency keys or results.

    Args:
        target: path or URL of the database to check, as for `Database.open()`. If the calling process has the database
            open, call `Database.doctor()` instead.
        clock: clock of the store.
        thorough: True to run SQLite's full integrity check without a time limit. The full check also compares the
            indexes with their tables. With `thorough=False`, a check that takes longer than 10 seconds is stopped and
            listed in `Diagnosis.not_checked`.
        fix: True to repair problems that can be repaired without loss. The doctor corrects modes of files, route keys
            of sessions and the journal mode. The doctor also deletes partial copies older than a day, expired rows and
            hashes of expired secrets, and empties the WAL. The returned findings describe the database after the
            repair.
        acknowledged: names of the application's triggers on homeagent's tables (see `Database.open()`).

    Raises:
        InvalidArgumentError: if the target is invalid, or names a temporary database.
    """
    given = conceal(target)
    del target
    where = resolve_target(given)
    if where.is_temporary:
        raise InvalidArgumentError("a temporary database exists only while it is open: use Database.doctor()")
    return _diagnose(where, clock, frozenset(acknowledged), thorough=thorough, fix=fix)


def diagnose_open(settings: UnitSettings, *, thorough: bool, fix: bool) -> Diagnosis:
    """Check a database that the calling process has open (see `Database.doctor`)."""
    engine = settings.engine
    target = Target(path=engine.path) if isinstance(engine, SQLiteEngine) else Target(url=engine.sa_engine.url)
    return _diagnose(target, settings.now, engine.acknowledged, thorough=thorough, fix=fix, settings=settings)


@contextmanager
def _reading(settings: UnitSettings) -> Iterator[None]:
    """Hold a read-only unit open if possible, so that SQLite keeps the WAL index and the doctor creates no file."""
    with ExitStack() as stack:
        try:
            stack.enter_context(UnitOfWork(settings, read_only=True))
        except DatabaseClosedError:
            raise
        except DatabaseError as error:
            logger.debug(
                "the doctor checks a database without a reader, because a unit can't be opened: %s",
                error,
                extra={"event": "doctor_without_reader", "error": type(error).__name__},
            )
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
    def check(repairs: Sequence[Repair]) -> Diagnosis:
        limit = None if thorough else QUICK
        now = check_timestamp(clock(), "the clock's time")
        collector = Collector(now, acknowledged, thorough=thorough, watch=Stopwatch(limit))
        if target.path is not None:
            collector.database_option = f" --database {shlex.quote(str(target.path))}"
            with nullcontext() if settings is None else _reading(settings):
                check_sqlite(collector, target.path)
        elif target.url is not None:
            check_postgresql(collector, target.url, limit=limit)
        kind = "postgresql" if target.path is None else "sqlite"
        return collector.diagnosis(location=target.location, engine=kind, repairs=repairs)

    found = check(())
    repairs = repair(found, target, clock, settings) if fix else []
    return check(repairs) if repairs else found
