"""What `run_once` is made of: claims, their leases, fenced records, and what an operator does about lost ones."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from homeagent import Attempt, Database, IdempotencyKey, IdempotencyScope, Outcome
from homeagent.errors import (
    CorruptDatabaseError,
    EffectFailedError,
    FingerprintMismatchError,
    IdempotencyError,
    IdempotencyInProgressError,
    InvalidArgumentError,
    LeaseLostError,
    OutcomeUnknownError,
)
from homeagent.stores import IdempotencyKeyStore
from tests.conftest import ROOT, START, FakeClock, dump, write_past_checks
from tests.migrations.old_databases import REVISIONS

SCOPE = IdempotencyScope("lamp", "orders.create", "k-1")
MINUTE = timedelta(minutes=1)
DAY = timedelta(days=1)
TICK = timedelta(milliseconds=1)


def claim(database: Database, scope: IdempotencyScope = SCOPE, **options: Any) -> Attempt | Outcome:
    """Claim a key in a unit of its own."""
    arguments: Any = {"fingerprint": "f", "lease": MINUTE, "ttl": DAY, **options}
    return database.run(lambda unit: unit.idempotency_keys.claim(scope, **arguments))


def begin(database: Database, scope: IdempotencyScope = SCOPE, **options: Any) -> Attempt:
    """Claim a key that is free or abandoned."""
    attempt = claim(database, scope, **options)
    assert isinstance(attempt, Attempt)
    return attempt


def complete(database: Database, attempt: Attempt, result: Any = "done") -> bool:
    """Record an outcome in a unit of its own."""
    return database.run(lambda unit: unit.idempotency_keys.complete(attempt, result))


def find(database: Database, scope: IdempotencyScope = SCOPE) -> IdempotencyKey | None:
    """Return the live record."""
    return database.run(lambda unit: unit.idempotency_keys.find(scope), read_only=True)


def test_what_is_no_attempt_changes_nothing(database: Database) -> None:
    """A scope, a record and an outcome are no attempts: whatever takes one refuses them, and nothing is written."""
    begin(database)
    before = dump(database)
    for wrong in (SCOPE, find(database), Outcome(value=1, replayed=False, attempt=1), None):
        with database.unit_of_work() as unit:
            keys: Any = unit.idempotency_keys
            with pytest.raises(InvalidArgumentError, match="Attempt"):
                keys.renew(wrong, lease=MINUTE)
            for record in (keys.complete, keys.fail):
                with pytest.raises(InvalidArgumentError, match="Attempt"):
                    record(wrong, 1)
            for method in (keys.release, keys.find_recorded):
                with pytest.raises(InvalidArgumentError, match="Attempt"):
                    method(wrong)
    assert dump(database) == before


def test_lease_is_exact(database: Database, clock: FakeClock) -> None:
    """A lease is live a millisecond before its end, and lapsed at that very instant."""
    first = begin(database)
    clock.now = first.lease_expires_at - TICK
    with pytest.raises(IdempotencyInProgressError) as refusal:
        claim(database, rerun=True)
    assert refusal.value.retry_after == TICK
    clock.advance(TICK)
    with pytest.raises(OutcomeUnknownError):
        claim(database)
    second = begin(database, rerun=True)
    assert (second.number, second.downstream_key) == (2, first.downstream_key)


def test_lease_of_zero(database: Database) -> None:
    """A lease of zero is one that has lapsed, not one that never does; and it may still record its outcome."""
    attempt = begin(database, lease=timedelta(0))
    assert attempt.lease_expires_at == START
    with pytest.raises(OutcomeUnknownError):
        claim(database)
    complete(database, attempt)
    assert claim(database) == Outcome("done", True, 1)


WRITES: dict[str, Callable[[IdempotencyKeyStore, Attempt], object]] = {
    "complete": lambda store, attempt: store.complete(attempt, 1),
    "fail": lambda store, attempt: store.fail(attempt, 1),
    "release": lambda store, attempt: store.release(attempt),
    "renew": lambda store, attempt: store.renew(attempt, lease=MINUTE),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("lost_to", ["rerun", "completed", "resolved", "forgotten"])
def test_stale_owner(
    database: Database, clock: FakeClock, write: Callable[[IdempotencyKeyStore, Attempt], object], lost_to: str
) -> None:
    """Who lost a key, to whomever, changes nothing any more and is told."""
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
    with pytest.raises(LeaseLostError) as refusal:
        database.run(lambda unit: write(unit.idempotency_keys, stale))
    assert refusal.value.attempt == 1
    assert dump(database) == before


def test_late_but_not_taken(database: Database, clock: FakeClock) -> None:
    """An attempt whose lease lapsed records its outcome all the same where nobody took the key."""
    attempt = begin(database)
    clock.advance(MINUTE * 2)
    complete(database, attempt)
    assert claim(database) == Outcome("done", True, 1)


def test_renew(database: Database, clock: FakeClock) -> None:
    """A renewed lease counts from the renewal."""
    attempt = begin(database)
    clock.advance(MINUTE - TICK)
    renewed = database.run(lambda unit: unit.idempotency_keys.renew(attempt, lease=MINUTE))
    assert renewed.lease_expires_at == clock.now + MINUTE
    clock.advance(MINUTE - TICK)
    with pytest.raises(IdempotencyInProgressError):
        claim(database)
    complete(database, renewed)


@pytest.mark.parametrize("swept", [False, True], ids=["before cleanup", "after cleanup"])
def test_expiry(database: Database, clock: FakeClock, swept: bool) -> None:
    """A record is replayed until its end and gone at that very instant, whether or not cleanup has run."""
    complete(database, begin(database))
    with pytest.raises(FingerprintMismatchError):
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


def test_time_passes_between_claim_and_read(target: str) -> None:
    """A claim reads the clock once: a record that expires while it looks is replayed whole, never half gone."""
    readings: list[datetime] = []

    def clock() -> datetime:
        readings.append(now)
        # Any second reading would come from after the record's end.
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


def test_cleanup_spares_what_is_not_known(database: Database, clock: FakeClock) -> None:
    """Live leases and unknown outcomes outlive their time to live; what is known is removed."""
    scopes = {name: IdempotencyScope("lamp", "m", name) for name in ("running", "unknown", "completed", "failed")}
    attempts = {name: begin(database, scope, ttl=MINUTE) for name, scope in scopes.items()}
    complete(database, attempts["completed"])
    database.run(lambda unit: unit.idempotency_keys.fail(attempts["failed"], "no"))
    clock.advance(DAY)
    database.run(lambda unit: unit.idempotency_keys.renew(attempts["running"], lease=MINUTE))
    assert database.sweep().idempotency_keys == 2
    assert {name for name, scope in scopes.items() if find(database, scope)} == {"running", "unknown"}
    with pytest.raises(IdempotencyInProgressError):
        claim(database, scopes["running"])
    with pytest.raises(OutcomeUnknownError):
        claim(database, scopes["unknown"])
    with pytest.raises(FingerprintMismatchError):
        claim(database, scopes["unknown"], fingerprint="g")
    # Its time to live is over, but it has just ended: it is replayed for as long again.
    complete(database, attempts["running"])
    clock.advance(MINUTE - TICK)
    assert claim(database, scopes["running"]) == Outcome("done", True, 1)
    clock.advance(TICK)
    begin(database, scopes["running"])


def test_failure(database: Database) -> None:
    """A stored failure is raised again, and says that it is a replay."""
    attempt = begin(database)
    assert database.run(lambda unit: unit.idempotency_keys.fail(attempt, {"code": 0}))
    with pytest.raises(EffectFailedError) as replay:
        claim(database)
    assert (replay.value.detail, replay.value.replayed) == ({"code": 0}, True)


def test_operator(database: Database, clock: FakeClock) -> None:
    """An operator lists what was abandoned, longest ago first, says how one ended, and lets another run again."""
    scopes = [IdempotencyScope("lamp", "m", str(number)) for number in range(3)]
    for scope in scopes:
        begin(database, scope)
        clock.advance(seconds=10)

    def store(work: Callable[[IdempotencyKeyStore], Any]) -> Any:
        return database.run(lambda unit: work(unit.idempotency_keys))

    assert store(lambda keys: keys.list_abandoned()) == []
    with pytest.raises(IdempotencyInProgressError):
        store(lambda keys: keys.resolve(scopes[0], 1))
    with pytest.raises(IdempotencyInProgressError):
        store(lambda keys: keys.forget(scopes[0]))
    clock.advance(MINUTE)
    assert [row.key for row in store(lambda keys: keys.list_abandoned())] == ["0", "1", "2"]
    assert [row.key for row in store(lambda keys: keys.list_abandoned(limit=2))] == ["0", "1"]
    assert store(lambda keys: keys.resolve(scopes[0], {"order": 1})) is True
    assert store(lambda keys: keys.forget(scopes[1])) is True
    assert claim(database, scopes[0]) == Outcome({"order": 1}, True, 1)
    assert begin(database, scopes[1]).number == 1
    assert [row.key for row in store(lambda keys: keys.list_abandoned())] == ["2"]


def test_operator_meets_nothing(database: Database) -> None:
    """Where nothing was abandoned, an operator changes nothing: neither an absent record nor a completed one."""
    complete(database, begin(database))
    before = dump(database)
    with database.unit_of_work() as unit:
        for scope in (SCOPE, IdempotencyScope("lamp", "m", "absent")):
            assert unit.idempotency_keys.resolve(scope, "other") is False
            assert unit.idempotency_keys.forget(scope) is False
    assert dump(database) == before


def test_resolve_with_what_cannot_be_stored(database: Database, clock: FakeClock) -> None:
    """An operator's result must be one that can be stored; the key stays abandoned where it is not."""
    begin(database)
    clock.advance(MINUTE)
    with pytest.raises(InvalidArgumentError):
        database.run(lambda unit: unit.idempotency_keys.resolve(SCOPE, "x" * 300_000))
    with pytest.raises(OutcomeUnknownError):
        claim(database)


