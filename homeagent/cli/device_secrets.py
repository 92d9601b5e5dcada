"""The commands `homeagent devices pair` and `homeagent devices rotate`, which print a new secret once."""

from __future__ import annotations

from datetime import timedelta
from functools import partial
from typing import Annotated

import typer

from homeagent.cli.application import DatabaseOption, JsonOption, YesOption, confirm
from homeagent.cli.device_output import DeviceArgument, public, show_device
from homeagent.cli.devices import devices
from homeagent.cli.opening import open_named
from homeagent.cli.output import print_json
from homeagent.cli.request import json_argument, request
from homeagent.cli.visible_text import quoted
from homeagent.models.device import Role
from homeagent.models.schemas import DevicePair


@devices.command()
def pair(
    context: typer.Context,
    device_id: DeviceArgument,
    role: Annotated[Role, typer.Option(help="Role of the device.", show_default=False)],
    metadata: Annotated[
        str | None, typer.Option(metavar="JSON", help="Metadata of the device.", show_default=False)
    ] = None,
    approved: Annotated[
        bool, typer.Option("--approve", help="Approve the device at once, for example the first admin.")
    ] = False,
    database: DatabaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Add a device, and print its new secret once.

    The device is pending until 'devices approve', or gets access at once with --approve.
    """
    wanted = request(DevicePair, id=device_id, role=role, metadata=json_argument(metadata, "--metadata"))
    with open_named(context, database) as opened:
        paired = opened.pair(wanted)
        device = paired.device
        if approved:
            opened.devices.approve(
                device_id, expected_secret_hash=device.shared_secret_hash, expected_paired_at=device.paired_at
            )
            device = opened.devices.get(device_id)
    secret = paired.shared_secret.get_secret_value()
    if as_json:
        print_json({"device": public(device), "shared_secret": secret})
        return
    typer.echo(f"Paired {quoted(device.id)}, {device.role}, {device.status}.")
    typer.echo(f"Secret, which is not shown again: {secret}")


@devices.command()
def rotate(
    context: typer.Context,
    device_id: DeviceArgument,
    overlap: Annotated[
        int,
        typer.Option(
            min=0,
            max=366 * 24 * 3600,
            metavar="SECONDS",
            help="Time for which the old secret also works. Only for an approved device.",
        ),
    ] = 0,
    yes: YesOption = False,
    database: DatabaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Give a device a new secret, and print the secret once.

    The command shows the device and asks for a confirmation, because the old secret becomes invalid.
    """
    with open_named(context, database) as opened:
        seen = opened.devices.get(device_id)
        question = (
            f"Replace the secret of this device? The old secret ends {f'in {overlap:,} s' if overlap else 'at once'}."
        )
        confirm(context, question, yes=yes, show=partial(show_device, seen, error=True))
        secret = opened.rotate_secret(device_id, overlap=timedelta(seconds=overlap)).get_secret_value()
        device = opened.devices.get(device_id)
    if as_json:
        print_json({"device": public(device), "shared_secret": secret})
        return
    typer.echo(f"Rotated the secret of {quoted(device.id)}, {device.role}, {device.status}.")
    typer.echo(f"Secret, which is not shown again: {secret}")
