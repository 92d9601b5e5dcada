"""Column types for enums and booleans."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from sqlalchemy import Integer, Text
from sqlalchemy.types import TypeEngine

from homeagent.errors import InvalidArgumentError
from homeagent.models.types.stored_values import StoredColumn


class EnumColumn(StoredColumn[StrEnum]):
    """Column type for a StrEnum, which stores a member as the text of its value.

    SQLAlchemy's `Enum` would store the name of a member instead of its value.

    Args:
        kind: the StrEnum. If a stored text is not the value of a member, the column type raises an error. A CHECK
            constraint of the table allows only the values of the StrEnum's members.
    """

    impl: TypeEngine[Any] | type[TypeEngine[Any]] = Text
    cache_ok: bool | None = True

    def __init__(self, kind: type[StrEnum]) -> None:
        super().__init__()
        self.kind = kind
        self.loaded_values: dict[str, StrEnum] = {member.value: member for member in kind}
        self.convert_loaded = self.loaded_values.__getitem__
        self._stored: dict[Any, str] = {member.value: member.value for member in kind}

    def convert_bound(self, value: StrEnum | str) -> str:
        """Return the text to store for a member. A lookup in the dictionary also finds a member, because a StrEnum
        member equals its text.
        """
        try:
            return self._stored[value]
        except (KeyError, TypeError):
            raise InvalidArgumentError(f"a value is not a member of {self.kind.__name__}") from None

    def process_bind_param(self, value: StrEnum | None, dialect: Dialect) -> str | None:
        """Return the text to store for a member."""
        return None if value is None else self.convert_bound(value)

    def process_result_value(self, value: str | None, dialect: Dialect) -> StrEnum | None:
        """Return the enum member whose value is this text."""
        return None if value is None else loaded(self.loaded_values.__getitem__, value)


class _Flags(dict[Any, bool]):
    def __init__(self, *, otherwise: bool) -> None:
        super().__init__({0: False, 1: True})
        self._otherwise = otherwise

    def __missing__(self, stored: object) -> bool:
        return self._otherwise


class FlagColumn(TypeDecorator[bool]):
    """Column type for a bool, stored as INTEGER 0 or 1. SQLAlchemy's `Boolean` would declare the column as BOOLEAN.

    Args:
        otherwise: value to return for a stored value other than 0 and 1, which only another program can write. Choose
            False if True would grant access.
    """

    impl: TypeEngine[Any] | type[TypeEngine[Any]] = Integer
    cache_ok: bool | None = True
    convert_bound = int

    def __init__(self, *, otherwise: bool = False) -> None:
        super().__init__()
        self.otherwise = otherwise
        self.loaded_values: dict[object, bool] = _Flags(otherwise=otherwise)

    def process_bind_param(self, value: bool | None, dialect: Dialect) -> int | None:
        """Return 1 or 0."""
        return None if value is None else int(value)

    def process_result_value(self, value: object, dialect: Dialect) -> bool | None:
        """Return True for 1, False for 0, and the fallback for any other stored value."""
        return None if value is None else self.loaded_values[value]

    convert_bound = int
