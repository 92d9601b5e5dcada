"""The commands that settle keys whose outcome is unknown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import typer

from homeagent import Attempt, Database, IdempotencyScope
from tests import command_line
from tests.command_line import Result
from tests.conftest import FakeClock

SCOPES = [IdempotencyScope("lamp", "orders.create", f"key-{number}") for number in range(2)]
LIVE = IdempotencyScope("lamp", "orders.create", "live")
UNKNOWN = IdempotencyScope.of_record("a/../b", "m", "k")


def invoke(path: Path, *arguments: str, input: str = "") -> Result:
    return command_line.invoke("--database", path, "keys", *arguments, input=input)


def parts(scope: IdempotencyScope) -> Sequence[str]:
    return scope.device_id, scope.method, scope.key


@pytest.fixture
def path(sqlite_path: Path) -> Path:
    """A database with two keys whose leases expired and a key whose lease has not expired."""
    # The commands read the real clock.
    clock = FakeClock(datetime.now(UTC) - timedelta(hours=1))
    with Database.open(sqlite_path, clock=clock) as database:
        for scope in (*SCOPES, LIVE):
            lease = timedelta(hours=2) if scope is LIVE else timedelta(minutes=1)
            database.idempotency_keys.claim(scope, fingerprint="f", lease=lease, ttl=timedelta(days=1))
            clock.advance(minutes=1)
    return sqlite_path


def call(path: Path, scope: IdempotencyScope) -> Any:
    """Return the replayed value of a key, or "ran" if the effect ran."""
    with Database.open(path) as database, database.unit_of_work() as unit:
        found = unit.idempotency_keys.claim(scope, fingerprint="f", lease=timedelta(minutes=1), ttl=timedelta(days=1))
        return "ran" if isinstance(found, Attempt) else found.value


def test_abandoned(path: Path) -> None:
    """The table and the JSON list the keys with expired leases, oldest first, without keys whose lease still runs."""
    shown = invoke(path, "abandoned")
    assert shown.exit_code == 0, shown.output
    assert "live" not in shown.stdout
    assert shown.stdout.index("key-0") < shown.stdout.index("key-1")
    listed = json.loads(invoke(path, "abandoned", "--json").stdout)
    assert [row["key"] for row in listed] == ["key-0", "key-1"]
    fields = "device_id method key attempt created_at lease_expires_at downstream_key"
    assert set(listed[0]) == set(fields.split())
    assert [row["key"] for row in json.loads(invoke(path, "abandoned", "--json", "--limit", "1").stdout)] == ["key-0"]


def test_resolve(path: Path) -> None:
    """If the operator resolves a key, a retry gets the operator's result, and a second resolve has no key to settle."""
    done = invoke(path, "resolve", *parts(SCOPES[0]), '{"order": 7}', "--yes", "--attempt", "1", "--json")
    assert json.loads(done.stdout) == {"changed": True}
    assert call(path, SCOPES[0]) == {"order": 7}
    again = invoke(path, "resolve", *parts(SCOPES[0]), "null")
    assert (again.exit_code, again.stdout) == (0, "This key has no abandoned attempt: nothing to do.\n")
    assert call(path, SCOPES[0]) == {"order": 7}


def test_forget(path: Path) -> None:
    """If the operator forgets a key, the next call runs the effect."""
    done = invoke(path, "forget", *parts(SCOPES[1]), input="y\n")
    assert done.stdout == "Forgotten: the next call runs the effect.\n"
    assert all(text in done.stderr for text in (*parts(SCOPES[1]), "Abandoned at", "[y/N]"))
    assert call(path, SCOPES[1]) == "ran"


@pytest.mark.parametrize("command", ["resolve", "forget"])
@pytest.mark.parametrize(
    ("scope", "options", "status", "text"),
    [
        (SCOPES[0], ["--yes"], 2, "--yes needs --attempt"),
        (SCOPES[0], ["--json"], 2, "pass --yes"),
        (SCOPES[0], ["--yes", "--attempt", "2"], 1, "another value of attempt than 2"),
        (SCOPES[0], [], 1, "[y/N]"),
        (LIVE, [], 1, "in progress"),
        (UNKNOWN, [], 1, "no idempotency key has this device, method and key: find"),
        (UNKNOWN, ["--yes", "--attempt", "1", "--json"], 1, '"error": "NotFoundError"'),
    ],
    ids=str,
)
def test_refusals(
    path: Path, command: str, scope: IdempotencyScope, options: list[str], status: int, text: str
) -> None:
    """Without the answer yes, the expected attempt or an abandoned attempt, the command refuses and changes no row."""
    result = ["1"] if command == "resolve" else []
    refused = invoke(path, command, *parts(scope), *result, *options, input="n\n")
    assert (refused.exit_code, refused.stdout) == (status, "")
    assert text in refused.stderr
    assert "[y/N]" in text or refused.stderr.count("\n") == 1
    assert len(json.loads(invoke(path, "abandoned", "--json").stdout)) == 2


def test_a_later_attempt_with_the_same_number(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If another operator settles the key during the question, and a new attempt is abandoned, no row changes."""

    def settle(context: typer.Context, *_: object, **__: object) -> None:
        if context.params["yes"]:
            return
        invoke(path, "forget", *parts(SCOPES[0]), "--yes", "--attempt", "1")
        with Database.open(path) as database:
            database.idempotency_keys.claim(SCOPES[0], fingerprint="f", lease=timedelta(0), ttl=timedelta(days=1))

    with monkeypatch.context() as patch:
        patch.setattr("homeagent.cli.rows.confirm", settle)
        refused = invoke(path, "forget", *parts(SCOPES[0]))
    assert refused.exit_code == 1
    assert "changed after it was shown" in refused.stderr
    assert len(json.loads(invoke(path, "abandoned", "--json").stdout)) == 2
