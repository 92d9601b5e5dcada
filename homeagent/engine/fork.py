"""Prepare open databases for a fork of the process.

A child inherits no lock on a file, but it inherits SQLite's record of the locks that its parent held. A connection that
the child opens on the same file would rely on locks that the child does not hold, and the parent could delete the WAL
under that connection (https://sqlite.org/howtocorrupt.html#_carrying_an_open_database_connection_across_a_fork_).
Before a fork each engine therefore closes its idle connections. A file with a connection that could not be closed,
because a unit of work uses it, is refused in the child.
"""

from __future__ import annotations

import os
import weakref
from pathlib import Path
from typing import Protocol

from homeagent.engine.files.database_file import identity_of, look_at
from homeagent.engine.files.system_errors import quoted
from homeagent.errors import DatabaseError

__all__ = ["inherit", "refuse_inherited", "register"]


class _Forkable(Protocol):
    is_forked_copy: bool

    def before_fork(self) -> None:
        """Close idle connections. Connections that remain open count as in use."""

    def after_fork_in_child(self) -> None:
        """Make inherited connections unusable, and call `inherit` for a file that was in use."""


_known: weakref.WeakSet[_Forkable] = weakref.WeakSet()
_inherited: set[tuple[int, int]] = set()


def register(engine: _Forkable) -> None:
    """Prepare this engine for every fork, until it is garbage-collected."""
    _known.add(engine)


def inherit(identity: tuple[int, int]) -> None:
    """Remember, in a forked child, the device and inode of a file that its parent had in use."""
    _inherited.add(identity)


def refuse_inherited(path: Path) -> None:
    """Refuse a file that the parent had in use when this process was forked.

    Raises:
        DatabaseError: the parent had the file in use.
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
    for engine in list(_known):
        engine.before_fork()


def _after_in_child() -> None:
    engines = list(_known)
    # First for all of them: an error in the second loop must not leave an engine that looks usable.
    for engine in engines:
        engine.is_forked_copy = True
    for engine in engines:
        engine.after_fork_in_child()


os.register_at_fork(before=_before, after_in_child=_after_in_child)
