"""Check the schema and rows of a database, on both engines. A finding must not contain a secret, a hash, a nonce, a key
or a result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from sqlalchemy import and_, column, exists, func, not_, or_, select, text
from sqlalchemy import table as sql_table

from homeagent.engine.sqlite.dialect import Undecodable, decoded_row, undecoded_columns
from homeagent.errors import CorruptDatabaseError
from homeagent.maintenance.doctor.application import check_application, check_schema
from homeagent.maintenance.doctor.report import RESTORE, TOO_LONG, Collector, Severity
from homeagent.migrations import REVISION, VERSION_TABLE, revision_of
from homeagent.models import SCHEMA, Agent, AgentSession, Device, IdempotencyKey, Nonce, Role, store_table
from homeagent.models.idempotency_key import IdempotencyState
from homeagent.models.session import route_key
from homeagent.models.types import JsonColumn, TimestampColumn, naming_column, problem_of_stored
from homeagent.stores.nonces import NONCE_GRACE

if TYPE_CHECKING:
    from sqlalchemy import Column, ColumnElement, Connection, Dialect, Table

BACKLOG = 10_000
"""If the store has more expired rows than this number, the doctor assumes that no process sweeps."""

AHEAD = timedelta(minutes=1)
"""Allowed difference between the clocks of several hosts."""

PENDING = timedelta(days=7)
"""Longest time for which a device can wait for approval without a warning."""

SECRETS_GRACE = timedelta(days=1)
"""Time for which the hash of an expired secret can stay without a warning, because the clock can be wrong."""

_PAGE = 1000
_PAGE_WITH_JSON = 25  # the JSON of one row has up to 1 MiB

_device: Any = Device.__table__.c
_agent: Any = Agent.__table__.c
_session: Any = AgentSession.__table__.c
_nonce: Any = Nonce.__table__.c
_key: Any = IdempotencyKey.__table__.c

_TIMES = [
    c
    for described in SCHEMA
    for c in described.columns
    if isinstance(c.type, TimestampColumn) and not c.name.endswith("expires_at") and c.name != "at"
]
"""Columns to which stores write only the current time. The database's clock can set the column `device_changes.at`."""


def check_store(collector: Collector, connection: Connection) -> None:
    """Run all checks of a store. The connection must be in a transaction with one snapshot."""
    with collector.attempt("schema_revision", on=connection):
        _check_revision(collector, connection)
    revision = collector.findings.get("schema_revision")
    if revision is not None and revision.severity is Severity.OK:
        if revision.facts["revision"] != REVISION:
            collector.skip("the schema is newer than this version's", "schema", "application", "rows")
        for check, function in _CHECKS.items():
            if check not in collector.not_checked:
                with collector.attempt(check, on=connection):
                    function(collector, connection)
    collector.skip("the schema is at another revision", *STORE_CHECKS)


def _check_revision(collector: Collector, connection: Connection) -> None:
    check, revision = "schema_revision", revision_of(connection)
    facts = {"revision": revision, "needed": REVISION}
    if revision == REVISION:
        collector.ok(check, f"The schema is at revision {revision}.", **facts)
    elif revision is None:
        summary = f"There is no schema: no table {VERSION_TABLE}."
        remedy = f"if there was a schema, {RESTORE}; if not, create the schema"
        collector.critical(check, summary, "the schema was not created, or was lost", remedy, "homeagent init", **facts)
    elif revision < REVISION:
        summary = f"The schema is at revision {revision}, and this version needs {REVISION}."
        meaning = "the gateway upgrades the schema at its next start; until then read-only programs refuse it"
        collector.warn(
            check, summary, meaning, "upgrade it; a SQLite file is backed up first", "homeagent migrate", **facts
        )
    elif (connection.execute(select(store_table.c.oldest_revision)).scalar() or revision) <= REVISION:
        collector.ok(check, f"The schema is at the newer revision {revision}, which works with this version.", **facts)
    else:
        summary = f"The schema is at revision {revision}, and this version knows {REVISION} at most."
        meaning = "a newer version upgraded the schema; this version refuses it, because writes could do damage"
        remedy = "install the newer version again, or restore the backup that was made before the upgrade"
        collector.critical(check, summary, meaning, remedy, "pip install --upgrade homeagent", **facts)


