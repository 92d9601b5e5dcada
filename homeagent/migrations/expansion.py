"""Check that a revision only expands the schema, so that code of the previous version works with the new schema.

Administrators upgrade hosts one after the other. The first upgraded host changes the schema while the other hosts still
run old code. Therefore columns and names that old code uses must stay, and the schema must still accept the rows that
old code writes. The check runs the revisions on an empty database, and compares the schemas before and after each
revision.

A later release removes the parts of the schema that no code uses any more. The revision that removes parts of the
schema declares itself a contraction:

    oldest_revision = "a7"

The line in the revision's module declares that code for revision a7 and later works with the contracted schema.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterator, Mapping, Set
from dataclasses import dataclass, replace
from graphlib import CycleError, TopologicalSorter
from typing import TYPE_CHECKING, Any

from sqlalchemy import inspect, text

from homeagent.errors import IncompatibleRevisionError
from homeagent.migrations.application import Application
from homeagent.migrations.revisions import loaded
from homeagent.models import APPLICATION_VERSION_TABLE, TABLES, VERSION_TABLE

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from homeagent.engine.engine import Engine

_WIDER = {("INTEGER", "BIGINT"), ("SMALLINT", "INTEGER"), ("SMALLINT", "BIGINT"), ("VARCHAR", "TEXT")}

_LATER = "keep it until no process uses it, and then drop it in a revision that declares oldest_revision"
_NEW_COLUMN = "add another column instead"
_IN_CODE = "check the rows in the application instead, or show by a test that old code works, and accept the name"


@dataclass(frozen=True)
class _Table:
    columns: Mapping[str, Mapping[str, Any]]
    checks: Mapping[str, str]
    uniques: frozenset[tuple[str, ...]]
    references: frozenset[tuple[Any, ...]]
    primary_key: tuple[str, ...]
    triggers: frozenset[str]


Structure = Mapping[str, _Table]
"""The tables and views of a database, by name."""


def check_expansion(
    application: Application, open_step: Callable[[Application], Engine], accepted: Container[str]
) -> None:
    """Bring an empty database to each revision of an application, and raise an error for a revision that breaks old
    code.

    Args:
        application: the revisions.
        open_step: function that brings the database to the newest revision of an application, and opens an engine.
        accepted: names of new CHECK constraints and triggers that old code satisfies.

    Raises:
        IncompatibleRevisionError: if a revision breaks code of the previous version.
        MigrationError: if a revision failed, or changed homeagent's tables.
    """
    homeagents = {*TABLES, VERSION_TABLE, APPLICATION_VERSION_TABLE}
    old: Structure = {}
    for step in _steps(application):
        engine, revision = open_step(step), str(step.head)
        try:
            with engine.connect() as connection:
                new = {name: table for name, table in structure(connection).items() if name not in homeagents}
        finally:
            engine.close()
        oldest: str | None = getattr(loaded(step.scripts[revision].file), "oldest_revision", None)
        if oldest is None:
            problems = list(breaks(old, new, accepted))
        elif oldest in step.scripts and oldest != revision:
            problems = []
        else:
            problems = [f"oldest_revision is {oldest!r}: name an earlier revision, whose code still works"]
        if problems:
            raise IncompatibleRevisionError(revision, application=application.name, problems=problems)
        old = new


def _steps(application: Application) -> Iterator[Application]:
    """For each revision, oldest first, yield the application with the revisions up to this revision."""
    scripts = application.scripts
    graph = {revision: {*script.parents, *script.dependencies} for revision, script in scripts.items()}
    try:
        order = list(TopologicalSorter(graph).static_order())
    except CycleError:
        yield application  # Alembic refuses revisions that depend on each other
        return
    for number, revision in enumerate(order, start=1):
        yield replace(application, scripts={name: scripts[name] for name in order[:number]}, head=revision)


def structure(connection: Connection) -> Structure:
    """Read the tables and views of the current schema."""
    with connection.begin():
        inspector = inspect(connection)
        triggers = _triggers(connection)
        return {
            name: _Table(
                columns={str(column["name"]): dict(column) for column in inspector.get_columns(name)},
                checks={
                    str(check["name"] or check["sqltext"]): " ".join(str(check["sqltext"]).split())
                    for check in inspector.get_check_constraints(name)
                },
                uniques=frozenset(
                    tuple(str(column) for column in unique["column_names"]) for unique in _uniques(inspector, name)
                ),
                references=frozenset(
                    (tuple(key["constrained_columns"]), key["referred_table"], tuple(key["referred_columns"]))
                    for key in inspector.get_foreign_keys(name)
                ),
                primary_key=tuple(inspector.get_pk_constraint(name)["constrained_columns"]),
                triggers=frozenset(trigger for table, trigger in triggers if table == name),
            )
            for name in (*inspector.get_table_names(), *inspector.get_view_names())
        }


def _uniques(inspector: Any, table: str) -> list[Any]:
    indexes = (index for index in inspector.get_indexes(table) if index["unique"])
    return [*inspector.get_unique_constraints(table), *indexes]


def _triggers(connection: Connection) -> set[tuple[str, str]]:
    if connection.dialect.name == "sqlite":
        query = "SELECT tbl_name, name FROM sqlite_master WHERE type = 'trigger'"
    else:
        query = "SELECT tgrelid::regclass::text, tgname FROM pg_trigger WHERE NOT tgisinternal"
    return {(str(table), str(trigger)) for table, trigger in connection.execute(text(query))}


def breaks(old: Structure, new: Structure, accepted: Container[str] = ()) -> Iterator[str]:
    """Yield one text for each change that can break old code. The text names the change and, after a colon, the remedy.

    The check accepts a new CHECK constraint or trigger whose name is in `accepted=[…]`.
    """
    for name, before in old.items():
        if name not in new:
            yield f"{name} is dropped or renamed: {_LATER}"
        else:
            yield from _breaks_of_table(name, before, new[name], accepted)


def _breaks_of_table(name: str, old: _Table, new: _Table, accepted: Container[str]) -> Iterator[str]:
    for column, before in old.columns.items():
        if column not in new.columns:
            yield f"{name}.{column} is dropped or renamed: {_LATER}"
        else:
            yield from _breaks_of_column(f"{name}.{column}", before, new.columns[column])
    added = new.columns.keys() - old.columns.keys()
    for column in sorted(added):
        given = any(new.columns[column].get(kind) is not None for kind in ("default", "computed", "identity"))
        if not new.columns[column]["nullable"] and not given:
            yield f"{name}.{column} is NOT NULL without a server default: add server_default, or allow NULL"
    if new.primary_key != old.primary_key:
        yield f"the primary key of {name} changes, which old code's upserts name: create another table instead"
    yield from _breaks_of_checks(name, old, new, accepted)
    for columns in sorted(new.uniques - old.uniques):
        # Old code does not set a new nullable column. A unique index accepts several nulls.
        free = any(
            new.columns[column]["nullable"] and not new.columns[column]["default"] for column in added & {*columns}
        )
        if not free:
            yield f"{name} gets unique {columns}, of which old code can write a duplicate: {_IN_CODE}"
    for columns in sorted(old.uniques - new.uniques):
        yield f"{name} loses unique {columns}, which old code's upserts need: {_LATER}"
    for reference in sorted(new.references - old.references):
        if not added & {*reference[0]}:
            yield f"{name} gets a foreign key on {reference[0]}, which old code can violate: {_NEW_COLUMN}"
    for trigger in sorted(new.triggers - old.triggers):
        if trigger not in accepted:
            yield f"{name} gets trigger {trigger}, which also runs for old code: {_IN_CODE}"


def _breaks_of_checks(name: str, old: _Table, new: _Table, accepted: Container[str]) -> Iterator[str]:
    added = new.columns.keys() - old.columns.keys()
    for check, condition in new.checks.items():
        if check not in old.checks and check in accepted:
            continue
        if old.checks.get(check) != condition and not _mentions_only(condition, added, old.columns.keys()):
            yield f"CHECK {check} of {name} is new or changed, and old code can violate it: {_IN_CODE}"
    for check in old.checks.keys() - new.checks.keys():
        yield f"CHECK {check} of {name} is dropped, and old code can read a value that it does not know: {_LATER}"


def _breaks_of_column(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    if old["nullable"] and not new["nullable"]:
        yield f"{name} becomes NOT NULL, and old code can write NULL: {_NEW_COLUMN}"
    if new["nullable"] and not old["nullable"]:
        yield f"{name} becomes nullable, and old code expects no NULL: {_NEW_COLUMN}"
    if old["default"] is not None and new["default"] is None:
        yield f"{name} loses its server default, and old code inserts no value: {_LATER}"
    before, after = old["type"], new["type"]
    if str(before) == str(after):
        return
    kinds = (re.sub(r"\(.*", "", str(before)), re.sub(r"\(.*", "", str(after)))
    lengths = (getattr(before, "length", None), getattr(after, "length", None))
    wider = kinds[0] == kinds[1] and lengths[0] is not None and (lengths[1] is None or lengths[1] >= lengths[0])
    if not wider and kinds not in _WIDER:
        yield f"{name} changes its type from {before} to {after}: {_NEW_COLUMN}"


def _mentions_only(condition: str, added: Set[str], old: Set[str]) -> bool:
    words = set(re.findall(r"\w+", re.sub(r"'[^']*'", "", condition)))
    return bool(words & added) and not words & old
