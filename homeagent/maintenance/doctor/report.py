"""Models of the doctor's report, and a collector of the findings. Do not rename fields or checks: monitoring programs
use the names.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from functools import partialmethod
from typing import TYPE_CHECKING, ClassVar

from pydantic import BaseModel

from homeagent.engine.sqlite.inspection import Stopwatch
from homeagent.errors import CorruptDatabaseError, HomeAgentError

if TYPE_CHECKING:
    from sqlalchemy import Connection

RESTORE = "stop the gateway, keep the file aside with its -wal and -shm, and restore the newest good backup"
TOO_LONG = "the check takes longer than the time limit: use --thorough"

Fact = int | float | bool | str | None


class Severity(StrEnum):
    """Severity of a finding."""

    OK = "ok"
    WARNING = "warning"
    """homeagent works, and the administrator should check the cause."""
    CRITICAL = "critical"
    """The administrator must act now."""

    @property
    def exit_status(self) -> int:
        """Exit status of `homeagent doctor` for this severity: 0, 1 or 2."""
        return list(Severity).index(self)


class Finding(BaseModel, frozen=True, extra="forbid"):
    """Result of one check of the doctor.

    Attributes:
        check: name of the check, one of `CHECKS`.
        severity: severity of the reported finding.
        summary: description of the state.
        meaning: consequence of a problem.
        remedy: action for the administrator, or None if no action is necessary.
        command: command for the first step of the remedy, or None.
        facts: figures by name, such as counts, bytes and seconds. Facts contain no values of devices, agents, sessions,
            nonces or idempotency keys.
    """

    check: str
    severity: Severity
    summary: str
    meaning: str | None = None
    remedy: str | None = None
    command: str | None = None
    facts: dict[str, Fact] = {}


class Repair(BaseModel, frozen=True, extra="forbid"):
    """One repair.

    Attributes:
        check: name of the check whose finding was repaired.
        action: description of the repair, or of the error that prevented the repair.
    """

    check: str
    action: str


class Diagnosis(BaseModel, frozen=True, extra="forbid"):
    """Report about a database. The command `homeagent doctor --json` prints the report as JSON.

    Attributes:
        location: path of the file, or URL of the server without the password.
        engine: name of the engine, `sqlite` or `postgresql`.
        checked_at: time of the diagnosis, from the store's clock.
        thorough: True if the diagnosis included the slow checks.
        severity: worst severity of all findings.
        findings: one finding for each completed check, in the order of `CHECKS`.
        not_checked: reason for each check that was not completed, by check name.
        repairs: repairs that the doctor made or tried. Empty with `fix=False`.
    """

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
        """Exit status: 0 without problems, 1 for warnings, 2 for critical findings."""
        return self.severity.exit_status

    def finding(self, check: str) -> Finding | None:
        """Return the finding of a check. If the check did not complete, return None."""
        return next((finding for finding in self.findings if finding.check == check), None)


@dataclass
class Collector:
    """Collects the findings of a diagnosis. Several findings of a check become one finding with the worst severity.

    Attributes:
        database_option: option for homeagent's commands, such as " --database hub.db".
        restore_command: command that restores the newest good backup. None if no backup is known.
    """

    now: datetime
    acknowledged: frozenset[str]
    thorough: bool
    watch: Stopwatch
    findings: dict[str, Finding] = field(default_factory=dict)
    not_checked: dict[str, str] = field(default_factory=dict)
    database_option: str = ""
    restore_command: str | None = None

    def add(
        self,
        check: str,
        summary: str,
        meaning: str | None = None,
        remedy: str | None = None,
        command: str | None = None,
        *,
        critical: object = False,
        warning: object = False,
        **facts: Fact,
    ) -> None:
        """Add a finding. If `critical=` is true, the severity is CRITICAL. If only `warning=` is true, the
        severity is WARNING. Otherwise the severity is OK. For the severity OK, ignore the arguments `meaning=`,
        `remedy=` and `command=`.
        """
        severity, advice = Severity.OK, {}
        if critical or warning:
            severity = Severity.CRITICAL if critical else Severity.WARNING
            if remedy is RESTORE:
                command = command or self.restore_command
            if command is not None and command.startswith("homeagent ") and "--database" not in command:
                command += self.database_option
            advice = {"meaning": meaning, "remedy": remedy, "command": command}
        finding = Finding(check=check, severity=severity, summary=summary, facts=facts, **advice)
        self.not_checked.pop(check, None)
        earlier = self.findings.get(check)
        self.findings[check] = finding if earlier is None else _combined(earlier, finding)

    warn: ClassVar[partialmethod[None]] = partialmethod(add, warning=True)
    critical: ClassVar[partialmethod[None]] = partialmethod(add, critical=True)

    def skip(self, reason: str, *checks: str) -> None:
        """Record the reason why checks did not run. Do not replace an earlier finding or reason of a check."""
        for check in checks:
            if check not in self.findings:
                self.not_checked.setdefault(check, reason)

    @contextmanager
    def attempt(self, check: str, *, on: Connection | None = None) -> Iterator[None]:
        """Run the block as a check. Record an error of the block, so that later checks still run."""
        self.watch.start()
        # After an error, PostgreSQL refuses later statements of the transaction.
        guarded = on if on is not None and on.dialect.name == "postgresql" else None
        if guarded is not None:
            guarded.exec_driver_sql("SAVEPOINT doctor")
        try:
            yield
        except CorruptDatabaseError as error:
            self.critical(check, "The database is damaged where this check reads.", str(error), RESTORE)
        except HomeAgentError as error:
            # If `watch()` returns True, the time limit caused the error.
            if self.watch():
                self.skip(TOO_LONG, check)
            elif check not in self.findings:
                self.warn(check, "This check could not be made.", str(error), "remove the cause, then check again")
        finally:
            if guarded is not None:
                guarded.exec_driver_sql("ROLLBACK TO SAVEPOINT doctor")


def _combined(one: Finding, other: Finding) -> Finding:
    if other.severity.exit_status > one.severity.exit_status:
        one, other = other, one
    update: dict[str, object] = {"facts": {**one.facts, **other.facts}}
    if one.severity is Severity.OK or other.severity is not Severity.OK:
        for name, separator in (("summary", " "), ("meaning", "; "), ("remedy", "; ")):
            texts = filter(None, (getattr(one, name), getattr(other, name)))
            update[name] = separator.join(texts) or None
        update["command"] = one.command or other.command
    return one.model_copy(update=update)
