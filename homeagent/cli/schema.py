"""Commands for the schema: `init`, `migrate` and `migrations new`."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from traceback import extract_tb
from typing import Annotated

import typer

from homeagent.cli.application import WithoutDatabase, app, confirm, group, lasting_target
from homeagent.cli.arguments import AcknowledgeOption, MigrationsOption, YesOption, flag, option
from homeagent.cli.output import print_result
from homeagent.cli.visible_text import escape_words
from homeagent.database import Database
from homeagent.engine.files.system_errors import explained
from homeagent.engine.sqlite.engine import APPLICATION_ID
from homeagent.engine.sqlite.manifests import newest_backup
from homeagent.errors import InvalidArgumentError, SchemaOutdatedError
from homeagent.maintenance.adoption import AdoptionReport, preview_adoption
from homeagent.maintenance.adoption import adopt as take_over
from homeagent.migrations import REVISION
from homeagent.migrations.application import Application, named_folder


@app.command()
def init(
    context: typer.Context,
    migrations: MigrationsOption = None,
    acknowledge: AcknowledgeOption = None,
    adopt: Annotated[
        bool, flag("--adopt", "Add homeagent's tables to a database of an application, after a confirmation.")
    ] = False,
    yes: YesOption = False,
) -> None:
    """Create or upgrade the database. If the schema is current, the command changes no data.

    With --adopt, the database can already have tables of an application. Stop the application before you use --adopt.
    The command shows a report and asks for a confirmation. The command copies a SQLite file before the first change.
    """
    if not adopt or not _adopt(context, migrations, acknowledge or (), yes=yes):
        _report_upgrade(context, migrations, acknowledge or ())


def _adopt(context: typer.Context, migrations: str | None, acknowledged: Collection[str], *, yes: bool) -> bool:
    where = lasting_target(context.obj.database)
    application = replace(Application.of(migrations, acknowledged), adopts=True)
    found = preview_adoption(where, application)
    if found is None:
        return False
    confirm(context, f"Adopt {found.location}?", lambda: typer.echo("\n".join(_changes(found)), err=True))
    before = where.path and newest_backup(where.path)
    done = take_over(where, found, application)
    if done.backup is None and where.path is not None and (newest := newest_backup(where.path)) != before:
        # The file had homeagent's tables already, so the upgrade made the backup.
        done = done.model_copy(update={"backup": newest})
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

    If a SQLite file holds data, the command first copies the file. The copy is in the same directory. A failed upgrade
    does not change the data.
    """
    _report_upgrade(context, migrations, acknowledge or ())


def _report_upgrade(context: typer.Context, migrations: str | None, acknowledged: Collection[str]) -> None:
    """Create or upgrade the database, and print the action."""
    target = context.obj.database
    where = lasting_target(target)
    action, application = "unchanged", None
    found: str | None = REVISION
    try:
        Database.open(target, migrate=False, migrations=migrations).close()
    except SchemaOutdatedError as outdated:
        if outdated.application is not None:
            action, application = "upgraded application", outdated.needed
        else:
            action, found = "made" if outdated.revision is None else "upgraded", outdated.revision
    before = where.path and newest_backup(where.path)
    # Call `Database.open()` even for a current schema, to repair file modes.
    Database.open(target, migrations=migrations, acknowledged=acknowledged).close()
    newest = where.path and newest_backup(where.path)
    made = None if newest == before else newest
    kept = f" A copy from before the upgrade is in {made}." if made else ""
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
        "backup": str(made) if made else None,
        **({} if application is None else {"application_revision": application}),
    }
    print_result(context, values, texts[action])


migrations: typer.Typer = group("migrations", help="Write revisions of an application's own tables.")

_TEMPLATE = '''"""{message}."""

import sqlalchemy as sa

from alembic import op
{imports}
revision: str = {revision!r}
down_revision: str | None = {parent!r}


def upgrade() -> None:
{upgrade}


def downgrade() -> None:
{downgrade}
'''


