"""Requests to the stores, made from the arguments of a command."""

from __future__ import annotations

import json
from typing import Any, TypeVar

import typer
from pydantic import BaseModel, ValidationError

__all__ = ["json_argument", "request"]

M = TypeVar("M", bound=BaseModel)


def request(model: type[M], **values: Any) -> M:
    """Return a model of the values. If a value is invalid, end the command as wrong usage."""
    try:
        return model(**values)
    except ValidationError as error:
        # Do not show the invalid value, which can be long or contain control characters.
        texts = [f"{'.'.join(map(str, found['loc']))}: {found['msg']}" for found in error.errors(include_input=False)]
        raise typer.BadParameter("; ".join(texts)) from None


def json_argument(text: str | None, name: str) -> Any:
    """Return the value of an argument that is JSON, or None without the argument."""
    if text is None:
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise typer.BadParameter(f"{name} must be JSON, such as null or '{{\"id\": 7}}'.") from None
