"""What can be done with idempotency keys: claim, record, replay, find out, let expire."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from secrets import token_hex
from typing import Any

from pydantic import JsonValue
from sqlalchemy import Text, and_, bindparam, delete, func, not_, null, or_, select, tuple_, update

from homeagent.engine.statements import Statement, as_loaded, constant
from homeagent.errors import (
    EffectFailedError,
    FingerprintMismatchError,
    IdempotencyInProgressError,
    IdempotencyKeyExistsError,
    InvalidArgumentError,
    LeaseLostError,
    OutcomeUnknownError,
)
from homeagent.frame_locals import clears_locals
from homeagent.models.idempotency_key import Attempt, IdempotencyKey, IdempotencyScope, IdempotencyState, Outcome
from homeagent.models.types import check_duration, check_identifier, check_label, check_limit, encode_json, later
from homeagent.stores.store import Store, check_kind, reading, writing

__all__ = ["IdempotencyKeyStore"]

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
# A row in progress outlives its time, until somebody knows how it ended. So does a row whose stored state is none of
# the three: if it were deleted, an effect that may have taken place would run again.
_ENDED = or_(_columns.state == _COMPLETED, _columns.state == _FAILED)
_LIVE = or_(_columns.expires_at > bindparam("now"), not_(_ENDED))
EXPIRED = and_(_columns.expires_at <= bindparam("now"), _ENDED)
"""Whether a record counts as absent, and a sweep deletes it."""

_INSERT = Statement[IdempotencyKey](
    lambda insert: (
        statement := insert(_table).values(
            device_id=bindparam("device_id"),
            method=bindparam("method"),
            key=bindparam("key"),
            # Encoded already, where it was checked.
            result=bindparam("json", type_=Text),
            created_at=bindparam("now"),
            expires_at=bindparam("expires_at"),
            state=_COMPLETED,
            attempt=_FIRST,
            omitted=_NOT_OMITTED,
        )
    ).on_conflict_do_update(
        index_elements=["device_id", "method", "key"],
        # A dead record counts as absent, whether or not cleanup has run: it is replaced whole.
        set_={
            "result": statement.excluded.result,
            "created_at": statement.excluded.created_at,
            "expires_at": statement.excluded.expires_at,
            "state": _COMPLETED,
            "attempt": _FIRST,
            "omitted": _NOT_OMITTED,
            "fingerprint": null(),
            "owner": null(),
            "lease_expires_at": null(),
            "downstream_key": null(),
        },
        where=EXPIRED,
    )
)
_FIND = Statement[IdempotencyKey](select(IdempotencyKey).where(_SAME_SCOPE, _LIVE), lock=True)
_CLAIMED: dict[str, Any] = {
    "result": constant("null", Text()),
    "created_at": bindparam("now"),
    "expires_at": bindparam("expires_at"),
    "state": _IN_PROGRESS,
    "attempt": _FIRST,
    "omitted": _NOT_OMITTED,
    "fingerprint": bindparam("fingerprint"),
    "owner": bindparam("new_owner"),
    "lease_expires_at": bindparam("lease_expires_at"),
    "downstream_key": bindparam("downstream_key"),
}
_CLAIM = Statement[IdempotencyKey](
    lambda insert: (
        statement := insert(_table).values(
            device_id=bindparam("device_id"), method=bindparam("method"), key=bindparam("key"), **_CLAIMED
        )
    ).on_conflict_do_update(
        index_elements=["device_id", "method", "key"],
        set_={name: statement.excluded[name] for name in _CLAIMED},
        where=EXPIRED,
    )
)
_ANY = Statement[IdempotencyKey](select(IdempotencyKey).where(_SAME_SCOPE), lock=True)
# Every write of an attempt is fenced: it takes place only while the attempt owns the key.
_OWNED = and_(_SAME_SCOPE, _columns.state == _IN_PROGRESS, _columns.owner == bindparam("old_owner"))
_TAKE_OVER = Statement[IdempotencyKey](
    update(IdempotencyKey)
    .where(_OWNED)
    .values(owner=bindparam("new_owner"), attempt=bindparam("number"), lease_expires_at=bindparam("lease_expires_at"))
)
_RENEW = Statement[IdempotencyKey](
    update(IdempotencyKey).where(_OWNED).values(lease_expires_at=bindparam("lease_expires_at"))
)
_RECORD = Statement[IdempotencyKey](
    update(IdempotencyKey)
    .where(_OWNED)
    .values(
        state=bindparam("state"),
        # Encoded already, where it was checked.
        result=bindparam("json", type_=Text),
        omitted=bindparam("omitted"),
        expires_at=bindparam("expires_at"),
        owner=bindparam("recorded_by"),
        lease_expires_at=None,
    )
)
_DELETE_OWNED = Statement[IdempotencyKey](delete(IdempotencyKey).where(_OWNED))
_ABANDONED = Statement[IdempotencyKey](
    select(IdempotencyKey)
    .where(_columns.state == _IN_PROGRESS, _columns.lease_expires_at <= bindparam("now"))
    .order_by(_columns.lease_expires_at, _columns.device_id, _columns.method, _columns.key)
    .limit(bindparam("limit"))
)
_DELETE_EXPIRED = Statement[IdempotencyKey](
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
_DELETE_ENDED = Statement[IdempotencyKey](
    delete(IdempotencyKey).where(_columns.device_id == bindparam("device_id"), _ENDED)
)
COUNT_EXPIRED = Statement[int](select(func.count()).select_from(IdempotencyKey).where(EXPIRED))


class IdempotencyKeyStore(Store):
    """The records that make a retried call safe."""

    __slots__ = ()

    @writing()
    @clears_locals
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
        json = encode_json(result, "result")
        check_duration(ttl, "ttl")
        now = self._unit.now()
        expires_at = later(now, ttl, "ttl")
        if not self._unit.write(
            _INSERT,
            device_id=scope.device_id,
            method=scope.method,
            key=scope.key,
            json=json,
            now=now,
            expires_at=expires_at,
        ):
            raise IdempotencyKeyExistsError(scope.device_id, scope.method)
        # Validating it anew would cost three times the insert.
        return as_loaded(
            IdempotencyKey,
            {
                "key": scope.key,
                "method": scope.method,
                "device_id": scope.device_id,
                "result": result,
                "created_at": now,
                "expires_at": expires_at,
                "state": IdempotencyState.COMPLETED,
                "fingerprint": None,
                "owner": None,
                "attempt": 1,
                "lease_expires_at": None,
                "downstream_key": None,
                "omitted": False,
            },
        )

    @reading
    @clears_locals
    def find(self, scope: IdempotencyScope) -> IdempotencyKey | None:
        """Return the live record of a call, None where there is none or its time is over."""
        scope = _check_scope(scope)
        return self._unit.one(
            _FIND, device_id=scope.device_id, method=scope.method, key=scope.key, now=self._unit.now()
        )

    # What run_once is made of

    @writing()
    @clears_locals
    def claim(
        self,
        scope: IdempotencyScope,
        *,
        fingerprint: str,
        lease: timedelta,
        ttl: timedelta,
        rerun: bool = False,
        owner: str | None = None,
    ) -> Attempt | Outcome:
        """Claim the right to run an effect, or return how it ended before. Commit before the effect begins.

        Args:
            scope: what makes it the same call.
            fingerprint: of its parameters, see `homeagent.canonical_json.fingerprint_of`.
            lease: how long until the attempt counts as abandoned, unless it renews; zero for a lease that has expired.
            ttl: how long the outcome is replayed, above zero.
            rerun: whether an abandoned attempt is followed by another one.
            owner: a random token of the caller, such as 32 hex digits. A claim that is repeated after a commit with
                an unknown result finds its own attempt by the token. None to have one made.

        Returns:
            An Attempt where the effect is to be run now, an Outcome where it was completed.

        Raises:
            FingerprintMismatchError: the key was used with other parameters.
            IdempotencyInProgressError: another attempt's lease is live.
            OutcomeUnknownError: an attempt was abandoned, and `rerun` is not set.
            EffectFailedError: the effect failed for good; this is its stored error.
        """
        scope = _check_scope(scope)
        check_label(fingerprint, "fingerprint")
        now = self._unit.now()
        lease_expires_at = later(now, check_duration(lease, "lease", zero=True), "lease")
        expires_at = later(now, check_duration(ttl, "ttl"), "ttl")
        owner = token_hex(16) if owner is None else check_label(owner, "owner")
        downstream_key = token_hex(16)
        while not self._unit.write(
            _CLAIM,
            **_parameters(scope),
            now=now,
            expires_at=expires_at,
            fingerprint=fingerprint,
            new_owner=owner,
            lease_expires_at=lease_expires_at,
            downstream_key=downstream_key,
        ):
            row = self._unit.one(_ANY, **_parameters(scope))
            if row is not None:  # else it was deleted in between, and the key is free
                outcome = _outcome(scope, row, fingerprint)
                return outcome or self._take_over(scope, row, now, lease_expires_at, owner=owner, rerun=rerun)
        return Attempt(
            number=1,
            downstream_key=downstream_key,
            scope=scope,
            lease_expires_at=lease_expires_at,
            expires_at=expires_at,
            ttl=ttl,
            owner=owner,
        )

    def _take_over(
        self,
        scope: IdempotencyScope,
        row: IdempotencyKey,
        now: datetime,
        lease_expires_at: datetime,
        *,
        owner: str,
        rerun: bool,
    ) -> Attempt:
        if row.owner == owner:
            # This claim was committed before, and its caller never heard of it.
            return _attempt_of(row)
        if row.lease_expires_at is not None and row.lease_expires_at > now:
            raise IdempotencyInProgressError(
                device_id=scope.device_id, method=scope.method, retry_after=row.lease_expires_at - now
            )
        if not rerun:
            raise OutcomeUnknownError(device_id=scope.device_id, method=scope.method, attempt=row.attempt)
        number = row.attempt + 1
        self._unit.write(
            _TAKE_OVER,
            **_parameters(scope),
            old_owner=row.owner,
            new_owner=owner,
            number=number,
            lease_expires_at=lease_expires_at,
        )
        return replace(_attempt_of(row), number=number, lease_expires_at=lease_expires_at, owner=owner)

    @writing()
    @clears_locals
    def renew(self, attempt: Attempt, *, lease: timedelta) -> Attempt:
        """Extend an attempt's lease to `lease` from now, and return the attempt with it.

        Raises:
            LeaseLostError: the attempt no longer owns its key; nothing was changed.
        """
        check_kind(attempt, Attempt, "attempt")
        until = later(self._unit.now(), check_duration(lease, "lease", zero=True), "lease")
        self._fenced(_RENEW, attempt, lease_expires_at=until)
        return replace(attempt, lease_expires_at=until)

    @writing()
    @clears_locals
    def complete(self, attempt: Attempt, result: JsonValue) -> bool:
        """Record what the effect returned, to be replayed.

        A result that is no JSON or over 256 KiB is left out, since the effect took place all the same: the record
        says `omitted` then.

        Returns:
            False where the result was left out.

        Raises:
            LeaseLostError: the attempt no longer owns its key; nothing was changed.
        """
        check_kind(attempt, Attempt, "attempt")
        return self._record(attempt, IdempotencyState.COMPLETED, result, recorded_by=attempt.owner)

    @writing()
    @clears_locals
    def fail(self, attempt: Attempt, error: JsonValue) -> bool:
        """Record that the effect failed for good, with a detail to be replayed like a result; see `complete`."""
        check_kind(attempt, Attempt, "attempt")
        return self._record(attempt, IdempotencyState.FAILED, error, recorded_by=attempt.owner)

    @reading
    @clears_locals
    def find_recorded(self, attempt: Attempt) -> IdempotencyKey | None:
        """Return the record that this very attempt made, None where it made none, or that is gone.

        By this an attempt whose record was committed while the connection was lost finds out that it was.
        """
        check_kind(attempt, Attempt, "attempt")
        row = self._unit.one(_ANY, **_parameters(attempt.scope))
        own = row is not None and row.owner == attempt.owner and row.state is not IdempotencyState.IN_PROGRESS
        return row if own else None

    def _record(self, attempt: Attempt, state: IdempotencyState, result: JsonValue, *, recorded_by: str | None) -> bool:
        try:
            json, omitted = encode_json(result), False
        except InvalidArgumentError:
            json, omitted = encode_json(None), True
        now = self._unit.now()
        # An effect that took longer than its time to live must not be forgotten the moment it ends.
        expires_at = attempt.expires_at if attempt.expires_at > now else later(now, attempt.ttl, "ttl")
        self._fenced(
            _RECORD,
            attempt,
            state=state,
            json=json,
            omitted=omitted,
            expires_at=expires_at,
            recorded_by=recorded_by,
        )
        return not omitted

    @writing()
    @clears_locals
    def release(self, attempt: Attempt, *, none_began: bool = False) -> None:
        """Give a key back whose effect did not begin.

        Where an earlier attempt was abandoned, its outcome stays unknown: the key is not freed then, and counts as
        abandoned again.

        Args:
            attempt: the owner.
            none_began: whether it was found out that no earlier attempt began either.

        Raises:
            LeaseLostError: the attempt no longer owns its key; nothing was changed.
        """
        check_kind(attempt, Attempt, "attempt")
        if attempt.number == 1 or none_began:
            self._fenced(_DELETE_OWNED, attempt)
        else:
            self._fenced(_RENEW, attempt, lease_expires_at=self._unit.now())

    def _fenced(self, statement: Statement[IdempotencyKey], attempt: Attempt, **parameters: Any) -> None:
        if not self._unit.write(statement, **_parameters(attempt.scope), old_owner=attempt.owner, **parameters):
            scope = attempt.scope
            raise LeaseLostError(device_id=scope.device_id, method=scope.method, attempt=attempt.number)

    # What the operator does about outcomes that nobody knows

    @reading
    @clears_locals
    def list_abandoned(self, *, limit: int = 100) -> Sequence[IdempotencyKey]:
        """Return the records whose lease lapsed before an outcome came, longest ago first.

        Args:
            limit: how many at most, 1 or more.
        """
        return self._unit.all(_ABANDONED, now=self._unit.now(), limit=check_limit(limit))

    @writing()
    @clears_locals
    def resolve(self, scope: IdempotencyScope, result: JsonValue) -> bool:
        """Record how an abandoned effect ended, to be replayed from now on.

        Args:
            scope: whose outcome is known now.
            result: what the effect would have returned, any JSON value of at most 256 KiB.

        Returns:
            False where nothing was abandoned under this scope.

        Raises:
            IdempotencyInProgressError: its lease is live: it may still end by itself.
            InvalidArgumentError: the result is no JSON or too large.
        """
        encode_json(result, "result")
        attempt = self._invalidated(scope)
        return attempt is not None and self._record(attempt, IdempotencyState.COMPLETED, result, recorded_by=None)

    @writing()
    @clears_locals
    def forget(self, scope: IdempotencyScope) -> bool:
        """Remove an abandoned record, so that the next call runs the effect as if it had never been tried.

        Returns:
            False where nothing was abandoned under this scope.

        Raises:
            IdempotencyInProgressError: its lease is live: it may still end by itself.
        """
        attempt = self._invalidated(scope)
        if attempt is not None:
            self._fenced(_DELETE_OWNED, attempt)
        return attempt is not None

    def _invalidated(self, scope: IdempotencyScope) -> Attempt | None:
        scope = _check_scope(scope)
        row = self._unit.one(_ANY, **_parameters(scope))
        if row is None or row.state is not IdempotencyState.IN_PROGRESS:
            return None
        now = self._unit.now()
        lapsed = row.lease_expires_at or now
        if lapsed > now:
            raise IdempotencyInProgressError(device_id=scope.device_id, method=scope.method, retry_after=lapsed - now)
        return _attempt_of(row)

    @writing()
    def delete_ended(self, device_id: str) -> int:
        """Remove the records of a device's calls that have ended, and return how many. Those in progress are spared."""
        return self._unit.write(_DELETE_ENDED, device_id=check_identifier(device_id, "device_id"))

    @writing()
    def delete_expired(self, *, limit: int = 100) -> int:
        """Remove dead records, oldest first, and return how many. Those in progress are spared.

        Args:
            limit: how many at most, 1 or more.
        """
        return self._unit.write(_DELETE_EXPIRED, now=self._unit.now(), limit=check_limit(limit))


