"""Counters: what one open database did so far, cheap enough to count on every unit.

They are plain integers. CPython switches threads at calls and at jumps back, and never inside `x += 1` on a slot, so
that nothing is lost without a lock; waits and sizes go into bounded queues, the oldest of which drop out.
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
    """The last fault of the engine.

    Attributes:
        kind: the name of its class, such as `DiskFullError`.
        message: what it says; it holds no value of a row.
        at: when, by the system's clock.
    """

    kind: str
    message: str
    at: datetime


class CountersSnapshot(NamedTuple):
    """The counters at one moment, since the database was opened. Percentiles are of the last 1,024, None where none.

    Attributes:
        units: units that ended: `reads`, `commits` and `rollbacks` together.
        reads: read-only units.
        commits: write units that were committed, those that shared a commit each by itself.
        rollbacks: write units that were undone.
        retries: how often a unit was run again.
        pool_waits: how often a caller had to wait for a connection of the pool (for a writer: for the write lock).
        pool_wait_p50, pool_wait_p99: how long such a caller waited, in seconds.
        groups: commits that were shared by two units or more.
        group_size_p50, group_size_p99: how many units shared one.
        sweeps: sweeps that ended.
        swept: rows that they removed.
        last_error: the last fault of the engine; None for none.
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
    """Counts what happens in one open database."""

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
        self.reads = 0
        self.commits = 0
        self.rollbacks = 0
        self.retries = 0
        self.pool_waits = 0
        self.groups = 0
        self.sweeps = 0
        self.swept = 0
        self._waits: deque[float] = deque(maxlen=_RECENT)
        self._group_sizes: deque[int] = deque(maxlen=_RECENT)
        self._last_error: LastError | None = None

    def waited(self, seconds: float) -> None:
        """Count a caller that had to wait for a connection, whether or not the caller got one."""
        self.pool_waits += 1
        self._waits.append(seconds)

    def grouped(self, size: int) -> None:
        """Count a commit that this many units shared, 2 or more."""
        self.groups += 1
        self._group_sizes.append(size)

    def cleaned(self, rows: int) -> None:
        """Count a sweep that ended, and the rows that it removed."""
        self.sweeps += 1
        self.swept += rows

    def faulted(self, error: BaseException) -> None:
        """Remember an error where it is a fault of the engine; what an application is refused is none."""
        if isinstance(error, DatabaseError):
            self._last_error = LastError(type(error).__name__, str(error), datetime.now(UTC))

    def snapshot(self) -> CountersSnapshot:
        """Return the counters as they are now."""
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
    """Return the nearest-rank percentile, None of nothing."""
    # A copy by `list` is one call, which another thread can't append in the middle of.
    ordered = sorted(list(values))  # noqa: C414
    return ordered[(len(ordered) * percent - 1) // 100] if ordered else None
