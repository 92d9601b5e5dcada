"""One look at one database, and a second one after it was mended."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from datetime import timedelta
from os import PathLike
from typing import TYPE_CHECKING

from homeagent.clock import Clock, system_clock
from homeagent.engine.engine import Engine
from homeagent.engine.sqlite.engine import SQLiteEngine
from homeagent.engine.sqlite.inspection import Stopwatch
from homeagent.engine.target import DEFAULT_PATH, Target, resolve_target
from homeagent.errors import DatabaseClosedError, DatabaseError, InvalidArgumentError
from homeagent.maintenance.doctor.chart import Chart
from homeagent.maintenance.doctor.findings import Diagnosis, Repair
from homeagent.maintenance.doctor.postgresql import examine_postgresql
from homeagent.maintenance.doctor.repair import mend
from homeagent.maintenance.doctor.sqlite import examine_sqlite
from homeagent.models.types import check_instant
from homeagent.unit_of_work import UnitOfWork

if TYPE_CHECKING:
    from sqlalchemy import URL

__all__ = ["diagnose", "diagnose_open"]

logger = logging.getLogger("homeagent")

OpenUnit = Callable[[], AbstractContextManager[UnitOfWork]]

QUICK = timedelta(seconds=10)
"""How long one statement of a quick look may take."""


def diagnose(
    target: str | PathLike[str] | URL | None = None,
    *,
    clock: Clock = system_clock,
    thorough: bool = False,
    fix: bool = False,
) -> Diagnosis:
    """Look a database over, whatever state it is in, and say what is wrong with it and what to do.

    Nothing is changed unless `fix` is set. A database that is missing, damaged, too old or too new is a finding and
    no error. No finding holds a secret, a hash, a nonce, a key or a result.

    Args:
        target: as in `Database.open`: None, a path or a URL. For a database that this process has open use
            `Database.doctor`.
        clock: the store's.
        thorough: make SQLite's full integrity check, which also compares the indexes with their tables, and let each
            check take as long as it needs. Otherwise none takes longer than 10 seconds, and one that would is
            listed as not made.
        fix: mend what can be mended without losing anything: modes of our own files, half copies left behind over
            a day ago, the backlog of expired rows, hashes of secrets that serve no more, the journal mode and the
            size of the log. The findings are those after that.

    Raises:
        InvalidArgumentError: the target is of no use, or temporary.
    """
    where = resolve_target(target)
    if where.is_temporary:
        raise InvalidArgumentError("a temporary database is only there while it is open: use Database.doctor()")
    return _look_and_mend(where, clock=clock, thorough=thorough, fix=fix)


def diagnose_open(engine: Engine, read: OpenUnit, *, clock: Clock, thorough: bool, fix: bool) -> Diagnosis:
    """Look a database over that this process has open; see `Database.doctor`.

    Args:
        engine: the database.
        read: opens a read-only unit of it.
        clock: the store's.
        thorough: as in `diagnose`.
        fix: as in `diagnose`.

    Raises:
        DatabaseClosedError: it was closed meanwhile.
    """
    if not isinstance(engine, SQLiteEngine):
        return _look_and_mend(Target(url=engine.sa_engine.url), clock=clock, thorough=thorough, fix=fix, engine=engine)
    # While a reader is there, so is the log with its index: through them the doctor leaves no trace.
    return _look_and_mend(
        Target(path=engine.path),
        clock=clock,
        thorough=thorough,
        fix=fix,
        engine=engine,
        meanwhile=lambda: _reading(read),
    )


@contextmanager
def _reading(read: OpenUnit) -> Iterator[None]:
    """Read in the block, if the database can be read: what is wrong with it otherwise, the doctor finds."""
    with ExitStack() as stack:
        try:
            stack.enter_context(read())
        except DatabaseClosedError:
            raise
        except DatabaseError as error:
            logger.debug(
                "the doctor looks at a database that can't be read: %s",
                error,
                extra={"event": "doctor_without_reader", "error": type(error).__name__},
            )
        yield


def _look_and_mend(
    target: Target,
    *,
    clock: Clock,
    thorough: bool,
    fix: bool,
    engine: Engine | None = None,
    meanwhile: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Diagnosis:
    def look_now(repairs: Sequence[Repair] = ()) -> Diagnosis:
        with meanwhile():
            return look(target, clock=clock, thorough=thorough, repairs=repairs)

    found = look_now()
    if not fix:
        return found
    repairs = mend(found, target, clock=clock, engine=engine)
    return look_now(repairs) if repairs else found


def look(target: Target, *, clock: Clock, thorough: bool, repairs: Sequence[Repair] = ()) -> Diagnosis:
    """Look at a file or a server, and change nothing.

    Args:
        target: the file or the server.
        clock: the store's.
        thorough: as in `diagnose`.
        repairs: what was mended before, to be told along.
    """
    limit = None if thorough else QUICK
    chart = Chart(check_instant(clock(), "the clock's instant"), thorough=thorough, watch=Stopwatch(limit))
    if target.url is not None:
        examine_postgresql(chart, target.url, limit=limit)
        return chart.diagnosis(location=target.location, engine="postgresql", repairs=repairs)
    assert target.path is not None  # noqa: S101  a temporary one has no look from outside
    if not _is_default(target):
        chart.database_option = f" --database {shlex.quote(str(target.path))}"
    examine_sqlite(chart, target.path)
    return chart.diagnosis(location=target.location, engine="sqlite", repairs=repairs)


def _is_default(target: Target) -> bool:
    try:
        return target == resolve_target(DEFAULT_PATH)
    except InvalidArgumentError:
        return False  # this user has no home, so no default either
