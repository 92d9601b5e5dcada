"""Group commit: units that wait for the one writer's lane share a transaction, each in a savepoint, and one commit.

A commit that is synced to the disk takes many times what a small unit does. So while callers wait, one thread takes
the lane for them, does their units and commits once for all. A caller that nobody else is in the way of does its unit
itself, in a plain transaction. What callers must not notice of one another is done so:

- A unit that raises is undone to its savepoint; the exception reaches its own caller, and the others go on.
- Where the commit fails, or the engine undoes the transaction in the middle, nothing took place: each unit is done
  again in a transaction of its own.
- A unit that asks for its ORM session wants a transaction that it may end: it is undone, and done again alone.
- A call is taken only at its turn. Who gives up before that leaves the queue.
- A unit whose function hangs keeps no others waiting: they give up after the timeout, and are told so for certain.
  Whether a group commits and whether one of it gives up is decided under one lock. A group that somebody has left is
  undone, and the rest of it done again.
- No caller's thread ever runs another caller's function, which could keep it from its own outcome.

That is why a unit that may be grouped is a function: a `with` block can't be run again.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from threading import get_ident
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeVar

from homeagent.errors import DatabaseError, HomeAgentError
from homeagent.group_commit.calls import DONE, ENDED, GIVEN_UP, LEADING, QUEUED, TAKEN, Call, Mailbox
from homeagent.group_commit.joint_units import AloneRequest, JoiningUnit, LeadingUnit
from homeagent.group_commit.writer_thread import WriterThread
from homeagent.unit_of_work import UnitOfWork, UnitSettings, call_back, refuse_nesting

if TYPE_CHECKING:
    from homeagent.engine.link import Link

__all__ = ["Grouping"]

T = TypeVar("T")

# How many units are done with a first one, and how long more are taken, in seconds: nobody waits much longer for a
# lane that is led than for one that is not.
_MOST = 256
_LONGEST = 0.01

# Nobody looks whether it has waited for too long more often than this, in seconds.
_SHORTEST_LOOK = 0.005


class _UndoneError(Exception):
    """The transaction that units share is no more, and nothing of it took place."""


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
        self._group: list[Call[Any]] = []
        self._running: Call[Any] | None = None
        # It was told to lead, and has not begun yet.
        self._expected: Call[Any] | None = None
        # The group's outcome is settled: nobody can give up any more.
        self._sealed = False
        self._forsaken = False
        self._leader = 0
        # Several came at once, the last time.
        self._crowded = False
        self._writer: WriterThread[Call[Any]] = WriterThread(self.lead)
        settings.engine.writers.occupation = self._occupation

    def run(self, work: Callable[[UnitOfWork], T]) -> T:
        """Do one unit, in this thread or in one that does those of many, and return what `work` returned.

        Raises:
            DatabaseBusyError: its turn did not come within the timeout, or the group that it was done in did not end
                within it. Nothing took place.
            UnitStateError: this thread has a write unit open.
        """
        settings = self._settings
        # Before the mutex: in a forked child, somebody who is not there may hold it.
        settings.engine.lanes(read_only=False)
        if get_ident() in settings.writing:
            refuse_nesting()
        call = Call(work)
        try:
            with self._mutex:
                if self._led:
                    call.expect_turn()
                    call.state = QUEUED
                    self._queue.append(call)
                else:
                    self._led, call.state = True, LEADING
            if call.state != LEADING:
                self._wait(call)
            elif self._crowded or settings.writing:
                # Others will come before this one has begun, and are then done together with it.
                call.expect_turn()
                self._have_led(call)
                self._wait(call)
            if call.state == LEADING:
                self._do_alone(call)
        except BaseException:
            self._leave(call)
            self._tell_again(call)
            raise
        finally:
            # Here, so that an interrupt never takes the lead along.
            if call.state == LEADING:
                try:
                    self._give_lead_on([call], [])
                except BaseException:
                    self._tell_again(call)
                    raise
        if call.callbacks is not None:
            call_back(call.callbacks)
        return call.outcome()

    def submit(self, call: Call[Any]) -> None:
        """Queue a call whose caller is reached by its mailbox."""
        self._settings.engine.lanes(read_only=False)
        call.expect_turn()
        try:
            with self._mutex:
                if self._led:
                    call.state = QUEUED
                    self._queue.append(call)
                else:
                    self._led, call.state = True, LEADING
            if call.state == LEADING:
                self._have_led(call)
        except BaseException:
            self._tell_again(call)
            raise

    def close(self) -> None:
        """End the thread that does units for others. The lanes are closed before."""
        self._writer.close(self._settings.timeout)

    def hand(self, call: Call[Any]) -> None:
        """Have a call lead, in the thread that does units for others."""
        self._writer.hand(call)

    # Who waits, and for how long

    def _wait(self, call: Call[Any]) -> None:
        """Wait until the call was done, or is to lead."""
        woken = call.woken
        if woken is None:
            raise AssertionError("a call that waits was not made ready for it")
        patience = self._settings.timeout
        while not woken.acquire(timeout=patience):
            patience = self._patience(call)

    def _leave(self, call: Call[Any]) -> None:
        """Have nobody count on a caller that an interrupt took away: it would be told to lead, and all would wait."""
        with self._mutex:
            if call in self._queue:  # its state doesn't tell, where it came in the midst of giving up
                self._queue.remove(call)
            if call.state != LEADING:
                call.state = GIVEN_UP

    def _patience(self, call: Call[Any]) -> float:
        """Return after how many seconds more the call is to look again. Where it waited too long, it gives up."""
        with self._mutex:
            left = self._left(call, monotonic())
            if left > 0:
                return max(left, _SHORTEST_LOOK)
            self._give_up(call)
        raise self._busy(call)

    def _left(self, call: Call[Any], now: float) -> float:
        """Return how many seconds the call may wait for others. Its own function may take as long as it likes."""
        timeout = self._settings.timeout
        if call.state == QUEUED or (call.state == ENDED and not self._sealed):
            return call.since + timeout - now
        return max(timeout, _SHORTEST_LOOK)

    def _give_up(self, call: Call[Any]) -> None:
        if call.state == QUEUED:
            self._queue.remove(call)
        else:
            self._forsaken = True
        call.state = GIVEN_UP
        call.callbacks = None

    def withdraw(self, call: Call[Any]) -> bool:
        """Take a call out of the queue. False where it is being done, or was done."""
        with self._mutex:
            if call.state != QUEUED:
                return False
            self._give_up(call)
            return True

    def overdue(self, mailbox: Mailbox) -> tuple[list[tuple[Call[Any], HomeAgentError]], float]:
        """Give up the calls of a mailbox that waited too long, each with its error.

        Returns:
            These, and after how many seconds to ask again.
        """
        now = monotonic()
        again = self._settings.timeout
        late: list[Call[Any]] = []
        with self._mutex:
            for call in [each for each in (*self._queue, *self._group) if each.mailbox is mailbox]:
                left = self._left(call, now)
                if left > 0:
                    again = min(again, left)
                else:
                    self._give_up(call)
                    late.append(call)
        return [(call, self._busy(call)) for call in late], again

    def _busy(self, call: Call[Any]) -> HomeAgentError:
        counters = self._settings.engine.counters
        error = self._settings.engine.writers.busy(self._settings.timeout)
        counters.waited(monotonic() - call.since)
        counters.faulted(error)
        return error

    def _occupation(self, holder: int) -> str | None:
        """Say what a thread that holds the lane for others is doing for whom."""
        running = self._running
        if running is None or holder != self._leader:
            return None
        return f"{running} since {monotonic() - running.since:.3f} s"

    # What is done for those who wait

    def lead(self, call: Call[Any]) -> None:
        """Do a call that was told to lead, and those that wait by then; then give the lead on.

        The calls have their outcome then, and nothing is raised but through that.
        """
        with self._mutex:
            if self._expected is not call:
                return  # it was told twice
            self._expected = None
        members = self._group
        self._leader = get_ident()
        again: Sequence[Call[Any]] | None = None
        try:
            if call.alone:
                self._do_alone(call)
            else:
                again = self._do_together(members)
                if again is not members:
                    self._count(members[1:])
        except BaseException as error:  # noqa: BLE001  raised by the outcome
            call.error = error
            if again is None:
                again = members[1:]
        again = again or ()
        for each in again:
            each.alone = True
        self._crowded = len(members) > 1
        try:
            self._give_lead_on(members, again)
        except BaseException:
            self._tell_again(call)
            raise

    def _do_alone(self, call: Call[Any]) -> None:
        """Do a call in a transaction of its own, in its caller's thread where it leads there."""
        timeout = self._settings.timeout
        unit = LeadingUnit(self._settings)
        try:
            try:
                unit.begin(max(timeout - (monotonic() - call.since), 0) if call.since else timeout)
                call.since = call.since and monotonic()
                call.value = call.work(unit) if call.state == LEADING else call.compute(unit)
            except BaseException as error:
                unit.undo(error)
                raise
            unit.commit()
        except BaseException as error:  # noqa: BLE001  raised by the outcome
            call.error = error
            # Where an interrupt came as undoing or committing began: otherwise the unit is over.
            unit.undo(None)
        if unit.took_place:
            call.callbacks = unit.callbacks

    def _do_together(self, members: list[Call[Any]]) -> Sequence[Call[Any]]:
        """Do the first call of a group, and add those that wait, in one transaction.

        Returns:
            Those that are to be done alone; each of the others has its outcome. `members` where nothing took place.
        """
        call = members[0]
        unit = LeadingUnit(self._settings)
        try:
            unit.begin(max(self._settings.timeout - (monotonic() - call.since), 0))
            call.since = monotonic()
            call.value = call.compute(unit)
            self._take_in(unit, members)
            # Before the commit: after it nothing may fail that decides who is done again.
            alone = [each for each in members if each.alone]
        except _UndoneError:
            unit.undo(None)
            return members
        except BaseException as error:
            unit.undo(error)
            raise
        failure: BaseException | None = None
        try:
            unit.commit()
        except BaseException as error:  # noqa: BLE001  raised by the outcome
            failure = error
        if unit.took_place or len(members) == 1:
            call.callbacks = unit.callbacks if unit.took_place else None
            call.error = failure
            return alone
        if failure is not None and not isinstance(failure, HomeAgentError):
            raise failure
        return members

    def _take_in(self, leading: LeadingUnit, members: list[Call[Any]]) -> None:
        """Do the units of who waits, until nobody does or it is enough; then nobody of the group can give up."""
        begun = monotonic()
        # Well within the time that its first members wait for it.
        end = begun + min(_LONGEST, self._settings.timeout / 4)
        link = leading.share()
        call = self._next(members, enough=link is None)
        while link is not None and call is not None:
            self._do_shared(call, link)
            if not link.in_transaction:
                # A full disk and the like: https://sqlite.org/lang_transaction.html, section 3
                raise _UndoneError
            call = self._next(members, enough=len(members) > _MOST or monotonic() >= end)

    def _next(self, members: list[Call[Any]], *, enough: bool) -> Call[Any] | None:
        """Note that the last member's function has ended, and return the next one's call. None closes the group.

        Raises:
            _UndoneError: somebody gave up waiting for the group.
        """
        with self._mutex:
            ended = members[-1]
            if ended.state == TAKEN:
                ended.state, ended.since = ENDED, monotonic()
            self._running = None
            if self._forsaken:
                raise _UndoneError
            if enough or not self._queue:
                self._sealed = True
                return None
            call = self._running = self._queue.popleft()
            call.state = TAKEN
            members.append(call)
            return call

    def _do_shared(self, call: Call[Any], link: Link) -> None:
        now = monotonic()
        self._settings.engine.counters.waited(now - call.since)
        call.since = now
        try:
            unit = JoiningUnit(self._settings, link)
        except HomeAgentError as error:
            raise _UndoneError from error
        try:
            call.value = call.compute(unit)
            if unit.wants_alone:
                raise AloneRequest
        except BaseException as error:  # noqa: BLE001  raised by the outcome
            call.alone = unit.wants_alone
            call.error = None if unit.wants_alone else error
            _or_undone(unit.undo)
        else:
            call.callbacks = _or_undone(unit.keep)

    def _count(self, others: Sequence[Call[Any]]) -> None:
        if not others:
            return
        counters = self._settings.engine.counters
        ended = [each for each in others if not each.alone]
        kept = sum(each.error is None for each in ended)
        counters.commits += kept
        counters.rollbacks += len(ended) - kept
        if kept:
            counters.grouped(kept + 1)

    # Who is next

    def _have_led(self, call: Call[Any]) -> None:
        """Have the call lead, as the first of a group, in a thread that may block."""
        with self._mutex:
            self._expect(call)
        self._tell(call)

    def _expect(self, call: Call[Any]) -> None:
        self._group = [call]
        self._running = self._expected = call
        self._sealed = self._forsaken = False
        call.state = TAKEN

    def _tell(self, call: Call[Any]) -> None:
        following: Call[Any] | None = call
        # No recursion: where the system has no thread left, all coroutines that wait are refused, one after the other.
        while following is not None:
            call = following
            try:
                if call.mailbox is not None:
                    call.mailbox.lead(call)
                else:
                    self._writer.hand(call)
                return
            except Exception as error:  # noqa: BLE001  raised by the outcome
                # The system has no thread or no memory left, or the interpreter ends.
                with self._mutex:
                    if self._expected is not call:
                        return  # it leads all the same
                    self._expected = None
                    if call.woken is not None and call.state != GIVEN_UP:
                        self._group, self._running = [], None
                        call.state = LEADING
                        call.woken.release()
                        return
                why = str(error) or type(error).__name__
                call.error = DatabaseError(f"no thread can be started to do the units of coroutines: {why}")
            following, done = self._settle([call], [])
            self._deliver(done)

    def _tell_again(self, call: Call[Any]) -> None:
        """Have somebody lead, where an interrupt came while this call was about to, or was giving the lead on."""
        if call.state == LEADING:
            self._give_lead_on([call], [])
            return
        with self._mutex:
            expected = self._expected
        if expected is not None:
            self._tell(expected)

    def _give_lead_on(self, members: Sequence[Call[Any]], again: Sequence[Call[Any]]) -> None:
        """Queue those of a group that are to be done again, have the next in line lead, and tell the others."""
        following, done = self._settle(members, again)
        if following is not None:
            self._tell(following)
        if done:
            self._deliver(done)

    def _settle(
        self, members: Sequence[Call[Any]], again: Sequence[Call[Any]]
    ) -> tuple[Call[Any] | None, Sequence[Call[Any]]]:
        """Note the end of a group; return who is to be told to lead, where somebody is, and who has its outcome."""
        following: Call[Any] | None = None
        done: list[Call[Any]] = []
        with self._mutex:
            for call in reversed(again):
                # Who gave up has its error, and may not have looked at it yet.
                if call.state != GIVEN_UP:
                    call.error = call.callbacks = None
                    call.state, call.since = QUEUED, monotonic()
                    self._queue.appendleft(call)
            for call in members:
                if call.state in {TAKEN, ENDED}:
                    done.append(call)
                    call.state = DONE
            # An interrupt comes right after a call or a turn of a loop: there is none until somebody else leads.
            if members[0].state == LEADING:
                members[0].state = DONE
            self._group, self._running, self._expected = [], None, None
            if not self._queue:
                self._led = False
            else:
                following = self._queue[0]
                del self._queue[0]
                if following.woken is not None and following.alone:
                    following.state = LEADING
                    following.woken.release()
                    following = None
                else:
                    self._group = [following]
                    self._running = self._expected = following
                    self._sealed = self._forsaken = False
                    following.state = TAKEN
        return following, done

    def _deliver(self, done: Sequence[Call[Any]]) -> None:
        letters: dict[Mailbox, list[Call[Any]]] = {}
        for call in done:
            if call.mailbox is not None:
                letters.setdefault(call.mailbox, []).append(call)
            elif call.woken is not None:
                call.woken.release()
        failure: BaseException | None = None
        for mailbox, calls in letters.items():
            try:
                mailbox.deliver(calls)
            except BaseException as error:  # noqa: BLE001  raised when the others have been told
                failure = error
        if failure is not None:
            raise failure


def _or_undone(act: Callable[[], T]) -> T:
    try:
        return act()
    except HomeAgentError as error:
        raise _UndoneError from error
