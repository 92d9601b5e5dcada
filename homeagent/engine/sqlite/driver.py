"""Which SQLite library the process uses: the interpreter's own, or the one that `pysqlite3` brings.

Every SQLite from 3.7.0 to 3.51.2 can corrupt a WAL database when two connections write and checkpoint at the same
moment. 3.51.3 fixed it, and so did the backports 3.50.7 and 3.44.6 (https://sqlite.org/wal.html#walresetbug). Many
interpreters still bring an affected one. A process never opens one file through two SQLite libraries, since closing
it in the one drops the other's locks: so the choice is made once, for every file of the process.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import NamedTuple

from homeagent.errors import DatabaseError

__all__ = ["MINIMUM_VERSION", "SQLiteDriver", "choose_driver", "has_wal_reset_bug"]

logger = logging.getLogger("homeagent")

Version = tuple[int, int, int]

# RETURNING came with 3.35.0 (https://sqlite.org/lang_returning.html), and 3.35.5 mended an ALTER TABLE DROP COLUMN
# that could corrupt the file (https://sqlite.org/releaselog/3_35_5.html).
MINIMUM_VERSION: Version = (3, 35, 5)

_WAL_INTRODUCED: Version = (3, 7, 0)
_WAL_RESET_FIXED: Version = (3, 51, 3)
_WAL_RESET_BACKPORTS: tuple[Version, ...] = ((3, 44, 6), (3, 50, 7))


def has_wal_reset_bug(version: tuple[int, int, int]) -> bool:
    """Tell whether this SQLite can corrupt a WAL database that two connections checkpoint at once.

    Args:
        version: the library's version, as in `sqlite3.sqlite_version_info`.

    Source: https://sqlite.org/wal.html#walresetbug. A backport covers the later patches of its own series only:
    3.50.7 is sound, 3.51.0 after it is not.
    """
    if not _WAL_INTRODUCED <= version < _WAL_RESET_FIXED:
        return False
    return not any(version[:2] == backport[:2] and version >= backport for backport in _WAL_RESET_BACKPORTS)


class SQLiteDriver(NamedTuple):
    """A DBAPI module and the SQLite library behind it.

    Attributes:
        module: what SQLAlchemy takes as `module=`: `sqlite3` or `pysqlite3.dbapi2`.
        name: "sqlite3" or "pysqlite3".
        version: the SQLite library's version, as three numbers to compare with.
        version_text: the same as SQLite writes it, such as "3.51.3".
        safe: False where the library has the WAL-reset bug.
    """

    module: ModuleType
    name: str
    version: Version
    version_text: str
    safe: bool

    @property
    def errors(self) -> tuple[type[BaseException], ...]:
        """What the module raises: its own exceptions, and Python's for numbers and texts that it can't convert."""
        return (self.module.Error, OverflowError, UnicodeDecodeError)

    @classmethod
    def of(cls, module: ModuleType, name: str) -> SQLiteDriver:
        """Describe a DBAPI module by the SQLite library it runs on."""
        major, minor, patch = module.sqlite_version_info
        version = (int(major), int(minor), int(patch))
        return cls(
            module=module,
            name=name,
            version=version,
            version_text=str(module.sqlite_version),
            safe=not has_wal_reset_bug(version),
        )


_lock = threading.Lock()
_chosen: SQLiteDriver | None = None


def choose_driver() -> SQLiteDriver:
    """Return the SQLite library that this process uses, always the same one.

    The interpreter's own where it is sound, else `pysqlite3` where that is installed and sound. Where neither is,
    the interpreter's own is used all the same, and the logger `homeagent` is warned once: the bug is rare, and
    refusing would lock a user out of the data on each platform that has no wheel of `pysqlite3`.

    Raises:
        DatabaseError: no library at hand is as new as `MINIMUM_VERSION`.
    """
    global _chosen
    with _lock:
        if _chosen is None:
            _chosen = _choose(SQLiteDriver.of(sqlite3, "sqlite3"), _load_pysqlite3)
        return _chosen


def _choose(own: SQLiteDriver, load_other: Callable[[], SQLiteDriver | None]) -> SQLiteDriver:
    candidates = [own]
    # The second library is loaded only where it is needed: it costs memory, and it is one more to keep apart.
    if not own.safe or own.version < MINIMUM_VERSION:
        other = load_other()
        if other is not None:
            candidates.append(other)
    recent = [candidate for candidate in candidates if candidate.version >= MINIMUM_VERSION]
    if not recent:
        raise DatabaseError(
            f"SQLite {own.version_text} is too old, {_dotted(MINIMUM_VERSION)} or later is needed: "
            "install pysqlite3, or a Python that brings a newer SQLite"
        )
    for candidate in recent:
        if candidate.safe:
            return candidate
    chosen = recent[0]
    logger.warning(
        "SQLite %s has the WAL-reset bug, which can corrupt a database under concurrent writes "
        "(https://sqlite.org/wal.html#walresetbug): install pysqlite3, or a Python with SQLite %s or later",
        chosen.version_text,
        _dotted(_WAL_RESET_FIXED),
        extra={"event": "sqlite_unsafe", "sqlite_version": chosen.version_text, "driver": chosen.name},
    )
    return chosen


def _load_pysqlite3() -> SQLiteDriver | None:
    try:
        module = import_module("pysqlite3.dbapi2")
    except ImportError:
        return None  # an optional package, without wheels for every platform
    return SQLiteDriver.of(module, "pysqlite3")


def _dotted(version: Version) -> str:
    return ".".join(map(str, version))
