"""What a diagnosis consists of. The names of fields and checks are stable: monitoring is written against them."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum

from pydantic import BaseModel, ConfigDict

__all__ = ["CHECKS", "STORE_CHECKS", "Diagnosis", "Finding", "Repair", "Severity"]

STORE_CHECKS = (
    "schema_revision",
    "schema",
    "store_record",
    "clock",
    "expired_backlog",
    "abandoned_effects",
    "previous_secrets",
    "orphaned_keys",
    "orphaned_sessions",
    "pending_devices",
    "admins",
)
"""What is asked of a store that can be opened, on either engine."""

CHECKS: tuple[str, ...] = (
    "database",
    *STORE_CHECKS,
    # SQLite
    "directory",
    "file_owners",
    "file_modes",
    "file_names",
    "stale_files",
    "backup",
    "restores",
    "filesystem",
    "disk_space",
    "sqlite_version",
    "journal_mode",
    "wal_size",
    "log",
    "integrity",
    "foreign_keys",
    # PostgreSQL
    "server_version",
    "durability",
    "collations",
    "privileges",
    "connections",
    "standby",
    "replication",
    "lock_waits",
    "dead_rows",
    "server_clock",
)
"""The name of every check, in the order in which they are told."""

Fact = int | float | bool | str | None


class Severity(StrEnum):
    """How bad a finding is."""

    OK = "ok"
    WARNING = "warning"
    """It works, and somebody should look at it."""
    CRITICAL = "critical"
    """It must not go on like this."""

    @property
    def exit_status(self) -> int:
        """What `homeagent doctor` ends with where this is the worst that it found: 0, 1 or 2."""
        return list(Severity).index(self)


class Finding(BaseModel):
    """What one check found.

    Attributes:
        check: the check's name, one of `CHECKS`.
        severity: how bad it is.
        summary: what was found, in one sentence.
        meaning: what follows from it; None where all is well.
        remedy: what to do about it; None where there is nothing to do.
        command: a command that does it, or its first step; None where there is none.
        facts: the figures behind it, by name: counts, bytes and seconds, and never a value of a row.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    check: str
    severity: Severity
    summary: str
    meaning: str | None = None
    remedy: str | None = None
    command: str | None = None
    facts: dict[str, Fact] = {}


class Repair(BaseModel):
    """What was mended.

    Attributes:
        check: the check that had found it.
        action: what was done.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    check: str
    action: str


class Diagnosis(BaseModel):
    """The state of a database: what `homeagent doctor --json` prints.

    Attributes:
        location: the file, or the server's URL without its password.
        engine: `sqlite` or `postgresql`.
        checked_at: when, by the clock that the store goes by.
        thorough: whether the long checks were made too.
        severity: the worst of all findings.
        findings: one of each check that was made, in the order of `CHECKS`.
        not_checked: the checks that could not be made, and why.
        repairs: what was mended before these findings were made; empty unless that was asked for.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    location: str
    engine: str
    checked_at: datetime
    thorough: bool
    severity: Severity
    findings: list[Finding]
    not_checked: dict[str, str] = {}
    repairs: list[Repair] = []

    @property
    def exit_status(self) -> int:
        """0 where all is well, 1 for warnings, 2 for what must not go on."""
        return self.severity.exit_status

    def finding(self, check: str) -> Finding | None:
        """Return what this check found, None where it was not made."""
        return next((finding for finding in self.findings if finding.check == check), None)
