"""Limits on the use of a database by devices that are not approved."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from homeagent.errors import InvalidArgumentError
from homeagent.models.types import check_duration, check_limit

__all__ = ["Limits"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits on what a caller without an approval can create or use up.

    Args:
        pending_devices: maximum number of pending devices. If the limit is reached, `Database.pair` raises
            PendingLimitError. With 0, no device can pair.
        pending_ttl: time after which a sweep deletes a pending device.
        waiting_hashes: maximum number of slow hashes that wait in one process, 1 or more.
        failed_checks_per_minute: maximum number of failed checks of one device id per minute in one process, 1 or more.

    Raises:
        InvalidArgumentError: if a value is out of range.
    """

    pending_devices: int = 1_000
    pending_ttl: timedelta = timedelta(days=30)
    waiting_hashes: int = 16
    failed_checks_per_minute: int = 30

    def __post_init__(self) -> None:
        if type(self.pending_devices) is not int or self.pending_devices < 0:
            raise InvalidArgumentError("pending_devices must be an int, 0 or more")
        check_duration(self.pending_ttl, "pending_ttl")
        check_limit(self.waiting_hashes, "waiting_hashes")
        check_limit(self.failed_checks_per_minute, "failed_checks_per_minute")
