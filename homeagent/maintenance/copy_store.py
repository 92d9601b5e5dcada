"""Copy a store into an empty store, and compare the two stores."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Literal

from pydantic import BaseModel
from sqlalchemy import Connection, delete, text

from homeagent.engine.engine import Engine
from homeagent.engine.sqlite.engine import SQLiteEngine
from homeagent.errors import (
    CorruptDatabaseError,
    DatabaseError,
    InvalidArgumentError,
    SchemaOutdatedError,
    SourceChangedError,
    TargetNotEmptyError,
)
from homeagent.maintenance.copied_tables import (
    CopiedTable,
    Progress,
    applications_tables,
    homeagents_tables,
    suspended_rules,
)
from homeagent.migrations import REVISION, revision_of
from homeagent.migrations.schema_drift import refuse_changed_schema
from homeagent.models import store_table
from homeagent.transaction import UnitSettings
from homeagent.unit_of_work import UnitOfWork

_DIFFERS = (
    "is not the same on both sides, so the copy was undone: check whether the target's column types can store each "
    "value (SQLite rounds a NUMERIC to 15 digits), then the target's server or disk"
)


class CopyReport(BaseModel, frozen=True):
    """Result of a copy that was compared with its source.

    Attributes:
        rows: number of copied rows by table name, including the application's tables.
    """

    rows: dict[str, int]


@dataclass(frozen=True, slots=True)
class CopyProgress:
    """Progress of a copy.

    Attributes:
        step: "copying" in the first step, and "comparing" in the second step.
        table: name of the current table.
        rows: number of rows that the current step has processed, in all tables.
        total: total number of rows of the current step.
    """

    step: Literal["copying", "comparing"]
    table: str
    rows: int
    total: int


def copy_store(
    read: UnitSettings,
    written: UnitSettings,
    *,
    live: bool,
    leave: Collection[str] = (),
    progress: Callable[[CopyProgress], object] | None,
) -> CopyReport:
    """Copy all rows of a store into an empty store (see `Database.copy_to`)."""
    engines = read.engine, written.engine
    with UnitOfWork(written, read_only=False) as target, UnitOfWork(read, read_only=True) as source:
        origin, destination = source.session.connection(), target.session.connection()
        acknowledged = engines[0].acknowledged | engines[1].acknowledged
        for connection, location in ((origin, "the source"), (destination, "the target")):
            revision = revision_of(connection)
            if revision is None or revision < REVISION:
                raise SchemaOutdatedError(revision, needed=REVISION)
            # Also refuse a newer schema: this version would not copy its new columns.
            refuse_changed_schema(connection, revision, location, acknowledged)
        _refuse_same_database(engines, origin, destination)
        tables = [
            *homeagents_tables(origin, destination),
            *applications_tables(engines, origin, destination, leave),
        ]
        quote = destination.dialect.identifier_preparer.quote
        names = [] if destination.dialect.name == "sqlite" else [quote(table.name) for table in tables]
        if names:
            # On SQLite the write unit excludes other writers. On PostgreSQL the lock excludes writers, and allows
            # readers.
            destination.execute(text(f"LOCK TABLE {', '.join(names)} IN EXCLUSIVE MODE"))
        for table in tables:
            if table.name == store_table.name:
                if table.count(origin) != 1:
                    raise CorruptDatabaseError(
                        "the table `store` of the source has lost its row: restore the newest good backup"
                    )
                # Delete the row that a revision has inserted. The copied row keeps the source's epoch.
                destination.execute(delete(table.target))
            elif table.count(destination):
                raise TargetNotEmptyError(table.name)
        rows = {table.name: table.count(origin) for table in tables}
        step = partial(_reporter, sum(rows.values()), progress)
        _copy(origin, target, tables, step("copying"))
        for name in names:
            # Without statistics the server's planner would assume empty tables until autovacuum runs.
            destination.execute(text(f"ANALYZE {name}"))
        # Compare with a new snapshot, to find rows written during the copy.
        with nullcontext(source) if live else UnitOfWork(read, read_only=True) as later:
            differing = _first_difference(later.session.connection(), destination, tables, step("comparing"))
        if differing is not None:
            if not live and _first_difference(origin, destination, tables, lambda table, rows: None) is None:
                raise SourceChangedError(differing)
            raise DatabaseError(f"{differing} {_DIFFERS}")
    # Connections cache the time of the last restore (`precedes_restore()`), which the copy has replaced.
    written.engine.require_reconnect()
    written.engine.discard_free()
    del rows[store_table.name]
    return CopyReport(rows=rows)


def _reporter(
    total: int, report: Callable[[CopyProgress], object] | None, step: Literal["copying", "comparing"]
) -> Progress:
    done = 0

    def add(table: str, rows: int) -> None:
        nonlocal done
        done += rows
        if report is not None:
            report(CopyProgress(step, table, done, total))

    return add


def _copy(source: Connection, target: UnitOfWork, tables: Sequence[CopiedTable], progress: Progress) -> None:
    connection = target.session.connection()
    with suspended_rules(connection, tables):
        for table in tables:
            for page in table.pages(source):
                table.insert(target, page)
                progress(table.name, len(page))
            if table.model is None:
                table.continue_numbers(source, connection)


def _first_difference(
    source: Connection, target: Connection, tables: Sequence[CopiedTable], progress: Progress
) -> str | None:
    return next((table.name for table in tables if table.differs(source, target, progress)), None)


def _refuse_same_database(engines: tuple[Engine, Engine], source: Connection, target: Connection) -> None:
    first, second = engines
    if isinstance(first, SQLiteEngine) or isinstance(second, SQLiteEngine):
        same = isinstance(first, SQLiteEngine) and isinstance(second, SQLiteEngine) and first.path.samefile(second.path)
    else:
        # Do not compare URLs: one server can have several names. Two connections to one database can't share an
        # exclusive advisory lock (https://www.postgresql.org/docs/current/explicit-locking.html#ADVISORY-LOCKS).
        key = secrets.randbits(63)
        query = text("SELECT pg_try_advisory_xact_lock(:key), current_schema()")
        _, target_schema = target.execute(query, {"key": key}).one()
        free, source_schema = source.execute(query, {"key": key}).one()
        same = not free and source_schema == target_schema
    if same:
        raise InvalidArgumentError("source and target are the same database: name another target")
