"""SQL statements of `DeviceStore`."""

from __future__ import annotations

from datetime import datetime
from functools import cache
from typing import Any, NamedTuple

from sqlalchemy import and_, bindparam, case, delete, func, literal_column, not_, or_, select, tuple_, update

from homeagent.engine.statements import LenientStatement, Statement, bindparams, constant, count, delete_first, equal
from homeagent.errors import InvalidArgumentError
from homeagent.models.device import PENDING, Device, DeviceStatus, Role
from homeagent.models.device_change import DeviceChange, DeviceChangeKind
from homeagent.models.store_record import store_table


class SecretHashes(NamedTuple):
    """Hashes of a device's secrets. An absent device has an empty hash, which matches no secret."""

    shared_secret_hash: str
    previous_secret_hash: str | None
    previous_secret_expires_at: datetime | None


_table: Any = Device.__table__
_columns: Any = _table.c
_changes: Any = DeviceChange.__table__.c
_IS_DEVICE = _columns.id == bindparam("device_id")

_APPROVED = _columns.approved == True  # noqa: E712  an expression
_UNAPPROVED = _columns.approved.is_distinct_from(True)
"""Do not write `approved = 0`. The condition would ignore a device with the value 2."""

FIND = Statement[Device](select(Device).where(equal(_table, "id")), lock=True)
PAIRED_AT = Statement[datetime](select(_columns.paired_at).where(equal(_table, "id")))

# Select one row even if the device is absent. The duration must not show whether a device exists. Do not select
# `proof_verifier`. SQLite would first read the column `devices.metadata`, which can be long.
SECRET_HASHES = Statement[tuple[str | None, str | None, datetime | None]](
    select(_columns.shared_secret_hash, _columns.previous_secret_hash, _columns.previous_secret_expires_at).select_from(
        select(literal_column("1").label("one")).subquery("requested").outerjoin(_table, equal(_table, "id"))
    )
)
PROOF_SECRETS = Statement[tuple[str | None, str | None]](
    select(store_table.c.proof_key, _columns.proof_verifier).select_from(
        store_table.outerjoin(_table, equal(_table, "id"))
    )
)
COUNT_PENDING = count(
    # Select only columns of the index, to avoid reads of the table.
    select(_columns.paired_at)
    .where(PENDING, _columns.paired_at > bindparam("before"))
    .limit(bindparam("limit"))
    .subquery()
)
# On PostgreSQL, pairings without the lock could exceed `Limits.pending_devices`.
LOCK_STORE = Statement[int](select(store_table.c.id), lock=True)
OVERDUE: Any = _columns.paired_at <= bindparam("before")
"""The parameter `:before` is the current time minus `Limits.pending_ttl`."""

DELETE_PENDING = Statement[Device](delete_first(_table, _columns.paired_at, PENDING, OVERDUE).where(PENDING))
CREATE = Statement[Device](
    lambda insert: (
        insert(_table)
        .values(
            **bindparams("id", "role", "shared_secret_hash", "metadata", "proof_verifier"),
            approved=False,
            paired_at=bindparam("now"),
        )
        .on_conflict_do_nothing(index_elements=["id"])
    ),
    returning=Device,
)


def _update(*conditions: Any, **values: Any) -> Any:
    """Return an UPDATE of one device. The device must match the conditions."""
    return update(_table).where(_IS_DEVICE, *conditions).values(values)


_WITHOUT_OVERLAP = {"previous_secret_hash": None, "previous_secret_expires_at": None}
_HAS_EXPECTED_HASH = _columns.shared_secret_hash == bindparam("expected")

UPDATE_METADATA = Statement[Device](_update(metadata=bindparam("value")), returning=Device)
# An earlier version can leave a previous secret in an unapproved device.
APPROVE = Statement[Device](
    _update(approved=True, approved_at=bindparam("now"), revoked_at=None, revoked_reason=None, **_WITHOUT_OVERLAP)
)
REVOKE = Statement[Device](
    _update(approved=False, revoked_at=bindparam("now"), revoked_reason=bindparam("reason"), **_WITHOUT_OVERLAP)
)
SET_SECRET = Statement[Device](
    _update(
        _HAS_EXPECTED_HASH,
        shared_secret_hash=bindparam("replacement"),
        proof_verifier=bindparam("verifier"),
        previous_secret_hash=bindparam("previous"),
        previous_secret_expires_at=bindparam("until"),
    )
)
REHASH = Statement[Device](_update(_HAS_EXPECTED_HASH, shared_secret_hash=bindparam("replacement")))
_SEEN_EARLIER = or_(_columns.last_seen_at.is_(None), _columns.last_seen_at <= bindparam("before"))
NEEDS_LAST_SEEN = LenientStatement[str](select(_columns.id).where(_IS_DEVICE, _SEEN_EARLIER))
SET_LAST_SEEN = Statement[Device](_update(_SEEN_EARLIER, last_seen_at=bindparam("at")))
DELETE = Statement[Device](delete(_table).where(_IS_DEVICE))
# Compare in SQL. An unreadable value must not prevent an approval or a revocation. The third column is True after the
# first approval or revocation.
STATE = Statement[tuple[bool, bool, bool, bool | None, bool | None, bool | None]](
    select(
        _columns.approved,
        _columns.revoked_at.is_not(None),
        or_(_columns.revoked_at.is_not(None), _columns.approved_at.is_not(None)),
        _columns.role == bindparam("role"),
        _columns.shared_secret_hash == bindparam("secret_hash"),
        _columns.paired_at == bindparam("paired_at"),
    ).where(_IS_DEVICE),
    lock=True,
)
IS_ADMIN = Statement[bool](select(_columns.role == constant(Role.ADMIN, _columns.role.type)).where(_IS_DEVICE))
# Lock the admins in the order of the ids to prevent a deadlock. If two admins revoke each other, the second revocation
# raises LastAdminError.
APPROVED_ADMINS = Statement[bool](
    select(_IS_DEVICE).where(_columns.role == Role.ADMIN, _APPROVED).order_by(_columns.id), lock=True
)

