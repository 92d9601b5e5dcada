"""What can be done with devices: pair, approve, revoke, see, delete."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from functools import cache
from typing import Any, NamedTuple, TypeVar

from sqlalchemy import and_, bindparam, delete, func, literal_column, not_, or_, select, update

from homeagent import models
from homeagent.engine.statements import Statement, constant
from homeagent.errors import (
    ApprovalChangedError,
    CorruptDatabaseError,
    DeviceExistsError,
    DeviceNotApprovedError,
    DeviceNotFoundError,
    InvalidArgumentError,
    LastAdminError,
    PendingLimitError,
)
from homeagent.frame_locals import clears_locals
from homeagent.models.device import PENDING, Device, DeviceStatus, Role
from homeagent.models.idempotency_key import IdempotencyKey
from homeagent.models.store_record import store_table
from homeagent.models.types import (
    MILLISECOND,
    check_duration,
    check_identifier,
    check_label,
    check_limit,
    check_optional_label,
    check_timestamp,
    earlier,
    not_after,
)
from homeagent.stores.store import Store, check_kind, reading, writing

__all__ = ["DeviceStore", "SecretHashes"]

SEEN_GRANULARITY = timedelta(minutes=1)

_columns: Any = Device.__table__.c
_keys: Any = IdempotencyKey.__table__.c

# Each device is in one of the two, whatever value is stored: `approved = 0` would leave out what is neither 0 nor 1.
_APPROVED = _columns.approved == True  # noqa: E712  an expression
_UNAPPROVED = _columns.approved.is_distinct_from(True)

_FIND = Statement[Device](select(Device).where(_columns.id == bindparam("id")), lock=True)


def _for_every_id(*columns: Any) -> Any:
    # One row, also if the device is absent: then as much is fetched and converted as if it were there.
    one_row = select(literal_column("1").label("one")).subquery("asked")
    return select(*columns).select_from(one_row.outerjoin(Device.__table__, _columns.id == bindparam("id")))


# A check reads no more than this. On SQLite, columns stored after a long `metadata` take longer to read if they hold
# a value, so that the verifier is not among those of a secret.
_SECRET_HASHES = Statement[tuple[str, str | None, datetime | None]](
    _for_every_id(
        func.coalesce(_columns.shared_secret_hash, constant("", _columns.shared_secret_hash.type)),
        _columns.previous_secret_hash,
        _columns.previous_secret_expires_at,
    )
)
_VERIFIER = Statement[str | None](_for_every_id(_columns.proof_verifier))
_PROOF_SECRETS = Statement[tuple[str | None, str | None]](
    select(store_table.c.proof_key, _columns.proof_verifier).select_from(
        store_table.outerjoin(Device.__table__, _columns.id == bindparam("id"))
    )
)
_COUNT_PENDING = Statement[int](
    select(func.count()).select_from(
        select(_columns.paired_at).where(PENDING).limit(bindparam("limit")).subquery()  # the column of the index
    )
)
# On PostgreSQL, pairings wait for one another here until the end of their units, so that each counts the others.
_LOCK_STORE = Statement[int](select(store_table.c.id), lock=True)
OVERDUE: Any = _columns.paired_at <= bindparam("before")
"""Whether a sweep deletes a pending device; `before` is now less `Limits.pending_ttl`."""

_DELETE_PENDING = Statement[Device](
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
_CREATE = Statement[Device](
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
_UPDATE_METADATA = Statement[Device](
    update(Device).where(_columns.id == bindparam("device_id")).values({_columns.metadata: bindparam("value")}),
    returning=Device,
)
_APPROVE = Statement[Device](
    update(Device)
    .where(_columns.id == bindparam("device_id"))
    .values(
        approved=True,
        approved_at=bindparam("now"),
        revoked_at=None,
        revoked_reason=None,
        # Earlier versions and `uow.session` may have given a device that was not approved an overlap.
        previous_secret_hash=None,
        previous_secret_expires_at=None,
    )
)
_REVOKE = Statement[Device](
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
# A decision compares the columns in the database and reads no value, so that a value that can't be read prevents
# neither an approval nor a revocation. What is compared with None is None.
_STANDING = Statement[tuple[bool, bool, bool, bool | None, bool | None, bool | None]](
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
_IS_ADMIN = Statement[bool](
    select(_columns.role == constant(Role.ADMIN, _columns.role.type)).where(_columns.id == bindparam("device_id"))
)
# All approved admins are locked, in one order, before one of them is given up: of two who revoke each other at once
# the second waits, and then sees that it would be the last.
_APPROVED_ADMINS = Statement[bool](
    select(_columns.id == bindparam("device_id")).where(_columns.role == Role.ADMIN, _APPROVED).order_by(_columns.id),
    lock=True,
)
_not_seen = (
    _columns.id == bindparam("device_id"),
    or_(_columns.last_seen_at.is_(None), _columns.last_seen_at <= bindparam("before")),
)
_TO_BE_SEEN = Statement[str](select(_columns.id).where(*_not_seen))
_SEEN = Statement[Device](update(Device).where(*_not_seen).values(last_seen_at=bindparam("at")))
_DELETE = Statement[Device](delete(Device).where(_columns.id == bindparam("device_id")))
_DELETE_KEYS = Statement[IdempotencyKey](delete(IdempotencyKey).where(_keys.device_id == bindparam("device_id")))
_SET_SECRET = Statement[Device](
    update(Device)
    .where(_columns.id == bindparam("device_id"), _columns.shared_secret_hash == bindparam("expected"))
    .values(
        shared_secret_hash=bindparam("replacement"),
        proof_verifier=bindparam("verifier"),
        previous_secret_hash=bindparam("previous"),
        previous_secret_expires_at=bindparam("until"),
    )
)
_REHASH = Statement[Device](
    update(Device)
    .where(_columns.id == bindparam("device_id"), _columns.shared_secret_hash == bindparam("expected"))
    .values(shared_secret_hash=bindparam("replacement"))
)


@cache
def _list(*, approved: bool | None, by_role: bool, status: DeviceStatus | None, after: bool) -> Statement[Device]:
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
    if after:
        conditions.append(_columns.id > bindparam("after"))
    return Statement(select(Device).where(*conditions).order_by(_columns.id).limit(bindparam("limit")))


class SecretHashes(NamedTuple):
    """The columns of a device that a check of its secret reads, named as in `Device`.

    The values of an absent device are an empty hash, which no secret has, and None.
    """

    shared_secret_hash: str
    previous_secret_hash: str | None
    previous_secret_expires_at: datetime | None


class _Standing(NamedTuple):
    """The state of a device, and whether the device has the expected values.

    `was_decided` is True if the device was approved or revoked before: a device that lost its approval without a
    revocation counts as revoked.
    """

    approved: bool
    revoked: bool
    was_decided: bool
    has_role: bool | None
    has_secret_hash: bool | None
    has_paired_at: bool | None


class DeviceStore(Store):
    """The devices: who may enter."""

    __slots__ = ()

    @writing()
    @clears_locals
    def create(self, device: models.DeviceCreate) -> Device:
        """Add a device that holds a hash already, always unapproved; `Database.pair` makes the hash itself.

        Raises:
            DeviceExistsError: the id is taken; that device is left as it is.
        """
        check_kind(device, models.DeviceCreate, "device")
        created = self._unit.write_one(
            _CREATE,
            id=device.id,
            role=device.role,
            shared_secret_hash=device.shared_secret_hash,
            now=self._unit.now(),
            metadata=device.metadata_,
            proof_verifier=device.proof_verifier,
        )
        if created is None:
            raise DeviceExistsError(device.id)
        return created

    @reading
    def find_by_id(self, device_id: str) -> Device | None:
        """Return the device, None where it is absent. In a write unit it may be decided on."""
        return self._unit.one(_FIND, id=check_identifier(device_id, "device_id"))

    @reading
    def get(self, device_id: str) -> Device:
        """Return the device. In a write unit it may be decided on.

        Raises:
            DeviceNotFoundError: it is absent.
        """
        device = self._unit.one(_FIND, id=check_identifier(device_id, "device_id"))
        if device is None:
            raise DeviceNotFoundError(device_id)
        return device

    @reading
    def find_secret_hashes(self, device_id: str) -> SecretHashes:
        """Return what a secret of this device is checked against. An absent device costs the same."""
        row = self._unit.one(_SECRET_HASHES, id=check_identifier(device_id, "device_id"))
        assert row is not None  # noqa: S101  the outer join has a row for every id
        return SecretHashes(*row)

    @reading
    def find_proof_verifier(self, device_id: str) -> str | None:
        """Return what a proof of this device is checked against, None if it is absent or has no verifier."""
        return self._unit.one(_VERIFIER, id=check_identifier(device_id, "device_id"))

    @reading
    def find_proof_secrets(self, device_id: str) -> tuple[str, str | None]:
        """Return the store's proof key, and the device's verifier or None. An absent device costs the same.

        Raises:
            CorruptDatabaseError: the store has lost its proof key.
        """
        key, verifier = self._unit.one(_PROOF_SECRETS, id=check_identifier(device_id, "device_id")) or (None, None)
        if key is None:
            raise CorruptDatabaseError("the table `store` has lost its proof key: restore the newest good backup")
        return key, verifier

    @reading
    def count_pending(self, *, limit: int) -> int:
        """Count the devices that wait for their first approval, up to a limit.

        Args:
            limit: where to stop counting, 1 or more.
        """
        return self._unit.one(_COUNT_PENDING, limit=check_limit(limit)) or 0

    @writing()
    def require_pending_room(self, limit: int) -> None:
        """Raise if more devices wait for their approval than may. Other pairings wait until this unit ends.

        Args:
            limit: how many may wait, a device that this unit has created included.

        Raises:
            PendingLimitError: more wait.
        """
        self._unit.one(_LOCK_STORE)
        if self.count_pending(limit=limit + 1) > limit:
            raise PendingLimitError(limit)

    @writing()
    def delete_pending(self, *, paired_before: datetime, limit: int = 100) -> int:
        """Remove devices that have waited for their approval since before a time, longest first, and return how many.

        Args:
            paired_before: those that paired at this time or earlier.
            limit: how many at most, 1 or more.
        """
        before = check_timestamp(paired_before, "paired_before")
        return self._unit.write(_DELETE_PENDING, before=before, limit=check_limit(limit))

    @reading
    def list(
        self,
        *,
        approved: bool | None = None,
        role: Role | None = None,
        status: DeviceStatus | None = None,
        limit: int = 100,
        after: str | None = None,
    ) -> Sequence[Device]:
        """Return a page of devices, ordered by id.

        Args:
            approved: only those that are, or are not; None for both.
            role: only those with this role; None for all.
            status: only those that are pending, approved or revoked; None for all.
            limit: how many at most, 1 or more.
            after: the last id of the page before; None for the first page.
        """
        if approved is not None and not isinstance(approved, bool):
            raise InvalidArgumentError("approved must be True, False or None")
        role = None if role is None else _member(Role, role, "role")
        status = None if status is None else _member(DeviceStatus, status, "status")
        statement = _list(approved=approved, by_role=role is not None, status=status, after=after is not None)
        return self._unit.all(
            statement,
            limit=check_limit(limit),
            role=role,
            after=None if after is None else check_identifier(after, "after"),
        )

    @writing()
    def update(self, device_id: str, changes: models.DeviceUpdate) -> Device:
        """Change what was given in `changes`, and return the device as it is now.

        Raises:
            DeviceNotFoundError: it is absent.
        """
        check_identifier(device_id, "device_id")
        check_kind(changes, models.DeviceUpdate, "changes")
        if "metadata_" not in changes.model_fields_set:
            return self.get(device_id)
        device = self._unit.write_one(_UPDATE_METADATA, device_id=device_id, value=changes.metadata_)
        if device is None:
            raise DeviceNotFoundError(device_id)
        return device

    @writing()
    @clears_locals
    def approve(
        self,
        device_id: str,
        *,
        expected_role: Role | None = None,
        expected_secret_hash: str | None = None,
        expected_paired_at: datetime | None = None,
        expected_status: DeviceStatus | None = None,
    ) -> bool:
        """Let a device in, if it still is what the admin looked at.

        Args:
            device_id: the device, pending or revoked.
            expected_role: the role that was shown; None to approve any.
            expected_secret_hash: the hash of the secret that it paired with.
            expected_paired_at: when it paired: another instant means another device under the same id.
            expected_status: the status that was shown. None approves a pending device only: a revoked device needs
                `DeviceStatus.REVOKED`. A device that is approved already never raises for its status.

        Returns:
            False where it was approved already, and nothing was written.

        Raises:
            DeviceNotFoundError: it is absent.
            ApprovalChangedError: it has another role, secret or status, or paired anew; or it is revoked and
                `expected_status` does not say so.
        """
        if expected_role is not None:
            expected_role = _member(Role, expected_role, "expected_role")
        if expected_secret_hash is not None:
            check_label(expected_secret_hash, "expected_secret_hash")
        if expected_paired_at is not None:
            expected_paired_at = check_timestamp(expected_paired_at, "expected_paired_at")
        if expected_status is not None:
            expected_status = _member(DeviceStatus, expected_status, "expected_status")
        device = self._standing(
            device_id, role=expected_role, secret_hash=expected_secret_hash, paired_at=expected_paired_at
        )
        if expected_role is not None and not device.has_role:
            raise ApprovalChangedError(device_id, "role")
        if expected_secret_hash is not None and not device.has_secret_hash:
            raise ApprovalChangedError(device_id, "secret")
        if expected_paired_at is not None and not device.has_paired_at:
            raise ApprovalChangedError(device_id, "time of pairing")
        if device.approved:
            return False
        status = DeviceStatus.REVOKED if device.was_decided else DeviceStatus.PENDING
        if status is not (expected_status or DeviceStatus.PENDING):
            raise ApprovalChangedError(device_id, "status")
        self._unit.write(_APPROVE, device_id=device_id, now=self._unit.now())
        return True

    @writing()
    def revoke(self, device_id: str, *, reason: str | None = None, force: bool = False) -> bool:
        """Keep a device out until an explicit `approve`. Its nonces and idempotency keys stay.

        Args:
            device_id: the device, pending or approved.
            reason: what an admin reads later; None for no reason given.
            force: whether even the last approved admin may go.

        Returns:
            False where it was revoked already, and nothing was written.

        Raises:
            DeviceNotFoundError: it is absent.
            LastAdminError: it is the last approved admin.
        """
        if reason is not None:
            check_label(reason, "reason")
        self._spare_last_admin(device_id, force=force)
        device = self._standing(device_id)
        if not device.approved and device.revoked:
            return False
        self._unit.write(_REVOKE, device_id=device_id, now=self._unit.now(), reason=reason)
        return True

    def _standing(
        self,
        device_id: str,
        *,
        role: Role | None = None,
        secret_hash: str | None = None,
        paired_at: datetime | None = None,
    ) -> _Standing:
        """Return whether a device is approved or revoked, and whether it has these values; None is not compared.

        Raises:
            DeviceNotFoundError: it is absent.
        """
        check_identifier(device_id, "device_id")
        found = self._unit.one(_STANDING, device_id=device_id, role=role, secret_hash=secret_hash, paired_at=paired_at)
        if found is None:
            raise DeviceNotFoundError(device_id)
        return _Standing(*found)

    def _seen_lately(
        self, device_id: str, at: datetime | None = None, *, granularity: timedelta = SEEN_GRANULARITY
    ) -> tuple[bool, bool]:
        check_identifier(device_id, "device_id")
        _, before = self._seen(at, granularity)
        return self._unit.one(_TO_BE_SEEN, device_id=device_id, before=before) is None, False

    @writing(unless=_seen_lately)
    def update_last_seen(
        self, device_id: str, at: datetime | None = None, *, granularity: timedelta = SEEN_GRANULARITY
    ) -> bool:
        """Remember when a device was seen. Never creates one, never moves back, never un-revokes.

        Args:
            device_id: the device.
            at: when; None for now. A time later than now counts as now.
            granularity: how much later than the instant on record it must be to be written.

        Returns:
            False where nothing was written: the device is absent, or was seen so shortly before.
        """
        check_identifier(device_id, "device_id")
        at, before = self._seen(at, granularity)
        return self._unit.write(_SEEN, device_id=device_id, at=at, before=before) > 0

    def _seen(self, at: datetime | None, granularity: timedelta) -> tuple[datetime, datetime]:
        check_duration(granularity, "granularity", zero=True)
        at = not_after(self._unit.now(), at, "at")
        # Without any granularity an equal instant would still be written again and again.
        return at, earlier(at, max(granularity, MILLISECOND))

    @writing()
    def delete(self, device_id: str, *, force: bool = False) -> bool:
        """Remove a device and its idempotency keys. Its nonces stay, so that none can be used again.

        Returns:
            False where it was absent.

        Raises:
            LastAdminError: it is the last approved admin, and `force` is not set.
        """
        check_identifier(device_id, "device_id")
        self._spare_last_admin(device_id, force=force)
        if not self._unit.write(_DELETE, device_id=device_id):
            return False
        self._unit.write(_DELETE_KEYS, device_id=device_id)
        return True

    @writing()
    @clears_locals
    def set_secret(
        self,
        device_id: str,
        *,
        expected_secret_hash: str,
        secret_hash: str,
        proof_verifier: str | None,
        previous_until: datetime | None = None,
    ) -> bool:
        """Replace the secret's hash, if it still is the expected one; `Database.rotate_secret` makes the new one.

        Args:
            device_id: the device.
            expected_secret_hash: the hash that is to be replaced.
            secret_hash: the new one.
            proof_verifier: what the new secret's proofs are checked against; None for no proofs.
            previous_until: until when the old secret of an approved device serves as well; None for no longer.

        Returns:
            False where the device is absent or has another hash by now.

        Raises:
            DeviceNotApprovedError: `previous_until` was given and the device is pending or revoked.
            InvalidArgumentError: a hash or a verifier is no name, or `previous_until` has no time zone.
        """
        values = {
            "device_id": check_identifier(device_id, "device_id"),
            "expected": check_label(expected_secret_hash, "expected_secret_hash"),
            "replacement": check_label(secret_hash, "secret_hash"),
            "verifier": check_optional_label(proof_verifier, "proof_verifier"),
            "previous": None if previous_until is None else expected_secret_hash,
            "until": None if previous_until is None else check_timestamp(previous_until, "previous_until"),
        }
        if previous_until is not None:
            device = self._unit.one(_STANDING, device_id=device_id, role=None, secret_hash=None, paired_at=None)
            if device is not None and not device[0]:
                raise DeviceNotApprovedError(device_id)
        return self._unit.write(_SET_SECRET, **values) > 0

    @writing()
    @clears_locals
    def rehash_secret(self, device_id: str, *, expected_secret_hash: str, secret_hash: str) -> bool:
        """Replace the hash of the same secret by one made under newer parameters; False where it changed since."""
        return (
            self._unit.write(
                _REHASH,
                device_id=check_identifier(device_id, "device_id"),
                expected=check_label(expected_secret_hash, "expected_secret_hash"),
                replacement=check_label(secret_hash, "secret_hash"),
            )
            > 0
        )

    def _spare_last_admin(self, device_id: str, *, force: bool) -> None:
        check_identifier(device_id, "device_id")
        if force:
            return
        if not self._unit.one(_IS_ADMIN, device_id=device_id):
            return
        if self._unit.all(_APPROVED_ADMINS, device_id=device_id) == [True]:
            raise LastAdminError(device_id)


E = TypeVar("E", Role, DeviceStatus)


def _member(kind: type[E], value: E, what: str) -> E:
    try:
        return kind(value)
    except ValueError:
        raise InvalidArgumentError(f"{what} must be one of {', '.join(kind)}") from None
