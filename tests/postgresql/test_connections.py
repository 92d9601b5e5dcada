"""Connections to a server that fails, becomes a standby, or is one of several. PostgreSQL only: SQLite has none."""

from __future__ import annotations

import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import make_url, text

from homeagent import AgentCreate, Database, UnitOfWork, errors
from homeagent.engine.postgresql.engine import PostgreSQLEngine
from tests.conftest import Administer, FakeClock, MakeDatabase, dump, in_threads, postgres_database, postgres_execute
from tests.postgresql.load import wait_for
from tests.postgresql.server import Installation, Server, free_port

pytestmark = pytest.mark.usefixtures("postgres_url")

ADA = AgentCreate(id="ada", name="Ada", workspace_path="/srv/ada")


def end_sessions(target: str) -> None:
    """End every other session of a database, as a restart of the server would."""
    postgres_execute(
        target,
        "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity "
        "WHERE datname = current_database() AND pid <> pg_backend_pid()",
    )


@pytest.mark.parametrize("read_only", [False, True], ids=["write", "read"])
def test_idle_connections_are_replaced(target: str, database: Database, read_only: bool) -> None:
    """If all sessions ended while idle, the next units get new connections, as blocks and as functions."""
    together = threading.Barrier(4)

    def use() -> None:
        with database.unit_of_work(read_only=read_only) as unit:
            together.wait(20)
            unit.agents.list()

    in_threads(*[use] * 4)
    end_sessions(target)
    for _ in range(6):
        with database.unit_of_work(read_only=read_only) as unit:
            assert unit.agents.list() == []
    assert database.run(lambda unit: unit.agents.list(), read_only=True) == []


