"""Common arguments and output of the commands in the group `homeagent devices`."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Annotated, Any

import typer

from homeagent.cli.output import format_timestamp, print_facts, print_json
from homeagent.cli.visible_text import identity, quoted
from homeagent.errors import ConflictError
from homeagent.models.device import Device
from homeagent.models.schemas import DevicePublic

__all__ = [
    "HEADINGS",
    "DeviceArgument",
    "public",
    "refuse_change",
    "report_change",
    "row_of",
    "show_device",
    "timestamp_argument",
]

DeviceArgument = Annotated[str, typer.Argument(metavar="DEVICE", help="Id of the device.", show_default=False)]

HEADINGS = ("Device", "Role", "Status", "Paired at", "Last seen at")


def timestamp_argument(text: str | None) -> str | None:
    """Return the value of an option if the value is a timestamp with an offset, or None."""
    if text is not None:
        try:
            aware = datetime.fromisoformat(text).tzinfo is not None
        except ValueError:
            aware = False
        if not aware:
            raise typer.BadParameter("must be a timestamp with an offset, such as 2030-01-31T12:00:00.000Z.")
    return text


def public(device: Device) -> dict[str, Any]:
    """Return a device for JSON, without values derived from its secret."""
    shown = DevicePublic.model_validate(device, from_attributes=True)
    return shown.model_dump(mode="json", by_alias=True)


def row_of(device: Device) -> tuple[object, ...]:
    """Return the cells of a device for `HEADINGS`."""
    return device.id, device.role, device.status, device.paired_at, device.last_seen_at


def show_device(device: Device, *, error: bool) -> None:
    """Print a device on standard output, or on standard error if `error` is true."""
    facts = {
        "Device": identity(device.id),
        "Role": str(device.role),
        "Status": str(device.status),
        "Paired at": format_timestamp(device.paired_at),
        "Last seen at": format_timestamp(device.last_seen_at),
        "Metadata": json.dumps(device.metadata_),
    }
    if device.approved_at is not None:
        facts["Approved at"] = format_timestamp(device.approved_at)
    if device.revoked_at is not None:
        facts["Revoked at"] = format_timestamp(device.revoked_at)
        facts["Reason"] = identity(device.revoked_reason) if device.revoked_reason else "none given"
    if device.previous_secret_expires_at is not None:
        facts["Old secret until"] = format_timestamp(device.previous_secret_expires_at)
    print_facts(facts.items(), error=error)


def refuse_change(seen: Device, now: Device) -> None:
    """Raise ConflictError if the device changed after the operator saw it."""
    for name in ("status", "role", "paired_at", "shared_secret_hash"):
        if getattr(seen, name) != getattr(now, name):
            raise ConflictError(f"device {seen.id!r} changed after it was shown: show it again, then decide")


def report_change(device: Device, *, changed: bool, word: str, as_json: bool) -> None:
    """Print that a device was approved or revoked, or that no change was necessary."""
    if as_json:
        print_json({"changed": changed, "device": public(device)})
    elif changed:
        typer.echo(f"{word.capitalize()} {quoted(device.id)}, {device.role}.")
    else:
        typer.echo(f"{quoted(device.id)} is {word} already: nothing to do.")
