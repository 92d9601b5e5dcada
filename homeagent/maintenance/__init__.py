"""Maintenance: sweep, backup schedule, copy, restore, epochs, doctor and status, with their reports."""

from typing import TYPE_CHECKING

from homeagent.lazy_import import lazy_names

if TYPE_CHECKING:
    from homeagent.engine.counters import DatabaseCounters
    from homeagent.maintenance.adoption import AdoptionReport, adopt, preview_adoption
    from homeagent.maintenance.copy_store import CopyProgress, CopyReport
    from homeagent.maintenance.doctor import Diagnosis, Finding
    from homeagent.maintenance.epochs import EpochReport
    from homeagent.maintenance.restore import RestoreReport
    from homeagent.maintenance.status import DatabaseStatus
    from homeagent.maintenance.sweep import BackupSchedule, Sweeper, SweepReport

__all__ = [
    "AdoptionReport",
    "BackupSchedule",
    "CopyProgress",
    "CopyReport",
    "DatabaseCounters",
    "DatabaseStatus",
    "Diagnosis",
    "EpochReport",
    "Finding",
    "RestoreReport",
    "SweepReport",
    "Sweeper",
    "adopt",
    "preview_adoption",
]

_LAZY = {
    "AdoptionReport": "adoption",
    "BackupSchedule": "sweep",
    "CopyProgress": "copy_store",
    "CopyReport": "copy_store",
    "DatabaseCounters": "status",
    "DatabaseStatus": "status",
    "Diagnosis": "doctor",
    "EpochReport": "epochs",
    "Finding": "doctor",
    "RestoreReport": "restore",
    "SweepReport": "sweep",
    "Sweeper": "sweep",
    "adopt": "adoption",
    "preview_adoption": "adoption",
}

# Hide `__getattr__` from type checkers. With `__getattr__`, type checkers would accept any misspelt name.
if not TYPE_CHECKING:
    __getattr__ = lazy_names(__name__, _LAZY)
