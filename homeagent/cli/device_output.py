"""Common output of the commands in the group `homeagent devices`."""

from __future__ import annotations

import json
from typing import Any

import typer
from pydantic import SecretStr

from homeagent.cli.output import format_timestamp, print_facts, print_result
from homeagent.cli.visible_text import identity, quoted
from homeagent.models.device import Device
from homeagent.models.schemas import DevicePublic

HEADINGS = ("Device", "Role", "Status", "Paired at", "Last seen at")

DECISIVE = ("paired_at", "status", "role", "shared_secret_hash")
"""Columns of a device on which an operator's decision depends."""


def public(device: Device) -> dict[str, Any]:
    """Return a device for JSON, without values that were derived from the device's secret."""
    shown = DevicePublic.model_validate(device, from_attributes=True)
    return shown.model_dump(mode="json", by_alias=True)


def row_of(device: Device) -> tuple[object, ...]:
    """Return the cells of a device for the columns in `HEADINGS`."""
    return device.id, device.role, device.status, device.paired_at, device.last_seen_at


def show_device(device: Device, *, error: bool = False) -> None:
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


def report_change(context: typer.Context, device: Device, *, changed: bool, word: str) -> None:
    """Print that a device was approved or revoked, or that no change was necessary."""
    name = quoted(device.id)
    text = f"{word.capitalize()} {name}, {device.role}." if changed else f"{name} is {word} already: nothing to do."
    print_result(context, {"changed": changed, "device": public(device)}, text)


def report_secret(context: typer.Context, word: str, device: Device, secret: SecretStr) -> None:
    """Print a device with its new secret. No other command prints the secret."""
    shown = secret.get_secret_value()
    text = f"{word} {quoted(device.id)}, {device.role}, {device.status}.\nSecret, which is not shown again: {shown}"
    print_result(context, {"device": public(device), "shared_secret": shown}, text)
