"""Diagnose a PostgreSQL database: check the rights of the role and the store."""

from __future__ import annotations

from contextlib import closing
from datetime import timedelta
from typing import Any

from sqlalchemy import URL, Connection, text

from homeagent.engine.postgresql.engine import PostgreSQLEngine
from homeagent.engine.target import presentable_url
from homeagent.errors import HomeAgentError, InvalidArgumentError
from homeagent.maintenance.doctor.report import Collector
from homeagent.maintenance.doctor.store import STORE_CHECKS, check_store
from homeagent.migrations.postgresql import refuse_second_store
from homeagent.models import TABLES


def check_postgresql(collector: Collector, url: URL, *, limit: timedelta | None) -> None:
    """Run all checks on a server's database. The server cancels each statement that takes longer than `limit`."""
    if "connect_timeout" not in url.query:
        url = url.update_query_dict({"connect_timeout": "5"})
    try:
        server = PostgreSQLEngine(url, busy_timeout=timedelta(seconds=5))
        with closing(server) as engine, engine.connect() as connection:
            raw: Any = connection.connection.driver_connection
            with engine.translated():
                # Use SET LOCAL: behind a pooler, SET would affect other clients.
                raw.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
                patience = 0 if limit is None else int(limit.total_seconds() * 1000)
                # The role's settings can change the format of timestamps and trigger definitions.
                for setting in (f"statement_timeout = {patience}", "datestyle = ISO", "quote_all_identifiers = off"):
                    raw.execute(f"SET LOCAL {setting}")
            name = connection.execute(text("SELECT current_database()")).scalar_one()
            _check_path(collector, connection, name)
            if engine.search_schema is not None:
                connection.execute(text(f"SET LOCAL {engine.search_schema}"))
            with collector.attempt("write_access", on=connection):
                _check_write_access(collector, connection)
            check_store(collector, connection)
            with engine.translated():
                raw.execute("ROLLBACK")
    except HomeAgentError as error:
        remedy = "start the server, or correct the URL, the password or pg_hba.conf; read the server's log"
        collector.critical("database", f"{presentable_url(url)} can't be reached.", str(error), remedy, "pg_isready")
    collector.skip("the database can't be reached", "write_access", *STORE_CHECKS)


def _check_path(collector: Collector, connection: Connection, name: str) -> None:
    try:
        refuse_second_store(connection)
    except InvalidArgumentError as error:
        remedy = "name the schema in the URL or in the role; if another role created the first schema, drop that schema"
        collector.critical("database", "The search_path leads to two stores.", str(error), remedy)
    else:
        collector.add("database", f"The server answers, database {name!r}.")


def _check_write_access(collector: Collector, connection: Connection) -> None:
    rows = connection.execute(
        text(
            "SELECT DISTINCT name FROM unnest(CAST(:names AS text[])) AS names(name),"
            " unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE']) AS rights(needed)"
            " WHERE to_regclass(name) IS NOT NULL AND NOT has_table_privilege(to_regclass(name), needed)"
        ),
        {"names": list(TABLES)},
    )
    lacking = sorted(row[0] for row in rows)
    if connection.execute(text("SELECT pg_is_in_recovery()")).scalar_one():
        remedy = "name all hosts in the URL, with target_session_attrs=read-write"
        collector.critical("write_access", "The server is a standby.", "a standby accepts no writes", remedy)
    shown = ", ".join(lacking)
    summary = f"Tables that this role may not read and write: {shown or 'none'}."
    meaning = "units of the gateway that use these tables fail"
    remedy = "grant the role these rights, or use the role that owns the tables"
    command = f"GRANT SELECT, INSERT, UPDATE, DELETE ON {shown} TO CURRENT_USER"
    collector.add("write_access", summary, meaning, remedy, command, critical=lacking, tables=len(lacking))
