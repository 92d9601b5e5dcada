"""Commands that list and change devices (`homeagent devices`)."""

from __future__ import annotations

from datetime import datetime, timedelta
from enum import StrEnum
from functools import partial
from typing import Annotated

import typer
from pydantic import SecretStr

from homeagent.cli import arguments
from homeagent.cli.application import confirm, group, open_named
from homeagent.cli.output import count, print_deletion, print_list, print_result, print_table, rows_in
from homeagent.cli.rows import (
    cascading_tables,
    change_shown,
    count_rows,
    json_argument,
    public,
    request,
    require_expected,
    show_row,
)
from homeagent.cli.visible_text import quoted
from homeagent.models.device import Device, DeviceStatus, Role
from homeagent.models.idempotency_key import IdempotencyKey
from homeagent.models.schemas import DevicePair
from homeagent.models.types import MAX_LIMIT, MILLISECOND, check_name, earlier

devices: typer.Typer = group("devices", help="Pair, list, approve, revoke and delete devices.")

_SHOWN = 20  # number of devices that the command shows before the confirmation

_HEADINGS = ("Device", "Role", "Status", "Paired at", "Last seen at")

_DECISIVE = ("paired_at", "status", "role", "shared_secret_hash")
"""Columns of a device on which an operator's decision depends."""


_ORDER_HELP = "Order of the list. With paired_at, the most recently paired device comes first."
_STATUS_HELP = (
    "Refuse the approval if the device has another status. To approve a revoked device with --yes, also pass "
    "--status revoked."
)
_OVERLAP_HELP = "Time for which the old secret also works. The device must be approved."


class _Order(StrEnum):
    ID = "id"
    PAIRED_AT = "paired_at"


def _row_of(device: Device) -> tuple[object, ...]:
    """Return the table cells of a device, in the order of `_HEADINGS`."""
    return device.id, device.role, device.status, device.paired_at, device.last_seen_at


def _report_change(context: typer.Context, device: Device, *, changed: bool, word: str) -> None:
    """Print a device and whether the command changed the device. The argument `word=` is "approved" or "revoked"."""
    name = quoted(device.id)
    text = f"{word.capitalize()} {name}, {device.role}." if changed else f"{name} is {word} already: nothing to do."
    print_result(context, {"changed": changed, "device": public(device)}, text)


def _report_secret(context: typer.Context, word: str, device: Device, secret: SecretStr) -> None:
    """Print a device and the new secret in plain text. The argument `word=` names the action, such as "Paired"."""
    shown = secret.get_secret_value()
    text = f"{word} {quoted(device.id)}, {device.role}, {device.status}.\nSecret, which is not shown again: {shown}"
    print_result(context, {"device": public(device), "shared_secret": shown}, text)


@devices.command("list")
def list_devices(
    context: typer.Context,
    status: Annotated[DeviceStatus | None, arguments.choice(DeviceStatus, "Only devices with this status.")] = None,
    role: Annotated[Role | None, arguments.choice(Role, "Only devices with this role.")] = None,
    seen_before: Annotated[
        datetime | None, arguments.timestamp("Only devices that were last seen before this time.")
    ] = None,
    order: Annotated[_Order, arguments.choice(_Order, _ORDER_HELP, show_default=True)] = _Order.ID,
    limit: arguments.LimitOption = 100,
    after: arguments.AfterOption = None,
    form: arguments.FormatOption = arguments.Format.TABLE,
) -> None:
    """List the devices."""
    with open_named(context) as opened:
        page = opened.devices.list(
            status=status,
            role=role,
            seen_before=seen_before,
            order=order.value,
            limit=limit,
            after=after,
        )
    print_list(context, _HEADINGS, map(_row_of, page), list(map(public, page)))


@devices.command()
def show(context: typer.Context, device_id: arguments.DeviceArgument) -> None:
    """Show a device."""
    with open_named(context) as opened:
        device = opened.devices.get(device_id)
    print_result(context, public(device), partial(show_row, device))


@devices.command()
def approve(
    context: typer.Context,
    device_id: arguments.DeviceArgument,
    role: Annotated[Role | None, arguments.choice(Role, "Refuse the approval if the device has another role.")] = None,
    paired_at: arguments.PairedAtOption = None,
    status: Annotated[DeviceStatus | None, arguments.choice(DeviceStatus, _STATUS_HELP)] = None,
    yes: arguments.YesOption = False,
) -> None:
    """Approve a device.

    The command shows the device and asks for a confirmation. If the device gets a new role, secret or status before the
    confirmation, the command fails. The option --yes needs --role and --paired-at. To approve a revoked device with
    --yes, also pass --status revoked.
    """
    require_expected(context, "role")
    require_expected(context, "paired_at")
    with open_named(context) as opened:
        seen = opened.devices.get(device_id)
        confirm(context, "Approve this device?", partial(show_row, seen, error=True), asks=not seen.approved)
        changed = opened.devices.approve(
            device_id,
            expected_role=role or seen.role,
            expected_secret_hash=seen.shared_secret_hash,
            expected_paired_at=paired_at or seen.paired_at,
            # Compare the status, because another administrator can revoke the device before the confirmation.
            expected_status=status if yes else status or seen.status,
        )
        now = opened.devices.get(device_id)
    _report_change(context, now, changed=changed, word="approved")


@devices.command()
def revoke(
    context: typer.Context,
    device_id: arguments.DeviceArgument,
    reason: Annotated[str | None, arguments.text("TEXT", "Reason, stored with the device.", check_name)] = None,
    force: Annotated[bool, arguments.flag("--force", "Allow the revocation of the last approved admin.")] = False,
) -> None:
    """Revoke a device. The device has no access until a new approval."""
    with open_named(context) as opened:
        changed = opened.devices.revoke(device_id, reason=reason, force=force)
        now = opened.devices.get(device_id)
    _report_change(context, now, changed=changed, word="revoked")


