from __future__ import annotations

from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

from sqlalchemy import Integer, select, update

from homeagent.engine.statements import Statement, bindparams, constant, count, delete_first, equal
from homeagent.errors import CorruptDatabaseError, NonceLimitError
from homeagent.frame_locals import clears_locals
from homeagent.models import types
from homeagent.models.nonce import Nonce
from homeagent.models.store_record import store_table
from homeagent.stores.room import has_room
from homeagent.stores.store import Store, reading, writing

NONCE_GRACE = timedelta(hours=1)
"""Time for which the store keeps an expired nonce. If the clock is set back, the store must still refuse the nonce."""

_table: Any = Nonce.__table__
_columns: Any = _table.c

_NOW, _BEFORE = bindparams("now", "before").values()

_CONSUME = Statement[Nonce](
    lambda insert: (
        statement := insert(_table).values(**bindparams("nonce", "device_id", "expires_at"), created_at=_NOW)
    ).on_conflict_do_update(
        index_elements=["device_id", "nonce"],
        # An expired nonce counts as absent, even before a sweep.
        set_={"created_at": statement.excluded.created_at, "expires_at": statement.excluded.expires_at},
        where=_columns.expires_at <= _NOW,
    )
)
_FIND = Statement[Nonce](select(Nonce).where(equal(_table, "device_id", "nonce"), _columns.expires_at > _NOW))
# Value of `created_at` for a nonce that `forget()` released.
_RELEASED = constant(0, Integer())
_COUNTED = (equal(_table, "device_id"), _columns.expires_at > _NOW, _columns.created_at != _RELEASED)
_COUNT = count(_table, *_COUNTED)
_RELEASE = Statement[Nonce](update(Nonce).where(*_COUNTED).values(created_at=_RELEASED))
EXPIRED: Any = _columns.expires_at <= _BEFORE
"""SQL condition for nonces that a sweep deletes. The parameter `:before` is the current time minus `NONCE_GRACE`."""

_DELETE_EXPIRED = Statement[Nonce](delete_first(_table, _columns.expires_at, EXPIRED))
COUNT_EXPIRED = count(_table, EXPIRED)
FIND_RECORD = Statement[tuple[int, datetime | None]](select(store_table.c.epoch, store_table.c.restored_at))


class Freshness(StrEnum):
    """Result of the check of a signed message. Accept a message only if the result is `Freshness.FRESH`."""

    FRESH = "fresh"
    STALE = "stale"
    """The message is too old, or a restore perhaps removed the nonce."""
    FUTURE = "future"
    """The clock of the signer is too far ahead."""
    REPLAYED = "replayed"
    """The nonce was used before."""


