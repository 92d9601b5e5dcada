"""The commands `homeagent keys`, which settle the idempotency keys with an abandoned attempt."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from homeagent.cli.application import DatabaseOption, group
from homeagent.cli.opening import open_named
from homeagent.cli.output import JsonOption, console_for, format_timestamp, grid, print_json
from homeagent.cli.visible_text import identity
from homeagent.models.idempotency_key import IdempotencyScope
from homeagent.models.types import MAX_LIMIT

keys = group("keys", help="Settle the idempotency keys with an abandoned attempt.")

DeviceArgument = Annotated[str, typer.Argument(metavar="DEVICE", help="Id of the device.", show_default=False)]
MethodArgument = Annotated[str, typer.Argument(metavar="METHOD", help="Name of the method.", show_default=False)]
KeyArgument = Annotated[str, typer.Argument(metavar="KEY", help="Key that the device chose.", show_default=False)]


@keys.command()
def abandoned(
    context: typer.Context,
    limit: Annotated[int, typer.Option(min=1, max=MAX_LIMIT, metavar="ROWS", help="Maximum number of keys.")] = 100,
    database: DatabaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the keys with an abandoned attempt, whose lease expired without an outcome, oldest first.

    Find out whether the effect took place, then run 'keys resolve' or 'keys forget' for each key.
    """
    with open_named(context, database) as opened:
        rows = opened.run(lambda unit: unit.idempotency_keys.list_abandoned(limit=limit), read_only=True)
    if as_json:
        # Do not show parameters or results, because they can be private.
        shown = {"device_id", "method", "key", "attempt", "created_at", "lease_expires_at", "downstream_key"}
        print_json([row.model_dump(mode="json", include=shown) for row in rows])
        return
    table = grid(header=True)
    for heading in ("Device", "Method", "Key", "Attempt", "Begun at", "Abandoned at"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(
            identity(row.device_id),
            identity(row.method),
            identity(row.key),
            str(row.attempt),
            format_timestamp(row.created_at),
            format_timestamp(row.lease_expires_at),
        )
    console_for().print(table)


@keys.command()
def resolve(
    context: typer.Context,
    device_id: DeviceArgument,
    method: MethodArgument,
    key: KeyArgument,
    result: Annotated[
        str, typer.Argument(metavar="RESULT", help="Return value of the effect, as JSON.", show_default=False)
    ],
    database: DatabaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Record that the effect took place. Retries return RESULT from now on."""
    try:
        value = json.loads(result)
    except (ValueError, RecursionError):
        raise typer.BadParameter("RESULT must be JSON, such as null or '{\"id\": 7}'.") from None
    scope = IdempotencyScope.of_record(device_id, method, key)
    with open_named(context, database) as opened:
        changed = opened.run(lambda unit: unit.idempotency_keys.resolve(scope, value))
    _report_settled(changed=changed, done="Resolved: retries return this result.", as_json=as_json)


@keys.command()
def forget(
    context: typer.Context,
    device_id: DeviceArgument,
    method: MethodArgument,
    key: KeyArgument,
    database: DatabaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Record that the effect did not take place. The next call runs the effect."""
    scope = IdempotencyScope.of_record(device_id, method, key)
    with open_named(context, database) as opened:
        changed = opened.run(lambda unit: unit.idempotency_keys.forget(scope))
    _report_settled(changed=changed, done="Forgotten: the next call runs the effect.", as_json=as_json)


def _report_settled(*, changed: bool, done: str, as_json: bool) -> None:
    if as_json:
        print_json({"changed": changed})
    else:
        typer.echo(done if changed else "This key has no abandoned attempt: nothing to do.")
