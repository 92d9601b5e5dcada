"""Functions that a caller hands over to be called, and coroutine functions where nobody would await them."""

from __future__ import annotations

from inspect import iscoroutine, iscoroutinefunction, isgeneratorfunction
from types import CoroutineType
from typing import TypeVar

from homeagent.errors import InvalidArgumentError

__all__ = ["check_function", "refuse_coroutine", "refuse_coroutine_function"]

T = TypeVar("T")


def check_function(function: T, what: str, *, coroutine: str | None = None) -> T:
    """Return `function` if it can be called.

    Args:
        function: what was handed over.
        what: the name of the argument.
        coroutine: what takes a coroutine function instead. None where one is welcome.

    Raises:
        InvalidArgumentError: it can't be called, or is a generator function, or a coroutine function where those are
            not welcome.
    """
    if not callable(function):
        raise InvalidArgumentError(f"{what} must be a function, not {type(function).__name__}")
    if isgeneratorfunction(function):
        raise InvalidArgumentError(f"{what} is a generator function, a call of which runs nothing: make it return")
    if coroutine is not None and iscoroutinefunction(function):
        raise InvalidArgumentError(f"{what} is a coroutine function, which nobody awaits here: {coroutine}")
    return function


def refuse_coroutine(value: T, what: str, remedy: str) -> T:
    """Return what a function returned, unless that is a coroutine, of which nothing has been done yet.

    Raises:
        InvalidArgumentError: it is one.
    """
    if iscoroutine(value):
        value.close()  # or Python would warn that nobody awaited it
        raise InvalidArgumentError(f"{what} returned a coroutine, which nobody awaits here: {remedy}")
    return value


def refuse_coroutine_function(function: object, value: T, what: str, remedy: str) -> T:
    """Return what `function` returned, unless it is a coroutine function and so has done nothing.

    An ordinary function may return a coroutine for its caller to await.

    Raises:
        InvalidArgumentError: it is one.
    """
    # The type first, which is cheap: this is asked about every unit.
    if isinstance(value, CoroutineType) and iscoroutinefunction(function):
        value.close()
        raise InvalidArgumentError(f"{what} is a coroutine function, which nobody awaits here: {remedy}")
    return value
