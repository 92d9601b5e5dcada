"""The doctor: looks a database over without changing it, says what is wrong and what to do, mends what is safe."""

from homeagent.maintenance.doctor.diagnosis import diagnose
from homeagent.maintenance.doctor.findings import CHECKS, Diagnosis, Finding, Repair, Severity

__all__ = ["CHECKS", "Diagnosis", "Finding", "Repair", "Severity", "diagnose"]
