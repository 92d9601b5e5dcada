"""Sweep: delete expired rows in small batches. Each batch is a unit of work, so writers wait only briefly.

If a constraint refuses a batch, the sweep skips the refused rows. After a refusal, the sweep reads each expired row
only once.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, Self, get_args

from pydantic import BaseModel
from sqlalchemy import ColumnElement, and_, bindparam, delete, func, select, tuple_

from homeagent.clock import monotonic
from homeagent.engine.files.database_file import locate_file
from homeagent.engine.statements import LenientStatement
from homeagent.engine.target import refuse_address
from homeagent.errors import ConflictError, DatabaseClosedError, HomeAgentError, UnitStateError
from homeagent.models.device import PENDING, Device
from homeagent.models.idempotency_key import IdempotencyKey
from homeagent.models.nonce import Nonce
from homeagent.models.types import check_duration, check_flag, check_limit, check_wait, earlier
from homeagent.stores.device_statements import COUNT_OLD, OVERDUE
from homeagent.stores.idempotency_key_statements import EXPIRED as EXPIRED_KEY
from homeagent.stores.nonces import EXPIRED as EXPIRED_NONCE
from homeagent.stores.nonces import NONCE_GRACE
from homeagent.transaction import UnitSettings
from homeagent.unit_of_work import UnitOfWork

logger: logging.Logger = logging.getLogger("homeagent")

Kind = Literal["nonces", "idempotency_keys", "pending_devices", "device_changes"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_FIRST = datetime.min.replace(tzinfo=UTC)


class _Statements:
    def __init__(self, model: Any, expired: ColumnElement[bool], time: str = "expires_at") -> None:
        table = model.__table__
        key = list(table.primary_key.columns)
        order = [table.c[time], *key]
        self.names = [column.name for column in order]
        """Column names of a page. Each name is also a parameter of the statements."""
        after = tuple_(*(bindparam(column.name, type_=column.type) for column in order))
        self.page = LenientStatement[tuple[Any, ...]](
            select(*order).where(expired, tuple_(*order) > after).order_by(*order).limit(bindparam("limit"))
        )
        same = and_(*(column == bindparam(column.name, type_=column.type) for column in key))
        self.delete = LenientStatement[Any](delete(table).where(same, expired))
        self.count = LenientStatement[int](select(func.count()).select_from(table).where(expired))
        self.first = {column.name: _FIRST if column is table.c[time] else "" for column in order}


_STATEMENTS = {
    "nonces": _Statements(Nonce, EXPIRED_NONCE),
    "idempotency_keys": _Statements(IdempotencyKey, EXPIRED_KEY),
    "pending_devices": _Statements(Device, and_(PENDING, OVERDUE), "paired_at"),
}

_DELETE_BATCH: dict[Kind, Callable[[UnitOfWork, datetime, int], int]] = {
    "nonces": lambda unit, before, limit: unit.nonces.delete_expired(limit=limit),
    "idempotency_keys": lambda unit, before, limit: unit.idempotency_keys.delete_expired(limit=limit),
    "pending_devices": lambda unit, before, limit: unit.devices.delete_pending(paired_before=before, limit=limit),
    "device_changes": lambda unit, before, limit: unit.devices.delete_changes(before=before, limit=limit),
}


class ExpiredRows:
    """The expired rows of one table. The attribute `ExpiredRows.skipped` counts skipped rows for each constraint."""

    def __init__(self, settings: UnitSettings, kind: Kind, grace: timedelta, monotonic: Callable[[], float]) -> None:
        self._settings = settings
        self._kind = kind
        self._grace = grace
        self._statements: Any = _STATEMENTS.get(kind)
        self._monotonic = monotonic
        self._after: dict[str, Any] | None = None
        self.skipped: Counter[str] = Counter()

    def count(self) -> int:
        """Return the number of expired rows, including rows that sweeps skip."""
        with UnitOfWork(self._settings, read_only=True) as unit:
            times = self._times()
            if self._statements is None:
                return unit.one(COUNT_OLD, before=times["before"]) or 0
            return unit.one(self._statements.count, **times) or 0

    def _delete(self, limit: int) -> tuple[int, int, float]:
        """Delete a batch of at most `limit` rows. Return the number of deleted rows, the number of found rows, and the
        batch's duration in seconds. The found rows include the skipped rows. The duration includes the commit.
        """
        if self._after is None:
            try:
                with UnitOfWork(self._settings, read_only=False) as unit:
                    begun = self._monotonic()
                    count = _DELETE_BATCH[self._kind](unit, self._times()["before"], limit)
                return count, count, self._monotonic() - begun
            except ConflictError:
                if self._statements is None:
                    # Do not delete a change while an older change stays. A reader of the feed could not detect the
                    # deletion.
                    raise
                self._after = self._statements.first
        with UnitOfWork(self._settings, read_only=True) as unit:
            rows = unit.all(self._statements.page, **self._after, **self._times(), limit=limit)
        page = [dict(zip(self._statements.names, row, strict=True)) for row in rows]
        begun = self._monotonic()
        deleted = self._delete_each(page)
        self._after = page[-1] if page else self._after
        return deleted, len(page), self._monotonic() - begun

    def _delete_each(self, page: Sequence[dict[str, Any]]) -> int:
        if not page:
            return 0
        try:
            with UnitOfWork(self._settings, read_only=False) as unit:
                return sum(unit.write(self._statements.delete, **row, **self._times()) for row in page)
        except ConflictError as error:
            if len(page) == 1:
                self.skipped[_name(error)] += 1
                return 0
        half = len(page) // 2
        return self._delete_each(page[:half]) + self._delete_each(page[half:])

    def delete_all(self, batch_size: int, paused: Callable[[float], bool]) -> tuple[int, bool]:
        """Delete all rows in batches. Stop if `paused()` returns False. Return the number of deleted rows, and whether
        no row is left.
        """
        deleted = 0
        while True:
            count, found, held = self._delete(batch_size)
            deleted += count
            if found < batch_size:
                return deleted, True
            if not paused(min(max(held * _PAUSE_FACTOR, _SHORTEST_PAUSE), _LONGEST_PAUSE)):
                return deleted, False

    def _times(self) -> dict[str, datetime]:
        """Return the SQL parameters `:now` and `:before`. The parameter `:before` is `:now` minus the grace period."""
        now = self._settings.now()
        return {"now": now, "before": earlier(now, self._grace)}


def _name(error: ConflictError) -> str:
    if error.table is None:
        return "a constraint"
    return f"table {error.table}" if error.constraint is None else f"{error.constraint} of table {error.table}"


# Pauses after a batch, in seconds. The longer a batch held the write lock, the longer other writers get the lock.
_PAUSE_FACTOR = 4
_SHORTEST_PAUSE = 0.001
_LONGEST_PAUSE = 0.25


@dataclass(frozen=True, slots=True)
class BackupSchedule:
    """Schedule of a sweeper's backups.

    Args:
        directory: directory for the backups. The backup creates a missing directory with mode 0700.
        every: maximum age of the newest backup. The sweeper reads the age from the newest backup's manifest. Therefore
            a restart causes no additional backup. A second process with the same schedule makes no additional backup.
        keep: number of this database's backups to keep. Older backups are removed after a new backup is verified. With
            `keep=None`, no backup is removed.

    Raises:
        InvalidArgumentError: if `every` is not above zero, or `keep` is below 1. Also raised if the directory is not a
            path, or is a server's address.
    """

    directory: str | os.PathLike[str]
    every: timedelta = timedelta(days=1)
    keep: int | None = 7

    def __post_init__(self) -> None:
        refuse_address(self.directory)
        locate_file(self.directory)
        check_duration(self.every, "every")
        if self.keep is not None:
            check_limit(self.keep, "keep")


class SweepReport(BaseModel, frozen=True):
    """Result of a sweep.

    Attributes:
        nonces: number of deleted nonces.
        idempotency_keys: number of deleted idempotency keys.
        pending_devices: number of deleted devices that had waited too long for their approval.
        device_changes: number of deleted rows of the feed of device changes.
        more: True if the sweep ended early, so that expired rows can remain.
        skipped: number of skipped rows. A foreign key of the application prevents the deletion of such rows. The next
            sweep tries again. Skipped nonces and idempotency keys count as absent.
        constraints: constraints that prevented the deletion of expired rows. Each text names the constraint and its
            table.
    """

    nonces: int = 0
    idempotency_keys: int = 0
    pending_devices: int = 0
    device_changes: int = 0
    more: bool = False
    skipped: int = 0
    constraints: tuple[str, ...] = ()

    @property
    def deleted(self) -> int:
        """Number of deleted rows in all tables."""
        return self.nonces + self.idempotency_keys + self.pending_devices + self.device_changes


def sweep(
    settings: UnitSettings,
    *,
    batch_size: int = 100,
    time_budget: timedelta | None = None,
    dry_run: bool = False,
    stop: threading.Event | None = None,
    monotonic: Callable[[], float] = monotonic,
) -> SweepReport:
    """Delete expired rows in batches (see `Database.sweep`)."""
    check_limit(batch_size, "batch_size")
    check_flag(dry_run, "dry_run")
    deadline = None if time_budget is None else monotonic() + check_duration(time_budget, "time_budget").total_seconds()
    stopped = stop or threading.Event()
    limits = settings.limits
    graces = dict(zip(KINDS, (NONCE_GRACE, timedelta(0), limits.pending_ttl, limits.changes_kept), strict=True))
    removed = dict.fromkeys(KINDS, 0)
    skipped: Counter[str] = Counter()

    def paused(seconds: float) -> bool:
        return (deadline is None or monotonic() + seconds < deadline) and not stopped.wait(seconds)

    done = True
    for kind in KINDS:
        if done:
            rows = ExpiredRows(settings, kind, graces[kind], monotonic)
            if dry_run:
                removed[kind] = rows.count()
                continue
            removed[kind], done = rows.delete_all(batch_size, paused)
            skipped.update(rows.skipped)
    report = SweepReport.model_validate(
        {**removed, "more": not done, "skipped": skipped.total(), "constraints": tuple(sorted(skipped))}
    )
    if not dry_run:
        settings.engine.counters.cleaned(report.deleted)
    if report.skipped:
        logger.warning(
            "%d expired row(s) were skipped, because a constraint of an application's table keeps them: %s",
            report.skipped,
            ", ".join(report.constraints),
            extra={"event": "sweep_skipped", "skipped": report.skipped, "constraints": list(report.constraints)},
        )
    return report


class Sweeper:
    """Object that sweeps periodically in a daemon thread. The thread logs the error of a failed sweep, and continues.
    The thread ends if the database is closed.

    Args:
        run: function that sweeps once. The function gets an event, and stops if the event is set.
        every: pause between two sweeps, at most 24 days. The first sweep starts without a pause.
    """

    def __init__(self, run: Callable[[threading.Event], SweepReport], every: timedelta) -> None:
        self._run = run
        self._every = check_wait(every, "every").total_seconds()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        # The mutex is reentrant, because a signal handler can close the database.
        self._mutex = threading.RLock()

    @property
    def running(self) -> bool:
        """True if the sweeper's thread runs."""
        thread = self._thread
        return thread is not None and thread.is_alive()

    def start(self) -> None:
        """Start the thread. Raise UnitStateError if the sweeper runs already."""
        with self._mutex:
            if self.running:
                raise UnitStateError("this sweeper runs already: stop it first, or create another sweeper")
            self._stop = threading.Event()
            thread = threading.Thread(target=self._loop, args=(self._stop,), name="homeagent-sweeper", daemon=True)
            thread.start()
            # Store the thread after its start: an unstarted thread can't be joined.
            self._thread = thread

    def stop(self) -> None:
        """Stop the thread, and wait until the current batch ends. If the sweeper does not run, return at once."""
        with self._mutex:
            thread, self._thread = self._thread, None
            self._stop.set()
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def _loop(self, stop: threading.Event) -> None:
        while not stop.is_set():
            try:
                report = self._run(stop)
            except DatabaseClosedError:
                logger.info("the sweeper ends, because the database was closed", extra={"event": "sweeper_ended"})
                return
            except HomeAgentError as error:
                logger.warning(
                    "a sweep failed and will be tried again in %g s: %s",
                    self._every,
                    error,
                    extra={"event": "sweep_failed", "error": type(error).__name__, "retry_seconds": self._every},
                )
            except Exception as error:
                # An unexpected error must not end all later sweeps.
                logger.exception(
                    "a sweep failed and will be tried again in %g s",
                    self._every,
                    extra={"event": "sweep_failed", "error": type(error).__name__, "retry_seconds": self._every},
                )
            else:
                if report.deleted:
                    logger.info(
                        "swept %d nonce(s), %d idempotency key(s), %d pending device(s) and %d device change(s)",
                        report.nonces,
                        report.idempotency_keys,
                        report.pending_devices,
                        report.device_changes,
                        extra={
                            "event": "swept",
                            "nonces": report.nonces,
                            "idempotency_keys": report.idempotency_keys,
                            "pending_devices": report.pending_devices,
                            "device_changes": report.device_changes,
                            "more": report.more,
                        },
                    )
            stop.wait(self._every)
