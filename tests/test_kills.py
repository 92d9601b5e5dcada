"""`kill -9` at random times: every acknowledged unit is stored, and no unit is stored in part.

SQLite only: on PostgreSQL the server would be killed, and the server has tests of its own.
"""

from __future__ import annotations

import random
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from homeagent import Database

if TYPE_CHECKING:
    from tests.conftest import Children, RecordProperty

# Four kinds of units; each writes a row and its twin, and prints its name after the commit.
LOAD = """
import os, random, sys
from datetime import timedelta
from homeagent import AgentCreate, AgentSessionCreate, Database
path, durability, prefix, told = sys.argv[1:]
told = os.open(told, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
chance = random.Random(prefix)
database = Database.open(path, durability=durability)
def write(unit, name):
    config = {"pad": "x" * chance.randrange(3000)}
    unit.agents.create(AgentCreate(id=name, name=name, workspace_path="/a", config=config))
    unit.sessions.create(AgentSessionCreate(session_id=name, agent_id=name))
os.write(1, b"ready\\n")
number = 0
while True:
    name = f"{prefix}-{number}"
    number += 1
    match chance.randrange(4):
        case 0:
            database.run(lambda unit: write(unit, name))
        case 1:
            with database.unit_of_work() as unit:
                unit.session.connection()
                write(unit, name)
        case 2:
            with database.unit_of_work() as unit:
                with unit.savepoint():
                    write(unit, name)
                unit.nonces.consume("d", name, expires_at=unit.now() + timedelta(seconds=1))
            database.sweep()
        case _:
            with database.unit_of_work() as unit:
                write(unit, name)
    os.write(told, name.encode() + b"\\n")
"""


def kill_rounds(path: Path, children: Children, durability: str, rounds: int, seed: int) -> int:
    """Load a database with four processes, kill each at a random time, check the rows, and repeat."""
    chance = random.Random(seed)
    # Print to a file, since communicate() loses the data that a pipe's reader has buffered.
    told = path.parent.parent / "told"
    for number in range(rounds):
        processes = [children.start(LOAD, path, durability, f"{seed}.{number}.{each}", told) for each in range(4)]
        for process in processes:
            assert process.stdout.readline() == "ready\n"
        while not told.stat().st_size:  # on a busy machine, all kills could come before the first unit
            time.sleep(0.001)
        for process in chance.sample(processes, 4):
            time.sleep(chance.uniform(0, 0.1))
            process.kill()
        for process in processes:
            _, complaints = process.communicate(timeout=30)
            assert complaints == ""
        acknowledged = set(told.read_text().split())
        with (
            Database.open(path, busy_timeout=timedelta(seconds=5)) as database,
            database.unit_of_work(read_only=True) as unit,
        ):
            agents = {agent.id for agent in unit.agents.list(limit=1_000_000)}
            sessions = {session.session_id for session in unit.sessions.list(limit=1_000_000)}
            assert unit._require_connection().execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert agents == sessions, "a unit is half there"
        assert acknowledged <= agents, "an acknowledged unit is lost"
    return len(acknowledged)


@pytest.mark.parametrize("durability", ["full", "normal"])
def test_killed_load(sqlite_path: Path, children: Children, durability: str) -> None:
    """If four processes are killed, all acknowledged units are stored whole."""
    assert kill_rounds(sqlite_path, children, durability, 1, seed=1) > 0


@pytest.mark.slow
@pytest.mark.parametrize("durability", ["full", "normal"])
def test_300_kills(sqlite_path: Path, children: Children, durability: str, record_property: RecordProperty) -> None:
    """If 152 processes are killed at each durability, all acknowledged units are stored whole."""
    assert kill_rounds(sqlite_path, children, durability, 38, seed=2) > 38
    record_property("processes killed while they write units", 4 * 38)
