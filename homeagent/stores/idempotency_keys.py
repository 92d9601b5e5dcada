from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from os import urandom
from typing import Any

from pydantic import JsonValue

from homeagent import errors
from homeagent.engine.statements import Statement, as_loaded
from homeagent.frame_locals import clears_locals
from homeagent.models import types
from homeagent.models.idempotency_key import Attempt, IdempotencyKey, IdempotencyScope, IdempotencyState, Outcome
from homeagent.stores import idempotency_key_statements as statements
from homeagent.stores.room import has_room
from homeagent.stores.store import Store, check_kind, reading, writing

_DEFAULTS = {name: field.default for name, field in IdempotencyKey.model_fields.items()}


class IdempotencyKeyStore(Store):
    """Store of idempotency keys. An idempotency key is a record that makes a retried call safe."""

    __slots__ = ()

    @writing()
    def insert(self, scope: IdempotencyScope, result: JsonValue, *, ttl: timedelta) -> IdempotencyKey:
        """Store the result of a call for later retries.

        Args:
            scope: device, method and key of the call.
            result: JSON value of at most 1 MiB.
            ttl: time for which retries get the result, 1 ms to `Limits.longest_ttl`.

        Raises:
            IdempotencyKeyExistsError: if the key has a record that has not expired.
            KeyLimitError: if the device has `Limits.keys_per_device` records that have not expired.
            InvalidArgumentError: if an argument is out of range.
        """
        _check_new(scope)
        json = types.encode_json(result, "result", limit=types.MAX_RESULT_BYTES)
        now = self._unit.now()
        expires_at = types.later(now, self._check_ttl(ttl, "ttl"), "ttl")
        self._require_room(scope, now)
        if not self._unit.write(
            statements.INSERT,
            device_id=scope.device_id,
            method=scope.method,
            key=scope.key,
            json=json,
            now=now,
            expires_at=expires_at,
        ):
            raise errors.IdempotencyKeyExistsError(scope.device_id, scope.method)
        given = {"key": scope.key, "method": scope.method, "device_id": scope.device_id, "result": result}
        # Do not validate the instance: validation would take longer than the insert.
        return as_loaded(IdempotencyKey, {**_DEFAULTS, **given, "created_at": now, "expires_at": expires_at})

    @reading
    @clears_locals
    def find(self, scope: IdempotencyScope) -> IdempotencyKey | None:
        """Return the record of a call. If the record is absent or expired, return None."""
        unit = self._unit
        if type(scope) is not IdempotencyScope:
            return unit.one(statements.FIND, **self._search(scope), now=unit.now())
        return unit.one(statements.FIND, device_id=scope.device_id, method=scope.method, key=scope.key, now=unit.now())

    def _search(self, scope: IdempotencyScope) -> dict[str, Any]:
        """Return the parameters for a search. An old record can contain texts that are no longer valid."""
        check_kind(scope, IdempotencyScope, "scope")
        return {
            "device_id": self._searched(scope.device_id, "device_id"),
            "method": self._searched(scope.method, "method"),
            "key": self._searched(scope.key, "key"),
        }

    def _require_room(self, scope: IdempotencyScope, now: datetime) -> None:
        """Raise KeyLimitError if a new record would exceed the device's limit."""
        unit, device_id = self._unit, scope.device_id
        limit = unit.settings.limits.keys_per_device
        if not has_room(unit, "idempotency_keys", device_id, limit, now, self._count) and (
            unit.one(statements.FIND, **_parameters(scope), now=now) is None
        ):
            raise errors.KeyLimitError(device_id, limit)

    def _count(self, device_id: str, now: datetime) -> int:
        """Return the number of a device's records. If the device has fewer records than the limit, also count expired
        records.
        """
        stored = self._unit.one(statements.COUNT, device_id=device_id) or 0
        if stored < self._unit.settings.limits.keys_per_device:
            return stored
        # Count expired rows only at the limit, because the count is slow.
        return stored - (self._unit.one(statements.COUNT_EXPIRED_OF_DEVICE, device_id=device_id, now=now) or 0)

    # Methods that `run_once()` calls

    @writing()
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
        """Return an `Attempt` to run the effect, or the stored `Outcome`. Commit the claim before the effect begins.

        Args:
            scope: device, method and key of the call.
            fingerprint: fingerprint of the call's parameters, for example by `canonical_json.fingerprint_of()`.
            lease: time after which an attempt without renewal counts as abandoned. A lease of zero expires at once.
            ttl: time for which retries get the outcome, 1 ms to `Limits.longest_ttl`.
            rerun: True to take over an abandoned attempt and run the effect again.
            owner: random token of the caller. A repeated claim with the same token returns the same attempt.

        Raises:
            FingerprintMismatchError: if an earlier call used the key with different parameters.
            IdempotencyInProgressError: if another attempt has a lease that has not expired.
            OutcomeUnknownError: if an attempt was abandoned and `rerun=False`.
            EffectFailedError: if the effect has failed permanently. The error contains the stored detail.
            KeyLimitError: if the key is new and the device has reached the limit.
        """
        _check_new(scope)
        types.check_flag(rerun, "rerun")
        if fingerprint != "":
            types.check_name(fingerprint, "fingerprint")
        now = self._unit.now()
        attempt = Attempt(
            number=1,
            downstream_key=urandom(16).hex(),
            scope=scope,
            lease_expires_at=types.later(now, types.check_duration(lease, "lease", zero=True), "lease"),
            expires_at=types.later(now, self._check_ttl(ttl, "ttl"), "ttl"),
            ttl=ttl,
            owner=urandom(16).hex() if owner is None else types.check_name(owner, "owner"),
        )
        self._require_room(scope, now)
        while not self._unit.write(
            statements.CLAIM,
            **_parameters(scope),
            now=now,
            expires_at=attempt.expires_at,
            fingerprint=fingerprint,
            new_owner=attempt.owner,
            lease_expires_at=attempt.lease_expires_at,
            downstream_key=attempt.downstream_key,
        ):
            row = self._unit.one(statements.ANY, **_parameters(scope))
            if row is not None:  # if `row` is None, another caller has deleted the record: claim again
                return _outcome(row, fingerprint) or self._take_over(row, attempt, now, rerun=rerun)
        return attempt

    def _take_over(self, row: IdempotencyKey, attempt: Attempt, now: datetime, *, rerun: bool) -> Attempt:
        """If `rerun=True`, replace an abandoned attempt by the given attempt, and return the next attempt."""
        if row.owner == attempt.owner:
            # The caller repeats the same claim, for example after CommitUnknownError.
            return _attempt_of(row)
        if row.lease_expires_at is not None and row.lease_expires_at > now:
            raise errors.IdempotencyInProgressError(**_refusal(row), retry_after=row.lease_expires_at - now)
        if not rerun:
            raise errors.OutcomeUnknownError(**_refusal(row), attempt=row.attempt)
        attempt = replace(attempt, number=row.attempt + 1, downstream_key=row.downstream_key or "")
        self._unit.write(
            statements.TAKE_OVER,
            **_parameters(row),
            old_owner=row.owner,
            new_owner=attempt.owner,
            number=attempt.number,
            now=now,
            lease_expires_at=attempt.lease_expires_at,
            expires_at=attempt.expires_at,
        )
        return attempt

    @writing()
    def renew(self, attempt: Attempt, *, lease: timedelta) -> Attempt:
        """Renew the lease of an attempt, and return the renewed attempt. The argument `lease=` is the duration of the
        new lease from now. If the attempt no longer owns the key, raise `LeaseLostError`.
        """
        check_kind(attempt, Attempt, "attempt")
        until = types.later(self._unit.now(), types.check_duration(lease, "lease", zero=True), "lease")
        self._write_fenced(statements.RENEW, attempt, lease_expires_at=until)
        return replace(attempt, lease_expires_at=until)

    @writing()
    def complete(self, attempt: Attempt, result: JsonValue) -> bool:
        """Record the result of the effect for later retries. Omit a result that is not JSON or is over 1 MiB. For an
        omitted result, record `omitted=True` and return False.

        Raises:
            LeaseLostError: if the attempt no longer owns the key.
        """
        check_kind(attempt, Attempt, "attempt")
        return self._record(attempt, IdempotencyState.COMPLETED, result, self._unit.now(), recorded_by=attempt.owner)

    @writing()
    def fail(self, attempt: Attempt, error: JsonValue) -> bool:
        """Record that the effect failed permanently. A retry raises `EffectFailedError` with the given detail."""
        check_kind(attempt, Attempt, "attempt")
        return self._record(attempt, IdempotencyState.FAILED, error, self._unit.now(), recorded_by=attempt.owner)

    @reading
    @clears_locals
    def find_recorded(self, attempt: Attempt) -> IdempotencyKey | None:
        """Return the outcome that the attempt has recorded, or None. After `CommitUnknownError`, the result shows
        whether the outcome was committed.
        """
        check_kind(attempt, Attempt, "attempt")
        row = self._unit.one(statements.ANY, **_parameters(attempt.scope))
        own = row is not None and row.owner == attempt.owner and row.state is not IdempotencyState.IN_PROGRESS
        return row if own else None

    def _record(
        self, attempt: Attempt, state: IdempotencyState, result: JsonValue, now: datetime, *, recorded_by: str | None
    ) -> bool:
        """Record an outcome, and return True if the result could be stored."""
        try:
            json, omitted = types.encode_json(result, limit=types.MAX_RESULT_BYTES), False
        except errors.InvalidArgumentError:
            json, omitted = types.encode_json(None), True
        # If the ttl of the attempt has ended, begin a new ttl.
        expires_at = attempt.expires_at if attempt.expires_at > now else types.later(now, attempt.ttl, "ttl")
        self._write_fenced(
            statements.RECORD,
            attempt,
            state=state,
            json=json,
            omitted=omitted,
            expires_at=expires_at,
            recorded_by=recorded_by,
        )
        return not omitted

    @writing()
    def release(self, attempt: Attempt, *, none_began: bool = False) -> None:
        """Release a key. Call the method only if the attempt's effect did not begin.

        For the first attempt, delete the record. For a later attempt, keep the record as abandoned. The effect of an
        earlier attempt has perhaps begun. Pass `none_began=True` if no earlier effect has begun, to delete the record.

        Raises:
            LeaseLostError: if the attempt no longer owns the key.
        """
        check_kind(attempt, Attempt, "attempt")
        if attempt.number == 1 or none_began:
            self._write_fenced(statements.DELETE_OWNED, attempt)
        else:
            self._write_fenced(statements.RENEW, attempt, lease_expires_at=self._unit.now())

    def _write_fenced(self, statement: Statement[IdempotencyKey], attempt: Attempt, **parameters: Any) -> None:
        """Change the record of an attempt. If the attempt no longer owns the key, raise LeaseLostError."""
        if not self._unit.write(statement, **_parameters(attempt.scope), old_owner=attempt.owner, **parameters):
            scope = attempt.scope
            raise errors.LeaseLostError(device_id=scope.device_id, method=scope.method, attempt=attempt.number)

    # Methods for operators, who settle abandoned attempts

    @reading
    @clears_locals
    def list_abandoned(self, *, limit: int = 100) -> Sequence[IdempotencyKey]:
        """Return records of abandoned attempts, up to the limit. The record whose lease expired first comes first."""
        return self._unit.all(statements.ABANDONED, now=self._unit.now(), limit=types.check_limit(limit))

    @writing()
    def resolve(self, scope: IdempotencyScope, result: JsonValue) -> bool:
        """Record the result of an abandoned attempt for later retries. If the scope has no abandoned attempt, return
        False.

        Raises:
            IdempotencyInProgressError: if the lease has not expired, because the effect is perhaps still running.
            InvalidArgumentError: if the result is over 1 MiB or not JSON.
        """
        types.encode_json(result, "result", limit=types.MAX_RESULT_BYTES)
        now = self._unit.now()
        attempt = self._find_abandoned(scope, now)
        return attempt is not None and self._record(attempt, IdempotencyState.COMPLETED, result, now, recorded_by=None)

    @writing()
    def forget(self, scope: IdempotencyScope) -> bool:
        """Delete the record of an abandoned attempt. The next call runs the effect again. If the scope has no abandoned
        attempt, return False.

        Raises:
            IdempotencyInProgressError: if the lease has not expired, because the effect is perhaps still running.
        """
        attempt = self._find_abandoned(scope, self._unit.now())
        if attempt is not None:
            self._write_fenced(statements.DELETE_OWNED, attempt)
        return attempt is not None

    def _find_abandoned(self, scope: IdempotencyScope, now: datetime) -> Attempt | None:
        """Return the abandoned attempt, or None if the key is not in progress."""
        row = self._unit.one(statements.ANY, **self._search(scope))
        if row is None or row.state is not IdempotencyState.IN_PROGRESS:
            return None
        lease_end = row.lease_expires_at or now
        if lease_end > now:
            raise errors.IdempotencyInProgressError(**_refusal(row), retry_after=lease_end - now)
        return _attempt_of(row)

    @writing()
    def delete_ended(self, device_id: str) -> int:
        """Delete a device's completed and failed records. Return the number of deleted records."""
        return self._unit.write(statements.DELETE_ENDED, device_id=self._searched(device_id, "device_id"))

    @writing()
    def delete_expired(self, *, limit: int = 100) -> int:
        """Delete expired records, oldest first. Return the number of deleted records, which is at most the limit."""
        return self._unit.write(statements.DELETE_EXPIRED, now=self._unit.now(), limit=types.check_limit(limit))


