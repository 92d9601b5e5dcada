"""What can be done with nonces: consume one, once."""

from __future__ import annotations

from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

from sqlalchemy import bindparam, delete, func, select, tuple_

from homeagent.engine.statements import Statement
from homeagent.errors import CorruptDatabaseError, NonceLimitError
from homeagent.frame_locals import clears_locals
from homeagent.models.nonce import Nonce
from homeagent.models.store_record import store_table
from homeagent.models.types import (
    check_duration,
    check_identifier,
    check_label,
    check_limit,
    check_timestamp,
    earlier,
    later,
)
from homeagent.stores.store import Store, reading, writing

__all__ = ["NONCE_GRACE", "NONCE_LIMIT", "Freshness", "NonceStore", "ReplayGuard"]

NONCE_GRACE = timedelta(hours=1)
"""How long a dead nonce keeps its row, so that a clock that is set back does not readmit it."""

NONCE_LIMIT = 10_000
"""How many live nonces a device may have."""

_table: Any = Nonce.__table__
_columns: Any = _table.c

_CONSUME = Statement[Nonce](
    lambda insert: (
        statement := insert(_table).values(
            nonce=bindparam("nonce"),
            device_id=bindparam("device_id"),
            created_at=bindparam("now"),
            expires_at=bindparam("expires_at"),
        )
    ).on_conflict_do_update(
        index_elements=["device_id", "nonce"],
        # A dead one counts as absent, whether or not cleanup has run.
        set_={"created_at": statement.excluded.created_at, "expires_at": statement.excluded.expires_at},
        where=_columns.expires_at <= bindparam("now"),
    )
)
_FIND = Statement[Nonce](
    select(Nonce).where(
        _columns.device_id == bindparam("device_id"),
        _columns.nonce == bindparam("nonce"),
        _columns.expires_at > bindparam("now"),
    )
)
_COUNT = Statement[int](
    select(func.count()).select_from(
        select(_columns.nonce)
        .where(_columns.device_id == bindparam("device_id"), _columns.expires_at > bindparam("now"))
        .limit(bindparam("limit"))
        .subquery()
    )
)
EXPIRED: Any = _columns.expires_at <= bindparam("before")
"""Whether a sweep deletes a nonce; `before` is now less the grace period."""

# Whoever sweeps on another host at the same moment takes other rows: SKIP LOCKED. SQLite has one writer anyway.
_DELETE_EXPIRED = Statement[Nonce](
    delete(Nonce).where(
        tuple_(_columns.device_id, _columns.nonce).in_(
            select(_columns.device_id, _columns.nonce)
            .where(EXPIRED)
            .order_by(_columns.expires_at)
            .limit(bindparam("limit"))
            .with_for_update(skip_locked=True)
        )
    )
)
COUNT_EXPIRED = Statement[int](select(func.count()).select_from(Nonce).where(EXPIRED))

FIND_RECORD = Statement[tuple[int, datetime | None]](select(store_table.c.epoch, store_table.c.restored_at))
"""The epoch of the store, and when it began."""


class Freshness(StrEnum):
    """What became of a signed message: only `FRESH` may enter."""

    FRESH = "fresh"
    STALE = "stale"
    """It was signed too long ago, or before the database was restored, where its nonce may have been forgotten."""
    FUTURE = "future"
    """It was signed by a clock that is too far ahead."""
    REPLAYED = "replayed"
    """Its nonce was used before."""


