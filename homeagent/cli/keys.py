"""Commands of the group `homeagent keys`: list and settle the abandoned attempts of idempotency keys."""

from __future__ import annotations

from typing import Annotated

import typer

from homeagent.cli.application import DatabaseOption, JsonOption, YesOption, confirm, group
from homeagent.cli.opening import open_named
from homeagent.cli.output import Format, FormatOption, print_json, print_table
from homeagent.cli.request import json_argument
from homeagent.cli.visible_text import quoted
from homeagent.models.idempotency_key import IdempotencyScope
from homeagent.models.types import MAX_LIMIT

keys: typer.Typer = group("keys", help="Settle the idempotency keys with an abandoned attempt.")

DeviceArgument = Annotated[str, typer.Argument(metavar="DEVICE", help="Id of the device.", show_default=False)]
MethodArgument = Annotated[str, typer.Argument(metavar="METHOD", help="Name of the method.", show_default=False)]
KeyArgument = Annotated[str, typer.Argument(metavar="KEY", help="Key that the device chose.", show_default=False)]


@keys.command()
def abandoned(
    context: typer.Context,
    limit: Annotated[int, typer.Option(min=1, max=MAX_LIMIT, metavar="ROWS", help="Maximum number of keys.")] = 100,
    form: FormatOption = Format.TABLE,
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
    cells = [(row.device_id, row.method, row.key, row.attempt, row.created_at, row.lease_expires_at) for row in rows]
    print_table(("Device", "Method", "Key", "Attempt", "Begun at", "Abandoned at"), cells, form=form)


@keys.command()
def resolve(
    context: typer.Context,
    device_id: DeviceArgument,
    method: MethodArgument,
    key: KeyArgument,
    result: Annotated[
        str, typer.Argument(metavar="RESULT", help="Return value of the effect, as JSON.", show_default=False)
    ],
    yes: YesOption = False,
    database: DatabaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Record that the effect took place. Later retries return RESULT.

    At a terminal the command asks for a confirmation.
    """
    value = json_argument(result, "RESULT")
    scope = IdempotencyScope.of_record(device_id, method, key)
    effect = f"{quoted(method)} by {quoted(device_id)}, key {quoted(key)}"
    confirm(context, f"Record that {effect}, took place with this result?", yes=yes, only_at_terminal=True)
    with open_named(context, database) as opened:
        changed = opened.run(lambda unit: unit.idempotency_keys.resolve(scope, value))
    _report_settled(changed=changed, done="Resolved: retries return this result.", as_json=as_json)


@keys.command()
def forget(
    context: typer.Context,
    device_id: DeviceArgument,
    method: MethodArgument,
    key: KeyArgument,
    yes: YesOption = False,
    database: DatabaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Record that the effect did not take place. The next call with the key runs the effect.

    At a terminal the command asks for a confirmation.
    """
    scope = IdempotencyScope.of_record(device_id, method, key)
    effect = f"{quoted(method)} by {quoted(device_id)}, key {quoted(key)}"
    confirm(context, f"Let the next call run {effect}, again?", yes=yes, only_at_terminal=True)
    with open_named(context, database) as opened:
        changed = opened.run(lambda unit: unit.idempotency_keys.forget(scope))
    _report_settled(changed=changed, done="Forgotten: the next call runs the effect.", as_json=as_json)


def _report_settled(*, changed: bool, done: str, as_json: bool) -> None:
    if as_json:
        print_json({"changed": changed})
    else:
        typer.echo(done if changed else "This key has no abandoned attempt: nothing to do.")
