"""The doctor: checks a database without changing it, reports problems and remedies, and makes safe repairs."""

from homeagent.maintenance.doctor.diagnosis import diagnose
from homeagent.maintenance.doctor.report import CHECKS, Diagnosis, Finding, Repair, Severity

__all__ = ["CHECKS", "Diagnosis", "Finding", "Repair", "Severity", "diagnose"]