@devices.command()
def delete(
    context: typer.Context,
    device_id: Annotated[str | None, arguments.argument("DEVICE", "Id of the device.")] = None,
    pending: Annotated[bool, arguments.flag("--pending", "Delete pending devices. Needs --before.")] = False,
    before: Annotated[
        datetime | None, arguments.timestamp("Delete the pending devices that were paired before this time.")
    ] = None,
    force: Annotated[bool, arguments.flag("--force", "Allow the deletion of the last approved admin.")] = False,
    paired_at: arguments.PairedAtOption = None,
    dry_run: arguments.DryRunOption = False,
    yes: arguments.YesOption = False,
) -> None:
    """Delete one device. With --pending and --before, delete old pending devices.

    The command shows the devices and asks for a confirmation. If DEVICE gets a new role, secret or status before the
    confirmation, the command fails. With --pending, the command deletes only devices that are still pending. The option
    --yes needs --paired-at or --before.
    """
    if device_id is None:
        if not pending or before is None or force or paired_at is not None:
            raise typer.BadParameter("name a device, or name the kind of devices by --pending with --before.")
        _delete_pending(context, before, dry_run=dry_run, yes=yes)
        return
    if pending or before is not None:
        raise typer.BadParameter("name either a device, or --pending with --before.")
    require_expected(context, "paired_at")
    with open_named(context) as opened:
        keys = count_rows(opened, IdempotencyKey.device_id, device_id)
        cascades = cascading_tables(opened, "devices", "idempotency_keys")
        change_shown(
            context,
            opened,
            f"Delete this device and {count(keys, 'idempotency key')}{rows_in(cascades)}?",
            lambda unit: unit.devices.get(device_id),
            lambda unit: unit.devices.delete(device_id, force=force),
            name=f"device {device_id!r}",
            columns=_DECISIVE,
        )
    print_deletion(context, 1, "1 device", cascades, idempotency_keys=keys)


def _delete_pending(context: typer.Context, before: datetime, *, dry_run: bool, yes: bool) -> None:
    deleted, found = 0, list[Device]()
    with open_named(context) as opened:
        cascades = cascading_tables(opened, "devices", "idempotency_keys")
        if dry_run or not yes:
            pending = opened.devices.list(status=DeviceStatus.PENDING, order="paired_at", limit=MAX_LIMIT)
            found = [device for device in pending if device.paired_at < before]
            confirm(
                context,
                f"Delete {count(len(found), 'pending device')}{rows_in(cascades)}?",
                partial(_show_first, found, len(found) if dry_run else _SHOWN),
            )
            deleted = len(found) if dry_run else 0
        # The command must keep a device that was paired exactly at --before. `delete_pending()` would delete the
        # device, so subtract one millisecond.
        until = earlier(before, MILLISECOND)
        while not dry_run and (batch := opened.run(lambda unit: unit.devices.delete_pending(paired_before=until))):
            deleted += batch
    print_deletion(context, deleted, count(deleted, "pending device"), cascades, ids=[device.id for device in found])


def _show_first(found: list[Device], number: int) -> None:
    """Print the first devices of the list, and the number of the others."""
    print_table(_HEADINGS, map(_row_of, found[:number]), error=True)
    if len(found) > number:
        typer.echo(f"and {count(len(found) - number, 'other device')}", err=True)


@devices.command()
def pair(
    context: typer.Context,
    device_id: arguments.DeviceArgument,
    role: Annotated[Role, arguments.choice(Role, "Role of the device.")],
    metadata: Annotated[str | None, arguments.option("JSON", "Metadata of the device.")] = None,
    approved: Annotated[
        bool, arguments.flag("--approve", "Approve the device at once, for example if the device is the first admin.")
    ] = False,
) -> None:
    """Add a device, and print its new secret once.

    The device is pending until an administrator runs 'devices approve'. With --approve, the device gets access at once.
    """
    wanted = request(DevicePair, id=device_id, role=role, metadata=json_argument(metadata, "--metadata"))
    with open_named(context) as opened:
        paired = opened.pair(wanted)
        device = paired.device
        if approved:
            opened.devices.approve(
                device_id, expected_secret_hash=device.shared_secret_hash, expected_paired_at=device.paired_at
            )
            device = opened.devices.get(device_id)
    _report_secret(context, "Paired", device, paired.shared_secret)


@devices.command()
def rotate(
    context: typer.Context,
    device_id: arguments.DeviceArgument,
    overlap: Annotated[int, arguments.seconds(_OVERLAP_HELP, min=0)] = 0,
    paired_at: arguments.PairedAtOption = None,
    yes: arguments.YesOption = False,
) -> None:
    """Replace the secret of a device, and print the new secret once.

    The command shows the device and asks for a confirmation. The option --yes needs --paired-at.
    """
    require_expected(context, "paired_at")
    with open_named(context) as opened:
        seen = opened.devices.get(device_id)
        end = f"in {overlap:,} s" if overlap else "at once"
        question = f"Replace the secret of this device? The old secret ends {end}."
        confirm(context, question, partial(show_row, seen, error=True))
        secret = opened.rotate_secret(
            device_id,
            overlap=timedelta(seconds=overlap),
            expected_secret_hash=seen.shared_secret_hash,
            expected_paired_at=paired_at or seen.paired_at,
        )
        device = opened.devices.get(device_id)
    _report_secret(context, "Rotated the secret of", device, secret)
