"""A writer: a process of a load that runs units of each kind until a file stops it, and keeps a ledger.

Each line of the ledger was acknowledged: `run` returned. Arguments: a URL, a directory and the writer's number.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from homeagent import AgentCreate, AgentUpdate, Attempt, Database, IdempotencyScope, UnitOfWork
from homeagent.errors import CommitUnknownError

WRITER = "from tests.postgresql.writer import main; main()"
"""The script of a child process."""

PATIENCE = timedelta(seconds=100)
"""The busy_timeout of a unit, which a failover must not exceed."""

HOUR = timedelta(hours=1)


class Writer:
    """Units of four kinds, numbered. The directory has each writer's ledger and the shared file of effects."""

    def __init__(self, database: Database, directory: Path, name: str) -> None:
        self._database = database
        self._name = name
        self._ledger = os.open(directory / f"{name}.ledger", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self._effects = os.open(directory / "effects", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        with database.unit_of_work() as unit:
            unit.agents.create(AgentCreate(id=f"count-{name}", name=name, workspace_path="/srv", config=[0, -1]))

    def _acknowledged(self, kind: str, number: int, value: Any, began: float) -> None:
        now = time.monotonic()
        line = {"kind": kind, "number": number, "value": value, "at": now, "took": now - began}
        os.write(self._ledger, json.dumps(line).encode() + b"\n")

    def turn(self, number: int) -> None:
        for kind in ("create", "count", "nonce", "effect"):
            began = time.monotonic()
            value = getattr(self, kind)(number)
            self._acknowledged(kind, number, value, began)

    def create(self, number: int) -> str:
        """Create an agent under an idempotency key, in an idempotent unit. Each effect creates another id."""

        def make(unit: UnitOfWork) -> str:
            def effect(attempt: Attempt) -> str:
                agent_id = f"{self._name}-{number}-{secrets.token_hex(4)}"
                return unit.agents.create(AgentCreate(id=agent_id, name="n", workspace_path="/srv")).id

            return str(unit.run_once(IdempotencyScope(self._name, "create", str(number)), effect).value)

        return self._database.run(make, idempotent=True)

    def count(self, number: int) -> str:
        """Increment a counter: the unit must not run twice. Return how the commit was confirmed."""

        def add(unit: UnitOfWork) -> None:
            config: Any = unit.agents.get(f"count-{self._name}").config
            unit.agents.update(f"count-{self._name}", AgentUpdate(config=[config[0] + 1, number]))

        def is_done(unit: UnitOfWork) -> bool:
            # Use a write unit: `get` waits there for the transaction with the unknown commit, which may still hold the
            # row.
            config: Any = unit.agents.get(f"count-{self._name}").config
            return bool(config[1] == number)

        told = "committed"
        while True:
            try:
                self._database.run(add)
            except CommitUnknownError:
                if self._database.run(is_done, idempotent=True):
                    return "unknown, and had been committed"
                told = "unknown, and had not been committed"
            else:
                return told

    def nonce(self, number: int) -> bool | None:
        """Try to consume a nonce that all writers present; return None if the outcome is unknown."""
        until = datetime.now(UTC) + HOUR
        try:
            return self._database.run(lambda unit: unit.nonces.consume("all", str(number), expires_at=until))
        except CommitUnknownError:
            return None

    def effect(self, number: int) -> str:
        """Write a line into a file, once, by an effect outside of the database."""

        def effect(attempt: Attempt) -> str:
            os.write(self._effects, f"{self._name}-{number}\n".encode())
            return f"{self._name}-{number}"

        return str(self._database.run_once(IdempotencyScope(self._name, "effect", str(number)), effect).value)


def main() -> None:
    url, path, number = sys.argv[1:]
    directory = Path(path)
    with Database.open(url, busy_timeout=PATIENCE) as database:
        writer = Writer(database, directory, f"w{number}")
        turns = 0
        while not (directory / "stop").exists():
            writer.turn(turns)
            turns += 1
