"""What can be done with idempotency keys: store a result, find it, let it expire."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from pydantic import JsonValue
from sqlalchemy import and_, bindparam, delete, func, or_, select, tuple_

from homeagent.engine.statements import Statement
from homeagent.errors import IdempotencyKeyExistsError, InvalidArgumentError
from homeagent.models.idempotency_key import IdempotencyKey, IdempotencyScope, IdempotencyState
from homeagent.models.types import check_duration, check_limit, encode_json, later
from homeagent.stores.store import Store

__all__ = ["IdempotencyKeyStore"]

_table: Any = IdempotencyKey.__table__
_columns: Any = _table.c

_SAME_SCOPE = and_(
    _columns.device_id == bindparam("device_id"),
    _columns.method == bindparam("method"),
    _columns.key == bindparam("key"),
)
# A row in progress outlives its time, until somebody knows how it ended.
_LIVE = or_(_columns.expires_at > bindparam("now"), _columns.state == IdempotencyState.IN_PROGRESS)
_DEAD = and_(_columns.expires_at <= bindparam("now"), _columns.state != IdempotencyState.IN_PROGRESS)

_INSERT = Statement[IdempotencyKey](
    lambda insert: (
        statement := insert(_table).values(
            device_id=bindparam("device_id"),
            method=bindparam("method"),
            key=bindparam("key"),
            result=bindparam("result"),
            created_at=bindparam("now"),
            expires_at=bindparam("expires_at"),
            state=IdempotencyState.COMPLETED,
            attempt=1,
            omitted=False,
        )
    ).on_conflict_do_update(
        index_elements=["device_id", "method", "key"],
        # A dead record counts as absent, whether or not cleanup has run: it is replaced whole.
        set_={
            "result": statement.excluded.result,
            "created_at": statement.excluded.created_at,
            "expires_at": statement.excluded.expires_at,
            "state": IdempotencyState.COMPLETED,
            "attempt": 1,
            "omitted": False,
            "fingerprint": None,
            "owner": None,
            "lease_expires_at": None,
            "downstream_key": None,
        },
        where=_DEAD,
    )
)
_FIND = Statement[IdempotencyKey](select(IdempotencyKey).where(_SAME_SCOPE, _LIVE), lock=True)
_DELETE_EXPIRED = Statement[IdempotencyKey](
    delete(IdempotencyKey).where(
        tuple_(_columns.device_id, _columns.method, _columns.key).in_(
            select(_columns.device_id, _columns.method, _columns.key)
            .where(_DEAD)
            .order_by(_columns.expires_at)
            .limit(bindparam("limit"))
            .with_for_update(skip_locked=True)
        )
    )
)
COUNT_EXPIRED = Statement[int](select(func.count()).select_from(IdempotencyKey).where(_DEAD))


class IdempotencyKeyStore(Store):
    """The records that make a retried call safe."""

    __slots__ = ()

    def insert(self, scope: IdempotencyScope, result: JsonValue, *, ttl: timedelta) -> IdempotencyKey:
        """Store the result of a call, so that its retries are answered with it.

        Args:
            scope: what makes it the same call.
            result: any JSON value of at most 256 KiB.
            ttl: how long it is replayed, above zero.

        Raises:
            IdempotencyKeyExistsError: a live record is there already; it is left as it is.
            InvalidArgumentError: the result is no JSON or too large, or `ttl` is not above zero.
        """
        scope = _check_scope(scope)
        encode_json(result, "result")
        check_duration(ttl, "ttl")
        now = self._unit.now()
        expires_at = later(now, ttl, "ttl")
        if not self._unit.write(
            _INSERT,
            device_id=scope.device_id,
            method=scope.method,
            key=scope.key,
            result=result,
            now=now,
            expires_at=expires_at,
        ):
            raise IdempotencyKeyExistsError(scope.device_id, scope.method)
        return IdempotencyKey(
            device_id=scope.device_id,
            method=scope.method,
            key=scope.key,
            result=result,
            created_at=now,
            expires_at=expires_at,
        )

    def find(self, scope: IdempotencyScope) -> IdempotencyKey | None:
        """Return the live record of a call, None where there is none or its time is over."""
        scope = _check_scope(scope)
        return self._unit.one(
            _FIND, device_id=scope.device_id, method=scope.method, key=scope.key, now=self._unit.now()
        )

    def delete_expired(self, *, limit: int = 100) -> int:
        """Remove dead records, oldest first, and return how many. Those in progress are spared.

        Args:
            limit: how many at most, 1 or more.
        """
        return self._unit.write(_DELETE_EXPIRED, now=self._unit.now(), limit=check_limit(limit))


def _check_scope(scope: IdempotencyScope) -> IdempotencyScope:
    if not isinstance(scope, IdempotencyScope):
        raise InvalidArgumentError("scope must be an IdempotencyScope(device_id, method, key)")
    return scope
