"""Commands of the group `homeagent keys`: list and settle the abandoned attempts of idempotency keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from homeagent.cli import arguments
from homeagent.cli.application import confirm, group
from homeagent.cli.opening import open_named
from homeagent.cli.output import print_list, print_result
from homeagent.cli.request import json_argument
from homeagent.cli.visible_text import quoted
from homeagent.models.idempotency_key import IdempotencyScope
from homeagent.stores.idempotency_keys import IdempotencyKeyStore

keys: typer.Typer = group("keys", help="Settle the idempotency keys with an abandoned attempt.")


@keys.command()
def abandoned(
    context: typer.Context, limit: arguments.LimitOption = 100, form: arguments.FormatOption = arguments.Format.TABLE
) -> None:
    """List the keys with an abandoned attempt, whose lease expired without an outcome, oldest first.

    Find out whether the effect took place, then run 'keys resolve' or 'keys forget' for each key.
    """
    with open_named(context) as opened:
        rows = opened.run(lambda unit: unit.idempotency_keys.list_abandoned(limit=limit), read_only=True)
    # Do not show parameters or results, because they can be private.
    shown = {"device_id", "method", "key", "attempt", "created_at", "lease_expires_at", "downstream_key"}
    values = [row.model_dump(mode="json", include=shown) for row in rows]
    cells = [(row.device_id, row.method, row.key, row.attempt, row.created_at, row.lease_expires_at) for row in rows]
    print_list(context, ("Device", "Method", "Key", "Attempt", "Begun at", "Abandoned at"), cells, values, form)


@keys.command()
def resolve(
    context: typer.Context,
    device_id: arguments.DeviceArgument,
    method: arguments.MethodArgument,
    key: arguments.KeyArgument,
    result: Annotated[str, arguments.argument(metavar="RESULT", help="Return value of the effect, as JSON.")],
    yes: arguments.YesOption = False,
) -> None:
    """Record that the effect took place. Later retries return RESULT.

    At a terminal the command asks for a confirmation.
    """
    value = json_argument(result, "RESULT")
    scope = IdempotencyScope.of_record(device_id, method, key)
    question = "Record that {}, took place with this result?"
    done = "Resolved: retries return this result."
    _settle(context, scope, lambda store: store.resolve(scope, value), question, done, yes=yes)


@keys.command()
def forget(
    context: typer.Context,
    device_id: arguments.DeviceArgument,
    method: arguments.MethodArgument,
    key: arguments.KeyArgument,
    yes: arguments.YesOption = False,
) -> None:
    """Record that the effect did not take place. The next call with the key runs the effect.

    At a terminal the command asks for a confirmation.
    """
    scope = IdempotencyScope.of_record(device_id, method, key)
    question = "Let the next call run {}, again?"
    done = "Forgotten: the next call runs the effect."
    _settle(context, scope, lambda store: store.forget(scope), question, done, yes=yes)


def _settle(
    context: typer.Context,
    scope: IdempotencyScope,
    change: Callable[[IdempotencyKeyStore], bool],
    question: str,
    done: str,
    *,
    yes: bool,
) -> None:
    """Ask the question, in which the braces stand for the effect, change the key, and report the change."""
    effect = f"{quoted(scope.method)} by {quoted(scope.device_id)}, key {quoted(scope.key)}"
    confirm(context, question.format(effect), yes=yes, only_at_terminal=True)
    with open_named(context) as opened:
        changed = opened.run(lambda unit: change(unit.idempotency_keys))
    text = done if changed else "This key has no abandoned attempt: nothing to do."
    print_result(context, {"changed": changed}, text)
