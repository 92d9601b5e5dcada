"""An interrupt (Ctrl-C), or another signal, at each of the points where one can come."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Collection
from dis import opname
from typing import Any


def interrupt() -> None:
    """Do what Python's handler of Ctrl-C does."""
    raise KeyboardInterrupt


def interrupt_at(
    turn: int, modules: Collection[str], act: Callable[[], object], handler: Callable[[], object] = interrupt
) -> bool:
    """Call a handler at one of the points of these modules where a signal may come, and tell whether it came.

    CPython looks for signals when a function begins, and right after a call or a jump back.
    """
    last: dict[Any, str] = {}
    left = turn

    def trace(frame: Any, event: str, argument: Any) -> Any:
        nonlocal left
        if frame.f_globals.get("__name__") not in modules:
            return None
        frame.f_trace_opcodes = True
        here = opname[frame.f_code.co_code[frame.f_lasti]] if event == "opcode" else ""
        if event == "call" or (event == "opcode" and last.get(frame, "").startswith(("CALL", "JUMP_BACKWARD"))):
            left -= 1
            if left < 0:
                sys.settrace(None)
                handler()
                return None
        if event == "opcode":
            last[frame] = here
        return trace

    before = sys.gettrace()
    handled = sys.exception()
    sys.settrace(trace)
    try:
        act()
    except KeyboardInterrupt:
        if left >= 0:
            raise
    finally:
        sys.settrace(before)
    if handled is None and sys.exception() is not None:
        # A signal comes within the call, and this one before the instruction after it. Where that is the last of an
        # `except` block, CPython goes on as if the block had not ended, in whatever this thread does next.
        ctypes.pythonapi.PyErr_SetExcInfo(None, None, None)
    return left < 0