_IS_UNDECIDED = and_(_columns.approved_at.is_(None), _columns.revoked_at.is_(None))
_OF_STATUS = {
    DeviceStatus.PENDING: and_(_UNAPPROVED, _IS_UNDECIDED),
    DeviceStatus.APPROVED: _APPROVED,
    DeviceStatus.REVOKED: and_(_UNAPPROVED, not_(_IS_UNDECIDED)),
}


@cache
def page_of(
    given: frozenset[str], approved: bool | None, status: DeviceStatus | None, *, newest_first: bool
) -> Statement[Device]:
    """Return the statement that selects a page of devices. The statement has a parameter for each given name."""
    conditions = []
    if approved is not None:
        conditions.append(_APPROVED if approved else _UNAPPROVED)
    if status is not None:
        conditions.append(_OF_STATUS[status])
    if "role" in given:
        conditions.append(equal(_table, "role"))
    if "seen_before" in given:
        conditions.append(_columns.last_seen_at < bindparam("seen_before"))
    order = (_columns.paired_at, _columns.id) if newest_first else (_columns.id,)
    if "after" in given:
        last = bindparam("after", type_=_columns.id.type)
        last_paired_at = bindparam("after_paired_at", type_=_columns.paired_at.type)
        conditions.append(tuple_(*order) < tuple_(last_paired_at, last) if newest_first else _columns.id > last)
    order = tuple(column.desc() for column in order) if newest_first else order
    return Statement(select(Device).where(*conditions).order_by(*order).limit(bindparam("limit")))


# The feed of device changes

_newest = select(func.max(_changes.number)).scalar_subquery()
_after = bindparam("after", type_=_changes.number.type)
_is_kept = select(constant(1, _changes.number.type)).where(_changes.number == _after).exists()

# On SQLite, the triggers have already added the changes. On PostgreSQL, the triggers add the changes at COMMIT, and use
# the setting.
_now = bindparam("now", type_=_changes.at.type)
UPDATE_TIMES = Statement[DeviceChange](update(DeviceChange).where(_changes.number > _after).values(at=_now))
SET_TIME = Statement[str](
    # The function concat() returns the number as a text.
    select(func.set_config(literal_column("'homeagent.now'"), func.concat(_now), literal_column("true")))
)
NEWEST = Statement[int](select(func.max(_changes.number)))
# Select the change with the number `:after`, and all later changes. If the change does not exist, select only the
# newest change.
CHANGES = Statement[DeviceChange](
    select(DeviceChange)
    .where(_changes.number >= case((_is_kept, _after), else_=_newest))
    .order_by(_changes.number)
    .limit(bindparam("limit"))
)
# Ignore the time of a reset, which is always the first row. The database's clock writes the time of a new feed. Delete
# the row together with the next change.
_is_change = _changes.kind != constant(DeviceChangeKind.RESET, _changes.kind.type)
_recent = (
    select(_changes.number).where(_changes.at > bindparam("before"), _is_change).order_by(_changes.number).limit(1)
)
_is_earlier = _changes.number < func.coalesce(_recent.scalar_subquery(), _newest)
_is_old = and_(_is_earlier, select(_changes.number).where(_is_earlier, _is_change).exists())
COUNT_OLD = count(DeviceChange, _is_old)
DELETE_OLD = Statement[DeviceChange](
    delete(DeviceChange).where(
        _changes.number.in_(select(_changes.number).where(_is_old).order_by(_changes.number).limit(bindparam("limit")))
    )
)


def changes_of(rows: list[DeviceChange], after: int) -> list[DeviceChange]:
    """Return the changes after the given number. Pass the rows of the statement `CHANGES`. If the first row has another
    number, return one change with `kind="reset"`.
    """
    if rows and rows[0].number != after:
        return [rows[0].model_copy(update={"device_id": None, "kind": DeviceChangeKind.RESET})]
    return rows[1:]


def check_number(after: int) -> int:
    """Return the argument. If the argument can't be a change's number, raise InvalidArgumentError."""
    if type(after) is not int or not 0 <= after < 2**63:
        raise InvalidArgumentError("after must be the number of a device change: a whole number, 0 or more")
    return after
