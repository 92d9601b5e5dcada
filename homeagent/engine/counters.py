"""Counters of one open database. An update of a counter is cheap enough for every unit of work.

The counters are plain integers without a lock. CPython switches threads only at calls and backward jumps, and `x += 1`
on an attribute in `__slots__` contains neither. Bounded queues hold the last waits and group sizes.
"""

from __future__ import annotations

from collections import deque
from datetime import UTC, datetime
from typing import NamedTuple, TypeVar

from homeagent.errors import DatabaseError

__all__ = ["Counters", "CountersSnapshot", "LastError"]

_RECENT = 1024

N = TypeVar("N", int, float)


class LastError(NamedTuple):
    """The engine's last error.

    Attributes:
        kind: name of the error's class, such as `DiskFullError`.
        message: text of the error, which contains no stored values.
        at: time of the error, from the system's clock.
    """

    kind: str
    message: str
    at: datetime


class CountersSnapshot(NamedTuple):
    """Counters since the database was opened.

    A percentile is computed from the last 1,024 values, and is None without values.

    Attributes:
        units: number of ended units, which is the sum of reads, commits and rollbacks.
        reads: number of read-only units.
        commits: number of committed write units. Several units can share one commit.
        rollbacks: number of write units that were rolled back.
        retries: number of times that a unit was run again.
        pool_waits: number of times that a unit waited for a connection. A SQLite writer waits for the write lock.
        pool_wait_p50, pool_wait_p99: 50th and 99th percentile of the waits for a connection, in seconds.
        groups: number of commits that two or more units shared.
        group_size_p50, group_size_p99: 50th and 99th percentile of the number of units in a shared commit.
        sweeps: number of ended sweeps.
        swept: number of rows that the sweeps deleted.
        last_error: the engine's last error; None if there was no error.
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
    last_error: LastError | None = None


class Counters:
    """Counts events of one open database."""

    __slots__ = (
        "_group_sizes",
        "_last_error",
        "_waits",
        "commits",
        "groups",
        "pool_waits",
        "reads",
        "retries",
        "rollbacks",
        "sweeps",
        "swept",
    )

    def __init__(self) -> None:
        self.reads: int = 0
        self.commits: int = 0
        self.rollbacks: int = 0
        self.retries: int = 0
        self.pool_waits: int = 0
        self.groups: int = 0
        self.sweeps: int = 0
        self.swept: int = 0
        self._waits: deque[float] = deque(maxlen=_RECENT)
        self._group_sizes: deque[int] = deque(maxlen=_RECENT)
        self._last_error: LastError | None = None

    def waited(self, seconds: float) -> None:
        """Count a wait for a connection, successful or not."""
        self.pool_waits += 1
        self._waits.append(seconds)

    def grouped(self, size: int) -> None:
        """Count a commit that two or more units shared. The argument `size` is the number of units."""
        self.groups += 1
        self._group_sizes.append(size)

    def cleaned(self, rows: int) -> None:
        """Count an ended sweep and the rows that the sweep deleted."""
        self.sweeps += 1
        self.swept += rows

    def faulted(self, error: BaseException) -> None:
        """Keep a `DatabaseError` as the engine's last error. Ignore an error of any other class, such as an invalid
        argument.
        """
        if isinstance(error, DatabaseError):
            self._last_error = LastError(type(error).__name__, str(error), datetime.now(UTC))

    def snapshot(self) -> CountersSnapshot:
        """Return the current counters."""
        waits, sizes = self._waits, self._group_sizes
        return CountersSnapshot(
            units=self.reads + self.commits + self.rollbacks,
            reads=self.reads,
            commits=self.commits,
            rollbacks=self.rollbacks,
            retries=self.retries,
            pool_waits=self.pool_waits,
            pool_wait_p50=_percentile(waits, 50),
            pool_wait_p99=_percentile(waits, 99),
            groups=self.groups,
            group_size_p50=_percentile(sizes, 50),
            group_size_p99=_percentile(sizes, 99),
            sweeps=self.sweeps,
            swept=self.swept,
            last_error=self._last_error,
        )


def _percentile(values: deque[N], percent: int) -> N | None:
    """Return a percentile by the nearest-rank method; None if there are no values."""
    # Do not sort the deque itself, because another thread can append to the deque. The call `list(values)` copies the
    # deque in one step.
    ordered = sorted(list(values))  # noqa: C414
    return ordered[(len(ordered) * percent - 1) // 100] if ordered else None