class NonceStore(Store):
    """The nonces that were consumed: replay protection."""

    __slots__ = ()

    @writing()
    @clears_locals
    def consume(self, device_id: str, nonce: str, *, expires_at: datetime, limit: int = NONCE_LIMIT) -> bool:
        """Use a nonce up, atomically: of all who try, one gets True.

        Call it in a unit of its own, after the signature was verified and before access is given: a rollback would
        make the nonce good again.

        Args:
            device_id: whose nonce it is; one device can't use up another's.
            nonce: the number used once.
            expires_at: the signed time plus the allowed skew. From then on the message itself is too old.
            limit: how many live ones the device may have, counted closely enough.

        Returns:
            False for a replay, also at the bound, and for what is over already.

        Raises:
            NonceLimitError: the nonce is new and the device has too many live ones. They are never evicted, which
                would let one in again.
        """
        check_identifier(device_id, "device_id")
        check_label(nonce, "nonce")
        check_limit(limit)
        return self._consume(device_id, nonce, check_timestamp(expires_at, "expires_at"), self._unit.now(), limit)

    def _consume(self, device_id: str, nonce: str, expires_at: datetime, now: datetime, limit: int) -> bool:
        if expires_at <= now:
            return False
        if not self._has_room(device_id, now, limit):
            if self._unit.one(_FIND, device_id=device_id, nonce=nonce, now=now) is not None:
                return False
            raise NonceLimitError(device_id, limit)
        return self._unit.write(_CONSUME, device_id=device_id, nonce=nonce, now=now, expires_at=expires_at) > 0

    @writing()
    @clears_locals
    def consume_signed(
        self, device_id: str, nonce: str, *, signed_at: datetime, skew: timedelta, limit: int = NONCE_LIMIT
    ) -> Freshness:
        """Judge a signed message's timestamp and use its nonce up, under one reading of the clock.

        Args:
            device_id: who signed it.
            nonce: the number used once that was signed.
            signed_at: the timestamp that was signed.
            skew: how far the signer's clock may be off, either way.
            limit: as in `consume`.

        Raises:
            NonceLimitError: as in `consume`.
        """
        check_identifier(device_id, "device_id")
        check_label(nonce, "nonce")
        check_limit(limit)
        signed_at = check_timestamp(signed_at, "signed_at")
        expires_at = later(signed_at, check_duration(skew, "skew"), "skew")
        now = self._unit.now()
        if expires_at <= now:
            return Freshness.STALE
        if signed_at - now > skew:
            return Freshness.FUTURE
        restored_at = self._restored_at()
        # What was consumed before the restore was signed no later than `skew` after that, by a clock ahead.
        if restored_at is not None and signed_at - restored_at <= skew:
            return Freshness.STALE
        fresh = self._consume(device_id, nonce, expires_at, now, limit)
        return Freshness.FRESH if fresh else Freshness.REPLAYED

    def _restored_at(self) -> datetime | None:
        # Asked once for each connection: no epoch begins while one is open. A server that is set back closes them all,
        # and a gateway that goes on by itself afterwards must not go by what it knew before.
        memory = self._unit.connection_memory
        if "restored_at" not in memory:
            record = self._unit.one(FIND_RECORD)
            if record is None:
                raise CorruptDatabaseError("the table `store` has lost its row: restore the newest good backup")
            _, memory["restored_at"] = record
        restored_at: datetime | None = memory["restored_at"]
        return restored_at

    def _has_room(self, device_id: str, now: datetime, limit: int) -> bool:
        """Tell whether the device may have one more nonce, and count that nonce if so."""
        # Counting at the bound costs as much as 40 inserts, so that is done again only after as many calls as half
        # the room that was left: other processes can overrun the bound by that much, and no more.
        rooms: dict[tuple[str, int], int] = self._unit.shared.setdefault("nonce_rooms", {})
        # What is left below one bound says nothing about a lower one.
        room = rooms.get((device_id, limit), 0)
        if room < 1:
            live = self._unit.one(_COUNT, device_id=device_id, now=now, limit=limit) or 0
            if live >= limit:
                return False
            if len(rooms) > 10_000:
                rooms.clear()
            room = max(1, (limit - live) // 2)
        rooms[device_id, limit] = room - 1
        return True

    @reading
    @clears_locals
    def find(self, device_id: str, nonce: str) -> Nonce | None:
        """Return a live nonce, None where it was never consumed or is over."""
        return self._unit.one(
            _FIND,
            device_id=check_identifier(device_id, "device_id"),
            nonce=check_label(nonce, "nonce"),
            now=self._unit.now(),
        )

    @writing()
    def delete_expired(self, *, limit: int = 100) -> int:
        """Remove the rows of nonces that have been dead for an hour, oldest first, and return how many.

        Args:
            limit: how many at most, 1 or more.
        """
        return self._unit.write(
            _DELETE_EXPIRED, before=earlier(self._unit.now(), NONCE_GRACE), limit=check_limit(limit)
        )


class ReplayGuard:
    """Lets each signed message in once, and only while it is fresh.

    Args:
        skew: how far a device's clock may be off, either way. A message is fresh from `skew` before its timestamp
            until `skew` after it, and its nonce is remembered for as long.
        limit: how many live nonces a device may have.

    Raises:
        InvalidArgumentError: the skew is not above zero, or the limit not 1 or more.
    """

    def __init__(self, *, skew: timedelta = timedelta(minutes=5), limit: int = NONCE_LIMIT) -> None:
        self.skew = check_duration(skew, "skew")
        self.limit = check_limit(limit)

    @clears_locals
    def check(self, nonces: NonceStore, device_id: str, nonce: str, *, signed_at: datetime) -> Freshness:
        """Judge a message and use its nonce up; call it in a unit of its own, after the signature was verified.

        Args:
            nonces: the store of that unit.
            device_id: who signed.
            nonce: the number used once that was signed.
            signed_at: the timestamp that was signed.

        Raises:
            NonceLimitError: the device has too many live nonces.
        """
        return nonces.consume_signed(device_id, nonce, signed_at=signed_at, skew=self.skew, limit=self.limit)
