"""The commands `homeagent devices`, which list, approve, revoke and delete devices."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any

import typer
from rich.table import Table

from homeagent.cli.application import DatabaseOption, group
from homeagent.cli.opening import open_named
from homeagent.cli.output import JsonOption, console_for, count, facts_table, format_timestamp, grid, print_json
from homeagent.cli.visible_text import identity, quoted
from homeagent.database import Database
from homeagent.models.device import Device, DeviceStatus, Role
from homeagent.models.schemas import DevicePublic
from homeagent.models.types import MAX_LIMIT, MILLISECOND, check_timestamp, earlier

devices = group("devices", help="List, approve, revoke and delete devices.")

_SHOWN = 20  # number of devices that `delete` shows before the confirmation


def _timestamp_argument(text: str | None) -> str | None:
    if text is not None:
        try:
            aware = datetime.fromisoformat(text).tzinfo is not None
        except ValueError:
            aware = False
        if not aware:
            raise typer.BadParameter("must be a timestamp with an offset, such as 2030-01-31T12:00:00.000Z.")
    return text


DeviceArgument = Annotated[str, typer.Argument(metavar="DEVICE", help="Id of the device.", show_default=False)]


class _Order(StrEnum):
    ID = "id"
    PAIRED_AT = "paired_at"


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
    seen_before: Annotated[
        str | None,
        typer.Option(
            callback=_timestamp_argument,
            metavar="TIMESTAMP",
            help="Only devices that were last seen before this time.",
            show_default=False,
        ),
    ] = None,
    order: Annotated[_Order, typer.Option(help="Order of the list; paired_at lists the newest first.")] = _Order.ID,
    limit: Annotated[int, typer.Option(min=1, max=MAX_LIMIT, metavar="ROWS", help="Maximum number of devices.")] = 100,
    after: Annotated[
        str | None, typer.Option(metavar="DEVICE", help="Last id of the previous page.", show_default=False)
    ] = None,
    database: DatabaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the devices."""
    with open_named(context, database) as opened:
        page = opened.devices.list(
            status=status,
            role=role,
            seen_before=None if seen_before is None else datetime.fromisoformat(seen_before),
            order=order.value,
            limit=limit,
            after=after,
        )
    if as_json:
        print_json([_public(device) for device in page])
    else:
        console_for().print(_table_of(page))


def _table_of(page: Sequence[Device]) -> Table:
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
    return table


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


@devices.command()
def delete(
    context: typer.Context,
    before: Annotated[
        str,
        typer.Option(
            callback=_timestamp_argument,
            metavar="TIMESTAMP",
            help="Delete the devices that were paired before this time.",
            show_default=False,
        ),
    ],
    pending: Annotated[
        bool, typer.Option("--pending", help="Delete only pending devices. Required, to name the kind of devices.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    database: DatabaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Delete the pending devices that were paired before a time.

    The command shows the devices and asks for a confirmation. A device that is approved or revoked before the answer is
    not deleted.
    """
    if not pending:
        raise typer.BadParameter("name the kind of devices by --pending.")
    # The time of the method is inclusive.
    until = earlier(check_timestamp(datetime.fromisoformat(before), "before"), MILLISECOND)
    with open_named(context, database) as opened:
        if not yes:
            _ask_to_delete(opened, until)
        deleted = 0
        while batch := opened.run(lambda unit: unit.devices.delete_pending(paired_before=until)):
            deleted += batch
    if as_json:
        print_json({"deleted": deleted})
    else:
        typer.echo(f"Deleted {count(deleted, 'pending device')}.")


def _ask_to_delete(opened: Database, until: datetime) -> None:
    found: list[Device] = []
    page: Sequence[Device] = ()
    while page := opened.devices.list(
        status=DeviceStatus.PENDING, order="paired_at", limit=1000, after=page[-1] if page else None
    ):
        found += [device for device in page if device.paired_at <= until]
    # Standard output is for results only.
    console = console_for(error=True)
    console.print(_table_of(found[:_SHOWN]))
    if len(found) > _SHOWN:
        console.print(f"and {count(len(found) - _SHOWN, 'other device')}")
    typer.confirm(f"Delete {count(len(found), 'pending device')}?", abort=True, err=True)


def _report_change(device: Device, *, changed: bool, word: str, as_json: bool) -> None:
    if as_json:
        print_json({"changed": changed, "device": _public(device)})
    elif changed:
        typer.echo(f"{word.capitalize()} {quoted(device.id)}, {device.role}.")
    else:
        typer.echo(f"{quoted(device.id)} is {word} already: nothing to do.")
