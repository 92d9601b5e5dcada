"""The store of idempotency keys: insert, find and remove results."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

from sqlalchemy import inspect

from homeagent import Database, IdempotencyKey, IdempotencyScope
from tests.conftest import START, FakeClock, dump

MINUTE = timedelta(minutes=1)
SCOPE = IdempotencyScope("lamp", "on", "key-1")


def insert(database: Database, scope: IdempotencyScope = SCOPE, result: Any = 1, ttl: timedelta = MINUTE) -> None:
    """Store a result in a separate unit."""
    database.idempotency_keys.insert(scope, result, ttl=ttl)


def test_insert_and_find(database: Database) -> None:
    """`insert` returns an instance that equals the stored row in every field and counts as loaded."""
    result = {"b": [1, -0.0, 2**70, "é\0😀\u2028"], "a": None, "": "x" * 1000}
    made = database.idempotency_keys.insert(SCOPE, result, ttl=MINUTE)
    found = database.idempotency_keys.find(SCOPE)
    assert found is not None
    assert made == found
    assert json.dumps(made.result) == json.dumps(found.result) == json.dumps(result)
    assert (made.created_at, made.expires_at) == (START, START + MINUTE)
    assert made.__dict__.keys() - {"_sa_instance_state"} == set(IdempotencyKey.model_fields)
    assert inspect(made).identity == inspect(found).identity
    assert inspect(made).detached
    # The largest result has 1 MiB of JSON.
    insert(database, IdempotencyScope("lamp", "on", "large"), "x" * (1024 * 1024 - 2))
    large = database.idempotency_keys.find(IdempotencyScope("lamp", "on", "large"))
    assert large is not None
    assert large.result == "x" * (1024 * 1024 - 2)


def test_scopes_do_not_collide(database: Database) -> None:
    """Device, method and key stay separate, even if they contain separators."""
    scopes = [
        IdempotencyScope(*parts)
        for parts in [("a", "b", "c"), ("a", "b:c", "c"), ("a:b", "c", "c"), ("a", "b", "c:c"), ("a", "c", "b")]
    ]
    for number, scope in enumerate(scopes):
        insert(database, scope, number)
    with database.unit_of_work(read_only=True) as unit:
        found = [unit.idempotency_keys.find(scope) for scope in scopes]
    assert [row.result for row in found if row is not None] == [0, 1, 2, 3, 4]


def test_cleanup_is_bounded_and_keeps_unexpired_rows(database: Database, clock: FakeClock) -> None:
    """One cleanup call removes at most `limit` rows, and only expired rows."""
    for number in range(5):
        insert(database, IdempotencyScope("lamp", "on", f"k{number}"), ttl=MINUTE * (number + 1))
    clock.now = START + 4 * MINUTE
    for expected in (3, 1, 0):
        assert database.idempotency_keys.delete_expired(limit=3) == expected
    assert len(dump(database)["idempotency_keys"]) == 1
