"""Check that a revision only expands the schema.

Administrators upgrade hosts one by one, so old code uses the new schema. A contraction is a revision that breaks old
code. A contraction sets `oldest_revision`: the oldest revision whose code still works.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import closing
from dataclasses import replace
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

# Error texts for removed tables, columns and constraints, by kind. Removing a foreign key or a trigger does not break
# old code.
_REMOVED = {
    "table": f"{{table}} is dropped or renamed: {_LATER}",
    "column": f"{{table}}.{{name}} is dropped or renamed: {_LATER}",
    "check": f"CHECK {{name}} of {{table}} is dropped, and old code can read a value that it does not know: {_LATER}",
    "unique": f"{{table}} loses unique {{name}}, which old code's upserts need: {_LATER}",
}

Structure = Mapping[tuple[str, str, Any], Any]
"""The parts of a schema, by kind, table and name. A unique constraint or foreign key has its columns as the name."""


def check_expansion(
    application: Application, open_step: Callable[[Application], Engine], accepted: Container[str]
) -> None:
    """Compare the schemas of consecutive revisions in empty databases. If a revision breaks old code, raise
    IncompatibleRevisionError.
    """
    homeagents = {*TABLES, VERSION_TABLE, APPLICATION_VERSION_TABLE}
    old: Structure = {}
    for step in _steps(application):
        revision = str(step.head)
        with closing(open_step(step)) as engine, engine.connect() as connection:
            new = {part: fact for part, fact in structure(connection).items() if part[1] not in homeagents}
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
    scripts = application.scripts
    graph = {revision: {*script.parents, *script.dependencies} for revision, script in scripts.items()}
    try:
        order = list(TopologicalSorter(graph).static_order())
    except CycleError:
        yield application  # Alembic refuses a cycle of revisions
        return
    for number, revision in enumerate(order, start=1):
        yield replace(application, scripts={name: scripts[name] for name in order[:number]}, head=revision)


def structure(connection: Connection) -> Structure:
    """Read the tables and views of the current schema."""
    if connection.dialect.name == "sqlite":
        triggers = "SELECT tbl_name, name FROM sqlite_master WHERE type = 'trigger'"
    else:
        triggers = "SELECT tgrelid::regclass::text, tgname FROM pg_trigger WHERE NOT tgisinternal"
    with connection.begin():
        inspector = inspect(connection)
        parts: dict[tuple[str, str, Any], Any] = {
            ("trigger", table, trigger): None for table, trigger in connection.execute(text(triggers))
        }
        for table in (*inspector.get_table_names(), *inspector.get_view_names()):
            parts["table", table, ""] = inspector.get_pk_constraint(table)["constrained_columns"]
            for column in inspector.get_columns(table):
                parts["column", table, column["name"]] = column
            for check in inspector.get_check_constraints(table):
                parts["check", table, str(check["name"] or check["sqltext"])] = " ".join(check["sqltext"].split())
            uniques: list[Any] = [index for index in inspector.get_indexes(table) if index["unique"]]
            for unique in (*uniques, *inspector.get_unique_constraints(table)):
                parts["unique", table, tuple(map(str, unique["column_names"]))] = None
            for key in inspector.get_foreign_keys(table):
                reference = (tuple(key["constrained_columns"]), key["referred_table"], tuple(key["referred_columns"]))
                parts["reference", table, reference] = key["options"].get("ondelete")
        return parts


def breaks(old: Structure, new: Structure, accepted: Container[str] = ()) -> Iterator[str]:
    """Yield problem and remedy for each change that can break old code. Ignore added checks and triggers whose names
    are in `accepted`.
    """
    for part in sorted(old):
        kind, table, name = part
        if part not in new:
            if kind in _REMOVED and (kind == "table" or ("table", table, "") in new):
                yield _REMOVED[kind].format(table=table, name=name)
        elif kind == "column":
            yield from _breaks_of_column(f"{table}.{name}", old[part], new[part])
        elif kind == "table" and old[part] != new[part]:
            yield f"the primary key of {table} changes, which old code's upserts name: create another table instead"
        elif kind == "reference" and old[part] is not None and old[part] != new[part]:
            yield f"the foreign key on {name[0]} of {table} loses ON DELETE {old[part]}, which old code needs: {_LATER}"
    for part in sorted(new):
        kind, table, name = part
        is_added = part not in old and not (kind in ("check", "trigger") and name in accepted)
        is_changed = kind == "check" and part in old and old[part] != new[part]
        if ("table", table, "") in old and (is_added or is_changed):
            yield from _breaks_of_addition(part, old, new)


def _columns(parts: Structure, table: str) -> set[str]:
    return {name for kind, of, name in parts if (kind, of) == ("column", table)}


def _breaks_of_addition(part: tuple[str, str, Any], old: Structure, new: Structure) -> Iterator[str]:
    kind, table, name = part
    added = _columns(new, table) - _columns(old, table)
    if kind == "column":
        column = new[part]
        if not column["nullable"] and all(column.get(key) is None for key in ("default", "computed", "identity")):
            yield f"{table}.{name} is NOT NULL without a server default: add server_default, or allow NULL"
    elif kind == "check":
        words = set(re.findall(r"\w+", re.sub(r"'[^']*'", "", new[part])))
        if not words & added or words & _columns(old, table):
            yield f"CHECK {name} of {table} is new or changed, and old code can violate it: {_IN_CODE}"
    elif kind == "unique":
        # Old code writes NULL to new columns. A unique index accepts several rows with NULL.
        columns = [new["column", table, column] for column in added & {*name}]
        if not any(column["nullable"] and not column["default"] for column in columns):
            yield f"{table} gets unique {name}, of which old code can write a duplicate: {_IN_CODE}"
    elif kind == "reference" and not added & {*name[0]}:
        yield f"{table} gets a foreign key on {name[0]}, which old code can violate: {_NEW_COLUMN}"
    elif kind == "trigger":
        yield f"{table} gets trigger {name}, which also runs for old code: {_IN_CODE}"


def _breaks_of_column(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    if old["nullable"] and not new["nullable"]:
        yield f"{name} becomes NOT NULL, and old code can write NULL: {_NEW_COLUMN}"
    if new["nullable"] and not old["nullable"]:
        yield f"{name} becomes nullable, and old code expects no NULL: {_NEW_COLUMN}"
    if old["default"] is not None and new["default"] is None:
        yield f"{name} loses its server default, and old code inserts no value: {_LATER}"
    if new.get("computed") and not old.get("computed"):
        yield f"{name} becomes a generated column, and old code writes a value: {_NEW_COLUMN}"
    before, after = old["type"], new["type"]
    if str(before) == str(after):
        return
    kinds = tuple(re.sub(r"\(.*", "", str(kind)) for kind in (before, after))
    length, new_length = (getattr(kind, "length", None) for kind in (before, after))
    is_longer = kinds[0] == kinds[1] and length is not None and (new_length is None or new_length >= length)
    if not is_longer and kinds not in _WIDER:
        yield f"{name} changes its type from {before} to {after}: {_NEW_COLUMN}"
