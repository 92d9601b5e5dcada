"""The diagnosis of a PostgreSQL database: the server, its standbys, who waits for whom; then what the rows tell.

Everything is read, in one read-only transaction: https://www.postgresql.org/docs/current/monitoring-stats.html
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

from sqlalchemy import URL, text

from homeagent.clock import system_clock
from homeagent.engine.postgresql.engine import PostgreSQLEngine
from homeagent.engine.target import presentable_url
from homeagent.errors import HomeAgentError
from homeagent.maintenance.doctor.chart import Chart
from homeagent.maintenance.doctor.findings import STORE_CHECKS
from homeagent.maintenance.doctor.revision import check_revision
from homeagent.maintenance.doctor.rows import check_rows
from homeagent.maintenance.doctor.schema import check_schema
from homeagent.migrations.schema_drift import columns_found
from homeagent.models import metadata

if TYPE_CHECKING:
    from sqlalchemy import Connection

__all__ = ["examine_postgresql"]

OLDEST_VERSION = 15
CLOCK_WARNING = timedelta(seconds=2)
CLOCK_CRITICAL = timedelta(minutes=5)
LONG_WAIT = timedelta(seconds=10)
LONG_IDLE = timedelta(minutes=5)
LAG = timedelta(minutes=1)
DEAD_ROWS = 100_000
_CONNECT_SECONDS = "5"

# How the server writes instants and definitions, which a role may have otherwise.
_SHOWN_AS = ("datestyle = ISO", "quote_all_identifiers = off")


def examine_postgresql(chart: Chart, url: URL, *, limit: timedelta | None) -> None:
    """Make all checks on a server's database.

    Args:
        chart: where to write.
        url: the database.
        limit: how long one statement may take; None for as long as it needs.
    """
    if "connect_timeout" not in url.query:
        url = url.update_query_dict({"connect_timeout": _CONNECT_SECONDS})
    try:
        engine = PostgreSQLEngine(url, busy_timeout=timedelta(seconds=5))
        try:
            with engine.connect() as connection:
                raw: Any = connection.connection.driver_connection
                with engine.translated():
                    # The snapshot is taken by the first query. Its transaction is never written in, and what is set
                    # ends with it: behind a pooler others are given the same session.
                    raw.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
                    patience = 0 if limit is None else int(limit.total_seconds() * 1000)
                    for setting in (f"statement_timeout = {patience}", *_SHOWN_AS):
                        raw.execute(f"SET LOCAL {setting}")
                _examine(chart, connection)
                with engine.translated():
                    raw.execute("ROLLBACK")
        finally:
            engine.close()
    except HomeAgentError as error:
        chart.alarm(
            "database",
            f"{presentable_url(url)} can't be reached.",
            meaning=str(error),
            remedy="start the server, or mend the URL, the password or pg_hba.conf; its own log says more",
            command="pg_isready",
        )
    chart.skip("the database can't be reached", *_LOOKS, *STORE_CHECKS)


def _examine(chart: Chart, connection: Connection) -> None:
    name = connection.execute(text("SELECT current_database()")).scalar_one()
    chart.ok("database", f"The server answers, database {name!r}.")
    for check, look in _LOOKS.items():
        with chart.attempt(check, on=connection):
            look(chart, connection)
    if check_revision(chart, connection):
        check_schema(chart, connection)
    with chart.attempt("clock", on=connection):
        columns = columns_found(connection)
    check_rows(chart, connection, columns)


def _row(connection: Connection, query: str, **parameters: Any) -> Any:
    return connection.execute(text(query), parameters).one()


def _check_version(chart: Chart, connection: Connection) -> None:
    number, version = _row(
        connection, "SELECT current_setting('server_version_num')::int, current_setting('server_version')"
    )
    if number // 10000 >= OLDEST_VERSION:
        chart.ok("server_version", f"PostgreSQL {version}.", version=version)
        return
    chart.alarm(
        "server_version",
        f"PostgreSQL {version} is older than {OLDEST_VERSION}.",
        meaning="the package was never tested on it",
        remedy=f"upgrade the server to {OLDEST_VERSION} or newer",
        version=version,
    )


def _check_durability(chart: Chart, connection: Connection) -> None:
    names = ("fsync", "full_page_writes", "synchronous_commit")
    columns = ", ".join(f"current_setting('{name}')" for name in names)
    settings: dict[str, Any] = dict(zip(names, _row(connection, f"SELECT {columns}"), strict=True))
    shown = ", ".join(f"{name} is {value}" for name, value in settings.items())
    if "off" in (settings["fsync"], settings["full_page_writes"]):
        chart.alarm(
            "durability",
            f"The server does not wait for the disk: {shown}.",
            meaning="a power cut may lose everything, or leave a database that can't be started",
            remedy="switch fsync and full_page_writes on, and reload the server's settings",
            command="ALTER SYSTEM SET fsync = on",
            **settings,
        )
    elif settings["synchronous_commit"] == "off":
        chart.warn(
            "durability",
            "The server answers a commit before it is on the disk: synchronous_commit is off.",
            meaning="a crash may lose the last commits, and a nonce that is lost may be used again",
            remedy="switch synchronous_commit on for this database",
            command="ALTER SYSTEM SET synchronous_commit = on",
            **settings,
        )
    else:
        chart.ok("durability", f"A commit is on the disk before it is answered: {shown}.", **settings)


def _check_collations(chart: Chart, connection: Connection) -> None:
    wanted = {
        (table.name, column.name)
        for table in metadata.sorted_tables
        for column in table.columns
        if getattr(column.type.dialect_impl(connection.dialect), "collation", None) == "C"
    }
    rows = connection.execute(
        text(
            "SELECT c.relname, a.attname, co.collname FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid"
            " LEFT JOIN pg_collation co ON co.oid = a.attcollation"
            " WHERE c.oid IN (SELECT to_regclass(name) FROM unnest(CAST(:names AS text[])) AS names(name))"
            " AND a.attnum > 0 AND NOT a.attisdropped"
        ),
        {"names": list(metadata.tables)},
    )
    other = sorted(
        f"{table}.{column}" for table, column, collation in rows if (table, column) in wanted and collation != "C"
    )
    if not other:
        chart.ok("collations", "Text is compared by bytes.", columns=0)
        return
    chart.alarm(
        "collations",
        f"Columns that are not compared by bytes: {len(other)}, such as {other[0]}.",
        meaning="pages of a list come in another order, and an index breaks when the system's locale data change",
        remedy='give each its collation back, as in: ALTER TABLE … ALTER COLUMN … TYPE text COLLATE "C"',
        columns=len(other),
    )


def _check_privileges(chart: Chart, connection: Connection) -> None:
    rows = connection.execute(
        text(
            "SELECT DISTINCT name FROM unnest(CAST(:names AS text[])) AS names(name),"
            " unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE']) AS rights(needed)"
            " WHERE to_regclass(name) IS NOT NULL AND NOT has_table_privilege(to_regclass(name), needed)"
        ),
        {"names": list(metadata.tables)},
    )
    lacking = sorted(row[0] for row in rows)
    if not lacking:
        chart.ok("privileges", "This role may read and write every table.", tables=0)
        return
    chart.alarm(
        "privileges",
        f"This role may not read and write {', '.join(lacking)}.",
        meaning="the gateway's units fail",
        remedy="grant the role what it needs, or use the owner's",
        command=f"GRANT SELECT, INSERT, UPDATE, DELETE ON {', '.join(lacking)} TO CURRENT_USER",
        tables=len(lacking),
    )


_CONNECTIONS = (
    "SELECT (SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'),"
    " current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int"
)


def _check_connections(chart: Chart, connection: Connection) -> None:
    used, limit = _row(connection, _CONNECTIONS)
    summary = f"{used:,} of {limit:,} connections are in use."
    if used < 0.8 * limit:
        chart.ok("connections", summary, used=used, limit=limit)
        return
    tell = chart.alarm if used >= limit - 1 else chart.warn
    tell(
        "connections",
        summary,
        meaning="the next gateway or unit may be turned away",
        remedy="raise max_connections, put pgbouncer in front, or run fewer gateways",
        command="ALTER SYSTEM SET max_connections = …",
        used=used,
        limit=limit,
    )


def _check_standby(chart: Chart, connection: Connection) -> None:
    (standby,) = _row(connection, "SELECT pg_is_in_recovery()")
    if not standby:
        chart.ok("standby", "The server is a primary.", standby=False)
        return
    chart.alarm(
        "standby",
        "The server is a standby.",
        meaning="nothing can be written there",
        remedy="name all hosts in the URL, with target_session_attrs=read-write; or promote this one, "
        "if the primary is gone",
        command="SELECT pg_promote()",
        standby=True,
    )


def _check_replication(chart: Chart, connection: Connection) -> None:
    if chart.findings["standby"].facts.get("standby"):
        (lag,) = _row(connection, "SELECT extract(epoch FROM now() - pg_last_xact_replay_timestamp())::float")
        chart.ok("replication", "This is a standby: the primary tells about its replicas.", replay_age_seconds=lag)
        return
    # Without pg_monitor the state of others is hidden, and null.
    attached, synchronous, lag = _row(
        connection,
        "SELECT count(*), count(*) FILTER (WHERE sync_state IN ('sync', 'quorum')),"
        " max(extract(epoch FROM replay_lag))::float FROM pg_stat_replication",
    )
    (wanted,) = _row(connection, "SELECT current_setting('synchronous_standby_names')")
    facts: dict[str, Any] = {"standbys": attached, "synchronous": synchronous, "replay_lag_seconds": lag}
    if wanted and not synchronous:
        chart.alarm(
            "replication",
            "Commits wait for a synchronous standby, and none is attached.",
            meaning="every write hangs until one comes back",
            remedy="start the standby, or take it out of synchronous_standby_names",
            command="SELECT application_name, state, sync_state FROM pg_stat_replication",
            **facts,
        )
    elif lag is not None and lag > LAG.total_seconds():
        chart.warn(
            "replication",
            f"A standby is {lag:,.0f} s behind.",
            meaning="were it promoted now, what it has not received would be lost",
            remedy="look at the standby's load, disk and network",
            command="SELECT application_name, state, replay_lag FROM pg_stat_replication",
            **facts,
        )
    else:
        chart.ok("replication", f"{attached} standbys are attached, {synchronous} of them synchronous.", **facts)


def _check_locks(chart: Chart, connection: Connection) -> None:
    waiting, idle = _row(
        connection,
        "SELECT count(*) FILTER (WHERE wait_event_type = 'Lock' AND since > CAST(:wait AS interval)),"
        " count(*) FILTER (WHERE state LIKE 'idle in transaction%' AND since > CAST(:idle AS interval))"
        " FROM (SELECT state, wait_event_type, clock_timestamp() - state_change AS since FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()) AS activity",
        wait=LONG_WAIT,
        idle=LONG_IDLE,
    )
    if not waiting and not idle:
        chart.ok("lock_waits", "Nobody waits long for a lock.", waiting=0, idle_in_transaction=0)
        return
    chart.warn(
        "lock_waits",
        f"{waiting} connections have waited for a lock for over {LONG_WAIT.seconds} s, "
        f"and {idle} have sat in a transaction for over {LONG_IDLE.seconds} s.",
        meaning="units fail with DatabaseBusyError, and dead rows can't be cleared away",
        remedy="find out who holds the lock, and end that session",
        command="SELECT pid, state, query_start, pg_blocking_pids(pid) FROM pg_stat_activity",
        waiting=waiting,
        idle_in_transaction=idle,
    )


def _check_dead_rows(chart: Chart, connection: Connection) -> None:
    dead, live = _row(
        connection,
        "SELECT coalesce(sum(n_dead_tup), 0)::bigint, coalesce(sum(n_live_tup), 0)::bigint FROM pg_stat_user_tables"
        " WHERE relid IN (SELECT to_regclass(name) FROM unnest(CAST(:names AS text[])) AS names(name))",
        names=list(metadata.tables),
    )
    (vacuum,) = _row(connection, "SELECT current_setting('autovacuum')")
    facts: dict[str, Any] = {"dead": dead, "live": live, "autovacuum": vacuum}
    if vacuum == "on" and (dead <= DEAD_ROWS or dead <= live):
        chart.ok("dead_rows", f"{dead:,} dead rows beside {live:,} live ones.", **facts)
        return
    chart.warn(
        "dead_rows",
        f"{dead:,} dead rows beside {live:,} live ones; autovacuum is {vacuum}.",
        meaning="tables and indexes grow, and reads get slow",
        remedy="switch autovacuum on, and end transactions that have been open for long",
        command="VACUUM ANALYZE",
        **facts,
    )


def _check_server_clock(chart: Chart, connection: Connection) -> None:
    before = system_clock()
    (server,) = _row(connection, "SELECT clock_timestamp()")
    after = system_clock()
    # The answer was made at some instant between the two.
    off = max(before - server, server - after, timedelta(0))
    seconds = round(off.total_seconds(), 3)
    if off <= CLOCK_WARNING:
        chart.ok("server_clock", "This host's clock and the server's agree.", difference_seconds=seconds)
        return
    tell = chart.alarm if off > CLOCK_CRITICAL else chart.warn
    tell(
        "server_clock",
        f"This host's clock and the server's differ by {seconds:,} s.",
        meaning="one of them is wrong; where several gateways disagree, leases and expiries end early or late",
        remedy="let a time service keep the clocks of all hosts",
        command="timedatectl status",
        difference_seconds=seconds,
    )


_LOOKS = {
    "server_version": _check_version,
    "durability": _check_durability,
    "collations": _check_collations,
    "privileges": _check_privileges,
    "connections": _check_connections,
    "standby": _check_standby,
    "replication": _check_replication,
    "lock_waits": _check_locks,
    "dead_rows": _check_dead_rows,
    "server_clock": _check_server_clock,
}
