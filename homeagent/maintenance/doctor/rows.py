"""What the rows tell, on either engine: a clock that was set back, work that nobody does, what belongs to nothing.

Every check counts. None reads a secret, a nonce, a key or a result, and none shows a value of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from sqlalchemy import and_, exists, func, not_, or_, select

from homeagent.maintenance.doctor.chart import RESTORE, Chart
from homeagent.models import Agent, AgentSession, Device, IdempotencyKey, Nonce, Role, store_table
from homeagent.models.idempotency_key import IdempotencyState
from homeagent.stores.nonces import NONCE_GRACE

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement, Connection

__all__ = ["BACKLOG", "SECRETS_GRACE", "check_rows"]

BACKLOG = 10_000
"""More expired rows than this mean that nobody sweeps."""

AHEAD = timedelta(minutes=1)
"""How far a row may lie in the future: clocks of several hosts are never quite equal."""

PENDING = timedelta(days=7)
"""How long a device may wait for its approval."""

SECRETS_GRACE = timedelta(days=1)
"""How long after its overlap a previous secret's hash may stay, in case the clock is wrong."""

_device: Any = Device.__table__.c
_agent: Any = Agent.__table__.c
_session: Any = AgentSession.__table__.c
_nonce: Any = Nonce.__table__.c
_key: Any = IdempotencyKey.__table__.c
_store = store_table.c

_INSTANTS: Sequence[Any] = (
    _device.paired_at,
    _device.approved_at,
    _device.revoked_at,
    _device.last_seen_at,
    _agent.created_at,
    _session.created_at,
    _session.last_active_at,
    _nonce.created_at,
    _key.created_at,
)

Check = Callable[[Chart, "Connection"], None]


def check_rows(chart: Chart, connection: Connection, columns: dict[str, set[str]]) -> None:
    """Make the checks over rows; one that needs a column that is not there is left out.

    Args:
        chart: where to write.
        connection: which sees one snapshot throughout.
        columns: of each table, those that are there.
    """
    for name, (check, needed) in _CHECKS.items():
        missing = [
            f"{column.table.name}.{column.name}"
            for column in needed
            if column.name not in columns.get(column.table.name, ())
        ]
        if missing:
            chart.skip(f"the schema has no {missing[0]}", name)
            continue
        with chart.attempt(name, on=connection):
            check(chart, connection)


def _count(connection: Connection, model: Any, *conditions: ColumnElement[bool]) -> int:
    statement = select(func.count()).select_from(model.__table__).where(*conditions)
    return int(connection.execute(statement).scalar_one())


def _check_store_record(chart: Chart, connection: Connection) -> None:
    rows = connection.execute(select(_store.epoch)).fetchall()
    if len(rows) == 1:
        chart.ok("store_record", f"The store is in epoch {rows[0][0]}.", epoch=rows[0][0])
        return
    chart.alarm(
        "store_record",
        f"The table store holds {len(rows)} rows where one belongs.",
        meaning="nobody can tell which epoch this is, nor which versions may work with it",
        remedy=RESTORE,
        rows=len(rows),
    )


def _check_clock(chart: Chart, connection: Connection) -> None:
    newest = [instant for column in _INSTANTS if (instant := connection.execute(select(func.max(column))).scalar_one())]
    if not newest:
        chart.ok("clock", "There is no row to compare the clock with.")
        return
    ahead = max(newest) - chart.now
    seconds = round(ahead.total_seconds(), 3)
    if ahead <= AHEAD:
        chart.ok("clock", "No row comes from the future.", newest_row_ahead_seconds=seconds)
        return
    summary = f"The newest row is {_lasting(ahead)} ahead of the clock."
    meaning = "the clock was set back, here or where the row was written: leases and expiries end late"
    tell = chart.warn
    if ahead > NONCE_GRACE:
        tell = chart.alarm
        meaning += ", and a message whose nonce was swept may get in once more"
    tell(
        "clock",
        summary,
        meaning=meaning,
        remedy="set the clock right, and let a time service keep it so",
        command="timedatectl status",
        newest_row_ahead_seconds=seconds,
    )


def _check_backlog(chart: Chart, connection: Connection) -> None:
    nonces = _count(connection, Nonce, _nonce.expires_at <= chart.now - NONCE_GRACE)
    ended = _key.state.in_([IdempotencyState.COMPLETED, IdempotencyState.FAILED])
    keys = _count(connection, IdempotencyKey, _key.expires_at <= chart.now, ended)
    if nonces + keys <= BACKLOG:
        chart.ok("expired_backlog", f"Expired rows that wait to be swept: {nonces + keys:,}.", nonces=nonces, keys=keys)
        return
    chart.warn(
        "expired_backlog",
        f"Expired rows that wait to be swept: {nonces + keys:,}.",
        meaning="nobody sweeps, so the database only grows; what has expired is dead all the same",
        remedy="sweep now, and run database.sweeper() in the gateway",
        command="homeagent sweep",
        nonces=nonces,
        keys=keys,
    )


