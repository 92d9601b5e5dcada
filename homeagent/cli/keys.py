"""`homeagent keys`: settle the idempotency keys whose effect may or may not have happened."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from homeagent.cli.application import DatabaseOption, group
from homeagent.cli.opening import open_named
from homeagent.cli.output import JsonOption, console_for, grid, instant, print_json
from homeagent.models.idempotency_key import IdempotencyScope
from homeagent.models.types import MAX_LIMIT

keys = group("keys", help="Settle the idempotency keys whose effect may or may not have happened.")

DeviceArgument = Annotated[str, typer.Argument(metavar="DEVICE", help="The id of the device.", show_default=False)]
MethodArgument = Annotated[str, typer.Argument(metavar="METHOD", help="What was called.", show_default=False)]
KeyArgument = Annotated[str, typer.Argument(metavar="KEY", help="The key that the device chose.", show_default=False)]


@keys.command()
def abandoned(
    context: typer.Context,
    limit: Annotated[int, typer.Option(min=1, max=MAX_LIMIT, metavar="ROWS", help="How many at most.")] = 100,
    database: DatabaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the keys whose attempt ended without a word, longest ago first.

    Find out whether the effect took place, then 'resolve' or 'forget' each.
    """
    with open_named(context, database) as opened:
        rows = opened.run(lambda unit: unit.idempotency_keys.list_abandoned(limit=limit), read_only=True)
    if as_json:
        # The key alone names the record; neither parameters nor results are shown.
        shown = {"device_id", "method", "key", "attempt", "created_at", "lease_expires_at", "downstream_key"}
        print_json([row.model_dump(mode="json", include=shown) for row in rows])
        return
    table = grid(header=True)
    for heading in ("Device", "Method", "Key", "Attempt", "Begun at", "Abandoned at"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(
            row.device_id,
            row.method,
            row.key,
            str(row.attempt),
            instant(row.created_at),
            instant(row.lease_expires_at),
        )
    console_for().print(table)


@keys.command()
def resolve(
    context: typer.Context,
    device_id: DeviceArgument,
    method: MethodArgument,
    key: KeyArgument,
    result: Annotated[
        str, typer.Argument(metavar="RESULT", help="What the effect would have returned, as JSON.", show_default=False)
    ],
    database: DatabaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Record that the effect took place: retries get RESULT from now on."""
    try:
        value = json.loads(result)
    except (ValueError, RecursionError):
        raise typer.BadParameter("RESULT must be JSON, such as null or '{\"id\": 7}'.") from None
    scope = IdempotencyScope(device_id, method, key)
    with open_named(context, database) as opened:
        changed = opened.run(lambda unit: unit.idempotency_keys.resolve(scope, value))
    _report_settled(changed=changed, done="Resolved: its retries get this result.", as_json=as_json)


@keys.command()
def forget(
    context: typer.Context,
    device_id: DeviceArgument,
    method: MethodArgument,
    key: KeyArgument,
    database: DatabaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Record that the effect did not take place: the next call runs it."""
    scope = IdempotencyScope(device_id, method, key)
    with open_named(context, database) as opened:
        changed = opened.run(lambda unit: unit.idempotency_keys.forget(scope))
    _report_settled(changed=changed, done="Forgotten: the next call runs it.", as_json=as_json)


def _report_settled(*, changed: bool, done: str, as_json: bool) -> None:
    if as_json:
        print_json({"changed": changed})
    else:
        typer.echo(done if changed else "Nothing is abandoned under this key: nothing to do.")
