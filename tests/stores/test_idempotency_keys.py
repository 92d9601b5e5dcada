"""The store of idempotency keys: insert, find and remove results."""

from __future__ import annotations

import json
import math
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import inspect

from homeagent import Database, IdempotencyKey, IdempotencyScope
from homeagent.errors import IdempotencyKeyExistsError, InvalidArgumentError
from tests.conftest import START, FakeClock, dump

MINUTE = timedelta(minutes=1)
MS = timedelta(milliseconds=1)
SCOPE = IdempotencyScope("lamp", "on", "key-1")

text = st.text(st.characters(codec="utf-8"), max_size=20)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4),
    max_leaves=8,
)


def insert(database: Database, scope: IdempotencyScope = SCOPE, result: Any = 1, ttl: timedelta = MINUTE) -> None:
    """Store a result in a separate unit."""
    with database.unit_of_work() as unit:
        unit.idempotency_keys.insert(scope, result, ttl=ttl)


def test_insert_and_find(database: Database) -> None:
    """`insert` returns an instance that equals the stored row in every field and counts as loaded."""
    result = {"b": [1, -0.0, "é"], "a": None}
    with database.unit_of_work() as unit:
        made = unit.idempotency_keys.insert(SCOPE, result, ttl=MINUTE)
    with database.unit_of_work(read_only=True) as unit:
        found = unit.idempotency_keys.find(SCOPE)
    assert made == found
    assert (made.result, made.created_at, made.expires_at) == (result, START, START + MINUTE)
    assert made.__dict__.keys() - {"_sa_instance_state"} == set(IdempotencyKey.model_fields)
    assert inspect(made).identity == inspect(found).identity
    assert inspect(made).detached


def test_unexpired_record_is_never_overwritten(database: Database) -> None:
    """If the scope has an unexpired record, `insert` raises an error without the key in its text."""
    insert(database)
    before = dump(database)
    with pytest.raises(IdempotencyKeyExistsError) as caught:
        insert(database, result="another")
    assert (caught.value.device_id, caught.value.method) == ("lamp", "on")
    assert "key-1" not in str(caught.value) + repr(SCOPE)
    assert dump(database) == before


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


def test_expiry_is_exact(database: Database, clock: FakeClock) -> None:
    """A record is found one millisecond before its end, is absent exactly at its end, and is then replaced whole."""
    insert(database)
    clock.now = START + MINUTE - MS
    with pytest.raises(IdempotencyKeyExistsError):
        insert(database)
    clock.now = START + MINUTE
    with database.unit_of_work() as unit:
        assert unit.idempotency_keys.find(SCOPE) is None
    insert(database, result="new")
    with database.unit_of_work() as unit:
        found = unit.idempotency_keys.find(SCOPE)
    assert found is not None
    assert (found.result, found.created_at, found.expires_at) == ("new", clock.now, clock.now + MINUTE)


def test_cleanup_is_bounded_and_keeps_unexpired_rows(database: Database, clock: FakeClock) -> None:
    """One cleanup call removes at most `limit` rows, and only expired rows."""
    for number in range(5):
        insert(database, IdempotencyScope("lamp", "on", f"k{number}"), ttl=MINUTE * (number + 1))
    clock.now = START + 4 * MINUTE
    for expected in (3, 1, 0):
        with database.unit_of_work() as unit:
            assert unit.idempotency_keys.delete_expired(limit=3) == expected
    assert len(dump(database)["idempotency_keys"]) == 1


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=values)
def test_json_values_are_read_back_unchanged(database: Database, value: Any) -> None:
    """A stored JSON value is read back with its types, key order, NUL characters and minus zero."""
    with database.unit_of_work() as unit:
        unit.idempotency_keys.insert(SCOPE, value, ttl=MINUTE)
        found = unit.idempotency_keys.find(SCOPE)
        assert found is not None
        assert json.dumps(found.result) == json.dumps(value)
        unit.rollback()


def test_unstorable_results_are_refused(database: Database) -> None:
    """NaN, keys that are not text, sets, bytes, timestamps, lone surrogates and more than 1 MiB raise an error."""
    wrong = [math.nan, math.inf, {1: 2}, {"a": {1, 2}}, b"bytes", START, "\ud800", (1, 2), object()]
    for result in (*wrong, "x" * (1024 * 1024 - 1)):
        with pytest.raises(InvalidArgumentError):
            insert(database, result=result)
    assert dump(database)["idempotency_keys"] == []


def test_the_largest_result_is_stored(database: Database) -> None:
    """A result of exactly 1 MiB of JSON text is stored."""
    insert(database, result="x" * (1024 * 1024 - 2))
    with database.unit_of_work() as unit:
        found = unit.idempotency_keys.find(SCOPE)
    assert found is not None
    assert len(str(found.result)) == 1024 * 1024 - 2


def test_bad_arguments_are_refused(database: Database) -> None:
    """Invalid scopes, times to live and limits raise an error."""
    for parts in [
        ("", "m", "k"),
        ("a/..", "m", "k"),
        ("d", "", "k"),
        ("d", "m", ""),
        ("d", "m", "x" * 1025),
        ("d", "x" * 513, "k"),
        ("d", "m", "\0"),
    ]:
        with pytest.raises(InvalidArgumentError):
            IdempotencyScope(*parts)
    for ttl in (timedelta(0), -MINUTE, timedelta.max, 60):
        with pytest.raises(InvalidArgumentError):
            insert(database, ttl=ttl)  # type: ignore[arg-type]
    with database.unit_of_work() as unit:
        for limit in (0, -1, True):
            with pytest.raises(InvalidArgumentError):
                unit.idempotency_keys.delete_expired(limit=limit)
        with pytest.raises(InvalidArgumentError):
            unit.idempotency_keys.find(("lamp", "on", "key-1"))  # type: ignore[arg-type]
    assert dump(database)["idempotency_keys"] == []
