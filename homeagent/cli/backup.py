"""Commands that copy a store: `homeagent backup`, `restore`, `begin-epoch` and `copy`."""

from __future__ import annotations

import os
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from homeagent.cli.application import WithoutDatabase, app, confirm, lasting_target, open_named
from homeagent.cli.arguments import AcknowledgeOption, MigrationsOption, YesOption, argument, flag, option
from homeagent.cli.operator_texts import operator_text
from homeagent.cli.output import count, format_timestamp, print_facts, print_result, shown_progress
from homeagent.cli.rows import require_expected
from homeagent.cli.schema import import_tables
from homeagent.cli.visible_text import escape_words, identity, quoted
from homeagent.database import Database
from homeagent.engine.sqlite.manifests import Manifest, manifest_path, read_manifest
from homeagent.environment import BUSY_TIMEOUT, busy_timeout_or_default
from homeagent.errors import DatabaseBusyError, DatabaseError, SchemaOutdatedError
from homeagent.maintenance import RestoreReport
from homeagent.maintenance.restore import check_paths
from homeagent.models.types import MAX_LIMIT

_DESTINATION_HELP = (
    "Directory, or file that does not exist. A path with a slash at the end is a directory. The command creates "
    "missing directories."
)
_KEEP_HELP = "Remove this database's oldest backups from the directory until N backups are left."
_EPOCH_HELP = (
    "Refuse the restore if the database has another epoch. If the database is absent or unreadable, pass the epoch 0."
)
_LIVE_HELP = "For a trial: allow programs to change SOURCE during the copy. The copy lacks these changes."


@app.command()
def backup(
    context: typer.Context,
    destination: Annotated[str, argument("DESTINATION", _DESTINATION_HELP)],
    keep: Annotated[int | None, option("N", _KEEP_HELP, min=1, max=MAX_LIMIT, show_default="all")] = None,
    replace: Annotated[bool, flag("--replace", "Replace an existing file DESTINATION.")] = False,
) -> None:
    """Copy the database while other processes use it.

    The copy gets its final name only after the verification. The command adds a manifest, for example copy.db.json for
    copy.db. The manifest records time, revision, rows, size and SHA-256.
    """
    with open_named(context) as opened, shown_progress(context, "copying and verifying"):
        made = opened.backup(destination, keep=keep, replace=replace)
    manifest = read_manifest(made)
    facts = {} if manifest is None else manifest.model_dump(mode="json")
    size = "" if manifest is None else f", {count(manifest.size, 'byte')}"
    values = {"backup": str(made), "manifest": str(manifest_path(made)), **facts}
    print_result(context, values, f"Backed up to {made}{size}, verified.")


@app.command()
def restore(
    context: typer.Context,
    backup: Annotated[str, argument("BACKUP", "Backup to restore. The backup does not change.")],
    acknowledge: AcknowledgeOption = None,
    epoch: Annotated[int | None, option("NUMBER", _EPOCH_HELP, min=0)] = None,
    yes: YesOption = False,
) -> None:
    """Replace the database by a backup, and keep the old database in quarantine.

    First stop the gateway, and check that the system's clock is right. The command verifies the backup and begins a
    new epoch. After a restore, gateways refuse messages that were signed before the restore. The command shows the
    database and the backup, and asks for a confirmation. The option --yes needs --epoch.
    """
    source_of_epoch = "as 'status --json' prints it, or 0 if the database is absent or cannot be opened"
    require_expected(context, "epoch", source_of_epoch)
    if not yes or epoch == 0:
        source, database, manifest = check_paths(backup, context.obj.database)
        seen, state = _state(context, database)
        facts = {"Database": identity(str(database)), **state, "Backup": identity(str(source)), **_described(manifest)}
        confirm(context, "Replace this database by this backup?", partial(print_facts, facts.items(), error=True))
        # The operator gives the epoch 0 for a database that can't be opened. `Database.restore()` can read the
        # epoch of some damaged databases. A restore with `expected_epoch=0` would then fail. Pass None to accept any
        # epoch.
        epoch = seen if epoch is None or (epoch == 0 and seen is None) else epoch
    with shown_progress(context, "verifying and restoring"):
        report = Database.restore(
            backup,
            context.obj.database,
            acknowledged=acknowledge or (),
            busy_timeout=busy_timeout_or_default(BUSY_TIMEOUT),
            expected_epoch=epoch,
        )
    print_result(context, report.model_dump(mode="json"), lambda: _print(report))


def _state(context: typer.Context, database: Path) -> tuple[int | None, dict[str, str]]:
    """Return the epoch and facts about a database. If an existing database can't be opened, the epoch is None."""
    try:
        with open_named(context) as opened:
            seen = opened.status()
    except DatabaseBusyError:
        raise  # a busy database is not necessarily damaged
    except DatabaseError as error:
        if not os.path.lexists(database):
            return 0, {"State": "absent"}
        return None, {"State": escape_words(f"cannot be opened: {operator_text(str(error))}")}
    return seen.epoch, {"Epoch": str(seen.epoch), "Devices": f"{seen.rows['devices']:,}"}


