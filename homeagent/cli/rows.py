"""Show rows of the stores, create requests from the arguments of a command, and change a row after a confirmation."""

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
from homeagent.cli.arguments import parsed_timestamp
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
    """Return a row for JSON, without values that were derived from a secret."""
    return _PUBLIC[type(row)].model_validate(row, from_attributes=True).model_dump(mode="json", by_alias=True)


def show_row(row: Device | Agent | AgentSession, *, error: bool = False) -> None:
    """Print the fields of a row on standard output, or on standard error with `error=True`."""
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
    """Return an instance of `model` with the values. If a value is invalid, raise `typer.BadParameter`."""
    try:
        return model(**values)
    except ValidationError as error:
        # Do not show the invalid value, which can be long or contain control characters.
        texts = [f"{'.'.join(map(str, found['loc']))}: {found['msg']}" for found in error.errors(include_input=False)]
        raise typer.BadParameter("; ".join(texts)) from None


def json_argument(text: str | None, name: str) -> Any:
    """Return the value of a JSON argument, or None if the argument is absent."""
    if text is None:
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise typer.BadParameter(f"{name} must be JSON, such as null or '{{\"id\": 7}}'.") from None


def require_expected(
    *, yes: bool, option: str, value: object, source: str = "as the list of the rows prints it with --json"
) -> None:
    """Raise `typer.BadParameter` if the operator passed --yes without the value that identifies the row."""
    if yes and value is None:
        raise typer.BadParameter(f"--yes needs {option}, {source}.")


def change_shown(
    context: typer.Context,
    opened: Database,
    question: str,
    read: Callable[[UnitOfWork], R],
    change: Callable[[UnitOfWork], T],
    *,
    name: str,
    columns: tuple[str, ...],
    expected: str | int | None,
    yes: bool,
    dry_run: bool = False,
    show: Callable[[Any], object] = lambda row: show_row(row, error=True),
) -> T:
    """Show a row, ask a question, and change the row. If a value in one of `columns` changed after the row was shown,
    raise ConflictError.

    If `read` returns None, do not ask. The argument `expected` is the required value of the first column, with a
    timestamp as text. None means any value.
    """
    seen = opened.run(read, read_only=True)
    confirm(context, question, yes=yes or seen is None, dry_run=dry_run, show=partial(show, seen))
    wanted = parsed_timestamp(expected) if isinstance(expected, str) else expected

    def work(unit: UnitOfWork) -> T:
        now = read(unit)
        if now is not None:
            if wanted not in (None, getattr(now, columns[0])):
                raise ConflictError(
                    f"{name} has another value of {columns[0]} than {expected}: show it again, then decide"
                )
            if any(getattr(seen, column, None) != getattr(now, column) for column in columns):
                raise ConflictError(f"{name} changed after it was shown: show it again, then decide")
        result = change(unit)
        if dry_run:
            unit.rollback()
        return result

    return opened.run(work)


def count_rows(opened: Database, column: Any, value: str) -> int:
    """Return the number of rows whose column has the value."""
    query = select(func.count()).select_from(column.class_).where(column == value)
    found: int = opened.run(lambda unit: unit.session.execute(query).scalar_one(), read_only=True)
    return found
