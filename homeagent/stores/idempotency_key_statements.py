"""SQL statements of `IdempotencyKeyStore`."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Text, and_, bindparam, delete, not_, null, or_, select, update

from homeagent.engine.statements import Statement, bindparams, constant, count, delete_first, equal
from homeagent.models.idempotency_key import IdempotencyKey, IdempotencyState

_table: Any = IdempotencyKey.__table__
_columns: Any = _table.c

_IN_PROGRESS, _COMPLETED, _FAILED = (constant(state, _columns.state.type) for state in IdempotencyState)
_SCOPE = ("device_id", "method", "key")
_SAME_SCOPE = equal(_table, *_SCOPE)
# Do not let a row with an invalid state expire. Without the row, a retry could repeat the effect.
_ENDED = or_(_columns.state == _COMPLETED, _columns.state == _FAILED)
_NOT_EXPIRED = or_(_columns.expires_at > bindparam("now"), not_(_ENDED))
EXPIRED = and_(_columns.expires_at <= bindparam("now"), _ENDED)
"""SQL condition for expired records, which a sweep deletes."""

# Also count expired rows. To test the expiry, SQLite would read the table and not only an index.
COUNT = count(_table, equal(_table, "device_id"))
# Do not simplify `device_id + ""`. With `device_id` alone, the database would not use the index of `expires_at`
# (`test_expired_keys_are_counted_by_the_index`).
COUNT_EXPIRED_OF_DEVICE = count(_table, EXPIRED, _columns.device_id + "" == bindparam("device_id"))
COUNT_EXPIRED = count(_table, EXPIRED)


def _upsert(**values: Any) -> Statement[IdempotencyKey]:
    """Return the statement that inserts a record or replaces an expired record. The arguments `state=` and `result=`
    are necessary. Other arguments replace the default values of columns.
    """
    values = {
        **dict.fromkeys(("fingerprint", "owner", "lease_expires_at", "downstream_key"), null()),
        "created_at": bindparam("now"),
        "expires_at": bindparam("expires_at"),
        "attempt": constant(1, _columns.attempt.type),
        "omitted": constant(False, _columns.omitted.type),
        **values,
    }
    return Statement(
        lambda insert: (statement := insert(_table).values(**bindparams(*_SCOPE), **values)).on_conflict_do_update(
            index_elements=_SCOPE, set_={name: statement.excluded[name] for name in values}, where=EXPIRED
        )
    )


# The store has already encoded the result, so the type is Text.
INSERT = _upsert(state=_COMPLETED, result=bindparam("json", type_=Text))
CLAIM = _upsert(
    state=_IN_PROGRESS,
    result=constant("null", Text()),
    owner=bindparam("new_owner"),
    **bindparams("fingerprint", "lease_expires_at", "downstream_key"),
)
FIND = Statement[IdempotencyKey](select(IdempotencyKey).where(_SAME_SCOPE, _NOT_EXPIRED), lock=True)
ANY = Statement[IdempotencyKey](select(IdempotencyKey).where(_SAME_SCOPE), lock=True)
# The condition `_OWNED` refuses an attempt that no longer owns the record.
_OWNED = and_(_SAME_SCOPE, _columns.state == _IN_PROGRESS, _columns.owner == bindparam("old_owner"))
TAKE_OVER = Statement[IdempotencyKey](
    update(IdempotencyKey)
    .where(_OWNED)
    .values(
        owner=bindparam("new_owner"),
        attempt=bindparam("number"),
        created_at=bindparam("now"),
        **bindparams("lease_expires_at", "expires_at"),
    )
)
RENEW = Statement[IdempotencyKey](update(IdempotencyKey).where(_OWNED).values(bindparams("lease_expires_at")))
RECORD = Statement[IdempotencyKey](
    update(IdempotencyKey)
    .where(_OWNED)
    .values(
        **bindparams("state", "omitted", "expires_at"),
        result=bindparam("json", type_=Text),
        owner=bindparam("recorded_by"),
        lease_expires_at=None,
    )
)
DELETE_OWNED = Statement[IdempotencyKey](delete(IdempotencyKey).where(_OWNED))
ABANDONED = Statement[IdempotencyKey](
    select(IdempotencyKey)
    .where(_columns.state == _IN_PROGRESS, _columns.lease_expires_at <= bindparam("now"))
    .order_by(_columns.lease_expires_at, *(_columns[name] for name in _SCOPE))
    .limit(bindparam("limit"))
)
DELETE_EXPIRED = Statement[IdempotencyKey](delete_first(_table, _columns.expires_at, EXPIRED))
DELETE_ENDED = Statement[IdempotencyKey](delete(_table).where(equal(_table, "device_id"), _ENDED))
