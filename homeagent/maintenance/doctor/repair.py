"""What can be mended without losing anything: modes of our own files, leftovers, the backlog, the log."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import bindparam, or_, update

from homeagent.clock import Clock
from homeagent.engine.disk.privacy import FILE_MODE, change_mode
from homeagent.engine.disk.system_errors import explained
from homeagent.engine.engine import Engine
from homeagent.engine.postgresql.engine import PostgreSQLEngine
from homeagent.engine.sqlite.engine import SQLiteEngine, sidecar_lock
from homeagent.engine.statements import Statement
from homeagent.engine.target import Target
from homeagent.errors import HomeAgentError
from homeagent.maintenance.doctor.disk import loose_files, megabytes, stale_partials
from homeagent.maintenance.doctor.findings import Diagnosis, Repair, Severity
from homeagent.maintenance.doctor.rows import SECRETS_GRACE
from homeagent.maintenance.sweeping import sweep
from homeagent.migrations.postgresql import open_postgresql
from homeagent.migrations.sqlite import open_sqlite
from homeagent.models import Device
from homeagent.unit_of_work import UnitOfWork, UnitSettings

__all__ = ["mend"]

_WAIT = timedelta(seconds=30)

_device: Any = Device.__table__.c

_FORGET_PREVIOUS = Statement[Device](
    update(Device)
    .where(
        _device.previous_secret_hash.is_not(None),
        or_(_device.previous_secret_expires_at.is_(None), _device.previous_secret_expires_at <= bindparam("before")),
    )
    .values(previous_secret_hash=None, previous_secret_expires_at=None)
)

# Where one of these is found, the rows are left alone: they may be damaged, or seen by a wrong clock.
_HANDS_OFF = ("database", "integrity", "foreign_keys", "schema", "schema_revision", "store_record", "clock")


def mend(diagnosis: Diagnosis, target: Target, *, clock: Clock, engine: Engine | None) -> list[Repair]:
    """Mend what was found and can be mended safely, and say what was done, or what it was given up for.

    Args:
        diagnosis: what was found.
        target: the database.
        clock: the store's.
        engine: the open database's; None to open one.
    """
    done: list[Repair] = []
    # A file that is not known to be homeagent's keeps its mode, and the files next to it.
    if target.path is not None and _severity(diagnosis, "database") is not Severity.CRITICAL:
        for check, mend_files in _OUTSIDE.items():
            with _told(done, check):
                done += mend_files(target.path, diagnosis)
    if any(_severity(diagnosis, check) is Severity.CRITICAL for check in _HANDS_OFF):
        return done
    if _severity(diagnosis, "schema_revision") is not Severity.OK:
        return done
    if target.path is not None and engine is None and _severity(diagnosis, "journal_mode") is Severity.WARNING:
        with _told(done, "journal_mode"):
            done += _switch_to_wal(target.path)
    needed = [check for check in _WITHIN if _severity(diagnosis, check) is Severity.WARNING]
    if needed:
        with _told(done, needed[0]), _opened(target, clock, engine) as settings:
            for check in needed:
                with _told(done, check):
                    done += _WITHIN[check](settings)
    return done


@contextmanager
def _told(done: list[Repair], check: str) -> Iterator[None]:
    try:
        yield
    except HomeAgentError as error:
        done.append(Repair(check=check, action=f"gave up: {error}"))


def _severity(diagnosis: Diagnosis, check: str) -> Severity | None:
    finding = diagnosis.finding(check)
    return None if finding is None else finding.severity


def _make_private(path: Path, diagnosis: Diagnosis) -> Iterator[Repair]:
    for file in loose_files(path):
        mode = stat.S_IMODE(file.lstat().st_mode)
        with explained("make private", file):
            change_mode(file, mode & FILE_MODE)
        action = f"gave {file.name!r} mode {mode & FILE_MODE:04o}; it had {mode:04o}"
        yield Repair(check="file_modes", action=action)


def _remove_partials(path: Path, diagnosis: Diagnosis) -> Iterator[Repair]:
    for file in stale_partials(path, diagnosis.checked_at):
        with explained("remove", file):
            size = file.lstat().st_size
            file.unlink()
        yield Repair(check="stale_files", action=f"removed {file.name!r}, {megabytes(size)} of half a copy")


def _switch_to_wal(path: Path) -> list[Repair]:
    engine = SQLiteEngine(path, busy_timeout=timedelta(seconds=5), durability="full")
    try:
        with sidecar_lock(path, timeout=timedelta(seconds=5)):
            engine.prepare_header()
    finally:
        engine.close()
    return [Repair(check="journal_mode", action="switched the file to a write-ahead log")]


@contextmanager
def _opened(target: Target, clock: Clock, engine: Engine | None) -> Iterator[UnitSettings]:
    seconds = _WAIT.total_seconds()
    if engine is not None:
        yield UnitSettings(engine, clock, seconds)
        return
    own: SQLiteEngine | PostgreSQLEngine
    if target.path is not None:
        own = SQLiteEngine(target.path, busy_timeout=_WAIT, durability="full")
    else:
        assert target.url is not None  # noqa: S101  a temporary one was refused
        own = PostgreSQLEngine(target.url, busy_timeout=_WAIT)
    try:
        if isinstance(own, SQLiteEngine):
            open_sqlite(own, clock=clock, timeout=_WAIT, migrate=False, temporary=False)
        else:
            open_postgresql(own, timeout=_WAIT, migrate=False)
        yield UnitSettings(own, clock, seconds)
    finally:
        own.close()


def _sweep(settings: UnitSettings) -> list[Repair]:
    report = sweep(settings, batch_size=100, time_budget=None)
    action = f"swept {report.nonces:,} nonces and {report.idempotency_keys:,} idempotency keys that had expired"
    return [Repair(check="expired_backlog", action=action)]


def _forget_previous_secrets(settings: UnitSettings) -> list[Repair]:
    with UnitOfWork(settings, read_only=False) as unit:
        count = unit.write(_FORGET_PREVIOUS, before=unit.now() - SECRETS_GRACE)
    return [Repair(check="previous_secrets", action=f"removed the hash of a previous secret from {count:,} devices")]


def _truncate_log(settings: UnitSettings) -> list[Repair]:
    if not settings.engine.empty_log(settings.timeout, truncate=True):
        return []
    return [Repair(check="wal_size", action="moved the write-ahead log into the file and gave its room back")]


_OUTSIDE: dict[str, Callable[[Path, Diagnosis], Iterator[Repair]]] = {
    "file_modes": _make_private,
    "stale_files": _remove_partials,
}
_WITHIN: dict[str, Callable[[UnitSettings], list[Repair]]] = {
    "expired_backlog": _sweep,
    "previous_secrets": _forget_previous_secrets,
    "wal_size": _truncate_log,
}
