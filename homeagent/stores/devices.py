from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from typing import Literal, TypeVar

from homeagent import errors, models
from homeagent.engine.statements import Parameters
from homeagent.models import types
from homeagent.models.device import Device, DeviceStatus, Role
from homeagent.models.device_change import DeviceChange
from homeagent.stores import device_statements as statements
from homeagent.stores.device_statements import SecretHashes
from homeagent.stores.store import Store, check_kind, reading, writing

SEEN_GRANULARITY = timedelta(minutes=1)


class DeviceStore(Store):
    """Store of devices."""

    __slots__ = ()

    @writing()
    def create(self, device: models.DeviceCreate) -> Device:
        """Add an unapproved device whose secret is already hashed. If the id exists, raise `DeviceExistsError`."""
        check_kind(device, models.DeviceCreate, "device")
        created = self._unit.write_one(
            statements.CREATE,
            id=device.id,
            role=device.role,
            shared_secret_hash=device.shared_secret_hash,
            now=self._unit.now(),
            metadata=device.metadata_,
            proof_verifier=device.proof_verifier,
        )
        if created is None:
            raise errors.DeviceExistsError(device.id)
        return created

    @reading
    def find_by_id(self, device_id: str) -> Device | None:
        """Return the device, or None if the device does not exist."""
        return self._unit.one(statements.FIND, id=self._searched(device_id, "device_id"))

    @reading
    def get(self, device_id: str) -> Device:
        """Call `find_by_id()`, and raise `DeviceNotFoundError` if the device does not exist."""
        device = self._unit.one(statements.FIND, id=self._searched(device_id, "device_id"))
        if device is None:
            raise errors.DeviceNotFoundError(device_id)
        return device

    @reading
    def find_secret_hashes(self, device_id: str) -> SecretHashes:
        """Return the hashes of the device's secrets. The method takes the same time for present and absent devices."""
        row = self._unit.one(statements.SECRET_HASHES, id=self._searched(device_id, "device_id"))
        present, *previous = row or (None, None, None)
        return SecretHashes(present or "", *previous)

    @reading
    def find_proof_secrets(self, device_id: str) -> tuple[str, str | None]:
        """Return the store's proof key, and the device's verifier or None. The method takes the same time for present
        and absent devices.
        """
        row = self._unit.one(statements.PROOF_SECRETS, id=self._searched(device_id, "device_id"))
        key, verifier = row or (None, None)
        if key is None:
            raise errors.CorruptDatabaseError(
                "the table `store` has lost its proof key: restore the newest good backup"
            )
        return key, verifier

    @reading
    def count_pending(self, *, limit: int) -> int:
        """Count pending devices, and stop at the given limit. Do not count devices that a sweep would delete."""
        before = types.earlier(self._unit.now(), self._unit.settings.limits.pending_ttl)
        return self._unit.one(statements.COUNT_PENDING, limit=types.check_limit(limit), before=before) or 0

    @writing()
    def require_pending_room(self, limit: int) -> None:
        """If the number of pending devices is above the limit, raise `PendingLimitError`. Pairings in other units wait
        until this unit ends.
        """
        self._unit.one(statements.LOCK_STORE)
        if self.count_pending(limit=limit + 1) > limit:
            raise errors.PendingLimitError(limit)

    @writing()
    def delete_pending(self, *, paired_before: datetime, limit: int = 100) -> int:
        """Delete pending devices, oldest first. Keep devices that were paired after `paired_before`. Return the number
        of deleted devices, which is at most the limit.
        """
        before = types.check_timestamp(paired_before, "paired_before")
        types.check_limit(limit)
        with self._timed_changes():
            return self._unit.write(statements.DELETE_PENDING, before=before, limit=limit)

    @reading
    def list(
        self,
        *,
        approved: bool | None = None,
        role: Role | None = None,
        status: DeviceStatus | None = None,
        seen_before: datetime | None = None,
        order: Literal["id", "paired_at"] = "id",
        limit: int = 100,
        after: str | Device | None = None,
    ) -> Sequence[Device]:
        """Return a page of devices.

        Args:
            approved: True to select approved devices, False to select unapproved devices. Default: all.
            role: role of the selected devices. Default: all roles.
            status: status of the selected devices. Default: all.
            seen_before: a time, to select devices that were last seen earlier. Default: all devices.
            order: order of the devices: "id" (default), or "paired_at" for the newest first.
            limit: maximum number of devices, 1 or more.
            after: last device on the previous page, or the device's id. Default: the first page.

        Raises:
            DeviceNotFoundError: if `order="paired_at"`, and no device has the id in the argument `after=`. Pass a
                `Device` object to avoid the error.
        """
        if approved is not None:
            types.check_flag(approved, "approved")
        if order not in ("id", "paired_at"):
            raise errors.InvalidArgumentError("order must be 'id' or 'paired_at'")
        status = _member(DeviceStatus, status, "status")
        given: Parameters = {}
        if role is not None:
            given["role"] = _member(Role, role, "role")
        if seen_before is not None:
            given["seen_before"] = types.check_timestamp(seen_before, "seen_before")
        if after is not None:
            last = after.id if isinstance(after, Device) else after
            given["after"] = self._searched(last, "after")
            if order == "paired_at":
                given["after_paired_at"] = (
                    after.paired_at
                    if isinstance(after, Device)
                    else self._unit.one(statements.PAIRED_AT, id=given["after"])
                )
                if given["after_paired_at"] is None:
                    raise errors.DeviceNotFoundError(last)
        statement = statements.page_of(frozenset(given), approved, status, newest_first=order == "paired_at")
        return self._unit.all(statement, limit=types.check_limit(limit), **given)

    @writing()
    def update(self, device_id: str, changes: models.DeviceUpdate) -> Device:
        """Set the given fields, and return the device. If the device does not exist, raise `DeviceNotFoundError`."""
        check_kind(changes, models.DeviceUpdate, "changes")
        if "metadata_" not in changes.model_fields_set:
            return self.get(device_id)
        searched = self._searched(device_id, "device_id")
        with self._timed_changes():
            device = self._unit.write_one(statements.UPDATE_METADATA, device_id=searched, value=changes.metadata_)
        if device is None:
            raise errors.DeviceNotFoundError(device_id)
        return device

    @writing()
    def approve(
        self,
        device_id: str,
        *,
        expected_role: Role | None = None,
        expected_secret_hash: str | None = None,
        expected_paired_at: datetime | None = None,
        expected_status: DeviceStatus | None = None,
    ) -> bool:
        """Approve a device if the expected values still match. If the device was already approved, return False.

        Args:
            device_id: id of a pending or revoked device.
            expected_role: role that the device must have. Default: any role.
            expected_secret_hash: hash that the device's secret must have. Default: any hash.
            expected_paired_at: expected time of pairing. Default: any time.
            expected_status: status that the device must have. Default: pending.

        Raises:
            DeviceNotFoundError: if the device does not exist.
            ApprovalChangedError: if a value of the device differs from the expected value.
        """
        role = _member(Role, expected_role, "expected_role")
        status = _member(DeviceStatus, expected_status, "expected_status") or DeviceStatus.PENDING
        secret_hash, paired_at = expected_secret_hash, expected_paired_at
        if secret_hash is not None:
            secret_hash = self._searched(secret_hash, "expected_secret_hash")
        if paired_at is not None:
            paired_at = types.check_timestamp(paired_at, "expected_paired_at")
        approved, _, was_decided, *equal = self._lock_state(device_id, role, secret_hash, paired_at)
        expected = {"role": expected_role, "secret": expected_secret_hash, "time of pairing": expected_paired_at}
        for (changed, value), is_equal in zip(expected.items(), equal, strict=True):
            # If the database can't store the expected text, the comparison gives None.
            if value is not None and not is_equal:
                raise errors.ApprovalChangedError(device_id, changed)
        if approved:
            return False
        if status is not (DeviceStatus.REVOKED if was_decided else DeviceStatus.PENDING):
            raise errors.ApprovalChangedError(device_id, "status")
        self._unit.write(statements.APPROVE, device_id=device_id, now=self._unit.now())
        return True

    @writing()
    def revoke(self, device_id: str, *, reason: str | None = None, force: bool = False) -> bool:
        """Revoke a device, but keep its nonces and idempotency keys. Return False if the device was already revoked.

        Raises:
            DeviceNotFoundError: if the device does not exist.
            LastAdminError: if the device is the last approved admin and `force=False`.
        """
        if reason is not None:
            types.check_name(reason, "reason")
        self._require_another_admin(device_id, force=force)
        approved, revoked, *_ = self._lock_state(device_id)
        if not approved and revoked:
            return False
        self._unit.write(statements.REVOKE, device_id=device_id, now=self._unit.now(), reason=reason)
        return True

    def _lock_state(
        self,
        device_id: str,
        role: Role | None = None,
        secret_hash: str | None = None,
        paired_at: datetime | None = None,
    ) -> tuple[bool | None, ...]:
        """Lock the device, and return the columns of `STATE`. A comparison of a column with None gives None."""
        device = self._searched(device_id, "device_id")
        given = {"role": role, "secret_hash": secret_hash, "paired_at": paired_at}
        found: tuple[bool | None, ...] | None = self._unit.one(statements.STATE, device_id=device, **given)
        if found is None:
            raise errors.DeviceNotFoundError(device_id)
        return found

    def _is_seen_recently(
        self, device_id: str, at: datetime | None = None, *, granularity: timedelta = SEEN_GRANULARITY
    ) -> tuple[bool, Callable[[DeviceStore], bool] | Literal[False]]:
        """If `update_last_seen()` has no row to change, return `(True, False)`. Otherwise return False and a function
        that stores the time. So one call of `update_last_seen()` reads the clock once.
        """
        given = self._last_seen(device_id, at, granularity)
        if self._unit.one(statements.NEEDS_LAST_SEEN, **given) is None:
            return True, False
        return False, lambda store: store.unit.write(statements.SET_LAST_SEEN, **given) > 0

    @writing(unless=_is_seen_recently)
    def update_last_seen(
        self, device_id: str, at: datetime | None = None, *, granularity: timedelta = SEEN_GRANULARITY
    ) -> bool:
        """Store the time at which a device was last seen. Return True if the method changed the row.

        Without `at=…`, or for a future time, store the current time. If the time would advance by less than
        `granularity=`, keep the row.
        """
        return self._unit.write(statements.SET_LAST_SEEN, **self._last_seen(device_id, at, granularity)) > 0

    def _last_seen(self, device_id: str, at: datetime | None, granularity: timedelta) -> Parameters:
        """Return the parameters of `SET_LAST_SEEN`. The parameter `:before` is the new time minus the granularity."""
        types.check_duration(granularity, "granularity", zero=True)
        at = types.not_after(self._unit.now(), at, "at")
        # With a granularity below 1 ms, several calls could write equal timestamps.
        before = types.earlier(at, max(granularity, types.MILLISECOND))
        return {"device_id": self._searched(device_id, "device_id"), "at": at, "before": before}

    @writing()
    def delete(self, device_id: str, *, force: bool = False) -> bool:
        """Delete a device and its idempotency keys. Keep the device's nonces. Return False if the device did not exist.

        Raises:
            LastAdminError: if the device is the last approved admin, and `force=False`.
        """
        device = self._searched(device_id, "device_id")
        self._require_another_admin(device_id, force=force)
        # A trigger deletes the keys. A foreign key of the application can refuse the deletion of the device or a key.
        with self._unit.savepoint(), self._timed_changes():
            return self._unit.write(statements.DELETE, device_id=device) > 0

    @writing()
    def set_secret(
        self,
        device_id: str,
        *,
        expected_secret_hash: str,
        secret_hash: str,
        proof_verifier: str | None,
        previous_until: datetime | None = None,
    ) -> bool:
        """Replace the expected hash by the hash of a new secret. If the device is absent or has another hash, return
        False. To compute the new hash too, call `Database.rotate_secret()`.

        Args:
            device_id: id of the device.
            expected_secret_hash: expected hash of the old secret.
            secret_hash: hash of the new secret.
            proof_verifier: verifier for the new secret, or None if the device can't make proofs.
            previous_until: end of the overlap, during which the old secret also works. Default: no overlap.

        Raises:
            DeviceNotApprovedError: if `previous_until` is given and the device is not approved.
            InvalidArgumentError: if a text is invalid or `previous_until` has no time zone.
        """
        expected = self._searched(expected_secret_hash, "expected_secret_hash")
        values = {
            "device_id": self._searched(device_id, "device_id"),
            "expected": expected,
            "replacement": types.check_name(secret_hash, "secret_hash"),
            "verifier": None if proof_verifier is None else types.check_name(proof_verifier, "proof_verifier"),
            "previous": None if previous_until is None else expected,
            "until": None if previous_until is None else types.check_timestamp(previous_until, "previous_until"),
        }
        if previous_until is not None:
            with suppress(errors.DeviceNotFoundError):
                if not self._lock_state(device_id)[0]:
                    raise errors.DeviceNotApprovedError(device_id)
        with self._timed_changes():
            return self._unit.write(statements.SET_SECRET, **values) > 0

    @writing()
    def rehash_secret(self, device_id: str, *, expected_secret_hash: str, secret_hash: str) -> bool:
        """Replace the expected hash by a new hash of the same secret. If the stored hash differs, return False."""
        values = {
            "device_id": self._searched(device_id, "device_id"),
            "expected": self._searched(expected_secret_hash, "expected_secret_hash"),
            "replacement": types.check_name(secret_hash, "secret_hash"),
        }
        with self._timed_changes():
            return self._unit.write(statements.REHASH, **values) > 0

    def _require_another_admin(self, device_id: str, *, force: bool) -> None:
        """Raise LastAdminError if the device is the only approved admin."""
        device = self._searched(device_id, "device_id")
        if types.check_flag(force, "force") or not self._unit.one(statements.IS_ADMIN, device_id=device):
            return
        if self._unit.all(statements.APPROVED_ADMINS, device_id=device) == [True]:
            raise errors.LastAdminError(device_id)

    # The feed of device changes

    @contextmanager
    def _timed_changes(self) -> Iterator[None]:
        """Store the unit's time in the device changes that the block causes. The triggers store the database's time."""
        now = self._unit.now()
        if self._unit.settings.engine.dialect_name == "postgresql":
            self._unit.one(statements.SET_TIME, now=now)  # until the end of the transaction
            yield
        else:
            newest = self.newest_change()
            yield
            self._unit.write(statements.UPDATE_TIMES, after=newest, now=now)

    @reading
    def changes(self, *, after: int = 0, limit: int = 100) -> Sequence[DeviceChange]:
        """Return the device changes after the given number, oldest first.

        If the given number no longer exists, return one change with `kind="reset"`. After a change with `kind="reset"`,
        read all devices again. In the next call, pass the change's number in `after=`.

        Args:
            after: number of the last change that the caller has read. The number 0 is the beginning of a new feed.
                After a sweep or a restore, the number 0 can be absent, so the method returns a `reset` change.
            limit: maximum number of changes, 1 or more.
        """
        rows = self._unit.all(
            statements.CHANGES, after=statements.check_number(after), limit=types.check_limit(limit) + 1
        )
        return statements.changes_of(rows, after)

    @reading
    def newest_change(self) -> int:
        """Return the number of the newest device change."""
        return self._unit.one(statements.NEWEST) or 0

    @writing()
    def delete_changes(self, *, before: datetime, limit: int = 100) -> int:
        """Delete device changes, oldest first. Stop at the first change after the given time. Always keep the newest
        change. Return the number of deleted changes, which is at most the limit.
        """
        return self._unit.write(
            statements.DELETE_OLD, before=types.check_timestamp(before, "before"), limit=types.check_limit(limit)
        )


E = TypeVar("E", Role, DeviceStatus)


def _member(kind: type[E], value: E | None, what: str) -> E | None:
    """Return the enum's member for the value, or None for None. If no member matches, raise InvalidArgumentError."""
    try:
        return None if value is None else kind(value)
    except ValueError:
        raise errors.InvalidArgumentError(f"{what} must be one of {', '.join(kind)}") from None
