"""homeagent on a PostgreSQL server, against hand-written psycopg on the same server."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.benchmarks.contender import DAY, METHOD, RESULT, START, Clock
from tests.benchmarks.contenders import homeagent_
from tests.benchmarks.contenders.by_hand import DDL
from tests.benchmarks.contenders.homeagent_ import HomeAgent
from tests.benchmarks.measuring import Bench, BenchmarkError, Call
from tests.benchmarks.operations import DURABILITIES
from tests.postgresql.server import Server, find_installation

PREFIX = "PostgreSQL: "
UNIT, ONE_CALL = f"{PREFIX}find a device by id, in a unit", f"{PREFIX}find a device by id, one call"
CONSUME, INSERT = f"{PREFIX}nonce consume", f"{PREFIX}idempotency insert"
MINUTE = 60_000


@contextmanager
def _started() -> Iterator[Server]:
    """Start a server that syncs its commits, and stop it at the end."""
    directory = Path(tempfile.mkdtemp(prefix="homeagent-benchmarks-"))
    # If the tests run as root, the server runs as another user, who must be able to reach its directory.
    directory.chmod(0o755)
    try:
        installation = find_installation(None, directory)
        if installation is None:
            raise BenchmarkError("there is no PostgreSQL server: install homeagent[test]")
        server = Server(installation, directory / "main")
        server.create({})
        server.start()
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def measure(bench: Bench) -> None:
    """Measure each row of the report. At the durability `normal`, `synchronous_commit` is off."""
    if not bench.wants(UNIT, ONE_CALL, CONSUME, INSERT):
        return
    with _started() as server:
        for durability in DURABILITIES:
            _operations(bench, server, durability)


def _operations(bench: Bench, server: Server, durability: str) -> None:
    import psycopg

    filled = bench.sizes.filled
    for name in ("plain", "homeagent"):
        server.execute(f"DROP DATABASE IF EXISTS {name}")
        server.execute(f"CREATE DATABASE {name}")
        server.execute(f"ALTER DATABASE {name} SET synchronous_commit = {'on' if durability == 'full' else 'off'}")
    homeagent_.fill(server.url("homeagent"), filled)
    homeagent = HomeAgent(server.url("homeagent"), durability, Clock(START + MINUTE))
    with psycopg.connect(server.url("plain"), autocommit=True) as connection:
        connection.execute(DDL.replace(" WITHOUT ROWID", "").encode())
        copied = "INSERT INTO devices SELECT 'd' || i, 'client', 'x', 1, 0, 0 FROM generate_series(0, %s::int - 1) AS i"
        connection.execute(copied.encode(), (filled.devices,))
        server.execute("VACUUM ANALYZE", "plain")
        server.execute("VACUUM ANALYZE", "homeagent")
        by_hand = _by_hand(connection.cursor(), filled.devices)
        ours: dict[str, Call] = {
            UNIT: lambda i: homeagent.device(f"d{i % filled.devices}"),
            ONE_CALL: lambda i: homeagent.database.devices.find_by_id(f"d{i % filled.devices}"),
            CONSUME: lambda i: homeagent.consume(f"d{i % filled.devices}", f"n{i}-abcdefghijkl"),
            INSERT: lambda i: homeagent.insert_key(f"d{i % filled.devices}", f"x{i}"),
        }
        for row, call in ours.items():
            writes = row in (CONSUME, INSERT)
            if writes or durability == "full":
                bench.compare(row, durability if writes else "", {"psycopg": by_hand[row], "homeagent": call})
    homeagent.close()


def _by_hand(cursor: Any, devices: int) -> dict[str, Callable[[int], Any]]:
    execute, now = cursor.execute, START + MINUTE

    def find(i: int) -> Any:
        return execute("SELECT * FROM devices WHERE id = %s", (f"d{i % devices}",)).fetchone()

    def find_in_transaction(i: int) -> Any:
        execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
        row = find(i)
        execute("COMMIT")
        return row

    def write(sql: str, parameters: tuple[Any, ...]) -> bool:
        execute("BEGIN")
        changed: int = execute(sql, parameters).rowcount
        execute("COMMIT")
        return changed > 0

    def consume(i: int) -> bool:
        row = (f"d{i % devices}", f"n{i}-abcdefghijkl", now, now + DAY)
        return write("INSERT INTO nonces VALUES (%s, %s, %s, %s) ON CONFLICT DO NOTHING", row)

    def insert(i: int) -> bool:
        row = (f"x{i}", METHOD, f"d{i % devices}", json.dumps(RESULT), now, now + DAY)
        return write("INSERT INTO idempotency_keys VALUES (%s, %s, %s, %s, %s, %s) ON CONFLICT DO NOTHING", row)

    return {UNIT: find_in_transaction, ONE_CALL: find, CONSUME: consume, INSERT: insert}
