"""Checks of functions that callers pass as arguments."""

from __future__ import annotations

from inspect import (
    CO_ASYNC_GENERATOR,
    CO_COROUTINE,
    CO_GENERATOR,
    isasyncgen,
    isasyncgenfunction,
    isawaitable,
    iscoroutine,
    iscoroutinefunction,
    isgenerator,
    isgeneratorfunction,
)
from types import FunctionType, MethodType
from typing import TypeVar

from homeagent.errors import InvalidArgumentError

T = TypeVar("T")

_GENERATOR = CO_GENERATOR | CO_ASYNC_GENERATOR

_DEFERRED = _GENERATOR | CO_COROUTINE
"""Flags of functions whose body does not run at the call."""


def check_function(function: T, what: str, *, coroutine: str | None = None) -> T:
    """Return the function. Raise InvalidArgumentError for a generator function or a non-callable object. If
    `coroutine=` is not None, also refuse a coroutine function. The error's message then ends with the text of
    `coroutine=`.
    """
    plain: object = function.__func__ if isinstance(function, MethodType) else function
    deferred = _GENERATOR if coroutine is None else _DEFERRED
    # For an ordinary function without attributes, skip the slow checks below. An attribute can mark a coroutine
    # function (`inspect.markcoroutinefunction()`).
    if isinstance(plain, FunctionType) and not (plain.__code__.co_flags & deferred or plain.__dict__):
        return function
    if not callable(function):
        raise InvalidArgumentError(f"{what} must be a function, not {type(function).__name__}")
    # A call of another object runs its method `__call__()`.
    called: tuple[object, object] = (function, type(function).__call__)
    if any(isgeneratorfunction(each) or isasyncgenfunction(each) for each in called):
        raise InvalidArgumentError(f"{what} is a generator function, and a call does not run its body: return a value")
    if coroutine is not None and iscoroutinefunction(function):
        raise InvalidArgumentError(f"{what} is a coroutine function, which is not awaited here: {coroutine}")
    return function


def refuse_deferred(value: T, what: str, remedy: str) -> T:
    """Return the value that a function returned. Raise InvalidArgumentError for an awaitable object or a generator."""
    if iscoroutine(value):
        value.close()  # The call of `close()` prevents Python's warning "never awaited".
    if isgenerator(value) or isasyncgen(value):
        raise InvalidArgumentError(f"{what} returned a generator, whose body has not run: return a value")
    if isawaitable(value):
        kind = "a coroutine" if iscoroutine(value) else "an awaitable object"
        raise InvalidArgumentError(f"{what} returned {kind}, which is not awaited here: {remedy}")
    return value