# Stored values


def _check_rows(collector: Collector, connection: Connection) -> None:
    faults: list[str] = []
    rows = 0
    for described in SCHEMA:
        try:
            count, found = _read(described, connection, collector.watch)
        except CorruptDatabaseError as error:
            count, found = 0, [f"table {described.name} can't be read to its end ({error})"]
        rows += count
        faults += found
    if faults:
        shown = "; ".join(faults[:10])
        collector.critical(
            "rows",
            f"Rows that no store writes and that can't be used: {len(faults):,}: {shown}"
            f"{'; …' if len(faults) > 10 else ''}.",
            "units that read such a row raise CorruptDatabaseError; another program wrote it, or the file is damaged",
            "correct or delete these rows, or restore a backup",
            rows=rows,
            unreadable=len(faults),
        )
    elif collector.watch():
        collector.skip(TOO_LONG, "rows")
    else:
        collector.ok("rows", f"Rows that can be read: {rows:,} of {rows:,}.", rows=rows, unreadable=0)


def _read(described: Table, connection: Connection, watch: Callable[[], bool]) -> tuple[int, list[str]]:
    """Read the stored values of all rows of a table. Return the number of rows, and a description of each bad row."""
    columns = list(described.columns)
    names = [c.name for c in columns]
    # For a nonce or an idempotency key, a finding shows only the device, because the nonce or key is secret.
    named = names.index(naming_column(described))
    tests = [_test(c, connection.dialect) for c in columns]
    count, faults = 0, []
    for page in _pages(described, connection):
        for row in page:
            odd = next(((at, what) for at, test in enumerate(tests) if (what := test(row[at])) is not None), None)
            if odd is not None:
                where = f"{described.name}.{names[odd[0]]}"
                faults.append(f"{where} {odd[1]}, in the row with {names[named]} {row[named]!r}")
        count += len(page)
        if watch():
            break
    return count, faults


def _pages(described: Table, connection: Connection) -> Iterator[Sequence[Sequence[Any]]]:
    quote = connection.dialect.identifier_preparer.quote
    rows: Any = select(*(column(c.name) for c in described.columns)).select_from(sql_table(described.name))
    # On SQLite, read texts as bytes, because the driver raises an error for a page of rows with invalid UTF-8.
    undecoded = connection.dialect.name == "sqlite"
    if undecoded:
        names = undecoded_columns(quote(c.name) for c in described.columns)
        rows = text(f"SELECT {names} FROM {quote(described.name)}")  # noqa: S608  quoted
    size = _PAGE_WITH_JSON if any(isinstance(c.type, JsonColumn) for c in described.columns) else _PAGE
    for page in connection.execute(rows, execution_options={"yield_per": size}).partitions():
        yield [decoded_row(row) for row in page] if undecoded else page


def _test(described: Column[Any], dialect: Dialect) -> Callable[[Any], str | None]:
    problem = problem_of_stored(described)
    load = getattr(described.type, "process_result_value", None)

    def test(value: Any) -> str | None:
        if isinstance(value, Undecodable):
            return "holds text that is not UTF-8"
        what = problem(value)
        if what is None and load is not None:
            try:
                load(value, dialect)
            except CorruptDatabaseError:
                return "holds a value that can't be read"
        return what

    return test


# Rows that need the administrator's attention


def _count(connection: Connection, model: Any, *conditions: ColumnElement[bool]) -> int:
    statement = select(func.count()).select_from(model.__table__).where(*conditions)
    return int(connection.execute(statement).scalar_one())