def _attempt_of(row: IdempotencyKey) -> Attempt:
    """Return the attempt that a row in progress stands for."""
    return Attempt(
        number=row.attempt,
        downstream_key=row.downstream_key or "",
        scope=IdempotencyScope(row.device_id, row.method, row.key),
        lease_expires_at=row.lease_expires_at or row.created_at,
        expires_at=row.expires_at,
        ttl=row.expires_at - row.created_at,
        owner=row.owner or "",
    )


def _outcome(scope: IdempotencyScope, row: IdempotencyKey, fingerprint: str) -> Outcome | None:
    """Return how the call of this row ended, None if it is in progress. A failed call raises its stored error."""
    if row.fingerprint is not None and row.fingerprint != fingerprint:
        raise FingerprintMismatchError(device_id=scope.device_id, method=scope.method)
    if row.state is IdempotencyState.FAILED:
        raise EffectFailedError(row.result, replayed=True)
    if row.state is IdempotencyState.COMPLETED:
        return Outcome(value=row.result, replayed=True, attempt=row.attempt, omitted=row.omitted)
    return None


def _parameters(scope: IdempotencyScope) -> dict[str, Any]:
    return {"device_id": scope.device_id, "method": scope.method, "key": scope.key}


def _check_scope(scope: IdempotencyScope) -> IdempotencyScope:
    if not isinstance(scope, IdempotencyScope):
        raise InvalidArgumentError("scope must be an IdempotencyScope(device_id, method, key)")
    return scope