class NonceStore(Store):
    """Store of consumed nonces, for protection against replays."""

    __slots__ = ()

    @writing()
    def consume(self, device_id: str, nonce: str, *, expires_at: datetime, limit: int | None = None) -> bool:
        """Consume a nonce. If several callers consume a device's nonce, at most one caller gets True. If the time
        `expires_at` has passed, return False.

        Check the signature before the call. Call the method in a separate unit, before the device gets access. A
        rollback of the unit makes the nonce usable again.

        Args:
            device_id: id of the signer. Two devices can use the same nonce.
            nonce: nonce of the signed message.
            expires_at: time at which the message expires: signed timestamp plus allowed skew.
            limit: maximum number of the device's unexpired nonces. A limit above `Limits.nonces_per_device` has no
                effect.

        Raises:
            NonceLimitError: if the nonce is new and the device has reached the limit. To make room, call `forget()`.
            InvalidArgumentError: if `expires_at` is more than `Limits.longest_ttl` ahead.
        """
        types.check_identifier(device_id, "device_id")
        types.check_label(nonce, "nonce")
        if limit is not None:
            types.check_limit(limit)
        expires_at, now = types.check_timestamp(expires_at, "expires_at"), self._unit.now()
        if expires_at <= now:
            return False
        self._check_ttl(expires_at - now, "the time until expires_at")
        return self._consume(device_id, nonce, expires_at, now, limit)

    def _consume(self, device_id: str, nonce: str, expires_at: datetime, now: datetime, limit: int | None) -> bool:
        """Store a nonce. If an unexpired nonce is already stored, return False. The caller must check the arguments."""
        unit = self._unit
        bound = unit.settings.limits.nonces_per_device
        bound = bound if limit is None else min(limit, bound)
        if not has_room(unit, "nonces", device_id, bound, now, self._count):
            if unit.one(_FIND, device_id=device_id, nonce=nonce, now=now) is not None:
                return False
            raise NonceLimitError(device_id, bound)
        return unit.write(_CONSUME, device_id=device_id, nonce=nonce, now=now, expires_at=expires_at) > 0

    def _count(self, device_id: str, now: datetime) -> int:
        """Return the number of nonces that count towards the device's limit."""
        return self._unit.one(_COUNT, device_id=device_id, now=now) or 0

    @writing()
    def consume_signed(
        self, device_id: str, nonce: str, *, signed_at: datetime, skew: timedelta, limit: int | None = None
    ) -> Freshness:
        """Check the timestamp of a signed message and consume the nonce.

        Args:
            device_id: id of the signer.
            nonce: nonce of the signed message.
            signed_at: timestamp of the signed message.
            skew: allowed difference between the signer's clock and the gateway's clock, at most `Limits.longest_ttl`.
            limit: see `consume()`.

        Raises:
            NonceLimitError: see `consume()`.
        """
        types.check_identifier(device_id, "device_id")
        types.check_label(nonce, "nonce")
        if limit is not None:
            types.check_limit(limit)
        signed_at = types.check_timestamp(signed_at, "signed_at")
        self._check_ttl(skew, "skew")
        now = self._unit.now()
        # Refuse a future time before `types.later()` adds the skew. The sum could exceed the year 9999.
        if signed_at - now > skew:
            return Freshness.FUTURE
        expires_at = types.later(signed_at, skew, "skew")
        if expires_at <= now:
            return Freshness.STALE
        restored_at = self._restored_at()
        # Refuse an older message, because the restore can have removed its nonce.
        if restored_at is not None and signed_at - restored_at <= skew:
            return Freshness.STALE
        fresh = self._consume(device_id, nonce, expires_at, now, limit)
        return Freshness.FRESH if fresh else Freshness.REPLAYED

    def _restored_at(self) -> datetime | None:
        """Return the time of the last restore. The time can't change while a connection is open."""
        memory = self._unit.connection_memory
        if "restored_at" not in memory:
            record = self._unit.one(FIND_RECORD)
            if record is None:
                raise CorruptDatabaseError("the table `store` has lost its row: restore the newest good backup")
            _, memory["restored_at"] = record
        restored_at: datetime | None = memory["restored_at"]
        return restored_at

    @reading
    @clears_locals
    def find(self, device_id: str, nonce: str) -> Nonce | None:
        """Return a consumed nonce, or None if the nonce is absent or expired."""
        return self._unit.one(
            _FIND,
            device_id=self._searched(device_id, "device_id"),
            nonce=self._searched(nonce, "nonce"),
            now=self._unit.now(),
        )

    @writing()
    def forget(self, device_id: str) -> int:
        """Make room for new nonces of a device. Stored nonces no longer count towards the device's limit. Return the
        number of released nonces.

        The rows stay until expiry, so the store still refuses replays. Before the call, choose a smaller skew or an
        earlier `expires_at`. With the old skew, the device could reach the limit again.
        """
        device = self._searched(device_id, "device_id")
        return self._unit.write(_RELEASE, device_id=device, now=self._unit.now())

    @writing()
    def delete_expired(self, *, limit: int = 100) -> int:
        """Delete nonces that expired at least an hour ago, oldest first. Return the number of deleted nonces, which is
        at most the limit.
        """
        return self._unit.write(
            _DELETE_EXPIRED, before=types.earlier(self._unit.now(), NONCE_GRACE), limit=types.check_limit(limit)
        )


class ReplayGuard:
    """Guard that accepts a signed message once, while the message is fresh.

    Args:
        skew: allowed difference between a device's clock and the gateway's clock.
        limit: maximum number of a device's unexpired nonces. A limit above `Limits.nonces_per_device` has no effect.

    Raises:
        InvalidArgumentError: if the skew is below 1 ms or the limit below 1.
    """

    def __init__(self, *, skew: timedelta = timedelta(minutes=5), limit: int | None = None) -> None:
        self.skew: timedelta = types.check_duration(skew, "skew")
        self.limit: int | None = None if limit is None else types.check_limit(limit)

    @clears_locals
    def check(self, nonces: NonceStore, device_id: str, nonce: str, *, signed_at: datetime) -> Freshness:
        """Check the timestamp, and consume the nonce (see `NonceStore.consume_signed()`). Call the method in a separate
        unit, after the check of the signature.
        """
        return nonces.consume_signed(device_id, nonce, signed_at=signed_at, skew=self.skew, limit=self.limit)
