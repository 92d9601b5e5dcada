"""Create the requests to the stores from the arguments of a command, and check the rows that a command changes."""

from __future__ import annotations

import json
from typing import Any, TypeVar

import typer
from pydantic import BaseModel, ValidationError
from sqlalchemy import func, select

from homeagent.cli.arguments import parsed_timestamp
from homeagent.database import Database
from homeagent.errors import ConflictError

M = TypeVar("M", bound=BaseModel)


def request(model: type[M], **values: Any) -> M:
    """Construct a model from the values, and return the model. If a value is invalid, end the command as wrong
    usage.
    """
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
    """End the command as wrong usage if --yes stands without the value that identifies the row.

    With --yes, the command shows no row. The operator names a value of the row, and the command refuses a row with
    another value. The source tells the operator where to find the value.
    """
    if yes and value is None:
        raise typer.BadParameter(f"--yes needs {option}, {source}.")


def refuse_change(row: str, seen: Any, now: Any, *columns: str, expected: str | int | None = None) -> None:
    """Raise ConflictError if a row has changed since the command showed the row, or is not the expected row.

    Args:
        row: kind and id of the row, for the message.
        seen: row that was shown, or None if no row was shown.
        now: row that the command read in the unit of the change.
        columns: names of the columns that must not have changed between the two rows.
        expected: value that the operator expects in the first column, or None. A str value is parsed as a timestamp.
    """
    wanted = parsed_timestamp(expected) if isinstance(expected, str) else expected
    if wanted not in (None, getattr(now, columns[0])):
        raise ConflictError(f"{row} has another value of {columns[0]} than {expected}: show it again, then decide")
    if any(getattr(seen, column, None) != getattr(now, column) for column in columns):
        raise ConflictError(f"{row} changed after it was shown: show it again, then decide")


def count_rows(opened: Database, column: Any, value: str) -> int:
    """Return the number of rows whose column has the value."""
    query = select(func.count()).select_from(column.class_).where(column == value)
    found: int = opened.run(lambda unit: unit.session.execute(query).scalar_one(), read_only=True)
    return found
