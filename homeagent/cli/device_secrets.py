"""The commands `homeagent devices pair` and `homeagent devices rotate`, which print a new secret once."""

from __future__ import annotations

from datetime import timedelta
from functools import partial
from typing import Annotated

import typer

from homeagent.cli.application import confirm
from homeagent.cli.arguments import DeviceArgument, PairedAtOption, YesOption, choice, option, parsed_timestamp
from homeagent.cli.device_output import report_secret, show_device
from homeagent.cli.devices import devices
from homeagent.cli.opening import open_named
from homeagent.cli.request import json_argument, request, require_expected
from homeagent.models.device import Role
from homeagent.models.schemas import DevicePair


@devices.command()
def pair(
    context: typer.Context,
    device_id: DeviceArgument,
    role: Annotated[Role, choice(Role, help="Role of the device.")],
    metadata: Annotated[str | None, option(metavar="JSON", help="Metadata of the device.")] = None,
    approved: Annotated[
        bool, typer.Option("--approve", help="Approve the device at once, for example the first admin.")
    ] = False,
) -> None:
    """Add a device, and print its new secret once.

    The device is pending until 'devices approve', or gets access at once with --approve.
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
    report_secret(context, "Paired", device, paired.shared_secret)


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
    paired_at: PairedAtOption = None,
    yes: YesOption = False,
) -> None:
    """Give a device a new secret, and print the secret once.

    The command shows the device and asks for a confirmation, because the old secret becomes invalid. The option
    --yes needs --paired-at.
    """
    require_expected(yes=yes, option="--paired-at", value=paired_at)
    with open_named(context) as opened:
        seen = opened.devices.get(device_id)
        end = f"in {overlap:,} s" if overlap else "at once"
        question = f"Replace the secret of this device? The old secret ends {end}."
        confirm(context, question, yes=yes, show=partial(show_device, seen, error=True))
        secret = opened.rotate_secret(
            device_id,
            overlap=timedelta(seconds=overlap),
            expected_secret_hash=seen.shared_secret_hash,
            expected_paired_at=parsed_timestamp(paired_at) or seen.paired_at,
        )
        device = opened.devices.get(device_id)
    report_secret(context, "Rotated the secret of", device, secret)
