"""Prepare open databases for a fork. A forked child inherits no file locks. SQLite's memory in the child still records
the parent's locks (https://sqlite.org/howtocorrupt.html#_carrying_an_open_database_connection_across_a_fork_).
"""

from __future__ import annotations

import os
import threading
import weakref
from pathlib import Path
from typing import TYPE_CHECKING

from homeagent.engine.files.database_file import identity_of, look_at
from homeagent.engine.files.system_errors import quoted
from homeagent.errors import DatabaseError

if TYPE_CHECKING:
    from homeagent.engine.engine import Engine

_known: weakref.WeakSet[Engine] = weakref.WeakSet()
_inherited: set[tuple[int, int]] = set()

# Each forking thread takes all mutexes. Without this lock, two forking threads could deadlock.
_forking = threading.RLock()
_held: list[threading.RLock] = []


def register(engine: Engine) -> None:
    """Register an engine for the fork hooks. The garbage collector can still remove the engine."""
    _known.add(engine)


def inherit(identity: tuple[int, int]) -> None:
    """In a forked child, record a file that the parent used. The argument `identity=` contains the file's device and
    inode.
    """
    _inherited.add(identity)


def refuse_inherited(path: Path) -> None:
    """Raise DatabaseError for a file that the parent used at the fork."""
    if not _inherited:
        return
    status = look_at(path)
    if status is not None and identity_of(status) in _inherited:
        raise DatabaseError(
            f"a unit of work on {quoted(path)} was open when this process was forked, so SQLite would rely on locks "
            "that only the parent holds: fork while no unit of work is open, or start the process with spawn"
        )


def _before() -> None:
    # Hold the mutexes until the end of the fork (`test_forks_under_load`). Otherwise the child could wait forever for
    # an inherited lock of SQLite.
    _forking.acquire()
    for engine in list(_known):
        for lock in engine.fork_locks():
            lock.acquire()
            _held.append(lock)
        engine.before_fork()


def _after() -> None:
    while _held:
        _held.pop().release()
    _forking.release()


def _after_in_child() -> None:
    engines = list(_known)
    # First mark all engines as unusable, because `after_fork_in_child()` can raise an error.
    for engine in engines:
        engine.is_forked_copy = True
    try:
        for engine in engines:
            engine.after_fork_in_child()
    finally:
        _after()


os.register_at_fork(before=_before, after_in_parent=_after, after_in_child=_after_in_child)
