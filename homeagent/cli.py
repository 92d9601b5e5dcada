"""The command line: make and upgrade a database, look at it, clean it, and let devices in.

The exit status is 0; 1 for a refused operation, with one line on standard error; 2 for wrong usage.
"""

from __future__ import annotations

import io
import json
import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from homeagent.database import Database
from homeagent.engine.target import resolve_target
from homeagent.errors import HomeAgentError, InvalidArgumentError, SchemaOutdatedError
from homeagent.maintenance.reporting import DatabaseStatus
from homeagent.migrations import REVISION
from homeagent.models.device import Device, DevicePublic, DeviceStatus, Role
from homeagent.models.idempotency_key import IdempotencyScope
from homeagent.models.types import MAX_LIMIT

__all__ = ["app", "main"]

# Typer carries Click inside it in its newer versions and depends on it in the older ones; this is either's UsageError.
_UsageError: Any = typer.BadParameter.__base__

_CREDENTIALS = re.compile(r"://\S*@|((?:password|passwd)=)[^&\s]*", re.IGNORECASE)
_LONGEST_BUDGET = 366 * 24 * 3600.0


# How a command ends


class _Commands(TyperGroup):
    """Ends a refused operation with one line and status 1, and keeps credentials out of messages on wrong usage."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        with _discreet():
            return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        if ctx.parent is not None:
            return super().invoke(ctx)
        try:
            with _discreet(), _warnings_at_the_end():
                return super().invoke(ctx)
        except HomeAgentError as error:
            typer.echo(f"homeagent: {_one_line(str(error))}", err=True)
            raise typer.Exit(1) from None


@contextmanager
def _discreet() -> Iterator[None]:
    # A message on wrong usage repeats the argument, which may be a database's URL in the wrong place.
    try:
        yield
    except _UsageError as error:
        error.message = _CREDENTIALS.sub(lambda found: f"{found[1]}***" if found[1] else "://***@", error.message)
        raise


class _Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@contextmanager
def _warnings_at_the_end() -> Iterator[None]:
    # A refused operation leaves exactly one line, which a warning logged on the way would make two.
    kept = _Kept()
    logger = logging.getLogger("homeagent")
    logger.addHandler(kept)
    try:
        yield
    finally:
        logger.removeHandler(kept)
    for record in kept.records:
        typer.echo(f"homeagent: warning: {_one_line(record.getMessage())}", err=True)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def main() -> None:
    """Run the command that `sys.argv` names, and exit with its status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # An id in a script that the terminal's encoding lacks is shown as its code points; it ends no command.
            stream.reconfigure(errors="backslashreplace")
    app(prog_name="homeagent")


# What the commands share

DatabaseOption = Annotated[
    str | None,
    typer.Option(
        "--database",
        metavar="TARGET",
        help="A SQLite file or a PostgreSQL URL. Left out: $HOMEAGENT_DATABASE, else ~/.homeagent/homeagent.db.",
        show_default=False,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
DeviceArgument = Annotated[str, typer.Argument(metavar="DEVICE", help="The id of the device.", show_default=False)]

MethodArgument = Annotated[str, typer.Argument(metavar="METHOD", help="What was called.", show_default=False)]
KeyArgument = Annotated[str, typer.Argument(metavar="KEY", help="The key that the device chose.", show_default=False)]

app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    # Whatever is no refusal is a bug: the plain traceback, without the values of local variables.
    pretty_exceptions_enable=False,
)
devices = typer.Typer(
    cls=_Commands, no_args_is_help=True, help="See which devices may enter, let them in and keep them out."
)
app.add_typer(devices, name="devices")
keys = typer.Typer(
    cls=_Commands, no_args_is_help=True, help="Settle the idempotency keys whose effect may or may not have happened."
)
app.add_typer(keys, name="keys")


@app.callback()
def _before_command(context: typer.Context, database: DatabaseOption = None) -> None:
    """The operational store of a home agent gateway.

    Exit status: 0; 1 for a refused operation, with the reason on standard error; 2 for wrong usage.
    """
    context.obj = database


@devices.callback()
def _before_device_command(context: typer.Context, database: DatabaseOption = None) -> None:
    if database is not None:
        context.obj = database


@keys.callback()
def _before_key_command(context: typer.Context, database: DatabaseOption = None) -> None:
    if database is not None:
        context.obj = database


def _target(context: typer.Context, database: str | None) -> str | None:
    named_before: str | None = context.obj
    return named_before if database is None else database


def _open(context: typer.Context, database: str | None) -> Database:
    # Only `init` and `migrate` make or change a schema: a misspelt path leaves no new file behind.
    return Database.open(_target(context, database), migrate=False)


def _print_json(value: object) -> None:
    # ASCII: it is right in any encoding, and no character of an id or a reason steers the terminal.
    typer.echo(json.dumps(value, indent=2))


def _console(*, error: bool = False) -> Console:
    # What is stored is never taken for markup.
    return Console(stderr=error, markup=False, highlight=False, emoji=False)


def _grid(*, header: bool = False) -> Table:
    return Table(box=None, show_header=header, pad_edge=False, header_style="bold")


def _facts(facts: dict[str, str]) -> Table:
    table = _grid()
    table.add_column(style="bold", no_wrap=True)
    # An id is shown whole, whatever the width: it is what the reader decides on.
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, value)
    return table


