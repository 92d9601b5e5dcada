"""Group commit: units that wait for the one writer's lane share a transaction, each in a savepoint, and one commit.

A commit that is synced to the disk takes many times what a small unit does. So whoever gets the lane, the leader, does
the units of those who came meanwhile too, and commits once for all. What they must not notice is done so:

- A unit that raises is undone to its savepoint; the exception reaches its own caller, and the others go on.
- Where the commit fails, or the engine undoes the transaction in the middle, nothing took place: each unit is done
  again in a transaction of its own.
- A unit that asks for its ORM session wants a transaction that it may end: it is undone, and done again alone.
- A call is taken only at its turn. Who gives up before that leaves the queue; who is being served waits for the end.

That is why a unit that may be grouped is a function: a `with` block can't be run again.
"""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextvars import Context, copy_context
from threading import get_ident
from time import monotonic
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from homeagent.errors import HomeAgentError
from homeagent.unit_of_work import UnitOfWork, UnitSettings, call_back, refuse_nesting

if TYPE_CHECKING:
    from sqlmodel import Session

    from homeagent.engine.link import Link

__all__ = ["Call", "Grouping", "Mailbox"]

T = TypeVar("T")

# How many units a leader does for others, and how long it goes on taking them, in seconds: nobody waits much longer
# for a lane that is led than for one that is not.
_MOST = 256
_LONGEST = 0.01

_SAVEPOINT = "homeagent_group"

# What becomes of a call.
_NEW, _QUEUED, _TAKEN, _LEADING, _DONE, _GIVEN_UP = range(6)


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

    __slots__ = ("alone", "callbacks", "context", "error", "mailbox", "since", "state", "value", "woken", "work")

    value: T

    def __init__(self, work: Callable[[UnitOfWork], T], mailbox: Mailbox | None = None) -> None:
        self.work = work
        self.mailbox = mailbox
        self.state = _NEW
        self.alone = False
        self.error: BaseException | None = None
        self.callbacks: list[Callable[[], object]] | None = None
        self.context: Context | None = None
        self.since = 0.0
        self.woken: threading.Lock | None = None

    def expect_turn(self) -> None:
        """Get ready to be done by another thread, with the variables of this context."""
        self.context = copy_context()
        self.since = monotonic()
        if self.mailbox is None:
            self.woken = threading.Lock()
            self.woken.acquire()

    @property
    def is_done(self) -> bool:
        """Whether its outcome is there."""
        return self.state == _DONE

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


class _Alone(BaseException):
    """A unit asks for what it can have in a transaction of its own only."""


class _UndoneError(Exception):
    """The transaction that units share is no more, and nothing of it took place."""


class _LeadingUnit(UnitOfWork):
    """The unit of a leader: its transaction is the one that others join."""

    __slots__ = ("_committing", "_undone", "took_place")

    def __init__(self, settings: UnitSettings) -> None:
        super().__init__(settings, read_only=False)
        self._committing = False
        self._undone = False
        self.took_place = False
        """Whether the commit took place, also where an interrupt came right after it."""

    def begin(self, timeout: float) -> None:
        """Take the lane and begin."""
        self._begin(timeout)

    def share(self) -> Link | None:
        """Let others join, from when on this unit is of no more use itself, and return the link that they work on.

        None where there is nothing to join: this unit was given up, or has an ORM session.
        """
        if self._state != "open" or self._session is not None:
            return None
        self._state = "shared"
        return self._link

    @property
    def callbacks(self) -> list[Callable[[], object]] | None:
        """What is to be called after the commit."""
        return self._after_commit

    def commit(self) -> None:
        """Commit, or end a unit that was given up by its own `rollback`."""
        if self._state in ("open", "shared"):
            self._state = "open"
            self._committing = True
            self._commit()
        else:
            self._roll_back(None)

    def undo(self, error: BaseException | None) -> None:
        """Undo everything, and give the lane back."""
        self._roll_back(error)

    def _undo(self, link: Link) -> bool:
        # An interrupt may come when COMMIT has returned and nobody has noted it yet.
        refused = isinstance(sys.exception(), HomeAgentError)
        self._undone = refused or link.in_transaction
        return super()._undo(link)

    def _end(self, link: Link, *, sound: bool) -> None:
        self.took_place = self._committing and not self._undone
        super()._end(link, sound=sound)