def test_session_ended_in_a_unit_undoes_the_unit(
    target: str, database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """If a session ends during a unit, a block raises, `run` repeats the function, and no traceback is logged."""
    with pytest.raises(errors.ConnectionLostError), database.unit_of_work() as unit:
        unit.agents.create(ADA)
        end_sessions(target)
        unit.agents.list()
    assert dump(database)["agents"] == []
    ended = iter([True, False])

    def add(unit: UnitOfWork) -> str:
        if next(ended):
            end_sessions(target)
        return unit.agents.create(ADA).name

    assert database.run(add) == "Ada"
    # The server ended the session before COMMIT was sent, so the outcome is known.
    for opened in (False, True):
        with pytest.raises(errors.ConnectionLostError), database.unit_of_work() as unit:
            if opened:
                unit.session.connection()
            unit.agents.delete("ada")
            end_sessions(target)
    assert len(dump(database)["agents"]) == 1
    assert caplog.records == []


@pytest.mark.parametrize("timeout", ["idle_in_transaction_session_timeout", "transaction_timeout"])
@pytest.mark.parametrize("at", ["statement", "commit"])
def test_unit_with_a_timed_out_session_is_repeated(
    database: Database, timeout: str, at: str, administer: Administer
) -> None:
    """If a server timeout ends the session during a unit, `run` repeats the unit and a block raises an error."""
    pids: list[int] = []

    def add(unit: UnitOfWork) -> None:
        unit.agents.create(ADA)
        if not pids:
            raw: Any = unit.session.connection().connection.driver_connection
            if timeout == "transaction_timeout" and raw.info.server_version < 170_000:
                pytest.skip("PostgreSQL 17 brought this timeout")
            pids.append(raw.info.backend_pid)
            raw.execute(f"SET LOCAL {timeout} = 10")
            alive = f"SELECT 1 FROM pg_stat_activity WHERE pid = {pids[0]}"
            wait_for("the end of the session", lambda: not administer(alive).fetchone())
        if at == "statement":
            unit.agents.list()

    database.run(add)
    assert len(dump(database)["agents"]) == 1
    pids.clear()
    with pytest.raises(errors.ConnectionLostError), database.unit_of_work() as unit:
        unit.agents.delete("ada")
        add(unit)
    assert len(dump(database)["agents"]) == 1


@pytest.mark.parametrize("setting", ["LATIN1", "SQL_ASCII"])
def test_client_encoding_is_utf8(target: str, setting: str) -> None:
    """If a database asks for another client encoding, text is still sent and read as UTF-8."""
    postgres_execute(target, f"ALTER DATABASE {make_url(target).database} SET client_encoding = {setting}")
    given = AgentCreate(id="日", name="台所 é", workspace_path="/srv", config={"a": "台"})
    with Database.open(target) as database:
        database.agents.create(given)
        found = database.agents.get("日")
        assert (found.name, found.config) == (given.name, given.config)


def test_database_without_an_encoding_works(postgres_url: str) -> None:
    """A database with SQL_ASCII stores the bytes of UTF-8."""
    name = "without_encoding"
    options = "TEMPLATE template0 ENCODING 'SQL_ASCII' LOCALE_PROVIDER libc LOCALE 'C'"
    postgres_execute(postgres_url, f"CREATE DATABASE {name} {options}")
    try:
        with Database.open(postgres_database(postgres_url, name)) as database:
            database.agents.create(AgentCreate(id="日", name="台所 é", workspace_path="/srv"))
            assert [agent[:2] for agent in dump(database)["agents"]] == [("日", "台所 é")]
    finally:
        postgres_execute(postgres_url, f"DROP DATABASE {name} WITH (FORCE)")


def test_caught_statement_error_fails_the_commit(database: Database) -> None:
    """If a failed statement's error was caught, PostgreSQL rolls back: the unit raises and runs no callback."""
    called: list[str] = []
    for opened in (False, True):
        with pytest.raises(errors.DatabaseError, match="savepoint"), database.unit_of_work() as unit:
            unit.after_commit(lambda: called.append("committed"))
            unit.agents.create(ADA)
            with pytest.raises(errors.DatabaseError):
                if opened:
                    unit.session.connection().execute(text("SELECT 1/0"))
                else:
                    unit._require_connection().execute("SELECT 1/0")
    assert called == []
    assert dump(database)["agents"] == []
    with database.unit_of_work() as unit:
        unit.agents.create(ADA)
        with pytest.raises(errors.DatabaseError), unit.savepoint():
            unit._require_connection().execute("SELECT 1/0")
    assert len(dump(database)["agents"]) == 1


def test_cancelled_wait_for_a_standby_is_an_unknown_commit(
    administer: Administer, target: str, reopen: MakeDatabase
) -> None:
    """If the wait for a standby is cancelled, the standby may lack the commit: CommitUnknownError is raised."""
    # The server sends no warnings, as a role's settings may say.
    postgres_execute(target, f"ALTER DATABASE {make_url(target).database} SET client_min_messages = error")
    database = reopen()
    administer("ALTER SYSTEM SET synchronous_standby_names = 'absent'")
    administer("SELECT pg_reload_conf()")
    done = threading.Event()

    def cancel() -> None:
        while not done.wait(0.02):
            administer("SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep'")

    thread = threading.Thread(target=cancel)
    thread.start()
    try:
        with pytest.raises(errors.CommitUnknownError), database.unit_of_work() as unit:
            # The test server has synchronous_commit off, so only this transaction waits for the standby.
            unit.session.connection().execute(text("SET LOCAL synchronous_commit = on"))
            unit.agents.create(ADA)
    finally:
        done.set()
        thread.join()
        administer("ALTER SYSTEM RESET synchronous_standby_names")
        administer("SELECT pg_reload_conf()")
    assert len(dump(database)["agents"]) == 1
    assert database.agents.delete("ada")


def test_lock_wait_is_bounded_by_busy_timeout(target: str, clock: FakeClock, database: Database) -> None:
    """Each unit sets lock_timeout, so that a wait is bounded even with a pooler's sessions."""
    with Database.open(target, clock=clock, busy_timeout=timedelta(milliseconds=100)) as other:
        with database.unit_of_work() as unit:
            unit.agents.create(ADA)
        with database.unit_of_work() as unit:
            unit.agents.get("ada")
            with pytest.raises(errors.DatabaseBusyError, match="55P03"), other.unit_of_work() as second:
                second.agents.get("ada")
        with other.unit_of_work() as unit:
            (setting,) = unit.session.connection().execute(text("SHOW lock_timeout")).one()
            assert setting == "100ms"


@pytest.mark.parametrize("pool_size", [0, 1001, True, "10"])
def test_pool_size_is_checked(target: str, pool_size: object) -> None:
    """If pool_size is invalid, InvalidArgumentError is raised before a connection is made."""
    with pytest.raises(errors.InvalidArgumentError, match="pool_size must be a whole number from 1 to 1,000"):
        Database.open(target, pool_size=pool_size)


def test_pool_is_bounded(target: str, clock: FakeClock) -> None:
    """At most pool_size units run at the same time; another unit waits for busy_timeout at most."""
    # Other tests have databases of their own on the same server.
    sessions = "FROM pg_stat_activity WHERE application_name = 'homeagent' AND datname = current_database()"
    with Database.open(target, clock=clock, busy_timeout=timedelta(milliseconds=100), pool_size=1) as database:
        with (
            database.unit_of_work(read_only=True),
            pytest.raises(errors.DatabaseBusyError, match="could not get a connection"),
        ):
            database.unit_of_work(read_only=True).__enter__()
        with database.unit_of_work() as unit:
            connection = unit.session.connection()

            def at_most_one_of_each_kind() -> bool:
                # Within a transaction the server repeats its first answer, unless the snapshot is cleared.
                connection.execute(text("SELECT pg_stat_clear_snapshot()"))
                return bool(connection.execute(text(f"SELECT count(*) <= 2 {sessions}")).scalar_one())

            # The server takes some time to end the sessions of `Database.open`.
            wait_for("a writer and a reader are all that is left", at_most_one_of_each_kind, seconds=20)


# Hosts and errors


def test_absent_database_is_named(target: str) -> None:
    """If the server has no such database, the error names the database, and shows no password."""
    with pytest.raises(errors.ConnectionLostError, match="nowhere") as caught:
        Database.open(make_url(target).set(database="nowhere", password="hunter2"))
    assert "hunter2" not in repr([caught.value, caught.value.__cause__, caught.value.__context__])


def test_waits_for_a_host_have_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connecting, keepalives and unacknowledged data have limits, unless the URL or the environment sets others."""

    def options(url: str) -> dict[str, object]:
        engine = PostgreSQLEngine(make_url(url), busy_timeout=timedelta(seconds=1))
        taken: dict[str, object] = {}

        def take(dialect: object, record: object, args: object, parameters: dict[str, object]) -> None:
            taken.update(parameters)
            raise LookupError

        from sqlalchemy import event

        event.listen(engine.sa_engine, "do_connect", take)
        with pytest.raises(LookupError):
            engine.connect()
        engine.close()
        return taken

    for name in ("PGCONNECT_TIMEOUT", "PGTARGETSESSIONATTRS"):
        monkeypatch.delenv(name, raising=False)
    one = options("postgresql+psycopg://h/db?tcp_user_timeout=5")
    assert (one["connect_timeout"], one["tcp_user_timeout"], one["keepalives_idle"]) == ("10", "5", "30")
    assert "target_session_attrs" not in one
    several = "postgresql+psycopg://u@/db?host=a:1&host=b:2"
    assert options(several)["target_session_attrs"] == "read-write"
    assert (options(several)["host"], options(several)["port"]) == ("a,b", "1,2")
    assert options(several + "&target_session_attrs=any")["target_session_attrs"] == "any"
    assert options("postgresql+psycopg://a,b/db")["target_session_attrs"] == "read-write"
    monkeypatch.setenv("PGCONNECT_TIMEOUT", "3")
    assert "connect_timeout" not in options(several)


# Several hosts


@pytest.mark.slow
def test_units_follow_the_primary(installation: Installation, public_directory: Path, clock: FakeClock) -> None:
    """If the primary returns as a standby, units wait for the promoted server and use it."""
    first = Server(installation, public_directory / "a", port=free_port())
    first.create({"fsync": "off", "shared_buffers": "16MB"})
    first.start()
    second = first.clone(public_directory / "b", port=free_port(), name="b")
    url = f"postgresql://postgres@/postgres?host=127.0.0.1:{first.port}&host=127.0.0.1:{second.port}"
    try:
        with (
            Database.open(url, clock=clock, busy_timeout=timedelta(seconds=60)) as database,
            Database.open(first.url(), clock=clock, busy_timeout=timedelta(milliseconds=500)) as lone,
        ):
            database.run(lambda unit: unit.agents.create(ADA))
            lone.run(lambda unit: unit.agents.get("ada"))
            second.start()
            # A standby streams after its start; the WAL must reach it before the stop.
            first.execute("SELECT pg_switch_wal()")
            first.stop()
            (first.data / "standby.signal").touch()
            first.start()
            # Both servers are standbys now. With a single host in the URL, the error at the end of the wait says so.
            with pytest.raises(errors.ReadOnlyError, match="standby"):
                lone.run(lambda unit: unit.agents.delete("ada"))
            with pytest.raises(errors.ReadOnlyError, match="standby"), lone.unit_of_work():
                pass
            with lone.unit_of_work(read_only=True) as unit:
                assert unit.agents.get("ada").name == "Ada"
            promotion = threading.Timer(0.3, second.execute, ["SELECT pg_promote()"])
            promotion.start()
            assert database.run(lambda unit: unit.agents.delete("ada"))
            promotion.join()
            with database.unit_of_work() as unit:
                assert unit.agents.list() == []
    finally:
        for server in (first, second):
            if server.is_running:
                server.stop("immediate")