def _instant(value: datetime | None) -> str:
    return "never" if value is None else value.isoformat(sep=" ", timespec="milliseconds")


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


# The schema


@dataclass(frozen=True)
class _Upgrade:
    location: str
    action: str
    from_revision: str | None
    schema_revision: str
    backup: str | None

    def __str__(self) -> str:
        match self.action:
            case "made":
                return f"Made {self.location} at schema revision {self.schema_revision}."
            case "upgraded":
                kept = f" What it was is kept in {self.backup}." if self.backup else ""
                step = f"from schema revision {self.from_revision} to {self.schema_revision}"
                return f"Upgraded {self.location} {step}.{kept}"
            case _:
                return f"{self.location} is at schema revision {self.schema_revision} already: nothing to do."


def _bring_up_to_date(target: str | None) -> _Upgrade:
    where = resolve_target(target)
    if where.is_temporary:
        raise InvalidArgumentError("a temporary database ends with this command: name a file, or a server's URL")
    found: str | None = REVISION
    try:
        Database.open(target, migrate=False).close()
    except SchemaOutdatedError as outdated:
        found = outdated.revision
    before = _backups(where.path)
    # Opened in any case: that repairs the modes of directories and files too.
    Database.open(target).close()
    made = sorted(_backups(where.path) - before)
    return _Upgrade(
        location=where.location,
        action="made" if found is None else "unchanged" if found == REVISION else "upgraded",
        from_revision=found,
        schema_revision=REVISION,
        backup=str(made[-1]) if made else None,
    )


def _backups(path: Path | None) -> set[Path]:
    if path is None or not path.parent.is_dir():
        return set()
    return {
        beside
        for beside in path.parent.iterdir()
        if beside.name.startswith(f"{path.name}.") and beside.name.endswith(".backup")
    }


@app.command()
def init(context: typer.Context, database: DatabaseOption = None, as_json: JsonOption = False) -> None:
    """Make the database, or upgrade it where it exists.

    Doing it again is fine.
    """
    _report_upgrade(context, database, as_json=as_json)


@app.command()
def migrate(context: typer.Context, database: DatabaseOption = None, as_json: JsonOption = False) -> None:
    """Upgrade the schema to the revision that this version needs.

    A file that holds data is copied beside itself first. An upgrade that fails changes nothing.
    """
    _report_upgrade(context, database, as_json=as_json)


def _report_upgrade(context: typer.Context, database: str | None, *, as_json: bool) -> None:
    upgrade = _bring_up_to_date(_target(context, database))
    if as_json:
        _print_json(asdict(upgrade))
    else:
        typer.echo(str(upgrade))


# A look at it


@app.command()
def status(context: typer.Context, database: DatabaseOption = None, as_json: JsonOption = False) -> None:
    """Show where the database is, its engine, schema, settings and file modes, and how much it holds.

    It changes nothing and never makes a database.
    """
    with _open(context, database) as opened:
        found = opened.status()
    if as_json:
        _print_json(found.model_dump(mode="json"))
        return
    console = _console()
    console.print(_facts(_summary(found)))
    rows = _grid(header=True)
    rows.add_column("Table")
    rows.add_column("Rows", justify="right")
    rows.add_column("Expired, to be swept", justify="right")
    for name, number in found.rows.items():
        rows.add_row(name, f"{number:,}", f"{found.expired[name]:,}" if name in found.expired else "")
    console.print()
    console.print(rows)
    for title, facts in (("Pragmas", found.pragmas), ("File modes", found.file_modes)):
        if facts:
            console.print(f"\n{title}", style="bold")
            console.print(_facts({name: str(value) for name, value in facts.items()}))


