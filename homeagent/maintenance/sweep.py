"""Cleanup: expired rows are deleted in small batches, each a unit of its own, so that no writer waits long for one."""

from __future__ import annotations

import logging
import os
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Self

from pydantic import BaseModel, ConfigDict

from homeagent.clock import monotonic
from homeagent.engine.target import refuse_address
from homeagent.errors import DatabaseClosedError, HomeAgentError, UnitStateError
from homeagent.maintenance.expired_rows import ExpiredRows, Kind
from homeagent.maintenance.pace import Pace
from homeagent.models.types import check_duration, check_limit, check_wait
from homeagent.stores.nonces import NONCE_GRACE
from homeagent.unit_of_work import UnitSettings

__all__ = ["BackupSchedule", "SweepReport", "Sweeper", "sweep"]

logger = logging.getLogger("homeagent")

# A row lies in a page of its own, nearly always, and SQLite moves a thousand pages from the log into the file at once,
# in the middle of a commit. Where somebody waits meanwhile it is done sooner, in a turn that does nothing else.
_ROWS_IN_LOG = 250


@dataclass(frozen=True, slots=True)
class BackupSchedule:
    """Backups that a sweeper makes by itself.

    Args:
        directory: where they go; made 0700 where it is missing.
        every: how old the newest one there may get. What counts is its manifest, so that a restart makes none too
            many, and processes that share a schedule make one between them.
        keep: how many stay there; older ones of this database are removed once a new one is verified. None for all.

    Raises:
        InvalidArgumentError: `every` is not above zero, or `keep` not 1 or more, or `directory` is a server's address.
    """

    directory: str | os.PathLike[str]
    every: timedelta = timedelta(days=1)
    keep: int | None = 7

    def __post_init__(self) -> None:
        refuse_address(self.directory)
        check_duration(self.every, "every")
        if self.keep is not None:
            check_limit(self.keep, "keep")


class SweepReport(BaseModel):
    """What a sweep did.

    Attributes:
        nonces: rows of dead nonces that were removed.
        idempotency_keys: rows of dead idempotency keys that were removed.
        pending_devices: devices that were removed, since they had waited for their approval for too long.
        more: whether the time budget ended it before all was done.
        skipped: rows of expired nonces and keys that a constraint of an own table keeps. They stay, and count as
            absent; the next sweep tries them again.
        constraints: the names of these constraints, with their tables.
    """

    model_config = ConfigDict(frozen=True)

    nonces: int = 0
    idempotency_keys: int = 0
    pending_devices: int = 0
    more: bool = False
    skipped: int = 0
    constraints: tuple[str, ...] = ()


def sweep(
    settings: UnitSettings,
    *,
    batch_size: int,
    time_budget: timedelta | None,
    pending_ttl: timedelta | None = None,
    stop: threading.Event | None = None,
    monotonic: Callable[[], float] = monotonic,
) -> SweepReport:
    """Remove dead nonces, dead idempotency keys and overdue pending devices, a batch in each unit of work.

    While others write, it takes a fifth of the time at most, in turns of a few milliseconds.

    Args:
        settings: what the units share.
        batch_size: how many rows a unit removes at most.
        time_budget: when to end early; None for not before all is done.
        pending_ttl: how long a device may wait for its approval; None to remove no device.
        stop: ends it early as well.
        monotonic: what turns and budget are measured by, in seconds.

    Raises:
        InvalidArgumentError: the batch size or the budget is not above zero.
    """
    check_limit(batch_size, "batch_size")
    if time_budget is not None:
        check_duration(time_budget, "time_budget")
    deadline = None if time_budget is None else monotonic() + time_budget.total_seconds()
    pause = stop or threading.Event()
    pace = Pace(batch_size)
    tables: dict[Kind, timedelta | None] = {
        "nonces": NONCE_GRACE,
        "idempotency_keys": timedelta(0),
        "pending_devices": pending_ttl,
    }
    removed = dict.fromkeys(tables, 0)
    skipped: Counter[str] = Counter()

    def rested(seconds: float) -> bool:
        """Rest, and tell whether there is time for more. A rest that would outlast the budget is not begun."""
        return (deadline is None or monotonic() + seconds < deadline) and not pause.wait(seconds)

    done = True
    for kind, grace in tables.items():
        if done and grace is not None:
            rows = ExpiredRows(settings, kind, grace, monotonic)
            removed[kind], done = _delete(rows, settings, pace, rested, monotonic)
            skipped.update(rows.skipped)
    report = SweepReport.model_validate(
        {**removed, "more": not done, "skipped": skipped.total(), "constraints": tuple(sorted(skipped))}
    )
    _log_skipped(report)
    return report