def _check_abandoned(collector: Collector, connection: Connection) -> None:
    lapsed = or_(_key.lease_expires_at <= collector.now, _key.lease_expires_at.is_(None))
    abandoned = _count(connection, IdempotencyKey, _key.state == IdempotencyState.IN_PROGRESS, lapsed)
    collector.add(
        Severity.WARNING if abandoned else Severity.OK,
        "abandoned_effects",
        f"Effects that began and have no recorded end: {abandoned:,}.",
        "their retries get OutcomeUnknownError until the administrator records how each ended",
        "list the effects, find out how each ended, then run 'homeagent keys resolve' or 'homeagent keys forget'",
        "homeagent keys abandoned",
        keys=abandoned,
    )


def _check_previous_secrets(collector: Collector, connection: Connection) -> None:
    expired = _device.previous_secret_expires_at <= collector.now - SECRETS_GRACE
    ended = or_(_device.previous_secret_expires_at.is_(None), expired)
    stale = _count(connection, Device, _device.previous_secret_hash.is_not(None), ended)
    summary = f"Devices that still hold the hash of an expired secret: {stale:,}."
    meaning = "the secret is refused and the hash is not needed: a thief of the file has one more hash to guess at"
    remedy = "remove these hashes"
    command = "homeagent doctor --fix"
    collector.add(
        Severity.WARNING if stale else Severity.OK, "previous_secrets", summary, meaning, remedy, command, devices=stale
    )


def _check_references(collector: Collector, connection: Connection) -> None:
    sessions = _count(connection, AgentSession, not_(exists().where(_agent.id == _session.agent_id)))
    summary = f"Sessions whose agent does not exist: {sessions:,}."
    meaning = "another program wrote to the database with foreign keys switched off"
    remedy = "create the missing agents again, or remove these sessions; then find out which program wrote them"
    collector.add(
        Severity.CRITICAL if sessions else Severity.OK, "references", summary, meaning, remedy, sessions=sessions
    )
    keys = _count(connection, IdempotencyKey, not_(exists().where(_device.id == _key.device_id)))
    summary = f"Idempotency keys whose device does not exist: {keys:,}."
    meaning = "the device was removed by other means than devices.delete, or never paired"
    remedy = "wait until the keys expire and are swept; if the device never existed, find out which program writes them"
    collector.add(Severity.WARNING if keys else Severity.OK, "references", summary, meaning, remedy, keys=keys)


def stale_routes(connection: Connection) -> Iterator[tuple[str, str]]:
    """Yield the id and the right route key of each session with a wrong route key."""
    columns = (_session.session_id, _session.route_key, _session.agent_id, _session.sender_id, _session.channel_id)
    holders = select(*columns).where(_session.route_key.is_not(None))
    # If several sessions belong to one route, the session that was active last gets the route.
    holders = holders.order_by(_session.last_active_at.desc(), _session.session_id.desc())
    for session_id, stored, *route in connection.execute(holders, execution_options={"yield_per": _PAGE}):
        if not all(value is None or isinstance(value, str) for value in route):
            continue  # The check `"rows"` reports a row with a value that is not a text.
        right = route_key(*route)
        if stored != right:
            yield session_id, right


def _check_routes(collector: Collector, connection: Connection) -> None:
    stale = sum(1 for _ in stale_routes(connection))
    collector.add(
        Severity.WARNING if stale else Severity.OK,
        "routes",
        f"Sessions whose route key is not that of their agent, sender and channel: {stale:,}.",
        "an UPDATE past the stores moved them: sessions.resolve does not find them and makes new sessions",
        "compute these keys again; if another session has the route, the moved session stays listed without it",
        "homeagent doctor --fix",
        sessions=stale,
    )


def _check_store_record(collector: Collector, connection: Connection) -> None:
    epochs = connection.execute(select(store_table.c.epoch)).scalars().all()
    collector.add(
        Severity.OK if len(epochs) == 1 else Severity.CRITICAL,
        "store_record",
        f"Rows of the table store: {len(epochs)}, of epoch {max(epochs, default=None)}; one belongs there.",
        "the epoch is unknown, and the versions that can work with the store are unknown",
        RESTORE,
        rows=len(epochs),
        epoch=epochs[0] if epochs else None,
    )


