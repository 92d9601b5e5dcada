"""SQL statements of the store of devices."""

from __future__ import annotations

from datetime import datetime
from functools import cache
from typing import Any, NamedTuple

from sqlalchemy import and_, bindparam, delete, func, literal_column, not_, or_, select, tuple_, update

from homeagent.engine.statements import Statement, constant
from homeagent.models.device import PENDING, Device, DeviceStatus, Role
from homeagent.models.idempotency_key import IdempotencyKey
from homeagent.models.store_record import store_table


class SecretHashes(NamedTuple):
    """Hashes of the current and the previous secret of a device. The fields have the same names as in the class
    `Device`.

    If the device does not exist, `shared_secret_hash` is an empty text, which matches no secret. For an absent device,
    all fields except `shared_secret_hash` are None.
    """

    shared_secret_hash: str
    previous_secret_hash: str | None
    previous_secret_expires_at: datetime | None


class DeviceState(NamedTuple):
    """State of a device, and whether the device still has the expected values.

    `was_decided` is True if the device was approved or revoked at least once. If a program withdraws an approval by
    `uow.session`, the device counts as revoked even without a time of revocation.
    """

    approved: bool
    revoked: bool
    was_decided: bool
    has_role: bool | None
    has_secret_hash: bool | None
    has_paired_at: bool | None


_columns: Any = Device.__table__.c
_keys: Any = IdempotencyKey.__table__.c

_APPROVED = _columns.approved == True  # noqa: E712  an expression
_UNAPPROVED = _columns.approved.is_distinct_from(True)
"""SQL condition for unapproved devices. Do not write `approved = 0`, which ignores a device with the value 2."""

FIND = Statement[Device](select(Device).where(_columns.id == bindparam("id")), lock=True)
PAIRED_AT = Statement[datetime](select(_columns.paired_at).where(_columns.id == bindparam("id")))


def _for_every_id(*columns: Any) -> Any:
    """Select one row even for an absent device, because the statement must take the same time for every id."""
    one_row = select(literal_column("1").label("one")).subquery("requested")
    return select(*columns).select_from(one_row.outerjoin(Device.__table__, _columns.id == bindparam("id")))


# Do not select the column `proof_verifier` in this statement. SQLite takes longer to read a column that comes after a
# long value. In each row, the value of `devices.metadata` comes before the value of `proof_verifier`.
SECRET_HASHES = Statement[tuple[str, str | None, datetime | None]](
    _for_every_id(
        func.coalesce(_columns.shared_secret_hash, constant("", _columns.shared_secret_hash.type)),
        _columns.previous_secret_hash,
        _columns.previous_secret_expires_at,
    )
)
VERIFIER = Statement[str | None](_for_every_id(_columns.proof_verifier))
PROOF_SECRETS = Statement[tuple[str | None, str | None]](
    select(store_table.c.proof_key, _columns.proof_verifier).select_from(
        store_table.outerjoin(Device.__table__, _columns.id == bindparam("id"))
    )
)
COUNT_PENDING = Statement[int](
    select(func.count()).select_from(
        # The statement reads only columns that the index contains.
        select(_columns.paired_at)
        .where(PENDING, _columns.paired_at > bindparam("before"))
        .limit(bindparam("limit"))
        .subquery()
    )
)
# On PostgreSQL, two pairings at the same time do not see each other's device. Each pairing locks the only row of the
# table with the name `store`, so a second pairing waits until the first pairing has ended. Therefore the second pairing
# also counts the device of the first pairing.
LOCK_STORE = Statement[int](select(store_table.c.id), lock=True)
OVERDUE: Any = _columns.paired_at <= bindparam("before")
"""SQL condition for the pending devices that a sweep deletes.

The parameter `before` is the current time minus `Limits.pending_ttl`.
"""

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
# Compare the columns in SQL, because homeagent can't convert an unreadable value. An unreadable value must not prevent
# an approval or a revocation. In SQL, the result of a comparison with NULL is NULL.
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
# The statement locks all approved admins in a fixed order. Two admins can revoke each other at the same time. The
# second revocation waits for the first revocation, and then finds only one approved admin.
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
    """Return the statement that selects a page of devices. The arguments decide the conditions and the order of the
    statement.
    """
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
