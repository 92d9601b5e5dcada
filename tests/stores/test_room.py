"""The limits of the nonces and idempotency keys of one device, in one process and in several."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import pytest

from homeagent import Database, Freshness, IdempotencyScope, Limits, ReplayGuard
from homeagent.errors import IdempotencyKeyExistsError, InvalidArgumentError, KeyLimitError, LimitError, NonceLimitError
from homeagent.stores import idempotency_key_statements
from homeagent.stores.nonces import _COUNT
from tests.conftest import START, Children, FakeClock, MakeDatabase, dump, plan_of

MINUTE = timedelta(minutes=1)

# Each process waits until all processes are ready, and then adds rows until the limit.
FILL = """
import sys
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from homeagent import Database, IdempotencyScope, Limits, errors
database = Database.open(sys.argv[1], limits=Limits(nonces_per_device=24, keys_per_device=24))
me, until = sys.argv[2], datetime.now(UTC) + timedelta(hours=1)
print("ready", flush=True)
sys.stdin.readline()
for add in (
    lambda name: database.nonces.consume("lamp", name, expires_at=until),
    lambda name: database.idempotency_keys.insert(IdempotencyScope("lamp", "m", name), 1, ttl=timedelta(hours=1)),
):
    with suppress(errors.LimitError):
        for number in range(100):
            add(f"{me}-{number}")
