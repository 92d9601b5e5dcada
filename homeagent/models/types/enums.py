"""Column types for enums and booleans."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import Any

from sqlalchemy import Integer, Text
from sqlalchemy.types import TypeEngine

from homeagent.errors import InvalidArgumentError
from homeagent.models.types.stored_values import StoredColumn


class EnumColumn(StoredColumn[StrEnum]):
    """Column type that stores the value of a StrEnum member. SQLAlchemy's column type Enum would store the member's
    name.
    """

    impl: TypeEngine[Any] | type[TypeEngine[Any]] = Text
    cache_ok: bool | None = True

    def __init__(self, kind: type[StrEnum]) -> None:
        super().__init__()
        self.kind = kind
        self._stored: dict[Any, str] = {member.value: member.value for member in kind}
        self.convert_loaded: Callable[[Any], Any] = {member.value: member for member in kind}.__getitem__

    def convert_bound(self, value: StrEnum | str) -> str:
        """Return the stored text of an enum member. The argument can also be the text of a member."""
        try:
            return self._stored[value]
        except (KeyError, TypeError):
            refusal = InvalidArgumentError(f"a value is not a member of {self.kind.__name__}")
        # Do not raise inside the `except` block. The error's `__context__` would show the value.
        raise refusal


class _Flags(dict[Any, bool]):
    def __init__(self, *, otherwise: bool) -> None:
        super().__init__({0: False, 1: True})
        self._otherwise = otherwise

    def __missing__(self, stored: object) -> bool:
        return self._otherwise


class FlagColumn(StoredColumn[bool]):
    """Column type for a bool, stored as 0 or 1. The argument `otherwise=` replaces a stored value that is not 0 or 1.
    Choose a replacement that grants no access.
    """

    impl: TypeEngine[Any] | type[TypeEngine[Any]] = Integer
    cache_ok: bool | None = True
    convert_bound: Callable[[Any], Any] = int
    allowed: tuple[Any, ...] | None = (0, 1)

    def __init__(self, *, otherwise: bool = False) -> None:
        super().__init__()
        self.otherwise = otherwise
        self.convert_loaded: Callable[[Any], Any] = _Flags(otherwise=otherwise).__getitem__
