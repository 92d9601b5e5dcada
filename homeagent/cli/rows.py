"""Functions of the commands that show and change rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from functools import partial
from typing import Any, TypeVar

import typer
from pydantic import BaseModel, ValidationError
from sqlalchemy import func, select

from homeagent.cli.application import confirm
from homeagent.cli.output import format_timestamp, print_facts
from homeagent.cli.visible_text import identity
from homeagent.database import Database
from homeagent.errors import ConflictError
from homeagent.models import Agent, AgentSession, Device
from homeagent.models.schemas import AgentPublic, AgentSessionPublic, DevicePublic
from homeagent.unit_of_work import UnitOfWork

M = TypeVar("M", bound=BaseModel)
R = TypeVar("R")
T = TypeVar("T")

_PUBLIC: dict[type, type[BaseModel]] = {Device: DevicePublic, Agent: AgentPublic, AgentSession: AgentSessionPublic}


def public(row: Device | Agent | AgentSession) -> dict[str, Any]:
    """Return a row for JSON, without values derived from a secret."""
    return _PUBLIC[type(row)].model_validate(row, from_attributes=True).model_dump(mode="json", by_alias=True)


def show_row(row: Device | Agent | AgentSession, *, error: bool = False) -> None:
    """Print the fields of a row. With `error=True`, print the fields on standard error."""
    values = dict(_PUBLIC[type(row)].model_validate(row, from_attributes=True))
    facts = []
    for name, value in values.items():
        if isinstance(value, datetime):
            text = format_timestamp(value)
        elif isinstance(value, str):
            text = identity(value)
        else:
            text = "-" if value is None else json.dumps(value)
        # For example, the field `sender_id` gets the heading "Sender".
        heading = name.removesuffix("_").removesuffix("_id").replace("_", " ").capitalize()
        facts.append((type(row).__name__ if name == "id" else heading, text))
    if isinstance(row, Device) and row.previous_secret_expires_at is not None:
        facts.append(("Old secret until", format_timestamp(row.previous_secret_expires_at)))
    print_facts(facts, error=error)


def request(model: type[M], **values: Any) -> M:
    """Return an instance of `model=` with the values. If a value is invalid, raise `typer.BadParameter`."""
    try:
        return model(**values)
    except ValidationError as error:
        # Do not show the invalid value, which can contain control characters.
        texts = [f"{'.'.join(map(str, found['loc']))}: {found['msg']}" for found in error.errors(include_input=False)]
        raise typer.BadParameter("; ".join(texts)) from None


def json_argument(text: str | None, name: str) -> Any:
    """Parse a JSON argument. For an absent argument return None."""
    if text is None:
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise typer.BadParameter(f"{name} must be JSON, such as null or '{{\"id\": 7}}'.") from None


def require_expected(
    context: typer.Context, name: str, source: str = "as the list of the rows prints it with --json"
) -> None:
    """Raise `typer.BadParameter` if the operator passed --yes without the required option."""
    if context.params["yes"] and context.params[name] is None:
        raise typer.BadParameter(f"--yes needs --{name.replace('_', '-')}, {source}.")


def change_shown(
    context: typer.Context,
    opened: Database,
    question: str,
    read: Callable[[UnitOfWork], R],
    change: Callable[[UnitOfWork], T],
    *,
    name: str,
    columns: tuple[str, ...],
    show: Callable[[Any], object] = lambda row: show_row(row, error=True),
) -> T:
    """Show a row, ask a question, and change the row. If the row does not exist, do not ask.

    Raise ConflictError if a given column changed after the row was shown. Also raise ConflictError if the first column
    differs from the operator's option. If `--dry-run` is set, undo the change.
    """
    expected = context.params[columns[0]]
    seen = opened.run(read, read_only=True)
    confirm(context, question, partial(show, seen), asks=seen is not None)

    def work(unit: UnitOfWork) -> T:
        now = read(unit)
        if now is not None:
            if expected not in (None, getattr(now, columns[0])):
                raise ConflictError(
                    f"{name} has another value of {columns[0]} than {expected}: show it again, then decide"
                )
            if any(getattr(seen, column, None) != getattr(now, column) for column in columns):
                raise ConflictError(f"{name} changed after it was shown: show it again, then decide")
        result = change(unit)
        if context.params.get("dry_run"):
            unit.rollback()
        return result

    return opened.run(work)


# Select two tables for each foreign key with ON DELETE CASCADE. The first table refers to the second table.
_CASCADES = {
    "sqlite": 'SELECT name, k."table" FROM sqlite_master, pragma_foreign_key_list(name) k'
    " WHERE type = 'table' AND on_delete = 'CASCADE'",
    "postgresql": "SELECT c.relname, p.relname FROM pg_constraint k JOIN pg_class c ON c.oid = k.conrelid"
    " JOIN pg_class p ON p.oid = k.confrelid WHERE k.contype = 'f' AND k.confdeltype = 'c'"
    " AND p.relnamespace = (SELECT oid FROM pg_namespace WHERE nspname = current_schema())",
}


def cascading_tables(opened: Database, *changed: str) -> list[str]:
    """Return the tables whose rows the database deletes together with rows of the changed tables."""
    with opened.read_connection() as connection:
        keys = connection.exec_driver_sql(_CASCADES[connection.dialect.name]).all()
    reached = set(changed)
    while found := {child for child, parent in keys if parent in reached} - reached:
        reached |= found
    return sorted(reached - set(changed))


def count_rows(opened: Database, column: Any, value: str) -> int:
    """Return the number of rows whose column has the value."""
    query = select(func.count()).select_from(column.class_).where(column == value)
    found: int = opened.run(lambda unit: unit.session.execute(query).scalar_one(), read_only=True)
    return found
