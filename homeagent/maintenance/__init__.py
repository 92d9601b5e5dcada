"""Maintenance: sweep, backup schedule, copy, restore, epochs, doctor and status, with their reports."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from homeagent.engine.counters import DatabaseCounters
    from homeagent.maintenance.copy_store import CopyProgress, CopyReport
    from homeagent.maintenance.doctor import Diagnosis, Finding
    from homeagent.maintenance.epochs import EpochReport
    from homeagent.maintenance.restore import RestoreReport
    from homeagent.maintenance.status import DatabaseStatus
    from homeagent.maintenance.sweep import BackupSchedule, Sweeper, SweepReport

# fmt: off
__all__ = [
    "BackupSchedule", "CopyProgress", "CopyReport", "DatabaseCounters", "DatabaseStatus", "Diagnosis", "EpochReport",
    "Finding", "RestoreReport", "SweepReport", "Sweeper",
]
# fmt: on

# Import each name at its first use, so that programs start faster.
_MODULES = {
    "copy_store": ("CopyProgress", "CopyReport"),
    "doctor": ("Diagnosis", "Finding"),
    "epochs": ("EpochReport",),
    "restore": ("RestoreReport",),
    "status": ("DatabaseCounters", "DatabaseStatus"),
    "sweep": ("BackupSchedule", "SweepReport", "Sweeper"),
}

# Hide `__getattr__` from type checkers, which would otherwise accept any misspelt name.
if not TYPE_CHECKING:

    def __getattr__(name):
        for module, names in _MODULES.items():
            if name in names:
                globals()[name] = getattr(import_module(f"{__name__}.{module}"), name)
                return globals()[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
