"""Write docs/schema.md from the models: `python .ci/schema_page.py`. With `--check`, only compare the page.

The exit status is 1 if the page differs from the models.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from sqlalchemy import CheckConstraint, Column, Table
from sqlalchemy.dialects import postgresql
from sqlmodel import SQLModel

from homeagent import models
from homeagent.engine.sqlite.dialect import Dialect

PAGE = Path(__file__).resolve().parents[1] / "docs" / "schema.md"
ENGINES = {"SQLite": Dialect(), "PostgreSQL": postgresql.dialect()}

BEGINNING = """\
# Schema

This page is for engineers who read the tables by SQL, or whose own tables refer to homeagent's tables. A program
generates the page from the models. Timestamps are milliseconds since 1970-01-01 in UTC.

In the diagram, the line from `agents` to `sessions` stands for a foreign key. In homeagent's tables, the column
`device_id` is not a foreign key. If a device is deleted or gets another id, triggers delete the idempotency keys of the
device. The nonces and changes of the device stay.
"""


def descriptions(table: Table) -> dict[str, str]:
    """Return the meaning of each column: the description of the model's field, or of the column."""
    found = {column.name: column.info["description"] for column in table.columns if "description" in column.info}
    for value in vars(models).values():
        if isinstance(value, type) and issubclass(value, SQLModel) and getattr(value, "__table__", None) is table:
            found |= {
                (field.alias or name): field.description
                for name, field in value.model_fields.items()
                if field.description
            }
    return found


def diagram() -> Iterator[str]:
    """Yield the lines of the entity diagram."""
    yield "```mermaid"
    # Little room around the names, so that the diagram is readable on a narrow screen.
    yield from ["---", "config:", "  er:", "    nodeSpacing: 30", "    rankSpacing: 45", "    minEntityWidth: 60"]
    yield from ["    entityPadding: 6", "---"]
    yield "erDiagram"
    yield "  accTitle: Tables of homeagent and their keys"
    # One table above the other, for the same reason.
    yield "  direction LR"
    for table in models.SCHEMA:
        yield f"  {table.name} {{"
        for column in table.primary_key.columns:
            yield f"    {type_name(column, 'SQLite').lower()} {column.name} PK"
        for key in table.foreign_keys:
            yield f"    {type_name(key.parent, 'SQLite').lower()} {key.parent.name} FK"
        yield "  }"
    for table in models.SCHEMA:
        for key in table.foreign_keys:
            yield f'  {key.column.table.name} ||--o{{ {table.name} : ""'
    yield "```"


def type_name(column: Column[object], engine: str) -> str:
    """Return the SQL type of a column on an engine."""
    return column.type.compile(ENGINES[engine])


def section(table: Table) -> Iterator[str]:
    """Yield the lines about a table."""
    yield f"## {table.name}"
    yield ""
    yield "| column | SQLite | PostgreSQL | null | meaning |"
    yield "|---|---|---|---|---|"
    meanings = descriptions(table)
    for column in table.columns:
        types = " | ".join(type_name(column, engine) for engine in ENGINES)
        yield f"| `{column.name}` | {types} | {'yes' if column.nullable else 'no'} | {meanings[column.name]} |"
    yield ""
    yield f"- Primary key: {names(table.primary_key.columns)}"
    for index in sorted(table.indexes, key=lambda index: str(index.name)):
        kind = "Unique index" if index.unique else "Index"
        where = index.dialect_options["sqlite"].get("where")
        yield f"- {kind} `{index.name}`: {names(index.columns)}" + (
            "" if where is None else f", for rows with `{where}`"
        )
    checks = (constraint for constraint in table.constraints if isinstance(constraint, CheckConstraint))
    for check in sorted(checks, key=lambda check: str(check.name)):
        yield f"- Check `{check.name}`: `{check.sqltext}`"


def names(columns: object) -> str:
    """Return the names of columns as Markdown."""
    return ", ".join(f"`{column.name}`" for column in columns)  # type: ignore[attr-defined]  # any collection of columns


def page() -> str:
    """Return the text of the page."""
    lines = [BEGINNING, *diagram()]
    for table in models.SCHEMA:
        lines += ["", *section(table)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if "--check" not in sys.argv:
        PAGE.write_text(page(), encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != page():
        sys.exit("docs/schema.md differs from the models: run python .ci/schema_page.py")
