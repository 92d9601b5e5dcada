"""A load whose sums are correct in every committed state, and in no other state."""

from __future__ import annotations

import json
import threading
from contextlib import closing
from pathlib import Path
from typing import IO

from homeagent import AgentCreate, Database
from homeagent.engine.sqlite.dialect import connect
from tests.conftest import Children, Process

ACCOUNTS = 20
WRITERS = 4

# Each unit moves an amount between two accounts, and increments its writer's row and the ledger.
SCRIPT = """
import random, sys, threading
from homeagent import AgentUpdate, Database

path, writer = sys.argv[1], sys.argv[2]
stop = threading.Event()
threading.Thread(target=lambda: (sys.stdin.readline(), stop.set()), daemon=True).start()
chance = random.Random(writer)

def move(unit):
    a, b = chance.sample(range(ACCOUNTS), 2)
    for name, change in ((f"account-{a}", -1), (f"account-{b}", 1), (f"writer-{writer}", 1), ("ledger", 1)):
        value = unit.agents.get(name).config["value"] + change
        unit.agents.update(name, AgentUpdate(config={"value": value, "padding": "x" * chance.randrange(2000)}))
    return unit.agents.get(f"writer-{writer}").config["value"]

with Database.open(path) as database:
    print("ready", flush=True)
    while not stop.is_set():
        # Told once it is durable.
        print(database.run(move), flush=True)
""".replace("ACCOUNTS", str(ACCOUNTS))


def begin(database: Database) -> None:
    """Create the rows that the writers change."""
    names = [f"account-{number}" for number in range(ACCOUNTS)] + [f"writer-{number}" for number in range(WRITERS)]
    with database.unit_of_work() as unit:
        for name in (*names, "ledger"):
            value = 100 if name.startswith("account") else 0
            unit.agents.create(AgentCreate(id=name, name=name, workspace_path="/x", config={"value": value}))


def look(path: Path) -> tuple[int, dict[int, int]]:
    """Return the ledger and each writer's count from a file, and check that the file holds a committed state."""
    with closing(connect(f"file:{path}?mode=ro&immutable=1", uri=True)) as raw:
        assert raw.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert raw.execute("PRAGMA foreign_key_check").fetchall() == []
        values = {name: json.loads(text)["value"] for name, text in raw.execute("SELECT id, config FROM agents")}
    assert sum(value for name, value in values.items() if name.startswith("account")) == 100 * ACCOUNTS
    counts = {number: values[f"writer-{number}"] for number in range(WRITERS)}
    assert sum(counts.values()) == values["ledger"]
    return values["ledger"], counts


def start(children: Children, path: Path, told: dict[int, int]) -> list[Process]:
    """Start the writers, and remember in `told` the last count that each writer printed."""

    def remember(stream: IO[str], writer: int) -> None:
        for line in stream:
            if line.strip().isdigit():
                told[writer] = int(line)

    writers = [children.start(SCRIPT, path, number) for number in range(WRITERS)]
    for number, writer in enumerate(writers):
        threading.Thread(target=remember, args=(writer.stdout, number), daemon=True).start()
    return writers
