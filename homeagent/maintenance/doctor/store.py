"""Check the schema and the rows of a database. Findings must not contain secrets, hashes, nonces, keys or results."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

from sqlalchemy import ColumnElement, Connection, Dialect, Table, exists, func, not_, or_, select, text

from homeagent.engine.sqlite.dialect import Undecodable, decoded_row, undecoded_columns
from homeagent.errors import CorruptDatabaseError
from homeagent.maintenance.doctor.report import RESTORE, TOO_LONG, Collector, Severity
from homeagent.migrations import REVISION, VERSION_TABLE, revision_of
from homeagent.migrations.revisions import count_rows, is_newer, known_revisions, own_tables, stored_revisions
from homeagent.migrations.schema_drift import Difference, schema_differences
from homeagent.models import APPLICATION_VERSION_TABLE, SCHEMA, Agent, AgentSession, Device, Nonce, Role, store_table
from homeagent.models.idempotency_key import IdempotencyKey, IdempotencyState, webhook_owner
from homeagent.models.session import route_key
from homeagent.models.types import JsonColumn, TimestampColumn, earlier, naming_column, problem_of_stored
from homeagent.stores.nonces import NONCE_GRACE

BACKLOG = 10_000  # If more expired rows exist, the doctor assumes that no process sweeps.
AHEAD = timedelta(minutes=1)  # The clocks of two hosts can differ by this time.
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
"""Stores write only the current time to these columns. The database's clock can set the column `device_changes.at`."""

_OLDEST = select(store_table.c.oldest_revision)


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
        collector.add(check, f"The schema is at revision {revision}.", **facts)
    elif revision is None:
        summary = f"There is no schema: no table {VERSION_TABLE}."
        remedy = f"if there was a schema, {RESTORE}; if not, create the schema"
        collector.critical(check, summary, "the schema was not created, or was lost", remedy, "homeagent init", **facts)
    elif revision in known_revisions():
        summary = f"The schema is at revision {revision}, and this version needs {REVISION}."
        meaning = "the gateway upgrades the schema at its next start; until then read-only programs refuse it"
        remedy = "upgrade it; a SQLite file is backed up first"
        collector.warn(check, summary, meaning, remedy, "homeagent migrate", **facts)
    elif is_newer(revision) and (connection.execute(_OLDEST).scalar() or revision) <= REVISION:
        collector.add(check, f"The schema is at the newer revision {revision}, which works with this version.", **facts)
    else:
        summary = f"The schema is at revision {revision}, and this version knows {REVISION} at most."
        meaning = "a newer version upgraded the schema; this version refuses it, because writes could do damage"
        remedy = "install the newer version again, or restore the backup that was made before the upgrade"
        collector.critical(check, summary, meaning, remedy, "pip install --upgrade homeagent", **facts)


# The schema, and the objects and tables of the application

# Meaning and remedy for each kind of application object.
_OBJECTS = {
    "trigger": (
        "the trigger runs at writes to homeagent's tables; a copy, a restore and an upgrade refuse the trigger",
        "if the trigger is the application's, open the database with acknowledged={names!r} (on the command line: "
        "--acknowledge); otherwise {command}",
    ),
    "view": (
        "an upgrade that rebuilds the table fails while the view exists",
        "if an upgrade fails, drop the view ({command}), upgrade, and create the view again",
    ),
    "index": ("each write also changes the index", "if no query needs the index, drop the index: {command}"),
}


def _check_schema(collector: Collector, connection: Connection) -> None:
    differences = schema_differences(connection)
    accepted = [difference for difference in differences if difference.trigger in collector.acknowledged]
    remaining = [difference for difference in differences if difference.trigger not in collector.acknowledged]
    _report_changes(collector, [difference for difference in remaining if difference.kind is None])
    for kind, (meaning, remedy) in _OBJECTS.items():
        found = [difference for difference in remaining if difference.kind == kind]
        if found:
            summary = f"The application uses homeagent's tables: {_texts(found)}."
            names = [difference.trigger for difference in found]
            remedy = remedy.format(names=names, command=found[0].command)
            fact = "application_indexes" if kind == "index" else f"application_{kind}s"
            collector.warn("schema", summary, meaning, remedy, **{fact: len(found)})
    if accepted:
        listed = ", ".join(str(difference.trigger) for difference in accepted)
        # Also list the names in the field `Finding.facts`. A worse finding replaces the summary.
        collector.add("schema", f"Acknowledged triggers of the application: {listed}.", acknowledged=listed)


