"""OpenTelemetry's instrumentation of SQLAlchemy traces every statement of a unit, and never a value."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.instrumentation.sqlalchemy import SQLAlchemyInstrumentor
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from sqlalchemy import bindparam, event, insert, text

from homeagent import Agent, AgentCreate, AgentSession, Database, IdempotencyScope, Statement, errors
from tests.conftest import FakeClock, add_agent

Spans = Callable[[], list[ReadableSpan]]


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def provider(exporter: InMemorySpanExporter) -> Iterator[TracerProvider]:
    """A provider for an instrumentation, which the fixture removes at the end."""
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    yield provider
    SQLAlchemyInstrumentor().uninstrument()


@pytest.fixture
def spans(provider: TracerProvider, exporter: InMemorySpanExporter) -> Spans:
    """Return the spans since the previous call, while SQLAlchemy is instrumented as in an application."""
    SQLAlchemyInstrumentor().instrument(tracer_provider=provider, skip_dep_check=True)

    def finished() -> list[ReadableSpan]:
        found = list(exporter.get_finished_spans())
        exporter.clear()
        return found

    return finished


@pytest.fixture
def traced(spans: Spans, target: str, clock: FakeClock) -> Iterator[Database]:
    """A database that was opened after the instrumentation of SQLAlchemy."""
    with Database.open(target, clock=clock, busy_timeout=timedelta(seconds=20)) as database:
        spans()
        yield database


def statement_of(span: ReadableSpan) -> str:
    return str((span.attributes or {}).get("db.statement", ""))


def statements(found: list[ReadableSpan]) -> list[str]:
    return [statement_of(span).split()[0] for span in found if statement_of(span)]


_T = FakeClock()()
SESSION = AgentSession(session_id="s", agent_id="ada", created_at=_T, last_active_at=_T)


def test_every_statement_of_a_unit_has_its_span(traced: Database, spans: Spans, clock: FakeClock) -> None:
    """Each statement of the stores has a span with the instrumentation's attributes, and no span contains a value."""
    with traced.unit_of_work() as unit:
        unit.agents.create(AgentCreate(id="ada", name="geheim", workspace_path="/srv/geheim"))
        unit.sessions.index([SESSION])
        unit.nonces.consume("geheim", "geheim", expires_at=clock.now + timedelta(minutes=1))
        unit.idempotency_keys.insert(IdempotencyScope("geheim", "geheim", "geheim"), "geheim", ttl=timedelta(1))
    found = spans()
    words = statements(found)
    assert (words[:2], words[-1]) == (["BEGIN", "INSERT"], "COMMIT")
    assert "BEGIN" not in words[1:]
    assert "geheim" not in "".join(span.to_json() for span in found)
    insert = next(span for span in found if "INSERT INTO agents" in statement_of(span))
    assert insert.name.startswith("INSERT ")
    assert (insert.attributes or {})["db.system"] == traced._engine.dialect_name
    assert insert.kind is trace.SpanKind.CLIENT
    assert insert.end_time is not None
    assert insert.status.status_code is StatusCode.UNSET


def test_the_session_and_the_stores_are_traced_alike(traced: Database, spans: Spans) -> None:
    """Each statement of the ORM session and of the stores gives a single span."""
    with traced.unit_of_work() as unit:
        unit.session.add(Agent(id="bob", name="Bob", workspace_path="/srv", created_at=_T))
        assert unit.agents.get("bob").name == "Bob"
    assert statements(spans())[:3] == ["BEGIN", "INSERT", "SELECT"]


def test_spans_belong_to_the_caller(traced: Database, spans: Spans, provider: TracerProvider) -> None:
    """A statement's span is a child of the caller's span, also if the unit runs in a worker thread."""

    async def ask() -> None:
        with provider.get_tracer("test").start_as_current_span("request"):
            await traced.arun(lambda unit: unit.agents.find_by_id("ada"), read_only=True)

    asyncio.run(ask())
    found = spans()
    (request,) = (span for span in found if span.name == "request")
    select = next(span for span in found if "FROM agents" in statement_of(span))
    assert request.context is not None
    assert select.parent is not None
    assert select.parent.span_id == request.context.span_id


COLUMNS = ("session_id", "agent_id", "created_at", "last_active_at", "route_key")
INSERT = Statement[Any](insert(AgentSession).values({name: bindparam(name) for name in COLUMNS}))


