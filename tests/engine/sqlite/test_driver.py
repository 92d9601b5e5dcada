"""Which SQLite library is chosen, and which ones are affected by the WAL-reset bug."""

from __future__ import annotations

import logging
import sqlite3
import sys
import threading
from types import ModuleType

import pytest

from homeagent.engine.sqlite import driver
from homeagent.engine.sqlite.driver import MINIMUM_VERSION, SQLiteDriver, choose_driver, has_wal_reset_bug
from homeagent.errors import DatabaseError


@pytest.mark.parametrize(
    ("version", "affected"),
    [
        ((3, 6, 23), False),  # there was no WAL yet
        ((3, 7, 0), True),
        ((3, 40, 1), True),
        ((3, 44, 0), True),
        ((3, 44, 5), True),
        ((3, 44, 6), False),
        ((3, 44, 9), False),
        ((3, 45, 0), True),
        ((3, 46, 1), True),
        ((3, 49, 2), True),
        ((3, 50, 0), True),
        ((3, 50, 6), True),
        ((3, 50, 7), False),
        ((3, 50, 12), False),
        ((3, 51, 0), True),  # made before the backport of 3.50.7
        ((3, 51, 2), True),
        ((3, 51, 3), False),
        ((3, 52, 0), False),
        ((3, 53, 4), False),
        ((4, 0, 0), False),
    ],
)
def test_wal_reset_bug(version: tuple[int, int, int], affected: bool) -> None:
    """The bug is in all versions of WAL before 3.51.3, but for the two backports and what follows them."""
    assert has_wal_reset_bug(version) is affected


def library(version: tuple[int, int, int], name: str = "sqlite3") -> SQLiteDriver:
    """Describe a made-up library of this version."""
    module = ModuleType(name)
    module.sqlite_version_info = version  # type: ignore[attr-defined]
    module.sqlite_version = ".".join(map(str, version))  # type: ignore[attr-defined]
    return SQLiteDriver.of(module, name)


SOUND = library((3, 51, 3))
AFFECTED = library((3, 46, 1))
OLD = library((3, 34, 1))


def not_needed() -> SQLiteDriver | None:
    """Fail the test: there was no reason to look for a second library."""
    raise AssertionError("the second library was loaded for nothing")


def test_own_library_is_used_where_it_is_sound(caplog: pytest.LogCaptureFixture) -> None:
    """A sound library of the interpreter is used, the other one is not even loaded, and nobody is warned."""
    assert driver._choose(SOUND, not_needed) is SOUND
    assert caplog.records == []


@pytest.mark.parametrize("own", [AFFECTED, OLD])
def test_other_library_is_used_where_the_own_is_not_sound(own: SQLiteDriver, caplog: pytest.LogCaptureFixture) -> None:
    """A sound pysqlite3 takes the place of an affected or too old library, without a warning."""
    other = library((3, 53, 4), "pysqlite3")
    assert driver._choose(own, lambda: other) is other
    assert caplog.records == []


@pytest.mark.parametrize("other", [None, library((3, 50, 4), "pysqlite3"), library((3, 30, 0), "pysqlite3")])
def test_affected_library_is_used_with_a_warning(other: SQLiteDriver | None, caplog: pytest.LogCaptureFixture) -> None:
    """Where no sound library is at hand the interpreter's own is used, and the warning names it and the remedy."""
    assert driver._choose(AFFECTED, lambda: other) is AFFECTED
    [record] = caplog.records
    assert (record.name, record.levelno) == ("homeagent", logging.WARNING)
    assert "3.46.1" in record.getMessage()
    assert "pysqlite3" in record.getMessage()


def test_affected_library_goes_before_a_too_old_one(caplog: pytest.LogCaptureFixture) -> None:
    """An affected pysqlite3 is better than an interpreter's library on which the statements do not run."""
    other = library((3, 50, 4), "pysqlite3")
    assert driver._choose(OLD, lambda: other) is other
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


@pytest.mark.parametrize("other", [None, library((3, 35, 4), "pysqlite3")])
def test_too_old_library_is_refused(other: SQLiteDriver | None) -> None:
    """With nothing as new as the statements need, the error names what is there, what is needed and the remedy."""
    with pytest.raises(DatabaseError, match=r"3\.34\.1 is too old, 3\.35\.5 or later is needed: install pysqlite3"):
        driver._choose(OLD, lambda: other)


@pytest.fixture
def unchosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the process choose anew, and forget that choice after the test."""
    monkeypatch.setattr(driver, "_chosen", None)


@pytest.mark.usefixtures("unchosen")
def test_real_choice_is_sound_where_one_can_be() -> None:
    """Here and now, the module that is chosen runs the version that it reports, and is sound if any is."""
    chosen = choose_driver()
    connection = chosen.module.connect(":memory:")
    try:
        [(version,)] = connection.execute("SELECT sqlite_version()").fetchall()
    finally:
        connection.close()
    assert chosen.version_text == version
    assert ".".join(map(str, chosen.version)) == version
    assert chosen.version >= MINIMUM_VERSION
    assert chosen.name in ("sqlite3", "pysqlite3")
    assert chosen.module.__name__ in ("sqlite3", "pysqlite3.dbapi2")
    assert chosen.safe is not has_wal_reset_bug(chosen.version)
    other = driver._load_pysqlite3()
    assert chosen.safe is (not has_wal_reset_bug(sqlite3.sqlite_version_info) or (other is not None and other.safe))


@pytest.mark.usefixtures("unchosen")
def test_choice_is_made_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Threads that ask at the same moment get the same object, and the warning comes once in the process's life."""
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 46, 1))
    monkeypatch.setitem(sys.modules, "pysqlite3", None)  # as if it were not installed
    monkeypatch.setitem(sys.modules, "pysqlite3.dbapi2", None)
    barrier = threading.Barrier(4)
    answers: list[SQLiteDriver] = []

    def ask() -> None:
        barrier.wait()
        answers.append(choose_driver())

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 4
    assert all(answer is answers[0] for answer in answers)
    assert answers[0].module is sqlite3
    assert not answers[0].safe
    assert len(caplog.records) == 1


def test_minimum_library_runs_what_the_package_needs() -> None:
    """The chosen library knows RETURNING, upsert and row values, the newest features that the statements use."""
    connection = choose_driver().module.connect(":memory:")
    try:
        connection.execute("CREATE TABLE t (a INTEGER PRIMARY KEY, b INTEGER)")
        statement = "INSERT INTO t VALUES (1, 2) ON CONFLICT (a) DO UPDATE SET b = b + 1 RETURNING b"
        assert connection.execute(statement).fetchall() == [(2,)]
        assert connection.execute(statement).fetchall() == [(3,)]
        assert connection.execute("SELECT a FROM t WHERE (a, b) > (1, 2)").fetchall() == [(1,)]
    finally:
        connection.close()
