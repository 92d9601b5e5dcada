"""The command `homeagent nonces forget`, which lets a device at its limit send messages again."""

from __future__ import annotations

import typer

from homeagent.cli.application import group, open_named
from homeagent.cli.arguments import DeviceArgument
from homeagent.cli.output import count, print_result
from homeagent.cli.visible_text import quoted

nonces: typer.Typer = group("nonces", help="Release the nonces of a device that is at its limit.")


@nonces.command()
def forget(context: typer.Context, device_id: DeviceArgument) -> None:
    """Stop counting a device's stored nonces against the limit of the device.

    First configure the gateway to keep nonces for a shorter time. The rows stay until the nonces expire, so a message
    with a released nonce is still refused as a replay.
    """
    with open_named(context) as opened:
        released = opened.nonces.forget(device_id)
    print_result(context, {"released": released}, f"Released {count(released, 'nonce')} of {quoted(device_id)}.")
