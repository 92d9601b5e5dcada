"""How much of a database strangers may use."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from homeagent.errors import InvalidArgumentError
from homeagent.models.types import check_duration, check_limit

__all__ = ["Limits"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds on what callers can create or use up before an administrator lets them in.

    Args:
        pending_devices: how many devices may wait for their approval. At the bound `Database.pair` raises
            PendingLimitError; 0 closes pairing.
        pending_ttl: how long a device may wait. A sweep removes a device that has waited for longer.
        waiting_hashes: how many slow hashes may wait for their turn in a process, 1 or more.
        failed_checks_per_minute: how many checks of one id may fail within a minute in a process, 1 or more.

    Raises:
        InvalidArgumentError: one of them is out of its bounds.
    """

    pending_devices: int = 1_000
    pending_ttl: timedelta = timedelta(days=30)
    waiting_hashes: int = 16
    failed_checks_per_minute: int = 30

    def __post_init__(self) -> None:
        if type(self.pending_devices) is not int or self.pending_devices < 0:
            raise InvalidArgumentError("pending_devices must be a whole number, 0 or more")
        check_duration(self.pending_ttl, "pending_ttl")
        check_limit(self.waiting_hashes, "waiting_hashes")
        check_limit(self.failed_checks_per_minute, "failed_checks_per_minute")
