"""The commands `homeagent devices`, which list, approve and revoke devices."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Annotated, Any

import typer

from homeagent.cli.application import DatabaseOption, group
from homeagent.cli.opening import open_named
from homeagent.cli.output import JsonOption, console_for, facts_table, format_timestamp, grid, print_json
from homeagent.cli.visible_text import identity, quoted
from homeagent.models.device import Device, DeviceStatus, Role
from homeagent.models.schemas import DevicePublic
from homeagent.models.types import MAX_LIMIT

devices = group("devices", help="List, approve and revoke devices.")

DeviceArgument = Annotated[str, typer.Argument(metavar="DEVICE", help="Id of the device.", show_default=False)]


def _public(device: Device) -> dict[str, Any]:
    shown = DevicePublic.model_validate(device, from_attributes=True)
    return shown.model_dump(mode="json", by_alias=True)


@devices.command("list")
def list_devices(
    context: typer.Context,
    status: Annotated[
        DeviceStatus | None, typer.Option(help="Only devices with this status.", show_default=False)
    ] = None,
    role: Annotated[Role | None, typer.Option(help="Only devices with this role.", show_default=False)] = None,
    limit: Annotated[int, typer.Option(min=1, max=MAX_LIMIT, metavar="ROWS", help="Maximum number of devices.")] = 100,
    after: Annotated[
        str | None, typer.Option(metavar="DEVICE", help="Last id of the previous page.", show_default=False)
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
            identity(device.id),
            device.role,
            device.status,
            format_timestamp(device.paired_at),
            format_timestamp(device.last_seen_at),
        )
    console_for().print(table)


def _timestamp_argument(text: str | None) -> str | None:
    if text is not None:
        try:
            aware = datetime.fromisoformat(text).tzinfo is not None
        except ValueError:
            aware = False
        if not aware:
            raise typer.BadParameter("must be a timestamp with an offset, such as 2030-01-31T12:00:00.000Z.")
    return text


@devices.command()
def approve(
    context: typer.Context,
    device_id: DeviceArgument,
    role: Annotated[
        Role | None, typer.Option(help="Refuse the approval if the device has another role.", show_default=False)
    ] = None,
    paired_at: Annotated[
        str | None,
        typer.Option(
            callback=_timestamp_argument,
            metavar="TIMESTAMP",
            help="Refuse the approval if the device was paired at another time.",
            show_default=False,
        ),
    ] = None,
    status: Annotated[
        DeviceStatus | None,
        typer.Option(
            help="Refuse the approval if the device has another status. With --yes, a revoked device is approved only "
            "if you name its status.",
            show_default=False,
        ),
    ] = None,
    yes: Annotated[
        bool,
        typer.Option(
            "--yes", help="Do not ask. Needs --role and --paired-at, and for a revoked device also --status revoked."
        ),
    ] = False,
    database: DatabaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Approve a device.

    The command shows the device and asks for a confirmation. If the role, secret, time of pairing or status of the
    device changes before the answer, the approval is refused.
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
                # Another administrator can revoke the device before the answer. With --yes, nothing was shown.
                expected_status=status if yes else status or seen.status,
            )
        )
        now = opened.run(lambda unit: unit.devices.get(device_id), read_only=True)
    _report_change(now, changed=changed, word="approved", as_json=as_json)


def _ask(device: Device) -> None:
    # Standard output is for results only.
    console = console_for(error=True)
    facts = {
        "Device": identity(device.id),
        "Role": str(device.role),
        "Status": str(device.status),
        "Paired at": format_timestamp(device.paired_at),
        "Last seen at": format_timestamp(device.last_seen_at),
        "Metadata": json.dumps(device.metadata_),
    }
    if device.revoked_at is not None:
        facts["Revoked at"] = format_timestamp(device.revoked_at)
        facts["Reason"] = identity(device.revoked_reason) if device.revoked_reason else "none given"
    console.print(facts_table(facts))
    typer.confirm("Approve this device?", abort=True, err=True)


@devices.command()
def revoke(
    context: typer.Context,
    device_id: DeviceArgument,
    reason: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Reason, stored with the device.", show_default=False)
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Revoke even the last approved admin.")] = False,
    database: DatabaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Revoke a device, which then has no access until it is approved again."""
    with open_named(context, database) as opened:
        changed = opened.run(lambda unit: unit.devices.revoke(device_id, reason=reason, force=force))
        now = opened.run(lambda unit: unit.devices.get(device_id), read_only=True)
    _report_change(now, changed=changed, word="revoked", as_json=as_json)


def _report_change(device: Device, *, changed: bool, word: str, as_json: bool) -> None:
    if as_json:
        print_json({"changed": changed, "device": _public(device)})
    elif changed:
        typer.echo(f"{word.capitalize()} {quoted(device.id)}, {device.role}.")
    else:
        typer.echo(f"{quoted(device.id)} is {word} already: nothing to do.")
