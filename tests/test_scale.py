"""Behaviour with many rows: a million sessions, their pages and routes.

SQLite only: PostgreSQL chooses its plans by statistics, which favour an index more as the rows grow, and
stores/test_sessions.py shows that an index exists for each query.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from homeagent import AgentCreate, AgentSession, Database, UnitOfWork
from homeagent.engine.statements import Statement
from homeagent.stores import session_statements

BEGINNING = datetime(2026, 1, 1, tzinfo=UTC)
SESSIONS = 1_000_000
AGENTS = 20

pytestmark = pytest.mark.slow


def many_sessions() -> Iterator[AgentSession]:
    """Yield a million sessions, one at a time."""
    for number in range(SESSIONS):
        yield AgentSession(
            session_id=f"s{number:07}",
            agent_id=f"agent-{number % AGENTS}",
            sender_id=f"sender-{number // 10}",
            channel_id=None if number % 3 else "main",
            created_at=BEGINNING,
            # Ten sessions have the same timestamp, so pages must order equal timestamps by id.
            last_active_at=BEGINNING + timedelta(seconds=number // 10),
        )


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    path: Path = tmp_path_factory.mktemp("scale") / "homeagent.db"
    seen: list[int] = []
    with Database.open(path, durability="normal", clock=lambda: BEGINNING + timedelta(days=30)) as database:
        with database.unit_of_work() as unit:
            for number in range(AGENTS):
                unit.agents.create(AgentCreate(id=f"agent-{number}", name="Agent", workspace_path="/srv/agent"))
            assert unit.sessions.index(many_sessions(), progress=seen.append) == SESSIONS
        assert seen[-1] == SESSIONS
        assert len(seen) >= 1000
        yield database


def plan_of(unit: UnitOfWork, statement: Statement[Any], **parameters: Any) -> str:
    connection: Any = unit.session.connection().connection.driver_connection
    compiled = statement.compiled(unit.session.connection().dialect, read_only=True)
    rows = connection.execute(f"EXPLAIN QUERY PLAN {compiled.sql}", compiled.bind(parameters)).fetchall()
    return "; ".join(row[3] for row in rows)


def test_pages_are_whole_and_in_order(filled: Database) -> None:
    """Twenty pages of an agent's sessions hold each of the latest sessions once, last active first."""
    seen: list[AgentSession] = []
    with filled.unit_of_work(read_only=True) as unit:
        for _ in range(20):
            page = unit.sessions.list(agent_id="agent-3", limit=50, after=seen[-1] if seen else None)
            seen.extend(page)
    expected = [f"s{number:07}" for number in range(SESSIONS - 1, -1, -1) if number % AGENTS == 3][:1000]
    assert [session.session_id for session in seen] == expected


def test_resolve_among_a_million_sessions(filled: Database) -> None:
    """Among a million sessions, `resolve` finds a session by its route, and creates a session for a new route."""
    with filled.unit_of_work() as unit:
        found = unit.sessions.resolve(agent_id="agent-3", sender_id="sender-50000")
        assert found.session_id == "s0500003"
        made = unit.sessions.resolve(agent_id="agent-3", sender_id="nobody-yet")
        assert unit.sessions.resolve(agent_id="agent-3", sender_id="nobody-yet") == made
        plan = plan_of(unit, session_statements.BY_ROUTE_UNLOCKED, route="x")
    assert "idx_sessions_route" in plan