def _summary(found: DatabaseStatus) -> dict[str, str]:
    name = {"sqlite": "SQLite", "postgresql": "PostgreSQL"}.get(found.engine, found.engine)
    engine = f"{name} {found.engine_version}, through {found.driver}"
    if not found.safe_engine:
        engine += " (it has the WAL-reset bug: use SQLite 3.51.3 or newer)"
    facts = {
        "Database": found.location,
        "Engine": engine,
        "Schema revision": str(found.schema_revision),
    }
    if found.durability is not None:
        facts["Durability"] = found.durability
    if found.wal_bytes is not None:
        facts["Write-ahead log"] = _count(found.wal_bytes, "byte")
    return facts


# Cleanup


def _budget(seconds: float | None) -> float | None:
    # Written so that a NaN is refused too.
    if seconds is not None and not 0.001 <= seconds <= _LONGEST_BUDGET:
        raise typer.BadParameter("it must be from 0.001 seconds to 366 days.")
    return seconds


@app.command()
def sweep(
    context: typer.Context,
    batch_size: Annotated[
        int, typer.Option(min=1, max=MAX_LIMIT, metavar="ROWS", help="How many rows one transaction removes at most.")
    ] = 100,
    time_budget: Annotated[
        float | None,
        typer.Option(callback=_budget, metavar="SECONDS", help="When to end early.", show_default="until all is done"),
    ] = None,
    database: DatabaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Remove nonces and idempotency keys that have expired.

    It works in small transactions, so it can run beside the gateway.
    """
    with _open(context, database) as opened:
        report = opened.sweep(
            batch_size=batch_size, time_budget=None if time_budget is None else timedelta(seconds=time_budget)
        )
    if as_json:
        _print_json(report.model_dump(mode="json"))
        return
    typer.echo(
        f"Removed {_count(report.nonces, 'nonce')} and {_count(report.idempotency_keys, 'idempotency key')}."
        + (" The time budget ended it early: sweep again." if report.more else "")
    )


# Devices


def _public(device: Device) -> dict[str, Any]:
    shown = DevicePublic.model_validate(device, from_attributes=True)
    return shown.model_dump(mode="json", by_alias=True)


@devices.command("list")
def list_devices(
    context: typer.Context,
    status: Annotated[DeviceStatus | None, typer.Option(help="Only those that stand so.", show_default=False)] = None,
    role: Annotated[Role | None, typer.Option(help="Only those with this role.", show_default=False)] = None,
    limit: Annotated[int, typer.Option(min=1, max=MAX_LIMIT, metavar="ROWS", help="How many at most.")] = 100,
    after: Annotated[
        str | None, typer.Option(metavar="DEVICE", help="The last id of the page before.", show_default=False)
    ] = None,
    database: DatabaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the devices, ordered by id."""
    with _open(context, database) as opened:
        page = opened.run(
            lambda unit: unit.devices.list(status=status, role=role, limit=limit, after=after), read_only=True
        )
    if as_json:
        _print_json([_public(device) for device in page])
        return
    table = _grid(header=True)
    for heading in ("Device", "Role", "Status", "Paired at", "Last seen at"):
        table.add_column(heading, overflow="fold")
    for device in page:
        table.add_row(device.id, device.role, device.status, _instant(device.paired_at), _instant(device.last_seen_at))
    _console().print(table)


def _instant_argument(text: str | None) -> str | None:
    if text is not None:
        try:
            aware = datetime.fromisoformat(text).tzinfo is not None
        except ValueError:
            aware = False
        if not aware:
            raise typer.BadParameter("it must be an instant with its offset, such as 2030-01-31T12:00:00.000Z.")
    return text


@devices.command()
def approve(
    context: typer.Context,
    device_id: DeviceArgument,
    role: Annotated[
        Role | None, typer.Option(help="The role that you saw: with another one it is refused.", show_default=False)
    ] = None,
    paired_at: Annotated[
        str | None,
        typer.Option(
            callback=_instant_argument,
            metavar="INSTANT",
            help="The instant of pairing that you saw: with another one it is refused.",
            show_default=False,
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Don't ask. It needs --role and --paired-at.")] = False,
    database: DatabaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Let a device in.

    It is shown first, and approved only if it still is what was shown, with the same role and secret.
    """
    if yes and (role is None or paired_at is None):
        raise typer.BadParameter("--yes needs --role and --paired-at, as 'devices list --json' prints them.")
    with _open(context, database) as opened:
        seen = opened.run(lambda unit: unit.devices.get(device_id), read_only=True)
        if not yes and not seen.approved:
            _ask(seen)
        changed = opened.run(
            lambda unit: unit.devices.approve(
                device_id,
                expected_role=role or seen.role,
                expected_secret_hash=seen.shared_secret_hash,
                expected_paired_at=datetime.fromisoformat(paired_at) if paired_at else seen.paired_at,
            )
        )
        now = opened.run(lambda unit: unit.devices.get(device_id), read_only=True)
    _report_change(now, changed=changed, word="approved", as_json=as_json)


def _ask(device: Device) -> None:
    # On standard error: what is asked is no output.
    console = _console(error=True)
    facts = {
        "Device": device.id,
        "Role": str(device.role),
        "Status": str(device.status),
        "Paired at": _instant(device.paired_at),
        "Last seen at": _instant(device.last_seen_at),
        "Metadata": json.dumps(device.metadata_),
    }
    if device.revoked_at is not None:
        facts["Revoked at"] = _instant(device.revoked_at)
        facts["Reason"] = device.revoked_reason or "none given"
    console.print(_facts(facts))
    typer.confirm("Approve this device?", abort=True, err=True)


@devices.command()
def revoke(
    context: typer.Context,
    device_id: DeviceArgument,
    reason: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What is shown for it later.", show_default=False)
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Even if it is the last approved admin.")] = False,
    database: DatabaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Keep a device out until it is approved again."""
    with _open(context, database) as opened:
        changed = opened.run(lambda unit: unit.devices.revoke(device_id, reason=reason, force=force))
        now = opened.run(lambda unit: unit.devices.get(device_id), read_only=True)
    _report_change(now, changed=changed, word="revoked", as_json=as_json)


def _report_change(device: Device, *, changed: bool, word: str, as_json: bool) -> None:
    if as_json:
        _print_json({"changed": changed, "device": _public(device)})
    elif changed:
        typer.echo(f"{word.capitalize()} {device.id!r}, {device.role}.")
    else:
        typer.echo(f"{device.id!r} is {word} already: nothing to do.")


# Idempotency keys


@keys.command()
def abandoned(
    context: typer.Context,
    limit: Annotated[int, typer.Option(min=1, max=MAX_LIMIT, metavar="ROWS", help="How many at most.")] = 100,
    database: DatabaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the keys whose attempt ended without a word, longest ago first.

    Find out whether the effect took place, then 'resolve' or 'forget' each.
    """
    with _open(context, database) as opened:
        rows = opened.run(lambda unit: unit.idempotency_keys.list_abandoned(limit=limit), read_only=True)
    if as_json:
        # The key alone names the record; neither parameters nor results are shown.
        shown = {"device_id", "method", "key", "attempt", "created_at", "lease_expires_at", "downstream_key"}
        _print_json([row.model_dump(mode="json", include=shown) for row in rows])
        return
    table = _grid(header=True)
    for heading in ("Device", "Method", "Key", "Attempt", "Begun at", "Abandoned at"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(
            row.device_id,
            row.method,
            row.key,
            str(row.attempt),
            _instant(row.created_at),
            _instant(row.lease_expires_at),
        )
    _console().print(table)


@keys.command()
def resolve(
    context: typer.Context,
    device_id: DeviceArgument,
    method: MethodArgument,
    key: KeyArgument,
    result: Annotated[
        str, typer.Argument(metavar="RESULT", help="What the effect would have returned, as JSON.", show_default=False)
    ],
    database: DatabaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Record that the effect took place: retries get RESULT from now on."""
    try:
        value = json.loads(result)
    except (ValueError, RecursionError):
        raise typer.BadParameter("RESULT must be JSON, such as null or '{\"id\": 7}'.") from None
    scope = IdempotencyScope(device_id, method, key)
    with _open(context, database) as opened:
        changed = opened.run(lambda unit: unit.idempotency_keys.resolve(scope, value))
    _report_settled(changed=changed, done="Resolved: its retries get this result.", as_json=as_json)


@keys.command()
def forget(
    context: typer.Context,
    device_id: DeviceArgument,
    method: MethodArgument,
    key: KeyArgument,
    database: DatabaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Record that the effect did not take place: the next call runs it."""
    scope = IdempotencyScope(device_id, method, key)
    with _open(context, database) as opened:
        changed = opened.run(lambda unit: unit.idempotency_keys.forget(scope))
    _report_settled(changed=changed, done="Forgotten: the next call runs it.", as_json=as_json)


def _report_settled(*, changed: bool, done: str, as_json: bool) -> None:
    if as_json:
        _print_json({"changed": changed})
    else:
        typer.echo(done if changed else "Nothing is abandoned under this key: nothing to do.")