class _SharedUnit(UnitOfWork):
    """A unit in a savepoint of a leader's transaction."""

    __slots__ = ("wants_alone",)

    def __init__(self, settings: UnitSettings, link: Link) -> None:
        super().__init__(settings, read_only=False)
        self.wants_alone = False
        link.savepoint(_SAVEPOINT)
        self._link = link
        self._state = "open"

    @property
    def session(self) -> Session:
        """None here: the unit is done again, alone."""
        self._require_link()
        self.wants_alone = True
        raise _Alone

    def rollback(self) -> None:
        """Abandon the unit: see `UnitOfWork.rollback`."""
        link = self._require_link()
        self._after_commit = None
        link.rollback_to_savepoint(_SAVEPOINT)
        self._state = "rolled back"

    def keep(self) -> list[Callable[[], object]] | None:
        """Leave what it did to the leader's commit, and return what is to be called after that."""
        link, self._link = self._link, None
        kept, self._state = self._state == "open", "ended"
        if kept and link is not None:
            link.release_savepoint(_SAVEPOINT)
        return self._after_commit

    def undo(self) -> None:
        """Undo what it did, and nothing else."""
        link, self._link = self._link, None
        kept, self._state = self._state == "open", "ended"
        # Where the engine undid the whole transaction, there is no savepoint either.
        if kept and link is not None and link.in_transaction:
            link.rollback_to_savepoint(_SAVEPOINT)


