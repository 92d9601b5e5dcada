"""The content check of an open file; a PostgreSQL server checks its own files."""

from __future__ import annotations

import logging
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from homeagent import Database
from homeagent.engine.sqlite.dialect import connect
from homeagent.engine.sqlite.integrity import ContentCheck
from homeagent.errors import CorruptDatabaseError
from tests.conftest import FakeClock, add_agent


def test_valid_database_is_checked_periodically(database: Database) -> None:
    """If a check finds no damage, no error is raised, and the next check is due after its interval (either engine)."""
    now = 0.0
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return False

    check = ContentCheck(database._engine, every=timedelta(hours=1), monotonic=lambda: now)
    check.run_if_due(stop)
    first = asked
    check.run_if_due(stop)
    assert asked == first
    now = 3600.0
    check.run_if_due(stop)
    assert (asked > first) == (database._engine.dialect_name == "sqlite")
    add_agent(database, "after")


def test_damage_marks_the_database_corrupt(
    sqlite_path: Path, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    """If an index does not match its table, every later unit raises the error until the database is reopened."""
    with closing(connect(str(sqlite_path))) as raw:
        root: Any = raw.execute("SELECT rootpage FROM sqlite_master WHERE name = 'idx_sessions_agent'").get
    with Database.open(sqlite_path, clock=clock) as database:
        with sqlite_path.open("r+b") as file:
            file.seek((root - 1) * 4096 + 3)
            file.write(b"\x00\x03")
        check = ContentCheck(database._engine, every=timedelta(hours=1))
        with caplog.at_level(logging.ERROR, "homeagent"), pytest.raises(CorruptDatabaseError):
            check.run_if_due(lambda: False)
        assert "is damaged" in caplog.text
        with pytest.raises(CorruptDatabaseError, match="is damaged"):
            add_agent(database, "lost")
