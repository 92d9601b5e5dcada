from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from homeagent.errors import InvalidArgumentError
from homeagent.models.types import MAX_LIMIT, check_duration, check_limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits on the rows and the work that callers can cause. The page on limits describes how exact each limit is.
    Rows that already exceed a limit stay in the database.

    Args:
        pending_devices: maximum number of pending devices. If the limit is reached, `Database.pair` raises
            PendingLimitError. If the limit is 0, no device can pair.
        pending_ttl: time after which a sweep deletes a pending device.
        nonces_per_device: maximum number of unexpired nonces per device, 1 or more.
        keys_per_device: maximum number of unexpired idempotency keys per device, 1 or more.
        longest_ttl: longest time for which the store keeps a nonce or an idempotency key.
        waiting_hashes: maximum number of calls that wait for a slow hash, per process. Minimum: 1.
        failed_checks_per_minute: maximum number of failed secret checks per minute, device id and process. Minimum: 1.
        changes_kept: time after which a sweep deletes a device change from the feed. A sweep keeps the newest change.

    Raises:
        InvalidArgumentError: if a value is out of range.
    """

    pending_devices: int = 1_000
    pending_ttl: timedelta = timedelta(days=30)
    nonces_per_device: int = 10_000
    keys_per_device: int = 10_000
    longest_ttl: timedelta = timedelta(days=400)
    waiting_hashes: int = 16
    failed_checks_per_minute: int = 30
    changes_kept: timedelta = timedelta(days=7)

    def __post_init__(self) -> None:
        # `MAX_LIMIT` is too high, because `Database.pair` counts up to `pending_devices + 1`.
        if type(self.pending_devices) is not int or not 0 <= self.pending_devices < MAX_LIMIT:
            raise InvalidArgumentError(f"pending_devices must be a whole number from 0 to {MAX_LIMIT - 1:,}")
        for name in ("pending_ttl", "longest_ttl", "changes_kept"):
            check_duration(getattr(self, name), name)
        for name in ("nonces_per_device", "keys_per_device", "waiting_hashes", "failed_checks_per_minute"):
            check_limit(getattr(self, name), name)
