"""The doctor checks a database without changing the database, and repairs problems only on request."""

from homeagent.maintenance.doctor.diagnosis import diagnose
from homeagent.maintenance.doctor.report import CHECKS, Diagnosis, Finding, Severity
