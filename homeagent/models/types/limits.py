from __future__ import annotations

from collections.abc import Collection

from homeagent.errors import InvalidArgumentError

MAX_LIMIT = 2**31 - 1


def check_limit(value: int, what: str = "limit") -> int:
    """Return the value if it is an int from 1 to `MAX_LIMIT`. Otherwise raise InvalidArgumentError."""
    if type(value) is not int or not 1 <= value <= MAX_LIMIT:
        raise InvalidArgumentError(f"{what} must be a whole number from 1 to {MAX_LIMIT:,}")
    return value


def check_flag(value: bool, what: str) -> bool:
    """Return the value if it is True or False. Otherwise raise InvalidArgumentError."""
    if not isinstance(value, bool):
        raise InvalidArgumentError(f"{what} must be True or False, not {type(value).__name__}")
    return value


def check_names(names: Collection[str], what: str, example: str) -> frozenset[str]:
    """Return the names as a frozenset. Raise InvalidArgumentError if `names` is a str or not a collection of texts."""
    is_collection = isinstance(names, Collection) and not isinstance(names, str)
    if not is_collection or not all(isinstance(name, str) for name in names):
        raise InvalidArgumentError(f"{what} must be a collection of names, such as ['{example}']")
    return frozenset(names)
