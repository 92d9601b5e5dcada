"""No local variable in an error's traceback: reporters that record local variables must not get secrets.

A traceback keeps the frames that an exception left, with their local variables: secrets, nonces, keys, results and the
parameters of statements, as plain text. When an error of homeagent leaves a method that is given such values,
homeagent's frames are cleared. The traceback keeps its lines, and the application's frames keep their variables. An
exception that is not an error of homeagent, such as a TypeError from a mistake in homeagent, keeps everything.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from inspect import iscoroutinefunction
from typing import Any, ParamSpec, TypeVar, cast

from homeagent.errors import HomeAgentError

__all__ = ["clear_locals", "clears_locals"]

P = ParamSpec("P")
R = TypeVar("R")


def clear_locals(error: BaseException) -> None:
    """Clear the local variables of all frames of homeagent that this error, its causes or its contexts have left.

    The caller's own frame still runs, so the caller deletes its variables itself.
    """
    waiting: list[BaseException | None] = [error]
    seen: set[int] = set()
    while waiting:
        one = waiting.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        waiting += [one.__cause__, one.__context__]
        traceback = one.__traceback__
        while traceback is not None:
            frame = traceback.tb_frame
            if str(frame.f_globals.get("__name__")).partition(".")[0] == "homeagent":
                with suppress(RuntimeError):  # the frame still runs
                    frame.clear()
            traceback = traceback.tb_next


def clears_locals(function: Callable[P, R]) -> Callable[P, R]:
    """Return the function, whose errors of homeagent hold no local variable of homeagent's frames."""
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
