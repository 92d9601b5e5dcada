"""Inject an interrupt (Ctrl-C) or another signal at each point of the code where a signal can arrive."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Collection
from dis import opname
from typing import Any


def interrupt() -> None:
    """Do the same as Python's handler of Ctrl-C."""
    raise KeyboardInterrupt


def interrupt_at(
    turn: int, modules: Collection[str], act: Callable[[], object], handler: Callable[[], object] = interrupt
) -> bool:
    """Call a handler at a chosen point of these modules where a signal can arrive; return whether it was called.

    CPython checks for signals at the beginning of a function, and right after a call or a backward jump.
    """
    last: dict[int, str] = {}  # the keys are ids, because the handler's traceback would keep the frames in memory
    left = turn

    def trace(frame: Any, event: str, argument: Any) -> Any:
        nonlocal left
        if frame.f_globals.get("__name__") not in modules:
            return None
        frame.f_trace_opcodes = True
        here = opname[frame.f_code.co_code[frame.f_lasti]] if event == "opcode" else ""
        if event == "call" or (event == "opcode" and last.get(id(frame), "").startswith(("CALL", "JUMP_BACKWARD"))):
            left -= 1
            if left < 0:
                sys.settrace(None)
                handler()
                return None
        if event == "opcode":
            last[id(frame)] = here
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
        # A real signal is handled within the call; the injected signal is handled before the next instruction. If the
        # call is the last instruction of an `except` block, CPython does not leave the block, so the thread keeps the
        # handled exception.
        ctypes.pythonapi.PyErr_SetExcInfo(None, None, None)
    return left < 0
