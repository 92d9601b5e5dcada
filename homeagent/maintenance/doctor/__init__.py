"""The doctor checks a database, and repairs problems only on request."""

from homeagent.maintenance.doctor.diagnosis import CHECKS, diagnose
from homeagent.maintenance.doctor.report import Diagnosis, Finding, Severity
