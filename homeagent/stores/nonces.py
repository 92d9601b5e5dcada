"""What can be done with nonces: consume one, once."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import bindparam, delete, func, select, tuple_

from homeagent.engine.statements import Statement
from homeagent.errors import NonceLimitError
from homeagent.models.nonce import Nonce
from homeagent.models.types import check_identifier, check_instant, check_label, check_limit
from homeagent.stores.store import Store

__all__ = ["NONCE_GRACE", "NonceStore"]

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
# Whoever sweeps on another host at the same moment takes other rows: SKIP LOCKED. SQLite has one writer anyway.
_DELETE_EXPIRED = Statement[Nonce](
    delete(Nonce).where(
        tuple_(_columns.device_id, _columns.nonce).in_(
            select(_columns.device_id, _columns.nonce)
            .where(_columns.expires_at <= bindparam("before"))
            .order_by(_columns.expires_at)
            .limit(bindparam("limit"))
            .with_for_update(skip_locked=True)
        )
    )
)
COUNT_EXPIRED = Statement[int](
    select(func.count()).select_from(Nonce).where(_columns.expires_at <= bindparam("before"))
)


class NonceStore(Store):
    """The nonces that were consumed: replay protection."""

    __slots__ = ()

    def consume(self, device_id: str, nonce: str, *, expires_at: datetime) -> bool:
        """Use a nonce up, atomically: of all who try, one gets True.

        Call it in a unit of its own, after the signature was verified and before access is given: a rollback would
        make the nonce good again.

        Args:
            device_id: whose nonce it is; one device can't use up another's.
            nonce: the number used once.
            expires_at: the signed time plus the allowed skew. From then on the message itself is too old.

        Returns:
            False for a replay, and for what is over already.

        Raises:
            NonceLimitError: the device has too many live ones. They are never evicted, which would let one in again.
        """
        check_identifier(device_id, "device_id")
        check_label(nonce, "nonce")
        expires_at = check_instant(expires_at, "expires_at")
        now = self._unit.now()
        if expires_at <= now:
            return False
        self._make_room(device_id, now)
        return self._unit.write(_CONSUME, device_id=device_id, nonce=nonce, now=now, expires_at=expires_at) > 0

    def _make_room(self, device_id: str, now: datetime) -> None:
        # Counting at the bound costs as much as 40 inserts, so that is done again only after as many calls as half
        # the room that was left: other processes can overrun the bound by that much, and no more.
        rooms: dict[str, int] = self._unit.shared.setdefault("nonce_rooms", {})
        room = rooms.get(device_id, 0)
        if room < 1:
            live = self._unit.one(_COUNT, device_id=device_id, now=now, limit=NONCE_LIMIT) or 0
            if live >= NONCE_LIMIT:
                raise NonceLimitError(device_id, NONCE_LIMIT)
            if len(rooms) > 10_000:
                rooms.clear()
            room = max(1, (NONCE_LIMIT - live) // 2)
        rooms[device_id] = room - 1

    def find(self, device_id: str, nonce: str) -> Nonce | None:
        """Return a live nonce, None where it was never consumed or is over."""
        return self._unit.one(
            _FIND,
            device_id=check_identifier(device_id, "device_id"),
            nonce=check_label(nonce, "nonce"),
            now=self._unit.now(),
        )

    def delete_expired(self, *, limit: int = 100) -> int:
        """Remove the rows of nonces that have been dead for an hour, oldest first, and return how many.

        Args:
            limit: how many at most, 1 or more.
        """
        return self._unit.write(_DELETE_EXPIRED, before=self._unit.now() - NONCE_GRACE, limit=check_limit(limit))
