"""The snapshot of a read unit: taken at the beginning, the same for all reads, released at the end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import event, select

from homeagent import Agent, Database, UnitOfWork, errors
from homeagent.engine.sqlite.dialect import connect
from tests.conftest import add_agent

WAYS: dict[str, Callable[[UnitOfWork], object]] = {
    "stores": lambda unit: None,
    "session": lambda unit: unit.session,
    "session that was used": lambda unit: unit.session.scalars(select(Agent)).all(),
}


def names(unit: UnitOfWork) -> set[str]:
    """Return the ids of the agents that a unit's store finds."""
    return {agent.id for agent in unit.agents.list()}


def log_can_be_emptied(path: Path) -> bool:
    """Return whether a checkpoint can empty the WAL, which a held snapshot prevents."""
    connection = connect(str(path), timeout=0)
    try:
        ((busy, *_),) = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    finally:
        connection.close()
    return not busy


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shows", [False, True], ids=["held", "shown"])
def test_snapshot_excludes_later_commits(sqlite_path: Path, way: str, shows: bool) -> None:
    """A commit after the beginning of a read unit is not in its snapshot, for every way to read."""
    with Database.open(sqlite_path) as writer, Database.open(sqlite_path) as reader:
        if shows:
            event.listen(reader._engine.sa_engine, "before_cursor_execute", lambda *_: None)
        with reader.unit_of_work(read_only=True) as unit:
            add_agent(writer, "late")
            WAYS[way](unit)
            assert names(unit) == set()
            add_agent(writer, "later")
            with unit.savepoint():
                assert names(unit) == set()
            assert unit.session.scalars(select(Agent)).all() == []
            assert names(unit) == set()
        with reader.unit_of_work(read_only=True) as unit:
            assert names(unit) == {"late", "later"}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("end", ["commit", "rollback", "error"])
def test_snapshot_is_released_at_the_end(sqlite_path: Path, way: str, end: str) -> None:
    """If a read unit ends, its snapshot is released, so that the WAL can be emptied."""
    with Database.open(sqlite_path) as database:
        add_agent(database)
        try:
            with database.unit_of_work(read_only=True) as unit:
                WAYS[way](unit)
                assert names(unit) == {"ada"}
                assert not log_can_be_emptied(sqlite_path)
                if end == "rollback":
                    unit.rollback()
                    assert log_can_be_emptied(sqlite_path)
                if end == "error":
                    unit.agents.get("nobody")
        except errors.AgentNotFoundError:
            assert end == "error"
        assert log_can_be_emptied(sqlite_path)
        with database.unit_of_work(read_only=True) as unit:
            assert names(unit) == {"ada"}