def test_record_without_fingerprint(database: Database, clock: FakeClock) -> None:
    """A record inserted without parameters counts as completed, for calls with any parameters."""
    database.run(lambda unit: unit.idempotency_keys.insert(SCOPE, {"id": 1}, ttl=DAY))
    assert claim(database, fingerprint="anything") == Outcome({"id": 1}, True, 1)
    clock.advance(DAY)
    assert begin(database).number == 1


def test_errors_tell_no_key(database: Database) -> None:
    """No message of the state machine shows the key or a stored result; each says what it is about."""
    scope = IdempotencyScope("lamp", "m", "sesame")
    attempt = begin(database, scope, lease=timedelta(0))
    told: list[IdempotencyError] = []
    for fingerprint in ("f", "g"):
        with pytest.raises(IdempotencyError) as refusal:
            claim(database, scope, fingerprint=fingerprint)
        told.append(refusal.value)
    complete(database, attempt, "treasure")
    with pytest.raises(LeaseLostError) as lost:
        complete(database, attempt, "treasure")
    for error in (*told, lost.value):
        assert "sesame" not in str(error)
        assert "treasure" not in str(error)
        assert (error.device_id, error.method) == ("lamp", "m")


@pytest.mark.parametrize("revision", REVISIONS)
def test_earlier_schema(tmp_path: Path, revision: str) -> None:
    """A row of every released schema counts as completed after the upgrade, null included, until it ends.

    SQLite only: the databases that were kept of each release are files.
    """
    directory = tmp_path / "private"
    directory.mkdir(mode=0o700)
    path = directory / "homeagent.db"
    shutil.copyfile(ROOT / "tests" / "fixtures" / "revisions" / f"{revision}.db", path)
    path.chmod(0o600)
    clock = FakeClock(datetime(2023, 11, 14, 22, 14, tzinfo=UTC))
    with Database.open(path, clock=clock) as database:
        for key, value in (("key-1", {"opened": True, "who": "Zo\u00eb \U0001f408"}), ("key-2", None)):
            assert claim(database, IdempotencyScope("phone", "door.open", key)) == Outcome(value, True, 1)
        begin(database, IdempotencyScope("phone", "door.open", "key-old"))


# What another program stored as a state


def test_an_unknown_state_never_frees_a_key(database: Database, target: str, clock: FakeClock) -> None:
    """A row whose state is none of the three may stand for an effect that took place: it stays, and is refused."""
    begin(database, lease=timedelta(0))
    write_past_checks(target, "UPDATE idempotency_keys SET state = 'running'")
    clock.advance(days=30)
    before = dump(database)
    assert database.sweep().idempotency_keys == 0
    with database.unit_of_work() as unit:
        assert unit.idempotency_keys.delete_ended(SCOPE.device_id) == 0
    for call in (
        lambda: claim(database),
        lambda: database.run(lambda unit: unit.idempotency_keys.find(SCOPE)),
    ):
        with pytest.raises(CorruptDatabaseError):
            call()
    assert dump(database) == before


def test_an_odd_flag_says_that_the_result_was_left_out(database: Database, target: str) -> None:
    """Where `omitted` is neither 0 nor 1, the stored result is not passed off as the whole one."""
    complete(database, begin(database), "done")
    write_past_checks(target, "UPDATE idempotency_keys SET omitted = 2")
    again = claim(database)
    assert isinstance(again, Outcome)
    assert again.omitted
