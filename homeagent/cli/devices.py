"""Commands of the group `homeagent devices`: list devices, and decide on their access."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from enum import StrEnum
from functools import partial
from typing import Annotated

import typer

from homeagent.cli.application import DatabaseOption, JsonOption, YesOption, confirm, group
from homeagent.cli.device_output import (
    HEADINGS,
    DeviceArgument,
    public,
    refuse_change,
    report_change,
    row_of,
    show_device,
    timestamp_argument,
)
from homeagent.cli.opening import open_named
from homeagent.cli.output import Format, FormatOption, count, print_json, print_table
from homeagent.database import Database
from homeagent.models.device import Device, DeviceStatus, Role
from homeagent.models.types import MAX_LIMIT, MILLISECOND, check_timestamp, earlier
from homeagent.unit_of_work import UnitOfWork

devices: typer.Typer = group("devices", help="Pair, list, approve, revoke and delete devices.")

_SHOWN = 20  # number of devices that the command shows before the confirmation


class _Order(StrEnum):
    ID = "id"
    PAIRED_AT = "paired_at"


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
            callback=timestamp_argument,
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
    form: FormatOption = Format.TABLE,
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
        print_json([public(device) for device in page])
    else:
        print_table(HEADINGS, map(row_of, page), form=form)


@devices.command()
def show(
    context: typer.Context, device_id: DeviceArgument, database: DatabaseOption = None, as_json: JsonOption = False
) -> None:
    """Show a device."""
    with open_named(context, database) as opened:
        device = opened.devices.get(device_id)
    if as_json:
        print_json(public(device))
    else:
        show_device(device, error=False)


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
            callback=timestamp_argument,
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
    device changes before the operator answers, the command approves nothing.
    """
    if yes and (role is None or paired_at is None):
        raise typer.BadParameter("--yes needs --role and --paired-at, as 'devices list --json' prints them.")
    with open_named(context, database) as opened:
        seen = opened.run(lambda unit: unit.devices.get(device_id), read_only=True)
        show = partial(show_device, seen, error=True)
        confirm(context, "Approve this device?", yes=yes or seen.approved, show=show)
        changed = opened.run(
            lambda unit: unit.devices.approve(
                device_id,
                expected_role=role or seen.role,
                expected_secret_hash=seen.shared_secret_hash,
                expected_paired_at=datetime.fromisoformat(paired_at) if paired_at else seen.paired_at,
                # Without `--yes`, compare the status, because another administrator can revoke the device before the
                # answer.
                expected_status=status if yes else status or seen.status,
            )
        )
        now = opened.run(lambda unit: unit.devices.get(device_id), read_only=True)
    report_change(now, changed=changed, word="approved", as_json=as_json)


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
    report_change(now, changed=changed, word="revoked", as_json=as_json)


@devices.command()
def delete(
    context: typer.Context,
    device_id: Annotated[
        str | None, typer.Argument(metavar="[DEVICE]", help="Id of the device.", show_default=False)
    ] = None,
    pending: Annotated[bool, typer.Option("--pending", help="Delete pending devices. Needs --before.")] = False,
    before: Annotated[
        str | None,
        typer.Option(
            callback=timestamp_argument,
            metavar="TIMESTAMP",
            help="Delete the pending devices that were paired before this time.",
            show_default=False,
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Delete even the last approved admin.")] = False,
    yes: YesOption = False,
    database: DatabaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Delete a device, or the pending devices that were paired before a time.

    The command shows the devices and asks for a confirmation. If the device changes before the operator answers, the
    command does not delete the device. The command does not delete a pending device that is approved or revoked before
    the operator answers.
    """
    if device_id is not None:
        if pending or before is not None:
            raise typer.BadParameter("name either a device, or --pending with --before.")
        with open_named(context, database) as opened:
            deleted = _delete_one(context, opened, device_id, force=force, yes=yes)
        word = "device"
    else:
        if not pending or before is None or force:
            raise typer.BadParameter("name a device, or name the kind of devices by --pending with --before.")
        # The store's method also deletes a device that was paired exactly at its time argument; `--before` excludes
        # such a device.
        until = earlier(check_timestamp(datetime.fromisoformat(before), "before"), MILLISECOND)
        with open_named(context, database) as opened:
            deleted = _delete_pending(context, opened, until, yes=yes)
        word = "pending device"
    if as_json:
        print_json({"deleted": deleted})
    else:
        typer.echo(f"Deleted {count(deleted, word)}.")


def _delete_one(context: typer.Context, opened: Database, device_id: str, *, force: bool, yes: bool) -> int:
    seen = opened.devices.get(device_id)
    show = partial(show_device, seen, error=True)
    confirm(context, "Delete this device and its idempotency keys?", yes=yes, show=show)

    def work(unit: UnitOfWork) -> bool:
        refuse_change(seen, unit.devices.get(device_id))
        return unit.devices.delete(device_id, force=force)

    return int(opened.run(work))


def _delete_pending(context: typer.Context, opened: Database, until: datetime, *, yes: bool) -> int:
    if not yes:
        found: list[Device] = []
        page: Sequence[Device] = ()
        while page := opened.devices.list(
            status=DeviceStatus.PENDING, order="paired_at", limit=1000, after=page[-1] if page else None
        ):
            found += [device for device in page if device.paired_at <= until]

        def show() -> None:
            # Standard output is for results only.
            print_table(HEADINGS, map(row_of, found[:_SHOWN]), error=True)
            if len(found) > _SHOWN:
                typer.echo(f"and {count(len(found) - _SHOWN, 'other device')}", err=True)

        confirm(context, f"Delete {count(len(found), 'pending device')}?", yes=False, show=show)
    deleted = 0
    while batch := opened.run(lambda unit: unit.devices.delete_pending(paired_before=until)):
        deleted += batch
    return deleted
