"""The commands `homeagent init` and `homeagent migrate`, which create or upgrade the schema."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path

import typer

from homeagent.cli.application import DatabaseOption, JsonOption, app
from homeagent.cli.opening import AcknowledgeOption, MigrationsOption, target_of
from homeagent.cli.output import print_json
from homeagent.database import Database
from homeagent.engine.target import resolve_target
from homeagent.errors import InvalidArgumentError, SchemaOutdatedError
from homeagent.migrations import REVISION


@dataclass(frozen=True)
class _Upgrade:
    location: str
    action: str
    from_revision: str | None
    schema_revision: str
    backup: str | None
    application_revision: str | None = None

    def __str__(self) -> str:
        match self.action:
            case "made":
                return f"Made {self.location} at schema revision {self.schema_revision}."
            case "upgraded":
                kept = f" A copy from before the upgrade is in {self.backup}." if self.backup else ""
                step = f"from schema revision {self.from_revision} to {self.schema_revision}"
                return f"Upgraded {self.location} {step}.{kept}"
            case "upgraded application":
                kept = f" A copy from before the upgrade is in {self.backup}." if self.backup else ""
                return f"Upgraded {self.location} to revision {self.application_revision} of the application.{kept}"
            case _:
                return f"{self.location} is at schema revision {self.schema_revision} already: nothing to do."


def _bring_up_to_date(target: str | None, migrations: str | None, acknowledged: Collection[str]) -> _Upgrade:
    where = resolve_target(target)
    if where.is_temporary:
        raise InvalidArgumentError("a temporary database ends with this command: name a file or a server's URL")
    found: str | None = REVISION
    application: str | None = None
    try:
        Database.open(target, migrate=False, migrations=migrations).close()
    except SchemaOutdatedError as outdated:
        if outdated.application is None:
            found = outdated.revision
        else:
            application = outdated.needed
    before = _backups(where.path)
    # Call `Database.open()` also for a current schema, because the call repairs the modes of directories and files.
    Database.open(target, migrations=migrations, acknowledged=acknowledged).close()
    made = sorted(_backups(where.path) - before)
    return _Upgrade(
        location=where.location,
        action="made"
        if found is None
        else "upgraded application"
        if application is not None
        else "unchanged"
        if found == REVISION
        else "upgraded",
        from_revision=found,
        schema_revision=REVISION,
        backup=str(made[-1]) if made else None,
        application_revision=application,
    )


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
    database: DatabaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Create the database, or upgrade an existing database. If the schema is current, the command changes no data."""
    _report_upgrade(context, database, migrations, (), as_json=as_json)


@app.command()
def migrate(
    context: typer.Context,
    migrations: MigrationsOption = None,
    acknowledge: AcknowledgeOption = None,
    database: DatabaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Upgrade the schema to the revision that this version of homeagent needs.

    If a SQLite file holds data, the command first makes a copy next to the file. A failed upgrade does not change the
    data.
    """
    _report_upgrade(context, database, migrations, acknowledge or (), as_json=as_json)


def _report_upgrade(
    context: typer.Context,
    database: str | None,
    migrations: str | None,
    acknowledged: Collection[str],
    *,
    as_json: bool,
) -> None:
    upgrade = _bring_up_to_date(target_of(context, database), migrations, acknowledged)
    if as_json:
        shown = asdict(upgrade)
        if upgrade.application_revision is None:
            del shown["application_revision"]
        print_json(shown)
    else:
        typer.echo(str(upgrade))
