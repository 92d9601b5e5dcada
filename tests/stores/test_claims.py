"""The store of idempotency keys: results, claims, leases, fenced records, and the operator's methods."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any, TypeVar

import pytest
from sqlalchemy import inspect

from homeagent import (
    AgentSessionCreate,
    Attempt,
    Database,
    IdempotencyKey,
    IdempotencyScope,
    IdempotencyState,
    Outcome,
    errors,
)
from homeagent.stores import IdempotencyKeyStore
from tests.conftest import START, FakeClock, add_agent, add_device, dump, write_past_checks

SCOPE = IdempotencyScope("lamp", "orders.create", "k-1")
MINUTE = timedelta(minutes=1)
DAY = timedelta(days=1)
TICK = timedelta(milliseconds=1)
T = TypeVar("T")


def claim(database: Database, scope: IdempotencyScope = SCOPE, **options: Any) -> Attempt | Outcome:
    """Claim a key in a separate unit."""
    arguments: Any = {"fingerprint": "f", "lease": MINUTE, "ttl": DAY, **options}
    return database.idempotency_keys.claim(scope, **arguments)


def begin(database: Database, scope: IdempotencyScope = SCOPE, **options: Any) -> Attempt:
    """Claim a key that is free or abandoned."""
    attempt = claim(database, scope, **options)
    assert isinstance(attempt, Attempt)
    return attempt


def test_insert_and_find(database: Database) -> None:
    """`insert` returns an instance that equals the stored row in every field and counts as loaded."""
    scope = IdempotencyScope("lamp", "m", "k")
    result = {"b": [1, -0.0, 2**70, "é\0😀\u2028"], "a": None, "": "x" * 1000}
    made = database.idempotency_keys.insert(scope, result, ttl=MINUTE)
    found = database.idempotency_keys.find(scope)
    assert found is not None
    assert made == found
    assert json.dumps(made.result) == json.dumps(found.result) == json.dumps(result)
    assert (made.created_at, made.expires_at) == (START, START + MINUTE)
    assert made.__dict__.keys() - {"_sa_instance_state"} == set(IdempotencyKey.model_fields)
    assert inspect(made).identity == inspect(found).identity
    assert inspect(made).detached
    for other in (("lamp", "m", "K"), ("lamp", "n", "k"), ("door", "m", "k"), ("lamp", "mk", "")):
        assert database.idempotency_keys.find(IdempotencyScope.of_record(*other)) is None
    # The largest result has 1 MiB of JSON.
    database.idempotency_keys.insert(SCOPE, "x" * (1024 * 1024 - 2), ttl=MINUTE)
    large = database.idempotency_keys.find(SCOPE)
    assert large is not None
    assert large.result == "x" * (1024 * 1024 - 2)


def test_cleanup_is_bounded_and_keeps_unexpired_rows(database: Database, clock: FakeClock) -> None:
    """One cleanup call removes at most `limit` rows, and only expired rows."""
    for number in range(5):
        scope = IdempotencyScope("lamp", "m", str(number))
        database.idempotency_keys.insert(scope, 1, ttl=MINUTE * (number + 1))
    clock.now = START + 4 * MINUTE
    for expected in (3, 1, 0):
        assert database.idempotency_keys.delete_expired(limit=3) == expected
    assert len(dump(database)["idempotency_keys"]) == 1


def test_lease_is_exact(database: Database, clock: FakeClock) -> None:
    """A lease is valid one millisecond before its end and has expired exactly at its end, after a renewal too."""
    first = begin(database)
    clock.now = first.lease_expires_at - TICK
    first = database.idempotency_keys.renew(first, lease=MINUTE)
    assert first.lease_expires_at == clock.now + MINUTE
    clock.now = first.lease_expires_at - TICK
    with pytest.raises(errors.IdempotencyInProgressError) as refusal:
        claim(database, rerun=True)
    assert refusal.value.retry_after == TICK
    refused: errors.IdempotencyError = refusal.value
    assert (refused.state, refused.expires_at) == (IdempotencyState.IN_PROGRESS, first.expires_at)
    clock.advance(TICK)
    with pytest.raises(errors.OutcomeUnknownError) as unknown:
        claim(database)
    assert (unknown.value.state, unknown.value.expires_at) == (IdempotencyState.IN_PROGRESS, first.expires_at)
    second = begin(database, rerun=True)
    assert (second.number, second.downstream_key) == (2, first.downstream_key)


def test_take_over_begins_a_new_ttl(database: Database, clock: FakeClock) -> None:
    """The `ttl` of a call that takes over the key counts from the take-over, for the attempt and for an operator."""
    keys = database.idempotency_keys
    for by_operator in (False, True):
        begin(database, ttl=TICK)
        clock.advance(DAY)
        second = begin(database, rerun=True, lease=timedelta(0), ttl=2 * MINUTE)
        assert (second.ttl, second.expires_at) == (2 * MINUTE, clock.now + 2 * MINUTE)
        # After the end of the ttl, the ttl begins again when the outcome is recorded.
        clock.advance(3 * MINUTE)
        assert keys.resolve(SCOPE, "done") if by_operator else keys.complete(second, "done")
        clock.advance(2 * MINUTE - TICK)
        assert claim(database) == Outcome("done", True, 2)
        clock.advance(TICK)


def test_lease_of_zero(database: Database) -> None:
    """A lease of zero has expired at once, and its attempt can still record an outcome."""
    attempt = begin(database, lease=timedelta(0), fingerprint="")
    assert attempt.lease_expires_at == START
    with pytest.raises(errors.OutcomeUnknownError):
        claim(database, fingerprint="")
    # A fingerprint may be empty, and another fingerprint is refused with the state and expiry of the record.
    with pytest.raises(errors.FingerprintMismatchError) as refusal:
        claim(database)
    assert (refusal.value.state, refusal.value.expires_at) == (IdempotencyState.IN_PROGRESS, attempt.expires_at)
    database.idempotency_keys.complete(attempt, "done")
    assert claim(database, fingerprint="") == Outcome("done", True, 1)


WRITES: list[Callable[[IdempotencyKeyStore, Attempt], object]] = [
    lambda store, attempt: store.complete(attempt, 1),
    lambda store, attempt: store.fail(attempt, 1),
    lambda store, attempt: store.release(attempt),
    lambda store, attempt: store.renew(attempt, lease=MINUTE),
]


LOSSES: dict[str, Callable[[Database], object]] = {
    "rerun": lambda database: begin(database, rerun=True),
    "completed": lambda database: database.idempotency_keys.complete(begin(database, rerun=True), "done"),
    "resolved": lambda database: database.idempotency_keys.resolve(SCOPE, "known"),
    "forgotten": lambda database: database.idempotency_keys.forget(SCOPE),
}


@pytest.mark.parametrize("lost_to", LOSSES)
def test_lost_key(database: Database, clock: FakeClock, lost_to: str) -> None:
    """If an attempt lost its key to another attempt or an operator, its writes raise an error and change no row."""
    stale = begin(database)
    clock.advance(MINUTE)
    assert LOSSES[lost_to](database)
    before = dump(database)
    for write in WRITES:
        with pytest.raises(errors.LeaseLostError) as refusal, database.unit_of_work() as unit:
            write(unit.idempotency_keys, stale)
        assert refusal.value.attempt == 1
        assert dump(database) == before


@pytest.mark.parametrize("swept", [False, True], ids=["before cleanup", "after cleanup"])
def test_expiry(database: Database, clock: FakeClock, swept: bool) -> None:
    """A record is replayed until its end and is absent exactly at its end, before and after a cleanup."""
    database.idempotency_keys.complete(begin(database), "done")
    with pytest.raises(errors.FingerprintMismatchError):
        claim(database, fingerprint="g")
    clock.now = START + DAY - TICK
    if swept:
        database.sweep()
    assert claim(database) == Outcome("done", True, 1)
    clock.advance(TICK)
    if swept:
        assert database.sweep().idempotency_keys == 1
    assert database.idempotency_keys.find(SCOPE) is None
    attempt = begin(database, fingerprint="g")
    assert (attempt.number, attempt.expires_at) == (1, clock.now + DAY)
    row = database.idempotency_keys.find(SCOPE)
    assert row is not None
    assert (row.result, row.created_at, row.attempt, row.fingerprint) == (None, clock.now, 1, "g")
    # A record that was inserted without parameters counts as completed for calls with any parameters.
    other = IdempotencyScope("lamp", "m", "other")
    database.idempotency_keys.insert(other, {"id": 1}, ttl=DAY)
    assert claim(database, other, fingerprint="anything") == Outcome({"id": 1}, True, 1)
    clock.advance(DAY - TICK)
    with pytest.raises(errors.IdempotencyKeyExistsError):
        database.idempotency_keys.insert(other, "early", ttl=DAY)
    clock.advance(TICK)
    assert database.idempotency_keys.find(other) is None
    assert database.idempotency_keys.insert(other, "new", ttl=DAY) == database.idempotency_keys.find(other)
    clock.advance(DAY)
    assert begin(database, other).number == 1


def test_a_method_reads_the_clock_once(target: str) -> None:
    """If a record expires during a claim, the claim returns the whole record, since a method reads the clock once."""
    readings: list[datetime] = []

    def clock() -> datetime:
        readings.append(now)
        # A second reading would be later than the record's end.
        return now if len(readings) == 1 else now + DAY

    def read_once(call: Callable[[], T]) -> T:
        readings.clear()
        result = call()
        assert len(readings) == 1
        return result

    now = START
    with Database.open(target, clock=clock) as database:
        attempt = read_once(lambda: begin(database))
        database.idempotency_keys.complete(attempt, "done")
        now = START + DAY - TICK
        assert read_once(lambda: claim(database)) == Outcome("done", True, 1)
        abandoned = IdempotencyScope("lamp", "orders.create", "abandoned")
        read_once(lambda: begin(database, abandoned, lease=timedelta(0)))
        assert read_once(lambda: database.idempotency_keys.resolve(abandoned, "done"))
        agent_id = add_agent(database).id
        for _ in range(2):  # the first session has the route
            read_once(lambda: database.sessions.create(AgentSessionCreate(agent_id=agent_id)))
        device_id = add_device(database).id
        assert read_once(lambda: database.devices.update_last_seen(device_id))
        assert not read_once(lambda: database.devices.update_last_seen(device_id))


def test_cleanup_keeps_unknown_outcomes(database: Database, clock: FakeClock) -> None:
    """Cleanup keeps valid leases and unknown outcomes after their time to live, and removes known outcomes."""
    scopes = {name: IdempotencyScope("lamp", "m", name) for name in ("running", "unknown", "completed", "failed")}
    attempts = {name: begin(database, scope, ttl=MINUTE) for name, scope in scopes.items()}
    database.idempotency_keys.complete(attempts["completed"], "done")
    database.idempotency_keys.fail(attempts["failed"], "no")
    clock.advance(DAY)
    database.idempotency_keys.renew(attempts["running"], lease=MINUTE)
    assert database.sweep().idempotency_keys == 2
    assert {name for name, scope in scopes.items() if database.idempotency_keys.find(scope)} == {"running", "unknown"}
    with pytest.raises(errors.IdempotencyInProgressError):
        claim(database, scopes["running"])
    with pytest.raises(errors.OutcomeUnknownError):
        claim(database, scopes["unknown"])
    with pytest.raises(errors.FingerprintMismatchError):
        claim(database, scopes["unknown"], fingerprint="g")
    # The time to live is over, but the attempt has just ended: the record is replayed for the same time again.
    database.idempotency_keys.complete(attempts["running"], "done")
    clock.advance(MINUTE - TICK)
    assert claim(database, scopes["running"]) == Outcome("done", True, 1)
    clock.advance(TICK)
    begin(database, scopes["running"])


def test_operator_settles_abandoned_keys(database: Database, clock: FakeClock) -> None:
    """An operator lists abandoned keys, oldest first, records the outcome of one and allows another to run again."""
    scopes = [IdempotencyScope("lamp", "m", str(number)) for number in range(3)]
    for scope in scopes:
        begin(database, scope)
        clock.advance(seconds=10)
    keys = database.idempotency_keys
    assert keys.list_abandoned() == []
    with pytest.raises(errors.IdempotencyInProgressError):
        keys.resolve(scopes[0], 1)
    with pytest.raises(errors.IdempotencyInProgressError):
        keys.forget(scopes[0])
    clock.advance(MINUTE)
    assert [row.key for row in keys.list_abandoned()] == ["0", "1", "2"]
    assert [row.key for row in keys.list_abandoned(limit=2)] == ["0", "1"]
    assert keys.resolve(scopes[0], {"order": 1}) is True
    assert keys.forget(scopes[1]) is True
    assert claim(database, scopes[0]) == Outcome({"order": 1}, True, 1)
    assert begin(database, scopes[1]).number == 1
    assert [row.key for row in keys.list_abandoned()] == ["2"]


def test_operator_without_abandoned_keys(database: Database) -> None:
    """`resolve` and `forget` keep an absent and a completed record; an invalid result leaves a key abandoned."""
    database.idempotency_keys.complete(begin(database), "done")
    before = dump(database)
    for scope in (SCOPE, IdempotencyScope("lamp", "m", "absent")):
        assert database.idempotency_keys.resolve(scope, "other") is False
        assert database.idempotency_keys.forget(scope) is False
    assert dump(database) == before
    abandoned = IdempotencyScope("lamp", "m", "k")
    begin(database, abandoned, lease=timedelta(0))
    with pytest.raises(errors.InvalidArgumentError):
        database.idempotency_keys.resolve(abandoned, "x" * 1_100_000)
    with pytest.raises(errors.OutcomeUnknownError):
        claim(database, abandoned)


def test_errors_omit_the_key(database: Database) -> None:
    """Each error of the claims names its scope, but omits the key and the stored result."""
    scope = IdempotencyScope("lamp", "m", "sesame")
    attempt = begin(database, scope, lease=timedelta(0))
    told: list[errors.IdempotencyError] = []
    for fingerprint in ("f", "g"):
        with pytest.raises(errors.IdempotencyError) as refusal:
            claim(database, scope, fingerprint=fingerprint)
        told.append(refusal.value)
    database.idempotency_keys.complete(attempt, "treasure")
    with pytest.raises(errors.LeaseLostError) as lost:
        database.idempotency_keys.complete(attempt, "treasure")
    for error in (*told, lost.value):
        assert "sesame" not in str(error)
        assert "treasure" not in str(error)
        assert (error.device_id, error.method) == ("lamp", "m")


# A state that another program stored.


def test_unknown_state_keeps_the_key(database: Database, target: str, clock: FakeClock) -> None:
    """If a row has an unknown state, claims raise an error and cleanup keeps the row, since the effect may have run."""
    database.idempotency_keys.complete(begin(database, lease=timedelta(0)), "done")
    # If `omitted` is neither 0 nor 1, the stored result is not returned as a complete result.
    write_past_checks(target, "UPDATE idempotency_keys SET omitted = 2")
    again = claim(database)
    assert isinstance(again, Outcome)
    assert again.omitted
    write_past_checks(target, "UPDATE idempotency_keys SET state = 'running'")
    clock.advance(days=30)
    before = dump(database)
    assert database.sweep().idempotency_keys == 0
    assert database.idempotency_keys.delete_ended(SCOPE.device_id) == 0
    for call in (lambda: claim(database), lambda: database.idempotency_keys.find(SCOPE)):
        with pytest.raises(errors.CorruptDatabaseError):
            call()
    assert dump(database) == before
