"""Column types that homeagent chooses for fields of an application's tables."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from enum import Enum, StrEnum
from typing import Any, get_args

from pydantic import JsonValue
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from sqlalchemy import BigInteger, Integer
from sqlalchemy.types import TypeEngine

# The next two imports use private names: SQLModel has no public counterparts. The class `FieldInfoMetadata` stores the
# arguments of `Field()`. The function `get_sa_type_from_field()` returns a field's type without None.
from sqlmodel._compat import get_sa_type_from_field
from sqlmodel.main import FieldInfoMetadata

from homeagent.errors import InvalidArgumentError
from homeagent.models.types.enums import EnumColumn
from homeagent.models.types.json_text import JsonColumn
from homeagent.models.types.text import text_column
from homeagent.models.types.timestamps import TIMESTAMP_CHECK, TimestampColumn


def choose_column_type(field: FieldInfo, what: str) -> None:
    """Choose a column type, unless the field has `sa_type` or `sa_column`. Both engines sort the values of each chosen
    type equally.
    """
    given = next((each for each in field.metadata if isinstance(each, FieldInfoMetadata)), None)
    if given is not None and not (given.sa_type is given.sa_column is PydanticUndefined):
        return
    kind = get_sa_type_from_field(field)
    chosen = _column_type(kind, field, what)
    if chosen is None:
        return
    if given is None:
        given = FieldInfoMetadata()
        field.metadata.append(given)
    given.sa_type = chosen
    if kind is JsonValue and given.nullable is PydanticUndefined:
        given.nullable = True  # a JSON column stores None as NULL


def _column_type(kind: Any, field: FieldInfo, what: str) -> TypeEngine[Any] | None:
    if kind is JsonValue or kind in (dict, list):
        return JsonColumn()
    if not isinstance(kind, type):
        return None
    if issubclass(kind, StrEnum):
        return EnumColumn(kind)
    if issubclass(kind, Enum) or issubclass(kind, bool):
        return None
    if issubclass(kind, str):
        return text_column()
    if issubclass(kind, int):
        # PostgreSQL's INTEGER has only 32 bits. SQLite generates primary keys only for the type INTEGER.
        return BigInteger().with_variant(Integer(), "sqlite")
    if issubclass(kind, datetime):
        if TIMESTAMP_CHECK not in _parts(field.rebuild_annotation()):
            raise InvalidArgumentError(
                f"{what} is a datetime: annotate it as homeagent.Timestamp, which refuses a naive datetime, "
                "or set sa_type"
            )
        return TimestampColumn()
    return None


def _parts(annotation: Any) -> Iterator[Any]:
    yield annotation
    for part in get_args(annotation):
        yield from _parts(part)
