"""A call: a function that somebody wants done as a unit of work, who waits for it, and what became of it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextvars import Context, copy_context
from functools import partial
from threading import get_ident
from time import monotonic
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    from homeagent.unit_of_work import UnitOfWork

__all__ = ["DONE", "ENDED", "GIVEN_UP", "LEADING", "NEW", "QUEUED", "TAKEN", "Call", "Mailbox"]

T = TypeVar("T")

# What becomes of a call. One that is taken has its function run, in a thread that is not its caller's; one that has
# ended waits for the commit that it shares; one that leads is done by its caller's own thread.
NEW, QUEUED, TAKEN, ENDED, LEADING, DONE, GIVEN_UP = range(7)


class Mailbox(Protocol):
    """Reaches the callers of an event loop."""

    def lead(self, call: Call[Any]) -> None:
        """Have `Grouping.lead` called with this call, in a thread that may block."""

    def deliver(self, calls: Sequence[Call[Any]]) -> None:
        """Tell the callers of these that their outcome is in the call."""


class Call(Generic[T]):
    """A function that somebody wants done as a unit of work, and its outcome.

    Args:
        work: the function.
        mailbox: where its caller is reached; None for a thread that waits.
    """

    __slots__ = (
        "alone",
        "callbacks",
        "caller",
        "context",
        "error",
        "mailbox",
        "since",
        "state",
        "value",
        "woken",
        "work",
    )

    value: T

    def __init__(self, work: Callable[[UnitOfWork], T], mailbox: Mailbox | None = None) -> None:
        self.work = work
        self.mailbox = mailbox
        self.state = NEW
        self.alone = False
        self.error: BaseException | None = None
        self.callbacks: list[Callable[[], object]] | None = None
        self.context: Context | None = None
        self.caller = 0
        self.since = 0.0
        """Since when it is in its state, by the monotonic clock; 0 for one that never waited."""
        self.woken: threading.Lock | None = None

    def expect_turn(self) -> None:
        """Get ready to be done by another thread, with the variables of this context."""
        self.context = copy_context()
        self.since = monotonic()
        if self.mailbox is None:
            self.caller = get_ident()
            self.woken = threading.Lock()
            self.woken.acquire()

    def compute(self, unit: UnitOfWork) -> T:
        """Run the function on a unit, with its caller's context where another thread does it."""
        return self.work(unit) if self.context is None else self.context.run(self.work, unit)

    @property
    def is_over(self) -> bool:
        """Whether its outcome is there, or it was given up."""
        return self.state in {DONE, GIVEN_UP}

    def outcome(self) -> T:
        """Return what the work returned, or raise what it raised."""
        if self.error is not None:
            # The traceback leads to this very call: without this, the two would keep each other alive.
            error, self.error = self.error, None
            try:
                raise error
            finally:
                del error
        return self.value

    def __str__(self) -> str:
        work: Any = self.work
        while isinstance(work, partial):
            work = work.func
        name = getattr(work, "__qualname__", type(work).__qualname__)
        if self.mailbox is not None:
            return f"{name} for a coroutine"
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        return f"{name} for thread {names.get(self.caller, self.caller)!r}"