class Grouping:
    """Does functions as write units of one database, several in a commit where several wait.

    Args:
        settings: what its units share.
    """

    def __init__(self, settings: UnitSettings) -> None:
        self._settings = settings
        # A signal's handler may come while its own thread holds it, and use the database.
        self._mutex = threading.RLock()
        self._queue: deque[Call[Any]] = deque()
        self._led = False

    def run(self, work: Callable[[UnitOfWork], T]) -> T:
        """Do one unit, in this thread or in another caller's, and return what `work` returned.

        Raises:
            DatabaseBusyError: its turn did not come within the timeout.
            UnitStateError: this thread has a write unit open.
        """
        settings = self._settings
        # Before the mutex: in a forked child, somebody who is not there may hold it.
        settings.engine.lanes(read_only=False)
        if get_ident() in settings.writing:
            refuse_nesting()
        call = Call(work)
        with self._mutex:
            if self._led:
                call.expect_turn()
                call.state = _QUEUED
                self._queue.append(call)
            else:
                self._led = True
                call.state = _LEADING
        if call.state != _LEADING:
            self._wait(call)
        if call.state == _LEADING:
            self.lead(call)
        if call.callbacks is not None:
            call_back(call.callbacks)
        return call.outcome()

    def submit(self, call: Call[Any]) -> None:
        """Queue a call whose caller is reached by its mailbox."""
        self._settings.engine.lanes(read_only=False)
        call.expect_turn()
        with self._mutex:
            lead = not self._led
            self._led = True
            if lead:
                call.state = _LEADING
            else:
                call.state = _QUEUED
                self._queue.append(call)
        if lead and call.mailbox is not None:
            call.mailbox.lead(call)

    def withdraw(self, call: Call[Any]) -> bool:
        """Take a call out of the queue. False where it is being done, or was done."""
        with self._mutex:
            if call.state != _QUEUED:
                return False
            self._queue.remove(call)
            call.state = _GIVEN_UP
            return True

    def overdue(self, mailbox: Mailbox) -> tuple[list[tuple[Call[Any], HomeAgentError]], float]:
        """Take the calls of a mailbox out of the queue that waited too long, each with its error.

        Returns:
            These, and after how many seconds to ask again.
        """
        timeout = self._settings.timeout
        now = monotonic()
        with self._mutex:
            mine = [call for call in self._queue if call.mailbox is mailbox]
            late = [call for call in mine if now - call.since >= timeout]
            for call in late:
                self._queue.remove(call)
                call.state = _GIVEN_UP
        waiting = [call.since for call in mine if call.state == _QUEUED]
        return [(call, self._busy(call)) for call in late], (min(waiting) + timeout - now if waiting else timeout)

    def _wait(self, call: Call[Any]) -> None:
        """Wait until the call was done, or is to lead."""
        woken = call.woken
        if woken is None:
            raise AssertionError("a call that waits was not made ready for it")
        try:
            if not woken.acquire(timeout=self._settings.timeout):
                if self.withdraw(call):
                    raise self._busy(call)
                # It is being done: what is done with it will be said.
                woken.acquire()
        except BaseException:
            with self._mutex:
                state, call.state = call.state, _GIVEN_UP
                if state == _QUEUED:
                    self._queue.remove(call)
            if state == _LEADING:
                self._give_lead_on([])
            raise

    def _busy(self, call: Call[Any]) -> HomeAgentError:
        counters = self._settings.engine.counters
        error = self._settings.engine.writers.busy(self._settings.timeout)
        counters.waited(monotonic() - call.since)
        counters.faulted(error)
        return error

    # What a leader does

    def lead(self, call: Call[Any]) -> None:
        """Do a call that was told to lead, and those that wait by then; then give the lead on.

        The call has its outcome then, and nothing is raised but through that.
        """
        taken: list[Call[Any]] = []
        try:
            self._do(call, taken)
        except BaseException as error:  # noqa: BLE001  raised by the outcome
            call.error = error
            for each in taken:
                each.alone = True
        again = [each for each in taken if each.alone]
        done = [each for each in taken if not each.alone]
        if call.mailbox is not None:
            done.append(call)
        self._give_lead_on(again)
        self._deliver(done)

    def _do(self, call: Call[Any], taken: list[Call[Any]]) -> None:
        timeout = self._settings.timeout
        unit = _LeadingUnit(self._settings)
        failure: BaseException | None = None
        try:
            unit.begin(max(timeout - (monotonic() - call.since), 0) if call.since else timeout)
            call.value = call.work(unit) if call.mailbox is None or call.context is None else _in_context(call, unit)
            if self._queue and not call.alone:
                self._take_in(unit, taken)
        except _UndoneError:
            unit.undo(None)
        except BaseException as error:
            unit.undo(error)
            raise
        else:
            try:
                unit.commit()
            except BaseException as error:  # noqa: BLE001  raised by the outcome
                failure = error
            if unit.took_place or not taken:
                call.callbacks = unit.callbacks if unit.took_place else None
                call.error = failure
                self._count(taken)
                return
        # Nothing took place: each is done again in a transaction of its own, this one at once.
        for each in taken:
            each.alone = True
            each.error = each.callbacks = None
        call.alone = True
        if failure is not None and not isinstance(failure, HomeAgentError):
            raise failure
        self._do(call, [])

    def _take_in(self, leading: _LeadingUnit, taken: list[Call[Any]]) -> None:
        """Do the units of who waits, until nobody does or it is enough."""
        end = monotonic() + _LONGEST
        link = leading.share()
        while link is not None and len(taken) < _MOST:
            with self._mutex:
                if not self._queue:
                    return
                call = self._queue.popleft()
                call.state = _TAKEN
                taken.append(call)
            self._do_shared(call, link)
            if not link.in_transaction:
                # A full disk and the like: https://sqlite.org/lang_transaction.html, section 3
                raise _UndoneError
            if monotonic() >= end:
                return

    def _do_shared(self, call: Call[Any], link: Link) -> None:
        self._settings.engine.counters.waited(monotonic() - call.since)
        try:
            unit = _SharedUnit(self._settings, link)
        except HomeAgentError as error:
            raise _UndoneError from error
        try:
            call.value = _in_context(call, unit)
            if unit.wants_alone:
                raise _Alone
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
                # It is meant for the thread, which is the leader's.
                raise
            call.alone = unit.wants_alone
            call.error = None if unit.wants_alone else error
            _or_undone(unit.undo)
        else:
            call.callbacks = _or_undone(unit.keep)

    def _count(self, taken: Sequence[Call[Any]]) -> None:
        if not taken:
            return
        counters = self._settings.engine.counters
        ended = [each for each in taken if not each.alone]
        kept = sum(each.error is None for each in ended)
        counters.commits += kept
        counters.rollbacks += len(ended) - kept
        if kept:
            counters.grouped(kept + 1)

    def _give_lead_on(self, again: Sequence[Call[Any]]) -> None:
        """Have the next in line lead; first those that are to be done again."""
        following: Call[Any] | None = None
        with self._mutex:
            for call in reversed(again):
                if call.state != _GIVEN_UP:
                    call.state = _QUEUED
                    self._queue.appendleft(call)
            if self._queue:
                following = self._queue.popleft()
                following.state = _LEADING
            else:
                self._led = False
        if following is None:
            return
        if following.mailbox is not None:
            following.mailbox.lead(following)
        elif following.woken is not None:
            following.woken.release()

    def _deliver(self, done: Sequence[Call[Any]]) -> None:
        letters: dict[Mailbox, list[Call[Any]]] = {}
        for call in done:
            call.state = _DONE
            if call.mailbox is not None:
                letters.setdefault(call.mailbox, []).append(call)
            elif call.woken is not None:
                call.woken.release()
        for mailbox, calls in letters.items():
            mailbox.deliver(calls)


def _in_context(call: Call[T], unit: UnitOfWork) -> T:
    if call.context is None:
        raise AssertionError("a call of another thread was not made ready for it")
    return call.context.run(call.work, unit)


def _or_undone(act: Callable[[], T]) -> T:
    try:
        return act()
    except HomeAgentError as error:
        raise _UndoneError from error
