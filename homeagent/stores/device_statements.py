"""SQL statements of the store of devices."""

from __future__ import annotations

from datetime import datetime
from functools import cache
from typing import Any, NamedTuple

from sqlalchemy import and_, bindparam, case, delete, func, literal_column, not_, or_, select, tuple_, update

from homeagent.engine.statements import Statement, constant
from homeagent.errors import InvalidArgumentError
from homeagent.models.device import PENDING, Device, DeviceStatus, Role
from homeagent.models.device_change import DeviceChange, DeviceChangeKind
from homeagent.models.idempotency_key import IdempotencyKey
from homeagent.models.store_record import store_table


class SecretHashes(NamedTuple):
    """Hashes of a device's secrets. The hash of an absent device is an empty text, which matches no secret."""

    shared_secret_hash: str
    previous_secret_hash: str | None
    previous_secret_expires_at: datetime | None


class DeviceState(NamedTuple):
    """State of a device. `was_decided` is True if the device was approved or revoked at least once."""

    approved: bool
    revoked: bool
    was_decided: bool
    has_role: bool | None
    has_secret_hash: bool | None
    has_paired_at: bool | None


_columns: Any = Device.__table__.c
_keys: Any = IdempotencyKey.__table__.c
_changes: Any = DeviceChange.__table__.c

_APPROVED = _columns.approved == True  # noqa: E712  an expression
_UNAPPROVED = _columns.approved.is_distinct_from(True)
"""Do not write `approved = 0`, which ignores a device with the value 2."""

FIND = Statement[Device](select(Device).where(_columns.id == bindparam("id")), lock=True)
PAIRED_AT = Statement[datetime](select(_columns.paired_at).where(_columns.id == bindparam("id")))


def _for_every_id(*columns: Any) -> Any:
    """Select one row even for an absent device, because the statement must take the same time for every id."""
    one_row = select(literal_column("1").label("one")).subquery("requested")
    return select(*columns).select_from(one_row.outerjoin(Device.__table__, _columns.id == bindparam("id")))


# Do not select `proof_verifier` here. SQLite takes longer to read a column after a long value, and `proof_verifier`
# comes after `metadata`, which can be long.
SECRET_HASHES = Statement[tuple[str | None, str | None, datetime | None]](
    _for_every_id(_columns.shared_secret_hash, _columns.previous_secret_hash, _columns.previous_secret_expires_at)
)
VERIFIER = Statement[str | None](_for_every_id(_columns.proof_verifier))
PROOF_SECRETS = Statement[tuple[str | None, str | None]](
    select(store_table.c.proof_key, _columns.proof_verifier).select_from(
        store_table.outerjoin(Device.__table__, _columns.id == bindparam("id"))
    )
)
COUNT_PENDING = Statement[int](
    select(func.count()).select_from(
        # Select only columns of the index, so that the database does not read the table.
        select(_columns.paired_at)
        .where(PENDING, _columns.paired_at > bindparam("before"))
        .limit(bindparam("limit"))
        .subquery()
    )
)
# With this lock, a second pairing waits until the first pairing has ended. Without the lock, two pairings at the same
# time on PostgreSQL would not count each other's device.
LOCK_STORE = Statement[int](select(store_table.c.id), lock=True)
OVERDUE: Any = _columns.paired_at <= bindparam("before")
"""The parameter `before` is the current time minus `Limits.pending_ttl`."""