def _report_changes(collector: Collector, differences: Sequence[Difference]) -> None:
    if not differences:
        collector.add("schema", "The schema is the same as homeagent's revisions create.", differences=0)
        return
    grave = [difference for difference in differences if difference.grave]
    summary = f"The schema was changed by hand: {_texts(differences)}."
    meaning = "homeagent works, perhaps slowly; the next upgrade may fail or lose what was added"
    if grave:
        meaning = "homeagent relies on the schema: it may fail, or accept what it must refuse"
    command = (grave or differences)[0].command
    remedy = "undo the change" if command is None else f"undo the change; the first step is: {command}"
    triggers = [difference.trigger for difference in differences if difference.trigger is not None]
    if triggers:
        remedy += f"; if a trigger is the application's, open the database with acknowledged={triggers!r} instead"
    count = len(differences)
    collector.add("schema", summary, meaning, remedy, critical=grave, warning=True, differences=count)


def _texts(differences: Sequence[Difference]) -> str:
    """Join the texts of at most ten differences for a summary."""
    return _first_ten([difference.text for difference in differences])


def _check_application(collector: Collector, connection: Connection) -> None:
    rows = count_rows(connection, own_tables(connection))
    revision = ", ".join(sorted(stored_revisions(connection, APPLICATION_VERSION_TABLE))) or None
    shown = ", ".join(f"{name} (rows: {number:,})" for name, number in rows.items())
    place = "" if revision is None else f" at revision {revision}"
    summary = f"Tables of the application{place}: {shown or 'none'}."
    collector.add("application", summary, revision=revision, tables=len(rows), rows=sum(rows.values()))


def report_orphans(collector: Collector, broken: Counter[tuple[str, str]]) -> None:
    """Report rows of the application's tables that refer to a missing row."""
    if not broken:
        return
    shown = "; ".join(f"from {child} to {parent}: {rows:,}" for (child, parent), rows in sorted(broken.items()))
    child = min(broken)[0].replace('"', '""')
    summary = f"Rows of the application that refer to a row that does not exist: {shown}."
    meaning = (
        "another program wrote to the table, or a revision rebuilt the table, without foreign keys; the file is not "
        "damaged, and a backup can't restore these rows"
    )
    remedy = f'list the rows by: PRAGMA foreign_key_check("{child}"); then correct or delete the rows'
    collector.warn("application", summary, meaning, remedy, orphans=broken.total())


# Stored values


def _check_rows(collector: Collector, connection: Connection) -> None:
    faults: list[str] = []
    rows = 0
    for described in SCHEMA:
        find_fault = _fault_finder(described, connection.dialect)
        try:
            for page in _pages(described, connection):
                rows += len(page)
                faults += filter(None, map(find_fault, page))
                if collector.watch():
                    break
        except CorruptDatabaseError as error:
            faults.append(f"table {described.name} can't be read to its end ({error})")
    if faults:
        summary = f"Rows that no store writes and that can't be used: {len(faults):,}: {_first_ten(faults)}."
        meaning = (
            "units that read such a row raise CorruptDatabaseError; another program wrote it, or the file is damaged"
        )
        remedy = "correct or delete these rows, or restore a backup"
        collector.critical("rows", summary, meaning, remedy, rows=rows, unreadable=len(faults))
    elif collector.watch():
        collector.skip(TOO_LONG, "rows")
    else:
        collector.add("rows", f"Rows that can be read: {rows:,} of {rows:,}.", rows=rows, unreadable=0)


def _first_ten(texts: Sequence[str]) -> str:
    """Join at most ten texts for a summary."""
    return "; ".join(texts if len(texts) <= 10 else [*texts[:10], "…"])


