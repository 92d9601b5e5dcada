"""Counters of one open database, without a lock. CPython does not switch threads within the statement `x += 1`."""

from __future__ import annotations

from collections import deque
from datetime import UTC, datetime
from typing import TypeVar

from pydantic import BaseModel

from homeagent.errors import DatabaseError

_RECENT = 1024

N = TypeVar("N", int, float)


class LastFault(BaseModel, frozen=True):
    """The last error of the engine or of a scheduled backup. The engine does not record errors for invalid arguments.

    Attributes:
        kind: name of the error's class, such as `DiskFullError`.
        message: message of the error. The message contains no values of rows.
        at: time of the error by the system's clock.
    """

    kind: str
    message: str
    at: datetime


class DatabaseCounters(BaseModel, frozen=True):
    """Counters of one open database in this process since it was opened.

    Attributes:
        units: number of ended units: the sum of reads, commits and rollbacks.
        reads: number of ended read-only units.
        commits: number of committed write units. A batch of three units counts as three commits.
        rollbacks: number of write units that were rolled back.
        retries: number of times that a unit was run again.
        pool_waits: number of waits for a connection of the pool. On SQLite, `pool_waits` also counts the waits for the
            write lock.
        pool_wait_p50: median duration of the last 1,024 waits, in seconds. The value is None if no caller waited.
        pool_wait_p99: 99th percentile of the durations of the last 1,024 waits, in seconds. The value is None if no
            caller waited.
        groups: number of batches. A batch is a commit of two or more units together.
        group_size_p50: median size of the last 1,024 batches, in units. The value is None before the first batch.
        group_size_p99: 99th percentile of the sizes of the last 1,024 batches, in units. The value is None before the
            first batch.
        sweeps: number of ended sweeps.
        swept: number of rows that sweeps deleted.
        last_error: last error of the engine or of a scheduled backup. The value is None before the first error.
    """

    units: int = 0
    reads: int = 0
    commits: int = 0
    rollbacks: int = 0
    retries: int = 0
    pool_waits: int = 0
    pool_wait_p50: float | None = None
    pool_wait_p99: float | None = None
    groups: int = 0
    group_size_p50: int | None = None
    group_size_p99: int | None = None
    sweeps: int = 0
    swept: int = 0
    last_error: LastFault | None = None


class Counters:
    """Counts events of one open database. Each public attribute is a field of `DatabaseCounters`."""

    def __init__(self) -> None:
        self.reads: int = 0
        self.commits: int = 0
        self.rollbacks: int = 0
        self.retries: int = 0
        self.pool_waits: int = 0
        self.groups: int = 0
        self.sweeps: int = 0
        self.swept: int = 0
        self.last_error: LastFault | None = None
        self._waits: deque[float] = deque(maxlen=_RECENT)
        self._group_sizes: deque[int] = deque(maxlen=_RECENT)

    def waited(self, seconds: float) -> None:
        """Count a successful or failed wait for a connection."""
        self.pool_waits += 1
        self._waits.append(seconds)

    def grouped(self, size: int) -> None:
        """Count a commit that two or more units shared."""
        self.groups += 1
        self._group_sizes.append(size)

    def cleaned(self, rows: int) -> None:
        """Count an ended sweep and the rows that the sweep deleted."""
        self.sweeps += 1
        self.swept += rows

    def faulted(self, error: BaseException) -> None:
        """Keep a `DatabaseError` as the engine's last error. Ignore any other error, such as an invalid argument."""
        if isinstance(error, DatabaseError):
            self.failed(error)

    def failed(self, error: BaseException) -> None:
        """Keep an error of any class as the last error."""
        self.last_error = LastFault(kind=type(error).__name__, message=str(error), at=datetime.now(UTC))

    def snapshot(self) -> DatabaseCounters:
        """Return the current counters."""
        return DatabaseCounters(
            units=self.reads + self.commits + self.rollbacks,
            pool_wait_p50=_percentile(self._waits, 50),
            pool_wait_p99=_percentile(self._waits, 99),
            group_size_p50=_percentile(self._group_sizes, 50),
            group_size_p99=_percentile(self._group_sizes, 99),
            **{name: value for name, value in vars(self).items() if not name.startswith("_")},
        )


def _percentile(values: deque[N], percent: int) -> N | None:
    """Return a percentile by the nearest-rank method, or None without values."""
    # The call `list(values)` is atomic. Another thread can append values at any time.
    ordered = sorted(list(values))  # noqa: C414
    return ordered[(len(ordered) * percent - 1) // 100] if ordered else None
