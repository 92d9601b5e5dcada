"""Commands that settle abandoned attempts (`homeagent keys`) and release nonces (`homeagent nonces`)."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated

import typer

from homeagent.cli import arguments
from homeagent.cli.application import group, open_named
from homeagent.cli.output import count, print_list, print_result, print_table
from homeagent.cli.rows import change_shown, json_argument, require_expected
from homeagent.cli.visible_text import quoted
from homeagent.errors import NotFoundError
from homeagent.models.idempotency_key import IdempotencyKey, IdempotencyScope, IdempotencyState
from homeagent.stores.idempotency_keys import IdempotencyKeyStore
from homeagent.unit_of_work import UnitOfWork

keys: typer.Typer = group("keys", help="Settle the idempotency keys that have an abandoned attempt.")

MethodArgument = Annotated[str, arguments.argument("METHOD", "Name of the method.")]
KeyArgument = Annotated[str, arguments.argument("KEY", "Key that the device chose.")]
_ATTEMPT_HELP = "Refuse the change if the number of the last attempt differs from this number."
AttemptOption = Annotated[int | None, arguments.option("NUMBER", _ATTEMPT_HELP)]

_HEADINGS = ("Device", "Method", "Key", "Attempt", "Begun at", "Abandoned at")


def _row_of(row: IdempotencyKey) -> tuple[object, ...]:
    """Return the table cells of an idempotency key, in the order of `_HEADINGS`."""
    return row.device_id, row.method, row.key, row.attempt, row.created_at, row.lease_expires_at


@keys.command()
def abandoned(
    context: typer.Context, limit: arguments.LimitOption = 100, form: arguments.FormatOption = arguments.Format.TABLE
) -> None:
    """List the keys that have an abandoned attempt, oldest first.

    For each key, find out whether the effect took place. Then run 'keys resolve' or 'keys forget'.
    """
    with open_named(context) as opened:
        rows = opened.run(lambda unit: unit.idempotency_keys.list_abandoned(limit=limit), read_only=True)
    # Do not show parameters or results, which can be private.
    shown = {"device_id", "method", "key", "attempt", "created_at", "lease_expires_at", "downstream_key"}
    values = [row.model_dump(mode="json", include=shown) for row in rows]
    print_list(context, _HEADINGS, map(_row_of, rows), values)


@keys.command()
def resolve(
    context: typer.Context,
    device_id: arguments.DeviceArgument,
    method: MethodArgument,
    key: KeyArgument,
    result: Annotated[str, arguments.argument("RESULT", "Return value of the effect, as JSON.")],
    attempt: AttemptOption = None,
    yes: arguments.YesOption = False,
) -> None:
    """Record that the effect took place. A later call with the key returns RESULT.

    The command shows the abandoned attempt and asks for a confirmation. The option --yes needs --attempt.
    """
    value = json_argument(result, "RESULT")
    scope = IdempotencyScope.of_record(device_id, method, key)
    question = f"Record that this effect took place, with the result {json.dumps(value)}?"
    done = "Resolved: retries return this result."
    _settle(context, scope, lambda store: store.resolve(scope, value), question, done)


@keys.command()
def forget(
    context: typer.Context,
    device_id: arguments.DeviceArgument,
    method: MethodArgument,
    key: KeyArgument,
    attempt: AttemptOption = None,
    yes: arguments.YesOption = False,
) -> None:
    """Record that the effect did not take place. The next call with the key runs the effect.

    The command shows the abandoned attempt and asks for a confirmation. The option --yes needs --attempt.
    """
    scope = IdempotencyScope.of_record(device_id, method, key)
    question = "Let the next call run this effect again?"
    done = "Forgotten: the next call runs the effect."
    _settle(context, scope, lambda store: store.forget(scope), question, done)


def _abandoned(unit: UnitOfWork, scope: IdempotencyScope) -> IdempotencyKey | None:
    """Return the row of the key. If the attempt of the key is not abandoned, return None."""
    row = unit.idempotency_keys.find(scope)
    if row is None:
        raise NotFoundError(
            "no idempotency key has this device, method and key: find the right values with 'homeagent keys abandoned'"
        )
    if row.state is not IdempotencyState.IN_PROGRESS or row.lease_expires_at is None:
        return None
    return row if row.lease_expires_at <= unit.now() else None


def _settle(
    context: typer.Context,
    scope: IdempotencyScope,
    change: Callable[[IdempotencyKeyStore], bool],
    question: str,
    done: str,
) -> None:
    """Show the abandoned attempt, and ask for a confirmation. Then call `change()`, and print the result."""
    require_expected(context, "attempt", "as 'keys abandoned --json' prints it")
    with open_named(context) as opened:
        changed = change_shown(
            context,
            opened,
            question,
            lambda unit: _abandoned(unit, scope),
            lambda unit: change(unit.idempotency_keys),
            name=f"the key of {scope.method!r} by {scope.device_id!r}",
            # Also compare the owner, because two attempts can have the same number.
            columns=("attempt", "owner"),
            show=lambda row: print_table(_HEADINGS, [_row_of(row)], error=True),
        )
    text = done if changed else "This key has no abandoned attempt: nothing to do."
    print_result(context, {"changed": changed}, text)


nonces: typer.Typer = group("nonces", help="Release the nonces of a device that is at its limit.")


@nonces.command("forget")
def forget_nonces(context: typer.Context, device_id: arguments.DeviceArgument) -> None:
    """Make room for new nonces of a device.

    The limit of nonces then ignores the stored nonces of the device. First configure the gateway to keep nonces for a
    shorter time. The gateway still refuses a replayed message until its nonce expires. If DEVICE has no such nonces and
    does not exist, the command fails.
    """
    with open_named(context) as opened:
        released = opened.nonces.forget(device_id)
        if not released:
            opened.devices.get(device_id)  # raises DeviceNotFoundError for a misspelt id
    print_result(context, {"released": released}, f"Released {count(released, 'nonce')} of {quoted(device_id)}.")
