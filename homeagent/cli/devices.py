"""`homeagent devices`: see which devices may enter, let them in and keep them out."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Annotated, Any

import typer

from homeagent.cli.application import DatabaseOption, group
from homeagent.cli.opening import open_named
from homeagent.cli.output import JsonOption, console_for, facts_table, grid, identity, instant, print_json
from homeagent.models.device import Device, DeviceStatus, Role
from homeagent.models.schemas import DevicePublic
from homeagent.models.types import MAX_LIMIT

devices = group("devices", help="See which devices may enter, let them in and keep them out.")

DeviceArgument = Annotated[str, typer.Argument(metavar="DEVICE", help="The id of the device.", show_default=False)]


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
    with open_named(context, database) as opened:
        page = opened.run(
            lambda unit: unit.devices.list(status=status, role=role, limit=limit, after=after), read_only=True
        )
    if as_json:
        print_json([_public(device) for device in page])
        return
    table = grid(header=True)
    for heading in ("Device", "Role", "Status", "Paired at", "Last seen at"):
        table.add_column(heading, overflow="fold")
    for device in page:
        table.add_row(
            identity(device.id), device.role, device.status, instant(device.paired_at), instant(device.last_seen_at)
        )
    console_for().print(table)


def _timestamp_argument(text: str | None) -> str | None:
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
            callback=_timestamp_argument,
            metavar="INSTANT",
            help="The instant of pairing that you saw: with another one it is refused.",
            show_default=False,
        ),
    ] = None,
    status: Annotated[
        DeviceStatus | None,
        typer.Option(help="The status that you saw: a revoked device is refused without it.", show_default=False),
    ] = None,
    yes: Annotated[
        bool,
        typer.Option("--yes", help="Don't ask. It needs --role and --paired-at, and --status for a revoked device."),
    ] = False,
    database: DatabaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Let a device in.

    It is shown first, and approved only if it still is what was shown, with the same role, secret and status.
    """
    if yes and (role is None or paired_at is None):
        raise typer.BadParameter("--yes needs --role and --paired-at, as 'devices list --json' prints them.")
    with open_named(context, database) as opened:
        seen = opened.run(lambda unit: unit.devices.get(device_id), read_only=True)
        if not yes and not seen.approved:
            _ask(seen)
        changed = opened.run(
            lambda unit: unit.devices.approve(
                device_id,
                expected_role=role or seen.role,
                expected_secret_hash=seen.shared_secret_hash,
                expected_paired_at=datetime.fromisoformat(paired_at) if paired_at else seen.paired_at,
                # Another admin may revoke the device before the answer. With --yes `seen` was not shown to the admin.
                expected_status=status if yes else status or seen.status,
            )
        )
        now = opened.run(lambda unit: unit.devices.get(device_id), read_only=True)
    _report_change(now, changed=changed, word="approved", as_json=as_json)


def _ask(device: Device) -> None:
    # On standard error: what is asked is no output.
    console = console_for(error=True)
    facts = {
        "Device": identity(device.id),
        "Role": str(device.role),
        "Status": str(device.status),
        "Paired at": instant(device.paired_at),
        "Last seen at": instant(device.last_seen_at),
        "Metadata": json.dumps(device.metadata_),
    }
    if device.revoked_at is not None:
        facts["Revoked at"] = instant(device.revoked_at)
        facts["Reason"] = device.revoked_reason or "none given"
    console.print(facts_table(facts))
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
    with open_named(context, database) as opened:
        changed = opened.run(lambda unit: unit.devices.revoke(device_id, reason=reason, force=force))
        now = opened.run(lambda unit: unit.devices.get(device_id), read_only=True)
    _report_change(now, changed=changed, word="revoked", as_json=as_json)


def _report_change(device: Device, *, changed: bool, word: str, as_json: bool) -> None:
    if as_json:
        print_json({"changed": changed, "device": _public(device)})
    elif changed:
        typer.echo(f"{word.capitalize()} {device.id!r}, {device.role}.")
    else:
        typer.echo(f"{device.id!r} is {word} already: nothing to do.")
