"""`kill -9` at random instants: each acknowledged unit is there, and none by half.

One engine only: on a server it is the server that would be killed, which has tests of its own.
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
    from tests.conftest import Children

# Units in four shapes, each of which writes a row and its twin, and tells its name when it was committed.
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
    """Load a database with four processes, kill them at a random instant each, look, and begin again."""
    chance = random.Random(seed)
    # A file, since what a pipe's reader has buffered is lost to communicate().
    told = path.parent.parent / "told"
    for number in range(rounds):
        processes = [children.start(LOAD, path, durability, f"{seed}.{number}.{each}", told) for each in range(4)]
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
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
    """Four killed processes."""
    assert kill_rounds(sqlite_path, children, durability, 1, seed=1) > 0


@pytest.mark.slow
@pytest.mark.parametrize("durability", ["full", "normal"])
def test_300_kills(sqlite_path: Path, children: Children, durability: str) -> None:
    """A hundred and fifty-two killed processes at each durability."""
    assert kill_rounds(sqlite_path, children, durability, 38, seed=2) > 38