def _described(manifest: Manifest | None) -> dict[str, str]:
    if manifest is None:
        return {"Manifest": "absent"}
    return {
        "Taken at": format_timestamp(manifest.taken_at),
        "Schema revision": str(manifest.schema_revision),
        "Devices in backup": f"{manifest.rows.get('devices', 0):,}",
    }


def _print(report: RestoreReport) -> None:
    typer.echo(f"Restored {report.database} from {report.backup}: epoch {report.epoch} begins.")
    if report.taken_at is not None:
        typer.echo(f"The backup holds the state of {format_timestamp(report.taken_at)}.")
    if report.kept_aside is not None:
        typer.echo(f"The old database is kept in {report.kept_aside}.")
    if report.readmitted_devices is None:
        advice = "check each device of 'devices list --status approved'"
        typer.echo(f"The devices revoked since the backup are unknown: {advice}.")
    for device_id in report.readmitted_devices or ():
        change = "has an approval or a role again that it had lost since the backup"
        typer.echo(f"{quoted(device_id)} {change}: check or revoke it.")
    for device_id in report.old_secret_devices or ():
        typer.echo(f"{quoted(device_id)} has an older secret again: rotate the secret.")


@app.command()
def begin_epoch(
    context: typer.Context,
    epoch: Annotated[
        int | None, option("NUMBER", "Refuse the change if the database has another epoch.", min=0)
    ] = None,
    yes: YesOption = False,
) -> None:
    """Begin a new epoch after another program has restored the database.

    For example, run the command after pg_restore, or after you have restored a disk snapshot. Stop the gateways first.
    In the new epoch, gateways refuse messages signed before the epoch. A new epoch cannot be undone. The command shows
    the current epoch and asks for a confirmation. The option --yes needs --epoch.
    """
    require_expected(context, "epoch", "as 'status --json' prints it")
    if not yes:
        with open_named(context) as opened:
            seen = opened.status()
        facts = {
            "Database": identity(seen.location),
            "Epoch": str(seen.epoch),
            "Restored at": format_timestamp(seen.restored_at),
        }
        confirm(context, "Begin a new epoch of this database?", partial(print_facts, facts.items(), error=True))
        epoch = seen.epoch if epoch is None else epoch
    report = Database.begin_epoch(
        context.obj.database, busy_timeout=busy_timeout_or_default(BUSY_TIMEOUT), expected_epoch=epoch
    )
    text = f"Epoch {report.epoch} of {report.location} begins at {format_timestamp(report.restored_at)}."
    print_result(context, report.model_dump(mode="json"), text)


@app.command(cls=WithoutDatabase)
def copy(
    context: typer.Context,
    source: Annotated[str, argument("SOURCE", "SQLite file or PostgreSQL URL.")],
    target: Annotated[str, argument("TARGET", "Empty PostgreSQL database, or SQLite file that is empty or absent.")],
    live: Annotated[bool, flag("--live", _LIVE_HELP)] = False,
    migrations: MigrationsOption = None,
    leave: Annotated[
        list[str] | None, option("TABLE", "Do not copy this table of an application. Can be repeated.")
    ] = None,
    acknowledge: AcknowledgeOption = None,
) -> None:
    """Copy a whole store into an empty database. SOURCE and TARGET can have different engines.

    First stop every gateway and sweeper that uses SOURCE. The command copies all rows in one transaction. The command
    compares each copied row with SOURCE. If a step fails, TARGET stays empty. SOURCE is not changed.

    The command also copies an application's tables. If TARGET lacks the application's tables, name the application's
    revisions by --migrations.
    """
    if context.obj.database is not None:
        raise typer.BadParameter("copy takes SOURCE and TARGET: leave out --database.")
    origin, destination = lasting_target(source), lasting_target(target)
    import_tables(migrations)
    with (
        Database.open(source, migrate=False, acknowledged=acknowledge or ()) as opened,
        _open_target(target, migrations, acknowledge or ()) as empty,
        shown_progress(context) as progress,
    ):
        report = opened.copy_to(empty, live=live, leave=leave or (), progress=progress)
    places = {"source": origin.location, "target": destination.location}
    same = "as it was at the beginning" if live else "the same on both sides"
    rows = count(sum(report.rows.values()), "row")
    text = f"Copied {origin.location} to {destination.location}: {rows}, {same}."
    print_result(context, {**places, "live": live, **report.model_dump(mode="json")}, text)


def _open_target(target: str, migrations: str | None, acknowledged: Collection[str]) -> Database:
    try:
        return Database.open(target, migrate=False, migrations=migrations)
    except SchemaOutdatedError as outdated:
        # Do not upgrade an existing target, because a refused target must stay unchanged.
        if outdated.revision is not None:
            raise
    return Database.open(target, migrations=migrations, acknowledged=acknowledged)
