"""Complete descriptions of a schema."""

from __future__ import annotations

import re
from typing import Any

from sqlalchemy import Connection, text

from homeagent.migrations import VERSION_TABLE


def sqlite_structure(raw: Any) -> dict[str, Any]:
    """Return the clauses and options of each table of a SQLite schema, and the statements of indexes and views."""
    structure: dict[str, Any] = {}
    # `create_all` creates no triggers. The tests of the doctor compare the triggers with their texts.
    query = "SELECT type, name, sql FROM sqlite_master WHERE type <> 'trigger' AND sql IS NOT NULL AND name <> ?"
    for kind, name, sql in raw.execute(query, [VERSION_TABLE]).fetchall():
        normal = re.sub(r"\s+", " ", sql.replace('"', "")).strip()
        structure[name] = normal
        if kind == "table":
            body, options = re.fullmatch(r"CREATE TABLE \w+ ?\((.*)\)([^)]*)", normal).groups()  # type: ignore[union-attr]  # the statement matches
            structure[name] = sorted(part.strip() for part in re.split(r", (?![^(]*\))", body)), options.strip()
    return structure


def postgresql_structure(connection: Connection) -> dict[str, Any]:
    """Describe a PostgreSQL schema in the words of its catalogue."""
    columns = connection.execute(
        text(
            "SELECT table_name, column_name, data_type, is_nullable, column_default, collation_name"
            " FROM information_schema.columns WHERE table_schema = current_schema()"
        )
    )
    constraints = connection.execute(
        text(
            "SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid) FROM pg_constraint"
            " WHERE connamespace = current_schema()::regnamespace AND contype NOT IN ('n', 't')"
        )
    )
    indexes = connection.execute(
        text("SELECT tablename, indexname, indexdef FROM pg_indexes WHERE schemaname = current_schema()")
    )
    return {
        kind: sorted(tuple(map(str, row)) for row in found if not str(row[0]).endswith(VERSION_TABLE))
        for kind, found in (("columns", columns), ("constraints", constraints), ("indexes", indexes))
    }