def _pages(described: Table, connection: Connection) -> Iterator[Sequence[Sequence[Any]]]:
    """Yield all rows of a table in pages, without converting the values."""
    quote = connection.dialect.identifier_preparer.quote
    names = [quote(c.name) for c in described.columns]
    # On SQLite, read texts as bytes. Otherwise one invalid UTF-8 text would make the page unreadable.
    undecoded = connection.dialect.name == "sqlite"
    columns = undecoded_columns(names) if undecoded else ", ".join(names)
    rows = text(f"SELECT {columns} FROM {quote(described.name)}")  # noqa: S608  quoted
    size = _PAGE_WITH_JSON if any(isinstance(c.type, JsonColumn) for c in described.columns) else _PAGE
    for page in connection.execute(rows, execution_options={"yield_per": size}).partitions():
        yield [decoded_row(row) for row in page] if undecoded else page


def _fault_finder(table: Table, dialect: Dialect) -> Callable[[Sequence[Any]], str | None]:
    """Return a function that describes the first bad value of a row."""
    tests = [(c.name, problem_of_stored(c), getattr(c.type, "process_result_value", None)) for c in table.columns]
    # A finding names the device instead of a secret nonce or key.
    naming = naming_column(table)
    place = list(table.columns.keys()).index(naming)

    def find_fault(row: Sequence[Any]) -> str | None:
        for (name, find_problem, load), value in zip(tests, row, strict=True):
            problem = "holds text that is not UTF-8" if isinstance(value, Undecodable) else find_problem(value)
            if problem is None and load is not None:
                try:
                    load(value, dialect)
                except CorruptDatabaseError:
                    problem = "holds a value that can't be read"
            if problem is not None:
                return f"{table.name}.{name} {problem}, in the row with {naming} {row[place]!r}"
        return None

    return find_fault


# Rows that need the administrator's attention


def _count(connection: Connection, model: Any, *conditions: ColumnElement[bool]) -> int:
    """Return the number of `model` rows that meet all conditions."""
    statement = select(func.count()).select_from(model.__table__).where(*conditions)
    return int(connection.execute(statement).scalar_one())


def _check_abandoned(collector: Collector, connection: Connection) -> None:
    lapsed = or_(_key.lease_expires_at <= collector.now, _key.lease_expires_at.is_(None))
    keys = _count(connection, IdempotencyKey, _key.state == IdempotencyState.IN_PROGRESS, lapsed)
    summary = f"Effects that began and have no recorded end: {keys:,}."
    meaning = "their retries get OutcomeUnknownError until the administrator records how each ended"
    remedy = "list the effects, find out how each ended, then run 'homeagent keys resolve' or 'homeagent keys forget'"
    command = "homeagent keys abandoned"
    collector.add("abandoned_effects", summary, meaning, remedy, command, warning=keys, keys=keys)


def _check_references(collector: Collector, connection: Connection) -> None:
    sessions = _count(connection, AgentSession, not_(exists().where(_agent.id == _session.agent_id)))
    summary = f"Sessions whose agent does not exist: {sessions:,}."
    meaning = "another program wrote to the database with foreign keys switched off"
    remedy = "create the missing agents again, or remove these sessions; then find out which program wrote them"
    collector.add("references", summary, meaning, remedy, critical=sessions, sessions=sessions)
    missing = select(_key.device_id, func.count()).where(not_(exists().where(_device.id == _key.device_id)))
    proof_key = connection.execute(select(store_table.c.proof_key)).scalar() or ""
    # The keys of signed webhooks have no device.
    keys = sum(
        number
        for name, number in connection.execute(missing.group_by(_key.device_id))
        if name != webhook_owner(str(name).rpartition("/")[0], proof_key)
    )
    summary = f"Idempotency keys whose device does not exist: {keys:,}."
    meaning = "the device was removed by other means than devices.delete, or never paired"
    remedy = "wait until the keys expire and are swept; if the device never existed, find out which program writes them"
    collector.add("references", summary, meaning, remedy, warning=keys, keys=keys)


def stale_routes(connection: Connection) -> Iterator[tuple[str, str]]:
    """Find the sessions with a wrong route key. Yield the sessions' ids and the correct route keys."""
    columns = (_session.session_id, _session.route_key, _session.agent_id, _session.sender_id, _session.channel_id)
    holders = select(*columns).where(_session.route_key.is_not(None))
    # The session that was active last gets the route.
    holders = holders.order_by(_session.last_active_at.desc(), _session.session_id.desc())
    for session_id, stored, *route in connection.execute(holders, execution_options={"yield_per": _PAGE}):
        if not all(value is None or isinstance(value, str) for value in route):
            continue  # The check `"rows"` reports values that are not texts.
        right = route_key(*route)
        if stored != right:
            yield session_id, right


