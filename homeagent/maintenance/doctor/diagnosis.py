"""Diagnose a database, repair it if that is asked for, and diagnose it again."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from os import PathLike
from typing import TYPE_CHECKING

from homeagent.clock import Clock, system_clock
from homeagent.engine.engine import Engine
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

if TYPE_CHECKING:
    from sqlalchemy import URL

__all__ = ["diagnose", "diagnose_open"]

logger = logging.getLogger("homeagent")

OpenUnit = Callable[[], AbstractContextManager[UnitOfWork]]

QUICK = timedelta(seconds=10)
"""How long one check may take unless all are to be thorough."""


def diagnose(
    target: str | PathLike[str] | URL | None = None,
    *,
    clock: Clock = system_clock,
    thorough: bool = False,
    fix: bool = False,
) -> Diagnosis:
    """Check a database in any state, and report what is wrong with it and what to do.

    Nothing is changed unless `fix` is set. A database that is missing, damaged, too old or too new is a finding and
    no error. No finding holds a secret, a hash, a nonce, an idempotency key or a result.

    Args:
        target: as in `Database.open`: None, a path or a URL. For a database that this process has open use
            `Database.doctor`.
        clock: the store's.
        thorough: make SQLite's full integrity check, which also compares the indexes with their tables, and let each
            check take as long as it needs. Otherwise none takes longer than 10 seconds, and one that would is
            listed as not made.
        fix: repair what can be repaired without losing anything: modes of homeagent's own files, half copies left
            behind over a day ago, the backlog of expired rows, hashes of expired secrets, the journal mode and the
            size of the log. The findings are those after that.

    Raises:
        InvalidArgumentError: if the target is invalid, or temporary.
    """
    given = conceal(target)
    del target
    where = resolve_target(given)
    if where.is_temporary:
        raise InvalidArgumentError("a temporary database is only there while it is open: use Database.doctor()")
    return _diagnose(where, clock, thorough=thorough, fix=fix)


def diagnose_open(engine: Engine, read: OpenUnit, *, clock: Clock, thorough: bool, fix: bool) -> Diagnosis:
    """Check a database that this process has open; see `Database.doctor`.

    Args:
        engine: the database.
        read: opens a read-only unit of it.
        clock: the store's.
        thorough: as in `diagnose`.
        fix: as in `diagnose`.

    Raises:
        DatabaseClosedError: if the database was closed meanwhile.
    """
    if not isinstance(engine, SQLiteEngine):
        return _diagnose(Target(url=engine.sa_engine.url), clock, thorough=thorough, fix=fix, engine=engine)
    # As long as a reader is there, SQLite keeps the log and its index: the doctor reads through them without a trace.
    reading = partial(_reading, read)
    return _diagnose(Target(path=engine.path), clock, thorough=thorough, fix=fix, engine=engine, meanwhile=reading)


@contextmanager
def _reading(read: OpenUnit) -> Iterator[None]:
    """Read in the block if the database can be read; if not, the doctor reports why."""
    with ExitStack() as stack:
        try:
            stack.enter_context(read())
        except DatabaseClosedError:
            raise
        except DatabaseError as error:
            logger.debug(
                "the doctor checks a database that can't be read: %s",
                error,
                extra={"event": "doctor_without_reader", "error": type(error).__name__},
            )
        yield


def _diagnose(
    target: Target,
    clock: Clock,
    *,
    thorough: bool,
    fix: bool,
    engine: Engine | None = None,
    meanwhile: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Diagnosis:
    with meanwhile():
        found = _check(target, clock, thorough=thorough)
    repairs = repair(found, target, clock=clock, engine=engine) if fix else []
    if not repairs:
        return found
    with meanwhile():
        return _check(target, clock, thorough=thorough, repairs=repairs)


def _check(target: Target, clock: Clock, *, thorough: bool, repairs: Sequence[Repair] = ()) -> Diagnosis:
    limit = None if thorough else QUICK
    collector = Collector(check_timestamp(clock(), "the clock's time"), thorough=thorough, watch=Stopwatch(limit))
    if target.url is not None:
        check_postgresql(collector, target.url, limit=limit)
        return collector.diagnosis(location=target.location, engine="postgresql", repairs=repairs)
    assert target.path is not None  # noqa: S101  a temporary one was refused
    collector.database_option = f" --database {shlex.quote(str(target.path))}"
    check_sqlite(collector, target.path)
    return collector.diagnosis(location=target.location, engine="sqlite", repairs=repairs)
