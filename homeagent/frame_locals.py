"""Clear local variables in tracebacks, so that error reporters record no secrets."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from inspect import iscoroutinefunction
from typing import Any, ParamSpec, TypeVar, cast

from homeagent.errors import HomeAgentError

P = ParamSpec("P")
R = TypeVar("R")


def clear_locals(error: BaseException) -> None:
    """Clear the local variables of homeagent's functions in the traceback of an error. Also clear the tracebacks of the
    error's causes. The caller must delete its own local variables.
    """
    waiting: list[BaseException | None] = [error]
    seen: set[int] = set()
    while waiting:
        current = waiting.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        waiting += [current.__cause__, current.__context__]
        traceback = current.__traceback__
        while traceback is not None:
            frame = traceback.tb_frame
            if str(frame.f_globals.get("__name__")).partition(".")[0] == "homeagent":
                with suppress(RuntimeError):  # Python raises RuntimeError for a running frame
                    frame.clear()
            traceback = traceback.tb_next


def clears_locals(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function. If the function raises a HomeAgentError, clear local variables of homeagent's frames."""
    if iscoroutinefunction(function):
        awaited: Any = function

        @wraps(function)
        async def call_async(*arguments: P.args, **named: P.kwargs) -> Any:
            try:
                return await awaited(*arguments, **named)
            except HomeAgentError as error:
                del arguments, named
                clear_locals(error)
                raise

        return cast("Callable[P, R]", call_async)

    @wraps(function)
    def call(*arguments: P.args, **named: P.kwargs) -> R:
        try:
            return function(*arguments, **named)
        except HomeAgentError as error:
            del arguments, named
            clear_locals(error)
            raise

    return call