DELETE_PENDING = Statement[Device](
    delete(Device).where(
        PENDING,
        _columns.id.in_(
            select(_columns.id)
            .where(PENDING, OVERDUE)
            .order_by(_columns.paired_at)
            .limit(bindparam("limit"))
            .with_for_update(skip_locked=True)
        ),
    )
)
CREATE = Statement[Device](
    lambda insert_: (
        insert_(Device.__table__)
        .values(
            id=bindparam("id"),
            role=bindparam("role"),
            shared_secret_hash=bindparam("shared_secret_hash"),
            approved=False,
            paired_at=bindparam("now"),
            metadata=bindparam("metadata"),
            proof_verifier=bindparam("proof_verifier"),
        )
        .on_conflict_do_nothing(index_elements=["id"])
    ),
    returning=Device,
)
UPDATE_METADATA = Statement[Device](
    update(Device).where(_columns.id == bindparam("device_id")).values({_columns.metadata: bindparam("value")}),
    returning=Device,
)
APPROVE = Statement[Device](
    update(Device)
    .where(_columns.id == bindparam("device_id"))
    .values(
        approved=True,
        approved_at=bindparam("now"),
        revoked_at=None,
        revoked_reason=None,
        # An unapproved device can have a previous secret, for example from an earlier version of homeagent.
        previous_secret_hash=None,
        previous_secret_expires_at=None,
    )
)
REVOKE = Statement[Device](
    update(Device)
    .where(_columns.id == bindparam("device_id"))
    .values(
        approved=False,
        revoked_at=bindparam("now"),
        revoked_reason=bindparam("reason"),
        previous_secret_hash=None,
        previous_secret_expires_at=None,
    )
)
# Compare the columns in SQL and not in Python, so that an administrator can approve or revoke a device even if the row
# contains a value that cannot be read.
STATE = Statement[tuple[bool, bool, bool, bool | None, bool | None, bool | None]](
    select(
        _columns.approved,
        _columns.revoked_at.is_not(None),
        or_(_columns.revoked_at.is_not(None), _columns.approved_at.is_not(None)),
        _columns.role == bindparam("role"),
        _columns.shared_secret_hash == bindparam("secret_hash"),
        _columns.paired_at == bindparam("paired_at"),
    ).where(_columns.id == bindparam("device_id")),
    lock=True,
)
IS_ADMIN = Statement[bool](
    select(_columns.role == constant(Role.ADMIN, _columns.role.type)).where(_columns.id == bindparam("device_id"))
)
# Lock the admins in the order of the ids to prevent a deadlock. If two admins revoke each other at the same time, the
# second revocation waits, and then finds only one approved admin.
APPROVED_ADMINS = Statement[bool](
    select(_columns.id == bindparam("device_id")).where(_columns.role == Role.ADMIN, _APPROVED).order_by(_columns.id),
    lock=True,
)
_SEEN_EARLIER = (
    _columns.id == bindparam("device_id"),
    or_(_columns.last_seen_at.is_(None), _columns.last_seen_at <= bindparam("before")),
)
NEEDS_LAST_SEEN = Statement[str](select(_columns.id).where(*_SEEN_EARLIER))
SET_LAST_SEEN = Statement[Device](update(Device).where(*_SEEN_EARLIER).values(last_seen_at=bindparam("at")))
DELETE = Statement[Device](delete(Device).where(_columns.id == bindparam("device_id")))
DELETE_KEYS = Statement[IdempotencyKey](delete(IdempotencyKey).where(_keys.device_id == bindparam("device_id")))
SET_SECRET = Statement[Device](
    update(Device)
    .where(_columns.id == bindparam("device_id"), _columns.shared_secret_hash == bindparam("expected"))
    .values(
        shared_secret_hash=bindparam("replacement"),
        proof_verifier=bindparam("verifier"),
        previous_secret_hash=bindparam("previous"),
        previous_secret_expires_at=bindparam("until"),
    )
)
REHASH = Statement[Device](
    update(Device)
    .where(_columns.id == bindparam("device_id"), _columns.shared_secret_hash == bindparam("expected"))
    .values(shared_secret_hash=bindparam("replacement"))
)


@cache
def page_of(
    *,
    approved: bool | None,
    by_role: bool,
    status: DeviceStatus | None,
    by_seen: bool,
    newest_first: bool,
    after: bool,
) -> Statement[Device]:
    """Return the statement that selects a page of devices."""
    conditions = []
    if approved is not None:
        conditions.append(_APPROVED if approved else _UNAPPROVED)
    if by_role:
        conditions.append(_columns.role == bindparam("role"))
    if status is DeviceStatus.APPROVED:
        conditions.append(_APPROVED)
    elif status is not None:
        pending = and_(_columns.approved_at.is_(None), _columns.revoked_at.is_(None))
        conditions.append(and_(_UNAPPROVED, pending if status is DeviceStatus.PENDING else not_(pending)))
    if by_seen:
        conditions.append(_columns.last_seen_at < bindparam("seen_before"))
    last = bindparam("after", type_=_columns.id.type)
    if newest_first:
        order: tuple[Any, ...] = (_columns.paired_at.desc(), _columns.id.desc())
        place = tuple_(bindparam("after_paired_at", type_=_columns.paired_at.type), last)
        beyond = tuple_(_columns.paired_at, _columns.id) < place
    else:
        order = (_columns.id,)
        beyond = _columns.id > last
    if after:
        conditions.append(beyond)
    return Statement(select(Device).where(*conditions).order_by(*order).limit(bindparam("limit")))


# The feed of device changes

_newest = select(func.max(_changes.number)).scalar_subquery()
_after = bindparam("after", type_=_changes.number.type)
_is_kept = select(constant(1, _changes.number.type)).where(_changes.number == _after).exists()

NEWEST = Statement[int](select(func.max(_changes.number)))
# The statement selects the change with the number `after` and all later changes. If the change with the number was
# deleted, later changes are perhaps deleted too, so the statement selects only the newest change.
CHANGES = Statement[DeviceChange](
    select(DeviceChange)
    .where(_changes.number >= case((_is_kept, _after), else_=_newest))
    .order_by(_changes.number)
    .limit(bindparam("limit"))
)
_first_kept = select(_changes.number).where(_changes.at > bindparam("before")).order_by(_changes.number).limit(1)
_is_old = _changes.number < func.coalesce(_first_kept.scalar_subquery(), _newest)
COUNT_OLD = Statement[int](select(func.count()).select_from(DeviceChange).where(_is_old))
DELETE_OLD = Statement[DeviceChange](
    delete(DeviceChange).where(
        _changes.number.in_(select(_changes.number).where(_is_old).order_by(_changes.number).limit(bindparam("limit")))
    )
)


def changes_of(rows: list[DeviceChange], after: int) -> list[DeviceChange]:
    """Return the changes with a number greater than `after`. The argument `rows` is the result of `CHANGES`. If the
    feed no longer contains the change with the number `after`, return one change of the kind `reset`.
    """
    if rows and rows[0].number != after:
        return [rows[0].model_copy(update={"device_id": None, "kind": DeviceChangeKind.RESET})]
    return rows[1:]


def check_number(after: int) -> int:
    """Return the argument. If the argument can't be the number of a device change, raise InvalidArgumentError."""
    if type(after) is not int or not 0 <= after < 2**63:
        raise InvalidArgumentError("after must be the number of a device change: a whole number, 0 or more")
    return after