def _delete(
    rows: ExpiredRows,
    settings: UnitSettings,
    pace: Pace,
    rested: Callable[[float], bool],
    monotonic: Callable[[], float],
) -> tuple[int, bool]:
    """Delete the expired rows of a table. Return the number of deleted rows, and whether there was time for all."""
    engine = settings.engine
    deleted = in_log = 0
    while True:
        contention, asked = engine.contention, pace.rows
        batch = rows.delete(asked)
        deleted += batch.deleted
        if batch.found < asked:
            return deleted, True
        contended = engine.contention != contention
        if not rested(pace.after_batch(worked=batch.worked, held=batch.held, contended=contended)):
            return deleted, False
        in_log = in_log + batch.deleted if contended else 0
        if in_log >= _ROWS_IN_LOG:
            in_log = 0
            begun = monotonic()
            engine.empty_log(settings.timeout)
            if not rested(pace.rest_after(monotonic() - begun)):
                return deleted, False


def _log_skipped(report: SweepReport) -> None:
    if report.skipped:
        logger.warning(
            "%d expired row(s) were skipped, since a constraint of an own table keeps them: %s",
            report.skipped,
            ", ".join(report.constraints),
            extra={"event": "sweep_skipped", "skipped": report.skipped, "constraints": list(report.constraints)},
        )


class Sweeper:
    """Sweeps periodically in a daemon thread, survives errors, and stops within a second.

    Args:
        run: sweeps once; it is given the event that tells it to end early.
        every: how long to wait between two sweeps, 24 days at most; the first is done at once.
    """

    def __init__(self, run: Callable[[threading.Event], SweepReport], every: timedelta) -> None:
        self._run = run
        self._every = check_wait(every, "every").total_seconds()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        # A signal's handler may come while its own thread holds it, and close the database.
        self._mutex = threading.RLock()

    @property
    def running(self) -> bool:
        """Whether its thread is alive."""
        thread = self._thread
        return thread is not None and thread.is_alive()

    def start(self) -> None:
        """Start sweeping.

        Raises:
            UnitStateError: it runs already.
        """
        with self._mutex:
            if self.running:
                raise UnitStateError("this sweeper runs already: stop it first, or make another one")
            self._stop = threading.Event()
            thread = threading.Thread(target=self._loop, args=(self._stop,), name="homeagent-sweeper", daemon=True)
            thread.start()
            # Only now: one that the system refused can't be waited for.
            self._thread = thread

    def stop(self) -> None:
        """Stop sweeping, and wait for the batch that is under way; stopping what does not run is fine."""
        with self._mutex:
            thread, self._thread = self._thread, None
            self._stop.set()
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _loop(self, stop: threading.Event) -> None:
        while not stop.is_set():
            try:
                report = self._run(stop)
            except DatabaseClosedError:
                logger.info("the sweeper ends: the database was closed", extra={"event": "sweeper_ended"})
                return
            except HomeAgentError as error:
                logger.warning(
                    "a sweep failed and will be tried again in %g s: %s",
                    self._every,
                    error,
                    extra={"event": "sweep_failed", "error": type(error).__name__, "retry_seconds": self._every},
                )
            except Exception as error:
                # Whatever an injected clock or a bug of ours raises must not end the cleaning for good.
                logger.exception(
                    "a sweep failed and will be tried again in %g s",
                    self._every,
                    extra={"event": "sweep_failed", "error": type(error).__name__, "retry_seconds": self._every},
                )
            else:
                if report.nonces or report.idempotency_keys or report.pending_devices:
                    logger.info(
                        "swept %d nonce(s), %d idempotency key(s) and %d pending device(s)",
                        report.nonces,
                        report.idempotency_keys,
                        report.pending_devices,
                        extra={
                            "event": "swept",
                            "nonces": report.nonces,
                            "idempotency_keys": report.idempotency_keys,
                            "pending_devices": report.pending_devices,
                            "more": report.more,
                        },
                    )
            stop.wait(self._every)