database.close()
"""


def add(database: Database, table: str, name: str, expires_at: datetime = START + MINUTE) -> bool:
    """Add a nonce, or a key with a minute to live, and return whether the device was below its limit."""
    try:
        if table == "nonces":
            return database.nonces.consume("lamp", name, expires_at=expires_at)
        return bool(database.idempotency_keys.insert(IdempotencyScope("lamp", "m", name), 1, ttl=MINUTE))
    except LimitError:
        return False


TABLES = pytest.mark.parametrize("table", ["nonces", "idempotency_keys"])


@TABLES
@pytest.mark.parametrize("limit", [1, 120])
def test_the_limit_is_exact_in_one_process(reopen: MakeDatabase, clock: FakeClock, table: str, limit: int) -> None:
    """One process stores exactly as many rows as the limit allows, and new rows only after the expiry."""
    database = reopen(limits=Limits(nonces_per_device=limit, keys_per_device=limit), durability="normal")
    for number in range(limit):
        database.idempotency_keys.insert(IdempotencyScope("door", "m", str(number)), 1, ttl=MINUTE)
    assert [add(database, table, f"n{number}") for number in range(limit + 2)] == [True] * limit + [False] * 2
    assert len(dump(database)[table]) == limit * (1 if table == "nonces" else 2)
    clock.advance(MINUTE)
    # The expired rows are still stored, but do not count.
    # Of another device, too, and they make room only for their own device.
    expires_at = clock.now + MINUTE
    assert [add(database, table, f"m{number}", expires_at) for number in range(limit + 1)] == [True] * limit + [False]


def test_another_thread_can_clear_the_grants(sqlite_database: Database) -> None:
    """If another thread clears the grants between two look-ups, a nonce is accepted."""

    class Cleared(dict[Any, Any]):
        def __contains__(self, key: object) -> bool:
            found = super().__contains__(key)
            self.clear()
            return found

    sqlite_database._settings.grants = Cleared()
    assert all(add(sqlite_database, "nonces", name) for name in "ab")


@TABLES
def test_unused_grants_of_eight_processes(reopen: MakeDatabase, table: str) -> None:
    """If each of eight processes keeps the grant of an early count, all together store less than twice the limit."""
    databases = [reopen(limits=Limits(nonces_per_device=300, keys_per_device=300)) for _ in range(8)]
    for place, database in enumerate(databases):
        assert add(database, table, f"first-{place}")
    for place, database in enumerate(databases):
        number = 0
        while add(database, table, f"{place}-{number}"):
            number += 1
    assert 300 <= len(dump(databases[0])[table]) < 600


def test_eight_processes_at_the_same_time(target: str, children: Children) -> None:
    """Eight processes that add rows at the same time store at least the limit, and less than twice as many rows."""
    Database.open(target).close()
    children.together(FILL, [(target, number) for number in range(8)])
    with Database.open(target) as database:
        stored = dump(database)
    assert 24 <= len(stored["nonces"]) < 48
    assert 24 <= len(stored["idempotency_keys"]) < 48


def test_an_argument_only_lowers_the_limit(reopen: MakeDatabase) -> None:
    """The argument `limit` of a call or a guard can be lower than the limit of the database, but not raise it."""
    database = reopen(limits=Limits(nonces_per_device=3))
    for number in range(2):
        assert database.nonces.consume("lamp", f"n{number}", expires_at=START + MINUTE, limit=100)
    with pytest.raises(NonceLimitError) as caught:
        database.nonces.consume("lamp", "low", expires_at=START + MINUTE, limit=2)
    assert caught.value.limit == 2
    guard = ReplayGuard(skew=MINUTE, limit=100)
    assert guard.check(database.nonces, "lamp", "n2", signed_at=START) is Freshness.FRESH
    with pytest.raises(LimitError) as caught_by_guard:
        guard.check(database.nonces, "lamp", "n3", signed_at=START)
    assert caught_by_guard.value.limit == 3


def test_a_known_key_works_at_the_limit(reopen: MakeDatabase) -> None:
    """At the limit of keys, a retry gets the stored outcome, and a new effect does not begin."""
    database = reopen(limits=Limits(keys_per_device=2))
    began: list[int] = []
    scopes = [IdempotencyScope("lamp", "m", str(number)) for number in range(3)]
    for scope in scopes[:2]:
        database.run_once(scope, lambda attempt: began.append(1))
    for _ in range(2):
        assert database.run_once(scopes[0], lambda attempt: began.append(2)).replayed
        with pytest.raises(KeyLimitError) as caught:
            database.run_once(scopes[2], lambda attempt: began.append(3))
        with pytest.raises(KeyLimitError), database.unit_of_work() as unit:
            unit.run_once(scopes[2], lambda attempt: began.append(3))
        with pytest.raises(IdempotencyKeyExistsError):
            database.idempotency_keys.insert(scopes[0], 1, ttl=MINUTE)
    assert (caught.value.device_id, caught.value.limit, began) == ("lamp", 2, [1, 1])
    assert database.run_once(IdempotencyScope("door", "m", "2"), lambda attempt: 4).value == 4


def test_released_nonces_stay_replays(reopen: MakeDatabase, clock: FakeClock) -> None:
    """After `forget` a device can use as many new nonces as before, and no released nonce can be used again."""
    database = reopen(limits=Limits(nonces_per_device=3))
    guard = ReplayGuard(skew=MINUTE)
    for number in range(3):
        assert guard.check(database.nonces, "lamp", f"n{number}", signed_at=START) is Freshness.FRESH
    assert database.nonces.consume("door", "n0", expires_at=START + MINUTE)
    assert not add(database, "nonces", "new")
    assert database.nonces.forget("lamp") == 3
    assert database.nonces.forget("lamp") == 0
    assert guard.check(database.nonces, "lamp", "n0", signed_at=START) is Freshness.REPLAYED
    assert [add(database, "nonces", f"m{number}") for number in range(4)] == [True, True, True, False]
    assert not database.nonces.consume("lamp", "n1", expires_at=START + MINUTE)
    assert not database.nonces.consume("door", "n0", expires_at=START + MINUTE)
    clock.advance(MINUTE)
    assert database.nonces.consume("lamp", "n0", expires_at=clock.now + MINUTE)


def test_the_longest_ttl(reopen: MakeDatabase) -> None:
    """A longer time to live than `longest_ttl` raises an error in each method, and no effect begins."""
    database = reopen(limits=Limits(longest_ttl=MINUTE))
    scope = IdempotencyScope("lamp", "m", "k")
    longer = MINUTE + timedelta(milliseconds=1)
    calls: list[Any] = [
        lambda: database.nonces.consume("lamp", "n", expires_at=START + longer),
        lambda: database.nonces.consume_signed("lamp", "n", signed_at=START, skew=longer),
        lambda: ReplayGuard(skew=longer).check(database.nonces, "lamp", "n", signed_at=START),
        lambda: database.idempotency_keys.insert(scope, 1, ttl=longer),
        lambda: database.idempotency_keys.claim(scope, fingerprint="f", lease=MINUTE, ttl=longer),
        lambda: database.run_once(scope, lambda attempt: pytest.fail("the effect ran"), ttl=longer),
        lambda: database.run(lambda unit: unit.run_once(scope, lambda attempt: pytest.fail("it ran"), ttl=longer)),
    ]
    for call in calls:
        with pytest.raises(InvalidArgumentError, match="longest_ttl"):
            call()
    assert database.nonces.consume("lamp", "n", expires_at=START + MINUTE)
    assert ReplayGuard(skew=MINUTE).check(database.nonces, "lamp", "m", signed_at=START) is Freshness.FRESH
    assert database.run_once(scope, lambda attempt: 1, ttl=MINUTE).value == 1
    with Database.open(":memory:") as another, pytest.raises(InvalidArgumentError, match="400 days"):
        another.run_once(scope, lambda attempt: 1, ttl=timedelta(days=400, milliseconds=1))


def test_expired_keys_are_counted_by_the_index(sqlite_database: Database) -> None:
    """SQLite counts keys by the primary key, and expired keys by the index of their expiry."""
    now = {"now": sqlite_database._clock()}
    for statement, values, index in (
        (idempotency_key_statements.COUNT, {}, "COVERING INDEX sqlite_autoindex_idempotency_keys_1 (device_id=?)"),
        (idempotency_key_statements.COUNT_EXPIRED_OF_DEVICE, now, "INDEX idx_idempotency_expires (expires_at<?)"),
        (_COUNT, now, "PRIMARY KEY (device_id=?)"),
    ):
        plan = plan_of(sqlite_database, statement, device_id="lamp", **values)
        assert index in "\n".join(plan)
