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
from pathlib import Path
from typing import Protocol

from homeagent.engine.disk.files import identity_of, look_at
from homeagent.engine.disk.system_errors import quoted
from homeagent.errors import DatabaseError

__all__ = ["inherit", "refuse_inherited", "register"]


class _Forkable(Protocol):
    def before_fork(self) -> None:
        """Close what is idle, and let nothing begin until `after_fork`."""

    def after_fork(self) -> None:
        """Go on, in the parent and in the child."""

    def abandon(self) -> None:
        """Refuse to be used, in the child; tell `inherit` of what is in use."""


_known: weakref.WeakSet[_Forkable] = weakref.WeakSet()
_held: list[_Forkable] = []
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


def _before() -> None:
    _forking.acquire()
    _held[:] = _known
    for database in _held:
        database.before_fork()


def _after() -> None:
    for database in _held:
        database.after_fork()
    _held.clear()
    _forking.release()


def _after_in_child() -> None:
    try:
        for database in _held:
            database.abandon()
    finally:
        _after()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_after, after_in_child=_after_in_child)
