"""State and outcome of a call in the group commit's queue.

| from | to | when |
|---|---|---|
| QUEUED | STARTING | the call is the first of a batch, and the writer thread waits for the write lock |
| QUEUED, STARTING | RUNNING | the writer thread calls the function |
| RUNNING | ENDED | the function has returned or raised, and the batch is not committed yet |
| ENDED | COMMITTING | the writer thread begins the commit, and the caller can no longer leave |
| COMMITTING | DONE | the batch is committed, and the call has the outcome |
| RUNNING, ENDED, COMMITTING | ALONE | the batch was rolled back, so the caller must run the unit itself |
| QUEUED | ALONE | the writer thread cannot be started, so the caller must run the unit itself |
| QUEUED, STARTING | DONE | `busy_timeout` is over or the database was closed, so the caller gets the error |
| QUEUED, STARTING | LEFT | the caller was cancelled or interrupted |
| QUEUED | LEFT | `busy_timeout` is over before the function was called |
| ENDED | LEFT | `busy_timeout` is over before the commit, and the batch is rolled back |
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto
from functools import partial
from threading import get_ident
from typing import Any

from homeagent.clock import monotonic
from homeagent.worker_threads import AwaitedCall


class CallState(Enum):
    """State of a call (see the module's docstring)."""

    QUEUED = auto()
    STARTING = auto()
    RUNNING = auto()
    ENDED = auto()
    COMMITTING = auto()
    DONE = auto()
    ALONE = auto()
    LEFT = auto()

    def __init__(self, _: int) -> None:
        self.is_over: bool = self.name in ("DONE", "ALONE", "LEFT")
        """True if the caller must stop waiting for the call."""


# Python reads a global name ten times faster than `CallState.QUEUED`.
QUEUED, STARTING, RUNNING, ENDED, COMMITTING, DONE, ALONE, LEFT = CallState


@dataclass(slots=True, eq=False)
class QueuedCall(AwaitedCall):
    """A function that the writer thread runs as a unit."""

    woken: threading.Lock = field(default_factory=threading.Lock)
    """Lock that wakes the waiting thread. An interrupt could leave the lock of a `threading.Event` held."""
    caller: int = field(default_factory=get_ident)
    state: CallState = QUEUED
    since: float = field(default_factory=monotonic)
    callbacks: list[Callable[[], object]] | None = None

    def __str__(self) -> str:
        work: Any = self.work
        while isinstance(work, partial):
            work = work.func
        name = getattr(work, "__qualname__", type(work).__qualname__)
        if self.future is not None:
            return f"{name} for a coroutine"
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        return f"{name} for thread {names.get(self.caller, self.caller)!r}"