def _attempt_of(row: IdempotencyKey) -> Attempt:
    """Return the attempt of a record. If `lease_expires_at` is NULL, the lease ends at `created_at`."""
    return Attempt(
        number=row.attempt,
        downstream_key=row.downstream_key or "",
        scope=IdempotencyScope.of_record(row.device_id, row.method, row.key),
        lease_expires_at=row.lease_expires_at or row.created_at,
        expires_at=row.expires_at,
        ttl=row.expires_at - row.created_at,
        owner=row.owner or "",
    )


def _outcome(row: IdempotencyKey, fingerprint: str) -> Outcome | None:
    """Return the outcome, or None for a row in progress."""
    if row.fingerprint is not None and row.fingerprint != fingerprint:
        raise errors.FingerprintMismatchError(**_refusal(row))
    if row.state is IdempotencyState.FAILED:
        raise errors.EffectFailedError(row.result, replayed=True)
    if row.state is IdempotencyState.COMPLETED:
        return Outcome(value=row.result, replayed=True, attempt=row.attempt, omitted=row.omitted)
    return None


def _refusal(row: IdempotencyKey) -> dict[str, Any]:
    """Return the arguments of the error for a refused claim."""
    return {"device_id": row.device_id, "method": row.method, "state": row.state, "expires_at": row.expires_at}


def _parameters(scope: IdempotencyScope | IdempotencyKey) -> dict[str, Any]:
    """Return the scope's values as SQL parameters, without checks."""
    return {"device_id": scope.device_id, "method": scope.method, "key": scope.key}


def _check_new(scope: IdempotencyScope) -> None:
    """Check the scope for a new record."""
    if type(scope) is not IdempotencyScope:
        check_kind(scope, IdempotencyScope, "scope")
        # Check the texts: `IdempotencyScope.of_record()` accepts texts that are now invalid.
        IdempotencyScope(scope.device_id, scope.method, scope.key)
