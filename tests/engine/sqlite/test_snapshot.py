"""The snapshot of a unit that reads: taken when the unit begins, the same for all in it, given up at its end."""

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
    """Return the ids of the agents that a unit sees, through its store."""
    return {agent.id for agent in unit.agents.list()}


def log_can_be_emptied(path: Path) -> bool:
    """Tell whether a checkpoint meets no reader, which it can't do while a snapshot is held."""
    connection = connect(str(path), timeout=0)
    try:
        ((busy, *_),) = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    finally:
        connection.close()
    return not busy


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shows", [False, True], ids=["held", "shown"])
def test_it_is_of_the_beginning(sqlite_path: Path, way: str, shows: bool) -> None:
    """What is committed after a unit began is not in it, through whatever it looks, and whoever listens."""
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
def test_it_is_given_up_at_the_end(sqlite_path: Path, way: str, end: str) -> None:
    """A snapshot that outlived its unit would let the log grow without end."""
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