def _check_abandoned(chart: Chart, connection: Connection) -> None:
    lapsed = or_(_key.lease_expires_at <= chart.now, _key.lease_expires_at.is_(None))
    abandoned = _count(connection, IdempotencyKey, _key.state == IdempotencyState.IN_PROGRESS, lapsed)
    if not abandoned:
        chart.ok("abandoned_effects", "No effect was left without an outcome.", keys=0)
        return
    chart.warn(
        "abandoned_effects",
        f"Effects that began, and nobody knows how they ended: {abandoned:,}.",
        meaning="their retries get OutcomeUnknownError until somebody finds out",
        remedy="list them, find out about each, then 'homeagent keys resolve' or 'homeagent keys forget'",
        command="homeagent keys abandoned",
        keys=abandoned,
    )


def _check_previous_secrets(chart: Chart, connection: Connection) -> None:
    stale = _count(
        connection,
        Device,
        _device.previous_secret_hash.is_not(None),
        or_(
            _device.previous_secret_expires_at.is_(None),
            _device.previous_secret_expires_at <= chart.now - SECRETS_GRACE,
        ),
    )
    if not stale:
        chart.ok("previous_secrets", "No hash of a secret outlived its overlap.", devices=0)
        return
    chart.warn(
        "previous_secrets",
        f"Devices that still hold the hash of a secret that serves no more: {stale:,}.",
        meaning="nobody can enter with it, and nothing needs it: who steals the file has one more hash to guess at",
        remedy="remove these hashes",
        command="homeagent doctor --fix",
        devices=stale,
    )


def _check_orphaned_keys(chart: Chart, connection: Connection) -> None:
    orphans = _count(connection, IdempotencyKey, not_(exists().where(_device.id == _key.device_id)))
    if not orphans:
        chart.ok("orphaned_keys", "Every idempotency key belongs to a device.", keys=0)
        return
    chart.warn(
        "orphaned_keys",
        f"Idempotency keys that belong to no device: {orphans:,}.",
        meaning="their device was removed by other means than devices.delete, or never paired",
        remedy="wait until they expire and are swept; where no such device should be, find out who writes them",
        keys=orphans,
    )


def _check_orphaned_sessions(chart: Chart, connection: Connection) -> None:
    orphans = _count(connection, AgentSession, not_(exists().where(_agent.id == _session.agent_id)))
    if not orphans:
        chart.ok("orphaned_sessions", "Every session belongs to an agent.", sessions=0)
        return
    chart.alarm(
        "orphaned_sessions",
        f"Sessions that belong to no agent: {orphans:,}.",
        meaning="something else wrote to the database with foreign keys switched off",
        remedy="create the missing agents again, or remove these sessions; then find out what wrote them",
        sessions=orphans,
    )


def _check_pending(chart: Chart, connection: Connection) -> None:
    pending = and_(_device.approved.is_distinct_from(True), _device.revoked_at.is_(None))
    waiting = _count(connection, Device, pending)
    long = _count(connection, Device, pending, _device.paired_at <= chart.now - PENDING)
    if not long:
        chart.ok("pending_devices", f"Devices that wait for approval: {waiting:,}.", pending=waiting, overdue=0)
        return
    chart.warn(
        "pending_devices",
        f"Devices that have been waiting for approval for over {_lasting(PENDING)}: {long:,}.",
        meaning="somebody expects to get in, or somebody tries to",
        remedy="look at each, then 'homeagent devices approve' or 'homeagent devices revoke' it",
        command="homeagent devices list --status pending",
        pending=waiting,
        overdue=long,
    )


def _check_admins(chart: Chart, connection: Connection) -> None:
    admins = _count(connection, Device, _device.role == Role.ADMIN, _device.approved == True)  # noqa: E712  an expression
    devices = _count(connection, Device)
    if admins or not devices:
        summary = f"Approved admins: {admins:,}." if devices else "No device has paired yet."
        chart.ok("admins", summary, admins=admins, devices=devices)
        return
    chart.warn(
        "admins",
        "There are devices and no approved admin.",
        meaning="nobody can approve or revoke but who has a shell on this host",
        remedy="pair a device with the role admin, and approve it here",
        command="homeagent devices list --role admin",
        admins=0,
        devices=devices,
    )


_CHECKS: dict[str, tuple[Check, Sequence[Any]]] = {
    "store_record": (_check_store_record, (_store.epoch,)),
    "clock": (_check_clock, _INSTANTS),
    "expired_backlog": (_check_backlog, (_nonce.expires_at, _key.expires_at, _key.state)),
    "abandoned_effects": (_check_abandoned, (_key.state, _key.lease_expires_at)),
    "previous_secrets": (_check_previous_secrets, (_device.previous_secret_hash, _device.previous_secret_expires_at)),
    "orphaned_keys": (_check_orphaned_keys, (_key.device_id, _device.id)),
    "orphaned_sessions": (_check_orphaned_sessions, (_session.agent_id, _agent.id)),
    "pending_devices": (_check_pending, (_device.approved, _device.revoked_at, _device.paired_at)),
    "admins": (_check_admins, (_device.role, _device.approved)),
}


def _lasting(duration: timedelta) -> str:
    """Return a duration as one reads it: the two largest of its units."""
    seconds = int(duration.total_seconds())
    parts = []
    for size, unit in ((86400, "day"), (3600, "hour"), (60, "minute"), (1, "second")):
        number, seconds = divmod(seconds, size)
        if number:
            parts.append(f"{number} {unit}{'' if number == 1 else 's'}")
    return " ".join(parts[:2]) or "0 seconds"
