"""Command that checks the database and says how to repair each problem (`homeagent doctor`)."""

from __future__ import annotations

from typing import Annotated

import typer

from homeagent.cli.application import app, target_of
from homeagent.cli.arguments import AcknowledgeOption
from homeagent.cli.output import print_facts, print_result, shown_progress
from homeagent.cli.visible_text import escape_words
from homeagent.errors import InvalidArgumentError
from homeagent.maintenance.doctor import Diagnosis, Finding, Severity, diagnose

_COLOURS = {Severity.OK: "green", Severity.WARNING: "yellow", Severity.CRITICAL: "red"}


@app.command()
def doctor(
    context: typer.Context,
    thorough: Annotated[
        bool, typer.Option("--thorough", help="Run the full integrity check too, without a time limit.")
    ] = False,
    fix: Annotated[
        bool, typer.Option("--fix", help="Make the repairs that lose no data, and list each repair.")
    ] = False,
    acknowledge: AcknowledgeOption = None,
) -> None:
    """Check the database. For each problem, show its meaning and its remedy.

    Without --fix the command changes nothing. The command also works if the database is damaged, missing, too old or
    too new.

    Exit status: 0 without problems, 1 for warnings, 2 for critical problems.
    """
    try:
        with shown_progress(context, "checking"):
            diagnosis = diagnose(target_of(context), thorough=thorough, fix=fix, acknowledged=acknowledge or ())
    except InvalidArgumentError as error:
        # Exit with status 2 instead of 1, because exit status 1 of the doctor means warnings.
        raise typer.BadParameter(str(error)) from None
    print_result(context, diagnosis.model_dump(mode="json"), lambda: _print(diagnosis))
    raise typer.Exit(diagnosis.exit_status)


def _print(diagnosis: Diagnosis) -> None:
    for repair in diagnosis.repairs:
        typer.secho(f"Repaired, {repair.check}: {repair.action}.", fg="green")
    facts: list[tuple[str, str]] = []
    colours: dict[str, str] = {}
    width = max((len(finding.check) for finding in diagnosis.findings), default=0)
    for finding in diagnosis.findings:
        label = f"{finding.severity:<8}  {finding.check:<{width}}"
        facts.append((label, _finding_text(finding)))
        colours[label] = _COLOURS[finding.severity]
    print_facts(facts, colours=colours)
    for reason in dict.fromkeys(diagnosis.not_checked.values()):
        checks = [check for check, why in diagnosis.not_checked.items() if why == reason]
        print_facts([("not checked", f"{', '.join(checks)}: {reason}.")])
    bad = sum(finding.severity is not Severity.OK for finding in diagnosis.findings)
    verdict = "All is well" if not bad else f"{bad} of {len(diagnosis.findings)} checks found something"
    typer.secho(f"\n{diagnosis.location}: {verdict}.", fg=_COLOURS[diagnosis.severity])


def _finding_text(finding: Finding) -> str:
    lines = [escape_words(finding.summary)]
    if finding.meaning is not None:
        lines.append(f"It means: {finding.meaning}.")
    if finding.remedy is not None:
        lines.append(f"What to do: {finding.remedy}.")
    if finding.command is not None:
        lines.append(f"    {finding.command}")
    return "\n".join(lines)