def _check_routes(collector: Collector, connection: Connection) -> None:
    sessions = sum(1 for _ in stale_routes(connection))
    summary = f"Sessions whose route key is not that of their agent, sender and channel: {sessions:,}."
    meaning = "an UPDATE past the stores moved them: sessions.resolve does not find them and makes new sessions"
    remedy = "compute these keys again; if another session has the route, the moved session stays listed without it"
    command = "homeagent doctor --fix"
    collector.add("routes", summary, meaning, remedy, command, warning=sessions, sessions=sessions)


def _check_store_record(collector: Collector, connection: Connection) -> None:
    epochs = connection.execute(select(store_table.c.epoch)).scalars().all()
    summary = f"Rows of the table store: {len(epochs)}, of epoch {max(epochs, default=None)}; one belongs there."
    meaning = "the epoch is unknown, and the versions that can work with the store are unknown"
    facts: dict[str, Any] = {"rows": len(epochs), "epoch": epochs[0] if epochs else None}
    collector.add("store_record", summary, meaning, RESTORE, critical=len(epochs) != 1, **facts)


def _check_clock(collector: Collector, connection: Connection) -> None:
    newest = [time for c in _TIMES if (time := connection.execute(select(func.max(c))).scalar_one())]
    if not newest:
        collector.add("clock", "There is no row to compare the clock with.")
        return
    ahead = max(newest) - collector.now
    seconds = round(ahead.total_seconds(), 3)
    summary = (
        f"The newest row is {seconds:,} s ahead of the clock." if ahead > AHEAD else "No row comes from the future."
    )
    meaning = "the clock was set back, or another host's clock is ahead; leases and expiries end late"
    if ahead > NONCE_GRACE:
        meaning += ", and a message whose nonce was swept may be accepted once more"
    remedy = "correct the clock, and run a time service"
    severity = {"critical": ahead > NONCE_GRACE, "warning": ahead > AHEAD}
    collector.add("clock", summary, meaning, remedy, "timedatectl status", **severity, newest_row_ahead_seconds=seconds)


def _check_backlog(collector: Collector, connection: Connection) -> None:
    nonces = _count(connection, Nonce, _nonce.expires_at <= earlier(collector.now, NONCE_GRACE))
    ended = _key.state.in_([IdempotencyState.COMPLETED, IdempotencyState.FAILED])
    keys = _count(connection, IdempotencyKey, _key.expires_at <= collector.now, ended)
    summary = f"Expired rows that wait to be swept: {nonces + keys:,}."
    meaning = "no process sweeps, so the database only grows; expired rows count as absent all the same"
    remedy = "sweep now, and let the gateway sweep in the background"
    facts = {"nonces": nonces, "keys": keys}
    warning = nonces + keys > BACKLOG
    collector.add("expired_backlog", summary, meaning, remedy, "homeagent sweep", warning=warning, **facts)


def _check_admins(collector: Collector, connection: Connection) -> None:
    admins = _count(connection, Device, _device.role == Role.ADMIN, _device.approved == True)  # noqa: E712  an expression
    devices = _count(connection, Device)
    lacking = devices and not admins
    summary = f"Devices: {devices:,}, approved admins: {admins:,}."
    if lacking:
        summary = "There are devices and no approved admin."
    meaning = "devices can be approved or revoked only by a shell on this host"
    remedy = "pair a device with the role admin, and approve it here"
    command = "homeagent devices list --role admin"
    collector.add("admins", summary, meaning, remedy, command, warning=lacking, admins=admins, devices=devices)


_CHECKS: dict[str, Callable[[Collector, Connection], None]] = {
    "schema": _check_schema,
    "application": _check_application,
    "rows": _check_rows,
    "references": _check_references,
    "routes": _check_routes,
    "store_record": _check_store_record,
    "clock": _check_clock,
    "expired_backlog": _check_backlog,
    "abandoned_effects": _check_abandoned,
    "admins": _check_admins,
}

STORE_CHECKS: tuple[str, ...] = ("schema_revision", *_CHECKS)
"""Names of the checks of a readable store, on SQLite and PostgreSQL."""
