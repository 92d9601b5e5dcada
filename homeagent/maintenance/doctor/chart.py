"""The chart: where the checks write down what they find, and what kept them from looking."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING

from homeagent.engine.sqlite.inspection import Stopwatch
from homeagent.errors import CorruptDatabaseError, HomeAgentError
from homeagent.maintenance.doctor.findings import CHECKS, Diagnosis, Fact, Finding, Repair, Severity

if TYPE_CHECKING:
    from sqlalchemy import Connection

__all__ = ["RESTORE", "Chart"]

RESTORE = "stop the gateway, keep the file aside with its -wal and -shm, and restore the newest good backup"


class Chart:
    """Collects the findings of one look at one database.

    Args:
        now: the instant of the look.
        thorough: whether the long checks are made too.
        watch: what ends a statement that takes too long.
    """

    def __init__(self, now: datetime, *, thorough: bool, watch: Stopwatch) -> None:
        self.now = now
        self.thorough = thorough
        self.watch = watch
        self.findings: dict[str, Finding] = {}
        self.not_checked: dict[str, str] = {}
        self.database_option = ""
        """What names the database in a command of this package; empty where it is the default one."""
        self.restore_command: str | None = None
        """The command that restores the newest good backup, None where none is known."""

    def ok(self, check: str, summary: str, **facts: Fact) -> None:
        """Write down that a check found nothing wrong."""
        self._add(Finding(check=check, severity=Severity.OK, summary=summary, facts=facts))

    def warn(
        self, check: str, summary: str, *, meaning: str, remedy: str, command: str | None = None, **facts: Fact
    ) -> None:
        """Write down what somebody should look at."""
        self._bad(Severity.WARNING, check, summary, meaning, remedy, command, facts)

    def alarm(
        self, check: str, summary: str, *, meaning: str, remedy: str, command: str | None = None, **facts: Fact
    ) -> None:
        """Write down what must not go on."""
        if remedy is RESTORE:
            command = command or self.restore_command
        self._bad(Severity.CRITICAL, check, summary, meaning, remedy, command, facts)

    def _bad(
        self,
        severity: Severity,
        check: str,
        summary: str,
        meaning: str,
        remedy: str,
        command: str | None,
        facts: dict[str, Fact],
    ) -> None:
        self._add(
            Finding(
                check=check,
                severity=severity,
                summary=summary,
                meaning=meaning,
                remedy=remedy,
                command=command,
                facts=facts,
            )
        )

    def _add(self, finding: Finding) -> None:
        command = finding.command
        if command is not None and command.startswith("homeagent ") and "--database" not in command:
            finding = finding.model_copy(update={"command": command + self.database_option})
        self.findings[finding.check] = finding
        self.not_checked.pop(finding.check, None)

    def skip(self, reason: str, *checks: str) -> None:
        """Write down that these checks could not be made, unless they were, or another reason is written down."""
        for check in checks:
            if check not in self.findings:
                self.not_checked.setdefault(check, reason)

    @contextmanager
    def attempt(self, *checks: str, on: Connection | None = None) -> Iterator[None]:
        """Make checks; what keeps them from being made is written down, and the next ones follow all the same.

        Args:
            checks: the names of the checks.
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
            for check in checks:
                self.alarm(
                    check,
                    "The database is damaged where this check reads.",
                    meaning=str(error),
                    remedy=RESTORE,
                )
        except HomeAgentError as error:
            # On a server it is the server that ends what takes too long.
            if self.watch():
                self.skip("it takes longer than a quick look may: use --thorough", *checks)
                return
            for check in checks:
                if check not in self.findings:
                    self.warn(
                        check,
                        "This check could not be made.",
                        meaning=str(error),
                        remedy="mend that, then look again",
                    )
        finally:
            if on is not None and guarded:
                on.exec_driver_sql("ROLLBACK TO SAVEPOINT doctor")

    @property
    def worst(self) -> Severity:
        """The worst of what was found."""
        return max(
            (finding.severity for finding in self.findings.values()),
            key=lambda severity: severity.exit_status,
            default=Severity.OK,
        )

    def diagnosis(self, *, location: str, engine: str, repairs: Sequence[Repair]) -> Diagnosis:
        """Return what was written down."""
        return Diagnosis(
            location=location,
            engine=engine,
            checked_at=self.now,
            thorough=self.thorough,
            severity=self.worst,
            findings=[self.findings[check] for check in CHECKS if check in self.findings],
            not_checked={check: self.not_checked[check] for check in CHECKS if check in self.not_checked},
            repairs=list(repairs),
        )
