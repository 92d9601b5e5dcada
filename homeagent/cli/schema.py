"""Commands that create or upgrade the schema (`homeagent init` and `homeagent migrate`)."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Annotated

import typer

from homeagent.cli.application import app, confirm, target_of
from homeagent.cli.arguments import AcknowledgeOption, MigrationsOption, YesOption
from homeagent.cli.output import print_result
from homeagent.cli.visible_text import escape_words
from homeagent.database import Database
from homeagent.engine.sqlite.engine import APPLICATION_ID
from homeagent.engine.target import resolve_target
from homeagent.errors import InvalidArgumentError, SchemaOutdatedError
from homeagent.maintenance.adoption import AdoptionReport, preview_adoption
from homeagent.maintenance.adoption import adopt as take_over
from homeagent.migrations import REVISION


def _backups(path: Path | None) -> set[Path]:
    if path is None or not path.parent.is_dir():
        return set()
    return {
        file
        for file in path.parent.iterdir()
        if file.name.startswith(f"{path.name}.") and file.name.endswith(".backup")
    }


@app.command()
def init(
    context: typer.Context,
    migrations: MigrationsOption = None,
    acknowledge: AcknowledgeOption = None,
    adopt: Annotated[
        bool,
        typer.Option("--adopt", help="Add homeagent's tables to a database of an application, after a confirmation."),
    ] = False,
    yes: YesOption = False,
) -> None:
    """Create the database, or upgrade an existing database. If the schema is current, the command
    changes no data.

    With --adopt, the database can already have tables of an application. First stop the application. The command shows
    a report and asks for a confirmation. The command copies a SQLite file before the first change.
    """
    if not adopt or not _adopt(context, target_of(context), migrations, acknowledge or (), yes=yes):
        _report_upgrade(context, migrations, acknowledge or ())


def _adopt(
    context: typer.Context, target: str | None, migrations: str | None, acknowledged: Collection[str], *, yes: bool
) -> bool:
    found = preview_adoption(target, migrations=migrations, acknowledged=acknowledged)
    if found is None:
        return False
    confirm(context, f"Adopt {found.location}?", yes=yes, show=lambda: typer.echo("\n".join(_changes(found)), err=True))
    path = resolve_target(target).path
    before = _backups(path)
    done = take_over(target, found, migrations=migrations, acknowledged=acknowledged)
    # If the file already has homeagent's tables, the upgrade makes the backup itself.
    made = sorted(_backups(path) - before)
    done = done.model_copy(update={"backup": done.backup or (made[-1] if made else None)})
    kept = f" A copy from before is in {done.backup}." if done.backup else ""
    text = f"Adopted {done.location} at schema revision {REVISION}.{kept}"
    if yes:  # without --yes, the report is printed above the question
        text = "\n".join([*_changes(done), text])
    print_result(context, {"action": "adopted", "schema_revision": REVISION, **done.model_dump(mode="json")}, text)
    return True


def _changes(report: AdoptionReport) -> Iterator[str]:
    def listed(counts: dict[str, int]) -> str:
        return ", ".join(f"{escape_words(name)} ({rows:,} rows)" for name, rows in counts.items()) or "none"

    yield f"Tables that stay the application's: {listed(report.tables)}"
    if report.converted:
        yield f"Tables that become homeagent's: {listed(report.converted)}"
    if report.moved:
        yield f"New tables for rows without a key: {listed(report.moved)}"
    if report.application_revision is not None:
        yield f"Revision of the application, from alembic_version: {report.application_revision}"
    if report.application_id not in (None, 0, APPLICATION_ID):
        yield f"Application id of the file, which homeagent replaces: {report.application_id:#x}"


@app.command()
def migrate(context: typer.Context, migrations: MigrationsOption = None, acknowledge: AcknowledgeOption = None) -> None:
    """Upgrade the schema to the revision that this version of homeagent needs.

    If a SQLite file holds data, the command first makes a copy next to the file. A failed upgrade does not change the
    data.
    """
    _report_upgrade(context, migrations, acknowledge or ())


def _report_upgrade(context: typer.Context, migrations: str | None, acknowledged: Collection[str]) -> None:
    target = target_of(context)
    where = resolve_target(target)
    if where.is_temporary:
        raise InvalidArgumentError("a temporary database ends with this command: name a file or a server's URL")
    action, application = "unchanged", None
    found: str | None = REVISION
    try:
        Database.open(target, migrate=False, migrations=migrations).close()
    except SchemaOutdatedError as outdated:
        if outdated.application is not None:
            action, application = "upgraded application", outdated.needed
        else:
            action, found = "made" if outdated.revision is None else "upgraded", outdated.revision
    before = _backups(where.path)
    # Call `Database.open()` even for a current schema, because the call repairs the modes of directories and files.
    Database.open(target, migrations=migrations, acknowledged=acknowledged).close()
    made = sorted(_backups(where.path) - before)
    kept = f" A copy from before the upgrade is in {made[-1]}." if made else ""
    texts = {
        "made": f"Made {where.location} at schema revision {REVISION}.",
        "upgraded": f"Upgraded {where.location} from schema revision {found} to {REVISION}.{kept}",
        "upgraded application": f"Upgraded {where.location} to revision {application} of the application.{kept}",
        "unchanged": f"{where.location} is at schema revision {REVISION} already: nothing to do.",
    }
    values = {
        "location": where.location,
        "action": action,
        "from_revision": found,
        "schema_revision": REVISION,
        "backup": str(made[-1]) if made else None,
        **({} if application is None else {"application_revision": application}),
    }
    print_result(context, values, texts[action])