def _check_clock(collector: Collector, connection: Connection) -> None:
    newest = [time for c in _TIMES if (time := connection.execute(select(func.max(c))).scalar_one())]
    if not newest:
        collector.ok("clock", "There is no row to compare the clock with.")
        return
    ahead = max(newest) - collector.now
    seconds = round(ahead.total_seconds(), 3)
    late = ahead > NONCE_GRACE
    collector.add(
        Severity.CRITICAL if late else Severity.WARNING if ahead > AHEAD else Severity.OK,
        "clock",
        f"The newest row is {seconds:,} s ahead of the clock." if ahead > AHEAD else "No row comes from the future.",
        "the clock was set back, or another host's clock is ahead; leases and expiries end late"
        f"{', and a message whose nonce was swept may be accepted once more' if late else ''}",
        "correct the clock, and run a time service",
        "timedatectl status",
        newest_row_ahead_seconds=seconds,
    )


def _check_backlog(collector: Collector, connection: Connection) -> None:
    nonces = _count(connection, Nonce, _nonce.expires_at <= collector.now - NONCE_GRACE)
    ended = _key.state.in_([IdempotencyState.COMPLETED, IdempotencyState.FAILED])
    keys = _count(connection, IdempotencyKey, _key.expires_at <= collector.now, ended)
    collector.add(
        Severity.WARNING if nonces + keys > BACKLOG else Severity.OK,
        "expired_backlog",
        f"Expired rows that wait to be swept: {nonces + keys:,}.",
        "no process sweeps, so the database only grows; expired rows count as absent all the same",
        "sweep now, and let the gateway sweep in the background",
        "homeagent sweep",
        nonces=nonces,
        keys=keys,
    )


def _check_pending(collector: Collector, connection: Connection) -> None:
    pending = and_(_device.approved.is_distinct_from(True), _device.approved_at.is_(None), _device.revoked_at.is_(None))
    waiting = _count(connection, Device, pending)
    overdue = _count(connection, Device, pending, _device.paired_at <= collector.now - PENDING)
    collector.add(
        Severity.WARNING if overdue else Severity.OK,
        "pending_devices",
        f"Devices that wait for approval: {waiting:,}, for over {PENDING.days} days: {overdue:,}.",
        "a user waits to be let in, or a stranger tries to get in",
        "approve or revoke each device that you know, then run 'homeagent devices delete --pending --before TIME'",
        "homeagent devices list --status pending",
        pending=waiting,
        overdue=overdue,
    )


def _check_admins(collector: Collector, connection: Connection) -> None:
    admins = _count(connection, Device, _device.role == Role.ADMIN, _device.approved == True)  # noqa: E712  an expression
    devices = _count(connection, Device)
    lacking = devices and not admins
    collector.add(
        Severity.WARNING if lacking else Severity.OK,
        "admins",
        "There are devices and no approved admin."
        if lacking
        else f"Devices: {devices:,}, approved admins: {admins:,}.",
        "devices can be approved or revoked only by a shell on this host",
        "pair a device with the role admin, and approve it here",
        "homeagent devices list --role admin",
        admins=admins,
        devices=devices,
    )


_CHECKS: dict[str, Callable[[Collector, Connection], None]] = {
    "schema": check_schema,
    "application": check_application,
    "rows": _check_rows,
    "references": _check_references,
    "routes": _check_routes,
    "store_record": _check_store_record,
    "clock": _check_clock,
    "expired_backlog": _check_backlog,
    "abandoned_effects": _check_abandoned,
    "previous_secrets": _check_previous_secrets,
    "pending_devices": _check_pending,
    "admins": _check_admins,
}

STORE_CHECKS: tuple[str, ...] = ("schema_revision", *_CHECKS)
"""Names of the checks of a readable store, on SQLite and PostgreSQL."""
