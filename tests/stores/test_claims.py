"""The parts of `run_once`: claims, leases, fenced records, and the operator's methods for abandoned attempts."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import pytest

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
from tests.conftest import START, FakeClock, add_agent, dump, write_past_checks

SCOPE = IdempotencyScope("lamp", "orders.create", "k-1")
MINUTE = timedelta(minutes=1)
DAY = timedelta(days=1)
TICK = timedelta(milliseconds=1)


def claim(database: Database, scope: IdempotencyScope = SCOPE, **options: Any) -> Attempt | Outcome:
    """Claim a key in a separate unit."""
    arguments: Any = {"fingerprint": "f", "lease": MINUTE, "ttl": DAY, **options}
    return database.run(lambda unit: unit.idempotency_keys.claim(scope, **arguments))


def begin(database: Database, scope: IdempotencyScope = SCOPE, **options: Any) -> Attempt:
    """Claim a key that is free or abandoned."""
    attempt = claim(database, scope, **options)
    assert isinstance(attempt, Attempt)
    return attempt


def complete(database: Database, attempt: Attempt, result: Any = "done") -> bool:
    """Record an outcome in a separate unit."""
    return database.run(lambda unit: unit.idempotency_keys.complete(attempt, result))


def find(database: Database, scope: IdempotencyScope = SCOPE) -> IdempotencyKey | None:
    """Return the record that has not expired."""
    return database.run(lambda unit: unit.idempotency_keys.find(scope), read_only=True)


def test_lease_is_exact(database: Database, clock: FakeClock) -> None:
    """A lease is valid one millisecond before its end and has expired exactly at its end, after a renewal too."""
    first = begin(database)
    clock.now = first.lease_expires_at - TICK
    first = database.run(lambda unit: unit.idempotency_keys.renew(first, lease=MINUTE))
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
    complete(database, attempt)
    assert claim(database, fingerprint="") == Outcome("done", True, 1)


WRITES: list[Callable[[IdempotencyKeyStore, Attempt], object]] = [
    lambda store, attempt: store.complete(attempt, 1),
    lambda store, attempt: store.fail(attempt, 1),
    lambda store, attempt: store.release(attempt),
    lambda store, attempt: store.renew(attempt, lease=MINUTE),
]


@pytest.mark.parametrize("lost_to", ["rerun", "completed", "resolved", "forgotten"])
def test_lost_key(database: Database, clock: FakeClock, lost_to: str) -> None:
    """If an attempt lost its key to another attempt or an operator, its writes raise an error and change no row."""
    stale = begin(database)
    clock.advance(MINUTE)
    if lost_to == "rerun":
        begin(database, rerun=True)
    elif lost_to == "completed":
        complete(database, begin(database, rerun=True))
    elif lost_to == "resolved":
        assert database.run(lambda unit: unit.idempotency_keys.resolve(SCOPE, "known"))
    else:
        assert database.run(lambda unit: unit.idempotency_keys.forget(SCOPE))
    before = dump(database)
    for write in WRITES:
        with pytest.raises(errors.LeaseLostError) as refusal, database.unit_of_work() as unit:
            write(unit.idempotency_keys, stale)
        assert refusal.value.attempt == 1
        assert dump(database) == before


@pytest.mark.parametrize("swept", [False, True], ids=["before cleanup", "after cleanup"])
def test_expiry(database: Database, clock: FakeClock, swept: bool) -> None:
    """A record is replayed until its end and is absent exactly at its end, before and after a cleanup."""
    complete(database, begin(database))
    with pytest.raises(errors.FingerprintMismatchError):
        claim(database, fingerprint="g")
    clock.now = START + DAY - TICK
    if swept:
        database.sweep()
    assert claim(database) == Outcome("done", True, 1)
    clock.advance(TICK)
    if swept:
        assert database.sweep().idempotency_keys == 1
    assert find(database) is None
    attempt = begin(database, fingerprint="g")
    assert (attempt.number, attempt.expires_at) == (1, clock.now + DAY)
    row = find(database)
    assert row is not None
    assert (row.result, row.created_at, row.attempt, row.fingerprint) == (None, clock.now, 1, "g")
    # A record that was inserted without parameters counts as completed for calls with any parameters.
    other = IdempotencyScope("lamp", "m", "other")
    database.idempotency_keys.insert(other, {"id": 1}, ttl=DAY)
    assert claim(database, other, fingerprint="anything") == Outcome({"id": 1}, True, 1)
    clock.advance(DAY)
    assert begin(database, other).number == 1


def test_a_method_reads_the_clock_once(target: str) -> None:
    """If a record expires during a claim, the claim returns the whole record, since a method reads the clock once."""
    readings: list[datetime] = []

    def clock() -> datetime:
        readings.append(now)
        # A second reading would be later than the record's end.
        return now if len(readings) == 1 else now + DAY

    now = START
    with Database.open(target, clock=clock) as database:
        readings.clear()
        attempt = begin(database)
        assert len(readings) == 1
        readings.clear()
        complete(database, attempt)
        now = START + DAY - TICK
        readings.clear()
        assert claim(database) == Outcome("done", True, 1)
        assert len(readings) == 1
        abandoned = IdempotencyScope("lamp", "orders.create", "abandoned")
        readings.clear()
        begin(database, abandoned, lease=timedelta(0))
        readings.clear()
        assert database.idempotency_keys.resolve(abandoned, "done")
        assert len(readings) == 1
        session = AgentSessionCreate(agent_id=add_agent(database).id, session_id="first")
        database.sessions.create(session)
        readings.clear()
        database.sessions.create(session.model_copy(update={"session_id": "second"}))  # the first has the route
        assert len(readings) == 1


def test_cleanup_keeps_unknown_outcomes(database: Database, clock: FakeClock) -> None:
    """Cleanup keeps valid leases and unknown outcomes after their time to live, and removes known outcomes."""
    scopes = {name: IdempotencyScope("lamp", "m", name) for name in ("running", "unknown", "completed", "failed")}
    attempts = {name: begin(database, scope, ttl=MINUTE) for name, scope in scopes.items()}
    complete(database, attempts["completed"])
    database.run(lambda unit: unit.idempotency_keys.fail(attempts["failed"], "no"))
    clock.advance(DAY)
    database.run(lambda unit: unit.idempotency_keys.renew(attempts["running"], lease=MINUTE))
    assert database.sweep().idempotency_keys == 2
    assert {name for name, scope in scopes.items() if find(database, scope)} == {"running", "unknown"}
    with pytest.raises(errors.IdempotencyInProgressError):
        claim(database, scopes["running"])
    with pytest.raises(errors.OutcomeUnknownError):
        claim(database, scopes["unknown"])
    with pytest.raises(errors.FingerprintMismatchError):
        claim(database, scopes["unknown"], fingerprint="g")
    # The time to live is over, but the attempt has just ended: the record is replayed for the same time again.
    complete(database, attempts["running"])
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


def test_operator_without_abandoned_keys(database: Database, clock: FakeClock) -> None:
    """`resolve` and `forget` keep an absent and a completed record; an invalid result leaves a key abandoned."""
    complete(database, begin(database))
    before = dump(database)
    for scope in (SCOPE, IdempotencyScope("lamp", "m", "absent")):
        assert database.idempotency_keys.resolve(scope, "other") is False
        assert database.idempotency_keys.forget(scope) is False
    assert dump(database) == before
    begin(database, IdempotencyScope("lamp", "m", "k"))
    clock.advance(MINUTE)
    with pytest.raises(errors.InvalidArgumentError):
        database.idempotency_keys.resolve(IdempotencyScope("lamp", "m", "k"), "x" * 1_100_000)
    with pytest.raises(errors.OutcomeUnknownError):
        claim(database, IdempotencyScope("lamp", "m", "k"))


def test_errors_omit_the_key(database: Database) -> None:
    """Each error of the claims names its scope, but omits the key and the stored result."""
    scope = IdempotencyScope("lamp", "m", "sesame")
    attempt = begin(database, scope, lease=timedelta(0))
    told: list[errors.IdempotencyError] = []
    for fingerprint in ("f", "g"):
        with pytest.raises(errors.IdempotencyError) as refusal:
            claim(database, scope, fingerprint=fingerprint)
        told.append(refusal.value)
    complete(database, attempt, "treasure")
    with pytest.raises(errors.LeaseLostError) as lost:
        complete(database, attempt, "treasure")
    for error in (*told, lost.value):
        assert "sesame" not in str(error)
        assert "treasure" not in str(error)
        assert (error.device_id, error.method) == ("lamp", "m")


# A state that another program stored.


def test_unknown_state_keeps_the_key(database: Database, target: str, clock: FakeClock) -> None:
    """If a row has an unknown state, claims raise an error and cleanup keeps the row, since the effect may have run."""
    complete(database, begin(database, lease=timedelta(0)))
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
    for call in (lambda: claim(database), lambda: database.run(lambda unit: unit.idempotency_keys.find(SCOPE))):
        with pytest.raises(errors.CorruptDatabaseError):
            call()
    assert dump(database) == before