@migrations.command(cls=WithoutDatabase)
def new(
    context: typer.Context,
    message: Annotated[str, option("TEXT", "Description of the change.", "--message", "-m")],
    migrations: MigrationsOption = None,
    package: Annotated[
        str | None, option("PACKAGE", "Package with the tables. Default: the package of --migrations.")
    ] = None,
    acknowledge: AcknowledgeOption = None,
    empty: Annotated[bool, flag("--empty", "Write a revision that you complete by hand.")] = False,
) -> None:
    """Compare the application's tables with its revisions, and write the next revision.

    The command creates the folder if necessary, and needs no database. Read the revision before you use it.
    The application runs the revision at its next start.
    """
    if migrations is None:
        raise typer.BadParameter("name the folder of the revisions: --migrations PACKAGE:FOLDER.")
    named, place = named_folder(migrations)
    package, folder = package or named, Path(str(place))
    if not package:
        raise typer.BadParameter("name the package with the tables: --package PACKAGE.")
    with explained("create the folder", folder / "versions"):
        (folder / "versions").mkdir(parents=True, exist_ok=True)
    script = _write(Application.of(migrations, acknowledge or ()), folder, package, message, empty=empty)
    if script is None:
        text = "The revisions create all tables already: no revision was written. An empty revision needs --empty."
        print_result(context, {"script": None}, text)
    else:
        print_result(context, {"script": str(script)}, f"Wrote {script}. Read the revision before you use it.")


def import_tables(migrations: str | None) -> None:
    """Import the modules of the package that --migrations names. A copy needs the column types in the modules."""
    named, folder = named_folder(migrations or "")
    if named:
        _application_tables(named, Path(str(folder)))


def _application_tables(package: str, folder: Path) -> Collection[str]:
    """Import a package, and return the names of the tables. If an import fails, raise InvalidArgumentError."""
    from homeagent.migrations.autogenerate import application_tables

    try:
        return application_tables(package, scripts=folder.resolve())
    except Exception as error:
        directory = f"{os.sep}{package.partition('.')[0]}{os.sep}"
        lines = [each for each in extract_tb(error.__traceback__) if directory in each.filename]
        place = f"{lines[-1].filename}, line {lines[-1].lineno}: " if lines else ""
        raise InvalidArgumentError(
            f"a module of the package {package!r} can't be imported ({place}{type(error).__name__}: {error}), so its "
            "tables are unknown: correct the module, or install what the module imports"
        ) from error


def _write(application: Application, folder: Path, package: str, message: str, *, empty: bool) -> Path | None:
    from alembic.util import rev_id

    from homeagent.migrations.autogenerate import render_revision

    texts = {"imports": "", "upgrade": "    pass", "downgrade": "    pass"}
    if not empty:
        tables = _application_tables(package, folder)
        if not tables:
            raise InvalidArgumentError(
                f"the package {package!r} defines no tables that derive from homeagent.Table: derive a class from "
                "Table, or write the revision by hand with --empty"
            )
        rendered = render_revision(application, tables)
        if rendered is None:
            return None
        # Remove comments such as "### commands auto generated by Alembic - please adjust! ###".
        texts = {name: re.sub(r" *# ###.*\n?", "", text).rstrip() for name, text in rendered.items()}
        texts["imports"] += "\n" if texts["imports"] else ""
    revision = rev_id()
    slug = "_".join(re.findall(r"\w+", message.lower()))[:40]
    script = folder / "versions" / f"{revision}_{slug}.py"
    content = _TEMPLATE.format(
        message=message.strip().rstrip(".").replace("\\", "").replace('"', "'"),
        revision=revision,
        parent=application.head,
        **texts,
    )
    with explained("write", script), script.open("x", encoding="utf-8", errors="backslashreplace") as file:
        file.write(content)
    return script
