"""What a fork must not carry over: an open connection, and with it SQLite's memory of its locks.

A child inherits no lock on a file, but SQLite's record of the locks that its parent held. Where a connection is open at
the fork, the child's own later ones on that file would believe that they hold what they don't, and the parent could
delete the log under them (https://sqlite.org/howtocorrupt.html#_carrying_an_open_database_connection_across_a_fork_).
So what is idle is closed before a fork, and a file that was in use is refused in the child.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import get_ident
from typing import Protocol

from homeagent.engine.files.database_file import identity_of, look_at
from homeagent.engine.files.system_errors import quoted
from homeagent.errors import DatabaseError

__all__ = ["inherit", "refuse_inherited", "register"]


class _Forkable(Protocol):
    def frozen(self) -> Generator[None]:
        """Let nothing begin, from the first step until it is closed."""

    def before_fork(self) -> None:
        """Close what is idle."""

    def abandon(self) -> None:
        """Refuse to be used, in the child; tell `inherit` of what is in use."""


_known: weakref.WeakSet[_Forkable] = weakref.WeakSet()
# What each thread holds for the forks that it is in the middle of; a signal's handler may fork in the middle of one.
_held: defaultdict[int, list[list[Generator[None]]]] = defaultdict(list)
_inherited: set[tuple[int, int]] = set()

# Two threads that fork at once would each wait for what the other one holds.
_forking = threading.RLock()


def register(database: _Forkable) -> None:
    """Have an open database told of every fork, for as long as it lives."""
    _known.add(database)


def inherit(identity: tuple[int, int]) -> None:
    """Remember, in a forked child, a file that its parent had in use."""
    _inherited.add(identity)


def refuse_inherited(path: Path) -> None:
    """Refuse a file that the parent had in use when this process was forked.

    Raises:
        DatabaseError: it is one.
    """
    if not _inherited:
        return
    status = look_at(path)
    if status is not None and identity_of(status) in _inherited:
        raise DatabaseError(
            f"a unit of work on {quoted(path)} was under way when this process was forked, after which SQLite takes "
            "the parent's locks for its own: fork while no unit is under way, or start the process with spawn"
        )


def _alone() -> Generator[None]:
    with _forking:
        yield


def _before() -> None:
    # A block is entered whole or not at all, wherever an interrupt comes, and a generator that is dropped leaves it.
    # What is raised here stops no fork, so that the other databases are made ready for it all the same.
    holds: list[Generator[None]] = []
    _held[get_ident()].append(holds)
    with _all_tried() as attempt:
        attempt(partial(_enter, holds, _alone()))
        for database in list(_known):
            attempt(partial(_enter, holds, database.frozen()))
            attempt(database.before_fork)


def _enter(holds: list[Generator[None]], hold: Generator[None]) -> None:
    holds.append(hold)
    next(hold)


def _after() -> None:
    mine = _held[get_ident()]
    # The last one that was entered first; there is none where an interrupt came as `_before` began.
    holds = mine.pop() if mine else []
    while holds:
        holds.pop().close()


def _after_in_child() -> None:
    try:
        with _all_tried() as attempt:
            for database in list(_known):
                attempt(database.abandon)
    finally:
        _after()


@contextmanager
def _all_tried() -> Iterator[Callable[[Callable[[], object]], None]]:
    """Give a block what makes an attempt at something, and raise at its end what one of them raised."""
    failures: list[BaseException] = []

    def attempt(act: Callable[[], object]) -> None:
        try:
            act()
        except BaseException as error:  # noqa: BLE001  raised at the end
            failures.append(error)

    yield attempt
    if failures:
        raise failures[0]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_after, after_in_child=_after_in_child)