@pytest.mark.parametrize("through", ["store", "session"])
def test_a_failed_span_shows_no_value(traced: Database, spans: Spans, through: str) -> None:
    """If a statement fails, its span has homeagent's message, without PostgreSQL's DETAIL and without a parameter."""
    add_agent(traced, "geheim")
    spans()
    with pytest.raises(errors.HomeAgentError), traced.unit_of_work() as unit:
        if through == "session":
            unit.session.add(Agent(id="geheim", name="geheim", workspace_path="/geheim", created_at=_T))
            unit.session.flush()
        else:
            row = {"session_id": "geheim", "agent_id": "nobody-geheim", "route_key": None}
            unit.write_many(INSERT, [{**row, "created_at": _T, "last_active_at": _T}])
    found = spans()
    failed = [span for span in found if span.status.status_code is StatusCode.ERROR]
    assert len(failed) == 1
    assert failed[0].end_time is not None
    assert "geheim" not in "".join(span.to_json() for span in found)
    if through == "store":
        assert "constraint" in str(failed[0].status.description)


def test_a_comment_of_the_instrumentation_reaches_the_server(
    target: str, provider: TracerProvider, exporter: InMemorySpanExporter
) -> None:
    """If a listener adds a comment to a statement (sqlcommenter), the parameters stay unchanged."""
    SQLAlchemyInstrumentor().instrument(
        tracer_provider=provider, skip_dep_check=True, enable_commenter=True, enable_attribute_commenter=True
    )
    with Database.open(target) as database:
        add_agent(database)
        with database.unit_of_work(read_only=True) as unit:
            assert unit.agents.get("ada").name == "Ada"
    texts = map(statement_of, exporter.get_finished_spans())
    assert any("INSERT INTO agents" in text and "/*" in text for text in texts)


def test_a_bulk_insert_is_one_statement(traced: Database, spans: Spans) -> None:
    """If many rows are inserted at once (COPY on PostgreSQL), the insert is a single span, also if the insert fails."""
    columns = ("id", "name", "workspace_path", "created_at")
    engine = traced._engine
    for rows, fails in (([("geheim", "A", "/", 1), ("b", "B", "/", 1)], False), ([("c", None, "/", 1)], True)):
        with pytest.raises(errors.ConflictError) if fails else nullcontext(), traced.unit_of_work() as unit:
            unit.insert_rows("agents", columns, rows)
        found = spans()
        (bulk,) = (span for span in found if "agents" in statement_of(span))
        assert bulk.name.split()[0] == ("INSERT" if engine.dialect_name == "sqlite" else "COPY")
        assert (bulk.status.status_code is StatusCode.ERROR) is fails
        assert "geheim" not in "".join(span.to_json() for span in found)


def test_any_listener_of_sqlalchemy_is_called(target: str) -> None:
    """Any listener of SQLAlchemy's events gets the usual arguments, but no parameters."""
    told: list[tuple[str, Any, bool]] = []

    def before(connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, many: bool) -> None:
        context.mark = statement
        told.append((statement, parameters, many))

    def after(connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, many: bool) -> None:
        assert context.mark == statement
        assert cursor.connection is connection.connection.driver_connection

    with Database.open(target) as database:
        event.listen(database._engine.sa_engine, "before_cursor_execute", before)
        event.listen(database._engine.sa_engine, "after_cursor_execute", after)
        add_agent(database)
        with database.unit_of_work() as unit:
            unit.sessions.index([SESSION])
    assert told[0][0].startswith("BEGIN")
    assert all(parameters == () for _, parameters, _ in told)
    assert any(many for _, _, many in told)


def test_the_documented_lines_are_enough(
    monkeypatch: pytest.MonkeyPatch, sqlite_path: Path, provider: TracerProvider, exporter: InMemorySpanExporter
) -> None:
    """The documented lines run unchanged, with the default target in the environment."""
    page = (Path(__file__).parents[1] / "docs" / "how-to" / "observability.md").read_text(encoding="utf-8")
    (lines,) = re.findall(r"^```py\n(.*?SQLAlchemyInstrumentor.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    monkeypatch.setenv("HOMEAGENT_DATABASE", str(sqlite_path))
    monkeypatch.setattr("opentelemetry.trace._TRACER_PROVIDER", provider)
    names: dict[str, Any] = {"Database": Database}
    exec(lines, names)  # noqa: S102  the documentation's own lines
    with names["database"] as database:
        add_agent(database)
    assert f"INSERT {sqlite_path}" in [span.name for span in exporter.get_finished_spans()]


def test_a_refused_statement_hides_the_drivers_exception(traced: Database, spans: Spans) -> None:
    """If the engine refuses an instrumented statement, the error names it, and its chain has no driver's exception."""
    with traced.unit_of_work() as uow:
        uow.session.exec(text("ALTER TABLE agents RENAME COLUMN name TO title"))  # type: ignore[call-overload]
    with pytest.raises(errors.DatabaseError, match="the statement was: SELECT") as caught:
        traced.agents.get("ada")
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None
    assert any(span.status.status_code is StatusCode.ERROR for span in spans())
