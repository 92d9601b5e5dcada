"""What a diagnosis consists of, and the collector of its findings.

The names of fields and checks are stable: monitoring is written against them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from enum import StrEnum
from functools import partialmethod
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from homeagent.engine.sqlite.inspection import Stopwatch
from homeagent.errors import CorruptDatabaseError, HomeAgentError

if TYPE_CHECKING:
    from sqlalchemy import Connection

__all__ = ["CHECKS", "RESTORE", "STORE_CHECKS", "Collector", "Diagnosis", "Finding", "Repair", "Severity"]

STORE_CHECKS = (
    "schema_revision",
    "schema",
    "rows",
    "references",
    "routes",
    "store_record",
    "clock",
    "expired_backlog",
    "abandoned_effects",
    "previous_secrets",
    "pending_devices",
    "admins",
)
"""The checks of a store that can be opened, on either engine."""

CHECKS: tuple[str, ...] = (
    "database",
    *STORE_CHECKS,
    # SQLite
    "directory",
    "files",
    "leftovers",
    "backup",
    "filesystem",
    "disk_space",
    "wal",
    "integrity",
    # PostgreSQL
    "durability",
    "write_access",
)
"""The name of every check, in the order in which the findings are reported."""

RESTORE = "stop the gateway, keep the file aside with its -wal and -shm, and restore the newest good backup"
TOO_LONG = "it takes longer than a quick look may: use --thorough"

Fact = int | float | bool | str | None


class Severity(StrEnum):
    """How bad a finding is."""

    OK = "ok"
    WARNING = "warning"
    """It works, and the administrator should look at it."""
    CRITICAL = "critical"
    """It must not go on like this."""

    @property
    def exit_status(self) -> int:
        """The exit status of `homeagent doctor` if this is the worst finding: 0, 1 or 2."""
        return list(Severity).index(self)


class Finding(BaseModel):
    """What one check found.

    Attributes:
        check: the check's name, one of `CHECKS`.
        severity: how bad it is.
        summary: what was found.
        meaning: what follows from it; None if all is well.
        remedy: what to do about it; None if there is nothing to do.
        command: a command that does it, or its first step; None if there is none.
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
    """What was repaired.

    Attributes:
        check: the check whose finding was repaired.
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
        checked_at: when, by the store's clock.
        thorough: whether the long checks were made too.
        severity: the worst of all findings.
        findings: one of each check that was made, in the order of `CHECKS`.
        not_checked: the checks that could not be made, and why.
        repairs: what was repaired before these findings were made; empty unless `fix` was set.
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
        """0 if all is well, 1 for warnings, 2 for a critical finding."""
        return self.severity.exit_status

    def finding(self, check: str) -> Finding | None:
        """Return what this check found; None if it was not made."""
        return next((finding for finding in self.findings if finding.check == check), None)


class Collector:
    """Collects the findings about one database.

    A check may report several findings: they become one, with the worst severity, the worst first.

    Args:
        now: when the database is checked.
        thorough: whether the long checks are made too.
        watch: ends a statement that takes too long.
    """

    def __init__(self, now: datetime, *, thorough: bool, watch: Stopwatch) -> None:
        self.now = now
        self.thorough = thorough
        self.watch = watch
        self.findings: dict[str, Finding] = {}
        self.not_checked: dict[str, str] = {}
        self.database_option = ""
        """The option that names the database in a command of homeagent; empty for a server."""
        self.restore_command: str | None = None
        """The command that restores the newest good backup; None if no backup is known."""

    def add(
        self,
        severity: Severity,
        check: str,
        summary: str,
        meaning: str | None = None,
        remedy: str | None = None,
        command: str | None = None,
        **facts: Fact,
    ) -> None:
        """Add a finding; the parameters are its fields. If all is well, meaning, remedy and command are dropped."""
        if severity is Severity.OK:
            meaning = remedy = command = None
        if remedy is RESTORE:
            command = command or self.restore_command
        if command is not None and command.startswith("homeagent ") and "--database" not in command:
            command += self.database_option
        finding = Finding(
            check=check,
            severity=severity,
            summary=summary,
            meaning=meaning,
            remedy=remedy,
            command=command,
            facts=facts,
        )
        self.not_checked.pop(check, None)
        earlier = self.findings.get(check)
        self.findings[check] = finding if earlier is None else _combined(earlier, finding)

    # The same with the severity given.
    ok = partialmethod(add, Severity.OK)
    warn = partialmethod(add, Severity.WARNING)
    critical = partialmethod(add, Severity.CRITICAL)

    def skip(self, reason: str, *checks: str) -> None:
        """Note that these checks could not be made, unless they were, or another reason was noted."""
        for check in checks:
            if check not in self.findings:
                self.not_checked.setdefault(check, reason)

    @contextmanager
    def attempt(self, check: str, *, on: Connection | None = None) -> Iterator[None]:
        """Make a check; an error in it is reported, and the next checks follow all the same.

        Args:
            check: its name.
            on: the connection that is used. On PostgreSQL a statement that fails ends the transaction, so that each
                check gets a savepoint.
        """
        self.watch.start()
        guarded = on is not None and on.dialect.name == "postgresql"
        if on is not None and guarded:
            on.exec_driver_sql("SAVEPOINT doctor")
        try:
            yield
        except CorruptDatabaseError as error:
            self.critical(check, "The database is damaged where this check reads.", str(error), RESTORE)
        except HomeAgentError as error:
            # A server ends by itself what takes too long.
            if self.watch():
                self.skip(TOO_LONG, check)
            elif check not in self.findings:
                self.warn(check, "This check could not be made.", str(error), "remove the cause, then check again")
        finally:
            if on is not None and guarded:
                on.exec_driver_sql("ROLLBACK TO SAVEPOINT doctor")

    def diagnosis(self, *, location: str, engine: str, repairs: Sequence[Repair]) -> Diagnosis:
        """Return all findings as a report."""
        severities = [finding.severity for finding in self.findings.values()]
        return Diagnosis(
            location=location,
            engine=engine,
            checked_at=self.now,
            thorough=self.thorough,
            severity=max(severities, key=lambda severity: severity.exit_status, default=Severity.OK),
            findings=[self.findings[check] for check in CHECKS if check in self.findings],
            not_checked={check: self.not_checked[check] for check in CHECKS if check in self.not_checked},
            repairs=list(repairs),
        )


def _combined(one: Finding, other: Finding) -> Finding:
    if other.severity.exit_status > one.severity.exit_status:
        one, other = other, one
    facts = {**one.facts, **other.facts}
    if other.severity is Severity.OK and one.severity is not Severity.OK:
        return one.model_copy(update={"facts": facts})
    texts = {
        name: "; ".join(filter(None, (getattr(one, name), getattr(other, name)))) for name in ("meaning", "remedy")
    }
    return one.model_copy(
        update={
            "summary": f"{one.summary} {other.summary}",
            **{name: text or None for name, text in texts.items()},
            "command": one.command or other.command,
            "facts": facts,
        }
    )
