"""SQL statements of the store of idempotency keys."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Text, and_, bindparam, delete, func, not_, null, or_, select, tuple_, update

from homeagent.engine.statements import Statement, constant
from homeagent.models.idempotency_key import IdempotencyKey, IdempotencyState

_table: Any = IdempotencyKey.__table__
_columns: Any = _table.c

_IN_PROGRESS = constant(IdempotencyState.IN_PROGRESS, _columns.state.type)
_COMPLETED = constant(IdempotencyState.COMPLETED, _columns.state.type)
_FAILED = constant(IdempotencyState.FAILED, _columns.state.type)
_FIRST = constant(1, _columns.attempt.type)
_NOT_OMITTED = constant(False, _columns.omitted.type)

_SAME_SCOPE = and_(
    _columns.device_id == bindparam("device_id"),
    _columns.method == bindparam("method"),
    _columns.key == bindparam("key"),
)
# A row with an invalid state does not expire, because the effect could run again after a deletion of the row.
_ENDED = or_(_columns.state == _COMPLETED, _columns.state == _FAILED)
_NOT_EXPIRED = or_(_columns.expires_at > bindparam("now"), not_(_ENDED))
EXPIRED = and_(_columns.expires_at <= bindparam("now"), _ENDED)
"""SQL condition for the records that count as absent and that a sweep deletes."""

# Count expired rows too, so that the statement reads only the index of the primary key. To skip expired rows, SQLite
# would have to read the column `result`, which can be long and comes before `expires_at`.
COUNT = Statement[int](
    select(func.count()).select_from(IdempotencyKey).where(_columns.device_id == bindparam("device_id"))
)
# Do not replace `device_id + ""` by `device_id`, because the database would then use the primary key, not the index of
# `expires_at` (`test_expired_keys_are_counted_by_the_index`).
COUNT_EXPIRED_OF_DEVICE = Statement[int](
    select(func.count()).select_from(IdempotencyKey).where(EXPIRED, _columns.device_id + "" == bindparam("device_id"))
)


def _upsert(**values: Any) -> Statement[IdempotencyKey]:
    """Return the statement that inserts a record. The statement replaces an expired record, because an expired record
    counts as absent.
    """
    scope: dict[str, Any] = {name: bindparam(name) for name in ("device_id", "method", "key")}
    return Statement(
        lambda insert: (statement := insert(_table).values(**scope, **values)).on_conflict_do_update(
            index_elements=list(scope), set_={name: statement.excluded[name] for name in values}, where=EXPIRED
        )
    )


INSERT = _upsert(
    # The type is Text and not JSON, because the store has already encoded the result.
    result=bindparam("json", type_=Text),
    created_at=bindparam("now"),
    expires_at=bindparam("expires_at"),
    state=_COMPLETED,
    attempt=_FIRST,
    omitted=_NOT_OMITTED,
    fingerprint=null(),
    owner=null(),
    lease_expires_at=null(),
    downstream_key=null(),
)
CLAIM = _upsert(
    result=constant("null", Text()),
    created_at=bindparam("now"),
    expires_at=bindparam("expires_at"),
    state=_IN_PROGRESS,
    attempt=_FIRST,
    omitted=_NOT_OMITTED,
    fingerprint=bindparam("fingerprint"),
    owner=bindparam("new_owner"),
    lease_expires_at=bindparam("lease_expires_at"),
    downstream_key=bindparam("downstream_key"),
)
FIND = Statement[IdempotencyKey](select(IdempotencyKey).where(_SAME_SCOPE, _NOT_EXPIRED), lock=True)
ANY = Statement[IdempotencyKey](select(IdempotencyKey).where(_SAME_SCOPE), lock=True)
# The fence: a statement changes the record of a key only if the attempt owns the key.
_OWNED = and_(_SAME_SCOPE, _columns.state == _IN_PROGRESS, _columns.owner == bindparam("old_owner"))
TAKE_OVER = Statement[IdempotencyKey](
    update(IdempotencyKey)
    .where(_OWNED)
    .values(owner=bindparam("new_owner"), attempt=bindparam("number"), lease_expires_at=bindparam("lease_expires_at"))
)
RENEW = Statement[IdempotencyKey](
    update(IdempotencyKey).where(_OWNED).values(lease_expires_at=bindparam("lease_expires_at"))
)
RECORD = Statement[IdempotencyKey](
    update(IdempotencyKey)
    .where(_OWNED)
    .values(
        state=bindparam("state"),
        result=bindparam("json", type_=Text),
        omitted=bindparam("omitted"),
        expires_at=bindparam("expires_at"),
        owner=bindparam("recorded_by"),
        lease_expires_at=None,
    )
)
DELETE_OWNED = Statement[IdempotencyKey](delete(IdempotencyKey).where(_OWNED))
ABANDONED = Statement[IdempotencyKey](
    select(IdempotencyKey)
    .where(_columns.state == _IN_PROGRESS, _columns.lease_expires_at <= bindparam("now"))
    .order_by(_columns.lease_expires_at, _columns.device_id, _columns.method, _columns.key)
    .limit(bindparam("limit"))
)
DELETE_EXPIRED = Statement[IdempotencyKey](
    delete(IdempotencyKey).where(
        tuple_(_columns.device_id, _columns.method, _columns.key).in_(
            select(_columns.device_id, _columns.method, _columns.key)
            .where(EXPIRED)
            .order_by(_columns.expires_at)
            .limit(bindparam("limit"))
            .with_for_update(skip_locked=True)
        )
    )
)
DELETE_ENDED = Statement[IdempotencyKey](
    delete(IdempotencyKey).where(_columns.device_id == bindparam("device_id"), _ENDED)
)
COUNT_EXPIRED = Statement[int](select(func.count()).select_from(IdempotencyKey).where(EXPIRED))
