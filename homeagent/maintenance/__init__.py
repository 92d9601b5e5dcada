"""What runs beside the work, and what it reports."""

from typing import TYPE_CHECKING

from homeagent.late_import import late_names

if TYPE_CHECKING:
    from homeagent.maintenance.copying import CopyProgress, CopyReport
    from homeagent.maintenance.doctor import Diagnosis, Finding
    from homeagent.maintenance.epochs import EpochReport
    from homeagent.maintenance.reporting import DatabaseCounters, DatabaseStatus
    from homeagent.maintenance.restoring import RestoreReport
    from homeagent.maintenance.sweeping import BackupSchedule, Sweeper, SweepReport

__all__ = [
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
]

_LATE = {
    "BackupSchedule": "sweeping",
    "CopyProgress": "copying",
    "CopyReport": "copying",
    "DatabaseCounters": "reporting",
    "DatabaseStatus": "reporting",
    "Diagnosis": "doctor",
    "EpochReport": "epochs",
    "Finding": "doctor",
    "RestoreReport": "restoring",
    "SweepReport": "sweeping",
    "Sweeper": "sweeping",
}

# Hidden from type checkers, which would take any misspelt name for one of these.
if not TYPE_CHECKING:
    __getattr__ = late_names(__name__, _LATE)
