"""Checks of a SQLite file's content. SQLite stores no checksums of pages. The checks do not detect a changed letter in
a text.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import apsw

from homeagent.clock import monotonic
from homeagent.engine.driver_errors import RESTORE
from homeagent.engine.files.database_file import look_at, sidecars, size_of
from homeagent.engine.files.system_errors import quoted
from homeagent.engine.sqlite.diagnosis import newest_backup_hint
from homeagent.engine.sqlite.engine import SQLiteEngine
from homeagent.engine.sqlite.inspection import inspect_sqlite
from homeagent.engine.sqlite.write_ahead_log import find_lost_commits, has_frames, open_without_locks, read_start
from homeagent.errors import CorruptDatabaseError
from homeagent.models import TABLES, VERSION_TABLE

if TYPE_CHECKING:
    from homeagent.engine.engine import Engine

logger: logging.Logger = logging.getLogger("homeagent")

# Largest database sizes, in bytes, for SQLite's full check and quick check. The full check takes about 5 ms per MiB.
# The quick check takes about 1 ms per MiB. The quick check does not compare indexes with tables.
FULL_CHECK_BYTES = 2 * 1024 * 1024
QUICK_CHECK_BYTES = 16 * 1024 * 1024

# Longest time for one periodic check of an open file, in seconds.
_BUDGET = 30.0

# SQLite calls the function `give_up()` after this number of bytecode instructions.
_INSTRUCTIONS = 100_000


def refuse_unclean_damage(engine: SQLiteEngine) -> bool:
    """Check a file that was not closed cleanly, without changing any file. No process of homeagent may have the file
    open. Return True if `check_content()` accepted the file. Return False if the database has no WAL to check.
    """
    path = engine.path
    log, index, journal = sidecars(path)
    if look_at(log) is None and look_at(index) is None:
        return False
    # A hot journal must be rolled back before a connection can read (https://sqlite.org/lockingv3.html#hot_journals).
    is_hot = read_start(journal, 1) not in (b"", b"\0")
    if is_hot and has_frames(path):
        raise CorruptDatabaseError(
            f"{quoted(path)} has a log with commits and also the rollback journal {quoted(journal)}, which SQLite "
            "never writes together: move the journal to another directory, then open the database again; if homeagent "
            f"then reports damage, restore a backup; {newest_backup_hint(path)}"
        )
    damage: CorruptDatabaseError | None = None
    with open_without_locks(path) as raw:
        lost = find_lost_commits(path, raw)
        if lost is not None:
            if engine.durability == "full" or not lost.by_power_cut:
                raise _damaged(
                    path,
                    f"{lost.problem} [it was not closed cleanly]",
                    "; after a power cut, durability='normal' opens it without the lost commits" * lost.by_power_cut,
                )
            logger.warning(
                "%s was not closed cleanly and %s: the last commits may be lost, which durability 'normal' accepts",
                path,
                lost.problem,
                extra={"event": "commits_lost", "path": str(path), "by_power_cut": lost.by_power_cut},
            )
        if is_hot or not size_of(log):
            return False
        try:
            with engine.translated():
                check_content(path, raw, always=True)
        except CorruptDatabaseError as error:
            damage = error
    # If the WAL index exists, another program can have the file open. Check the file again with locks.
    if damage is not None and (look_at(index) is None or not _is_sound(engine)):
        raise damage
    return True


def _is_sound(engine: SQLiteEngine) -> bool:
    """Check the file again, with locks. Without locks, an unfinished write of another program can look like damage."""
    with suppress(CorruptDatabaseError):
        with inspect_sqlite(engine.path, is_closed=True) as connection, engine.translated():
            check_content(engine.path, connection.connection.driver_connection, always=True)
        return True
    return False


def check_content(path: Path, raw: Any, *, always: bool = False) -> None:
    """Check a file's content with SQLite. With `always=False`, do not check a file over `QUICK_CHECK_BYTES`."""
    # Count the pages, because the WAL can contain more pages than the file.
    size = raw.pragma("page_count") * raw.pragma("page_size")
    if size <= FULL_CHECK_BYTES:
        found = raw.execute("PRAGMA integrity_check(1)").fetchall()
    elif always or size <= QUICK_CHECK_BYTES:
        found = raw.execute("PRAGMA quick_check(1)").fetchall()
    else:
        return
    _refuse(path, found)


class ContentCheck:
    """Object that periodically checks each table of an open SQLite file. The first check is due at once."""

    def __init__(self, engine: Engine, *, every: timedelta, monotonic: Callable[[], float] = monotonic) -> None:
        self._engine = engine
        self._every = every.total_seconds()
        self._monotonic = monotonic
        self._due = monotonic()
        self._left: list[str] = []

    def run_if_due(self, stop: Callable[[], bool]) -> None:
        """If a check is due, check the tables. A stopped check continues in the next call. If a table is damaged, raise
        CorruptDatabaseError.
        """
        engine = self._engine
        now = self._monotonic()
        if not isinstance(engine, SQLiteEngine) or now < self._due:
            return
        left = self._left = self._left or [*TABLES, VERSION_TABLE]
        first = left[0]
        while left and not stop() and _check(engine, left[0], lambda: stop() or self._monotonic() >= now + _BUDGET):
            del left[0]
        if stop():
            return
        if first in left:
            del left[0]
            path = str(engine.path)
            logger.warning(
                "%s: the check of table %s was stopped after %g s: run homeagent doctor --thorough",
                path,
                first,
                _BUDGET,
                extra={"event": "content_check_gave_up", "path": path, "table": first, "seconds": _BUDGET},
            )
        self._due = self._monotonic() + self._every


def _check(engine: SQLiteEngine, table: str, give_up: Callable[[], bool]) -> bool:
    """Check a table and its indexes. If the table is damaged, mark the database corrupt, and raise
    CorruptDatabaseError. Return False if `give_up()` ended the check.
    """
    try:
        with engine.translated(), engine.driver_connection() as raw:
            raw.set_progress_handler(give_up, _INSTRUCTIONS)
            try:
                found = raw.execute(f"PRAGMA integrity_check({table})").fetchall()
            except apsw.InterruptError:
                return False
        _refuse(engine.path, found)
    except CorruptDatabaseError as error:
        engine.identity_check.marked_corrupt = str(error)
        logger.error("%s", error, extra={"event": "content_damaged", "path": str(engine.path)})
        raise
    return True


def _refuse(path: Path, found: list[Any]) -> None:
    """Raise CorruptDatabaseError if the rows of SQLite's check report damage."""
    if found and found[0][0] != "ok":
        # SQLite's result contains names and row numbers, but no stored values.
        raise _damaged(path, found[0][0].splitlines()[-1])


def _damaged(path: Path, problem: str, more: str = "") -> CorruptDatabaseError:
    """Return the error for a damaged database, with the remedy."""
    return CorruptDatabaseError(f"{quoted(path)} is damaged ({problem}): {RESTORE}; {newest_backup_hint(path)}{more}")
