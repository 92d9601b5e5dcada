"""`Database`: pairing, secrets and proofs, repeated units, and cleanup."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import anyio
import pytest
from pydantic import SecretStr

from homeagent import Attempt, Database, DevicePair, DeviceStatus, IdempotencyScope, Role, UnitOfWork, errors
from homeagent.credentials import hashing
from homeagent.scram import make_verifier
from tests.batches import creating, held
from tests.conftest import START, FakeClock, dump, pair, write_past_checks
from tests.credentials.conftest import cheap_hashes as cheap_hashes
from tests.credentials.conftest import dearer

pytestmark = pytest.mark.usefixtures("cheap_hashes")

HUMAN = SecretStr("correct horse battery staple")
MINUTE = timedelta(minutes=1)


@pytest.fixture(params=[HUMAN, None], ids=["human", "generated"])
def secret(request: pytest.FixtureRequest) -> Any:
    """The secret for pairing a device; None to have `pair` generate a secret."""
    return request.param


Act = Callable[[], object]


@pytest.fixture
def during_the_hash(monkeypatch: pytest.MonkeyPatch) -> Callable[[Act], None]:
    """Return a function that sets what happens once, after a new secret was hashed and before the hash is stored."""

    def set_act(act: Act) -> None:
        def make_verifier_late(secret: SecretStr) -> str:
            monkeypatch.undo()
            act()
            return make_verifier(secret)

        monkeypatch.setattr("homeagent.device_secrets.make_verifier", make_verifier_late)

    return set_act


@pytest.fixture
def dearer_hashes(database: Database, cheap_hashes: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pair the device "lamp" with a human's secret, and then raise the costs of hashes."""
    pair(database, "lamp", HUMAN)
    monkeypatch.setattr(hashing, "_default", dearer)


def stored_hash(database: Database) -> str:
    return database.devices.get("lamp").shared_secret_hash


def test_pair_gives_the_secret_back_once(
    database: Database, secret: SecretStr | None, caplog: pytest.LogCaptureFixture
) -> None:
    """A paired device is pending; no row, dump, repr or log has its secret, and no dump or log has its hash."""
    with caplog.at_level(logging.DEBUG):
        paired = database.pair(DevicePair(id="lamp", role=Role.NODE, shared_secret=secret, metadata={"a": 1}))
        database.devices.approve("lamp")
        assert database.verify_secret("lamp", paired.shared_secret) is not None
    plain = paired.shared_secret.get_secret_value()
    if secret is not None:
        assert plain == secret.get_secret_value()
    device = paired.device
    assert (device.id, device.role, device.approved, device.metadata_) == ("lamp", Role.NODE, False, {"a": 1})
    assert device.shared_secret_hash.startswith("sha256$" if secret is None else "$argon2id$")
    assert plain not in str(dump(database))
    for shown in (repr(paired), str(paired), paired.model_dump_json(), repr(device), caplog.text):
        assert plain not in shown
        assert device.shared_secret_hash not in shown


def test_rotated_secret_and_its_overlap(database: Database, secret: SecretStr | None, clock: FakeClock) -> None:
    """The old secret is valid until the last millisecond of the overlap, or until a revocation ends the overlap."""
    first = pair(database, "lamp", secret)
    second = database.rotate_secret("lamp", overlap=MINUTE)
    clock.now = START + MINUTE - timedelta(milliseconds=1)
    assert database.verify_secret("lamp", first) is not None
    assert database.verify_secret("lamp", second) is not None
    clock.now = START + MINUTE
    assert database.verify_secret("lamp", first) is None
    assert database.verify_secret("lamp", second) is not None
    third = database.rotate_secret("lamp", SecretStr("another long passphrase"))
    assert database.verify_secret("lamp", second) is None
    assert database.verify_secret("lamp", third) is not None
    database.rotate_secret("lamp", overlap=MINUTE)
    database.devices.revoke("lamp")
    assert database.check_secret("lamp", third).status == "denied"
    with pytest.raises(errors.DeviceNotFoundError):
        database.rotate_secret("nobody")


def test_a_device_revoked_during_its_rotation_gets_no_overlap(
    database: Database, during_the_hash: Callable[[Act], None]
) -> None:
    """If a device is revoked while the new secret is hashed, rotation raises, and the device keeps its secret."""
    secret = pair(database, "lamp")
    during_the_hash(lambda: database.devices.revoke("lamp"))
    with pytest.raises(errors.DeviceNotApprovedError):
        database.rotate_secret("lamp", overlap=MINUTE)
    database.devices.approve("lamp", expected_status=DeviceStatus.REVOKED)
    assert database.verify_secret("lamp", secret) is not None


@pytest.mark.parametrize("is_paired_again", [True, False], ids=["paired again", "rotated"])
def test_a_rotation_expects_the_device_that_was_read(
    database: Database, clock: FakeClock, during_the_hash: Callable[[Act], None], is_paired_again: bool
) -> None:
    """If the device pairs again or is rotated while the new secret is hashed, an expected value protects its secret."""
    device = database.pair(DevicePair(id="lamp", role=Role.NODE)).device
    others: list[SecretStr] = []

    def change() -> None:
        clock.advance(seconds=1)
        if is_paired_again:
            database.devices.delete("lamp")
        others.append(pair(database, "lamp", approve=False) if is_paired_again else database.rotate_secret("lamp"))

    during_the_hash(change)
    with pytest.raises(errors.ConflictError, match="paired at another time" if is_paired_again else "another secret"):
        database.rotate_secret(
            "lamp", expected_secret_hash=device.shared_secret_hash, expected_paired_at=device.paired_at
        )
    assert database.check_secret("lamp", others[0]).status == "pending"


@pytest.mark.parametrize("engine_name", ["sqlite"])
@pytest.mark.parametrize("made", [True, False], ids=["generated", "human"])
@pytest.mark.parametrize("overlap", [timedelta(0), MINUTE], ids=["at once", "overlapping"])
def test_rotating_to_the_present_secret_ends_the_overlap(database: Database, made: bool, overlap: timedelta) -> None:
    """If `rotate_secret` gets the present secret again, the overlap of the previous secret ends."""
    first = pair(database, "lamp")
    second = database.rotate_secret("lamp", None if made else SecretStr("a long passphrase"), overlap=60 * MINUTE)
    assert database.verify_secret("lamp", first) is not None
    database.rotate_secret("lamp", second, overlap=overlap)
    assert database.verify_secret("lamp", first) is None
    assert database.verify_secret("lamp", second) is not None


def test_of_two_pairings_with_the_same_secret_the_second_is_refused(
    database: Database, during_the_hash: Callable[[Act], None]
) -> None:
    """If two callers pair an id with the same secret, the second gets DeviceExistsError, in any role."""
    secret = pair(database, "other")
    # After the first check of the id, and before the device is added
    during_the_hash(lambda: pair(database, "lamp", secret))
    with pytest.raises(errors.DeviceExistsError):
        pair(database, "lamp", secret, role=Role.ADMIN)


@pytest.mark.parametrize("engine_name", ["sqlite"])
def test_a_malformed_proof_is_refused_for_every_device(database: Database) -> None:
    """If a proof is malformed, the error is a bad argument, equal for an existing and an absent device."""
    database.pair(DevicePair(id="lamp", role=Role.NODE))
    for name, values in {
        "proof": (None, "x" * 32),
        "nonce": (b"n", None, "n" * 1025),
        "timestamp": (None, "2026-01-02T03:04:05Z", START.replace(tzinfo=None)),
    }.items():
        for bad in values:
            said = set()
            for device_id in ("lamp", "nobody"):
                given: Any = {"nonce": "n", "timestamp": START, "proof": bytes(32), name: bad}
                with pytest.raises(errors.InvalidArgumentError) as caught:
                    database.verify_proof(device_id, **given)
                said.add(str(caught.value))
            assert len(said) == 1


# run


def test_run_repeats_a_unit_after_a_transient_error(database: Database) -> None:
    """If an error is transient, `run` rolls back and runs the whole unit again, and returns the last result."""
    faults = iter([errors.TransientError("again"), errors.TransientError("again")])

    def work(unit: UnitOfWork) -> str:
        assert unit.nonces.consume("lamp", "n", expires_at=START + MINUTE)
        if fault := next(faults, None):
            raise fault
        return "done"

    assert database.run(work) == "done"
    assert len(dump(database)["nonces"]) == 1


@pytest.mark.parametrize("engine_name", ["sqlite"])
@pytest.mark.parametrize("read_only", [False, True], ids=["write", "read only"])
def test_work_that_is_not_an_ordinary_function(database: Database, read_only: bool) -> None:
    """If the work is no function, or a coroutine or generator function, no unit begins, and nothing stays unawaited."""

    async def coroutine(unit: UnitOfWork) -> None:
        raise AssertionError("it was awaited")

    def generator(unit: UnitOfWork) -> Iterator[int]:
        yield 1

    async def agenerator(unit: UnitOfWork) -> AsyncIterator[int]:
        yield 1

    deferred = "a generator function"
    works: Any = [("ordinary function", coroutine), (deferred, generator), (deferred, agenerator), ("a function", None)]
    for words, work in works:
        with pytest.raises(errors.InvalidArgumentError, match=words):
            database.run(work, read_only=read_only)
        for backend in ("asyncio", "trio"):
            with pytest.raises(errors.InvalidArgumentError, match=words):
                anyio.run(partial(database.arun, work, read_only=read_only), backend=backend)
    assert database.counters().units == 0


@pytest.mark.parametrize("engine_name", ["sqlite"])
@pytest.mark.parametrize("value", ["no", 1, None])
def test_a_flag_must_be_a_bool(database: Database, tmp_path: Path, value: Any) -> None:
    """An argument for True or False refuses another value, such as the text "no"."""
    calls: dict[str, Callable[[], object]] = {
        "read_only": lambda: database.unit_of_work(read_only=value),
        "idempotent": lambda: database.run(lambda unit: None, idempotent=value),
        "dry_run": lambda: database.sweep(dry_run=value),
        "thorough": lambda: database.doctor(thorough=value),
        "fix": lambda: database.doctor(fix=value),
        "replace": lambda: database.backup(tmp_path / "backup.db", replace=value),
        "live": lambda: database.copy_to(database, live=value),
        "migrate": lambda: Database.open(":memory:", migrate=value),
    }
    for name, call in calls.items():
        with pytest.raises(errors.InvalidArgumentError, match=f"^{name} must be True or False, not"):
            call()
    with pytest.raises(errors.InvalidArgumentError, match="read_only"):
        database.run(lambda unit: None, read_only=value or 1)
    with pytest.raises(errors.InvalidArgumentError, match="idempotent"):
        anyio.run(partial(database.arun, lambda unit: None, idempotent=value))


def test_a_task_that_writes_inside_its_unit(database: Database) -> None:
    """A call that writes for an asyncio task with an open write unit is refused; another task's call waits."""

    async def effect(attempt: Attempt) -> None:
        """Do nothing."""

    async def main() -> None:
        paired = await database.apair(DevicePair(id="lamp", role=Role.CLIENT))
        with database.unit_of_work():
            other = asyncio.create_task(database.arun(creating("bob")))
            await asyncio.sleep(0.01)
            calls: list[Coroutine[Any, Any, object]] = [
                database.arun(creating("bob")),
                database.arun_once(IdempotencyScope(device_id="lamp", method="m", key="k"), effect),
                database.apair(DevicePair(id="fan", role=Role.CLIENT)),
                database.arotate_secret("lamp"),
            ]
            for call in calls:
                with pytest.raises(errors.UnitStateError, match="already has an open write unit"):
                    await call
            assert await database.arun(lambda unit: unit.devices.get("lamp"), read_only=True) == paired.device
        assert await other == "bob"
        with database.unit_of_work(read_only=True):
            await database.arotate_secret("lamp")

    asyncio.run(main())


def test_work_may_return_a_coroutine(database: Database) -> None:
    """If an ordinary function returns a coroutine, `run` returns the coroutine to the caller."""

    async def tell() -> str:
        return "told"

    async def caller() -> tuple[str, str]:
        return await database.run(lambda unit: tell()), await (await database.arun(lambda unit: tell()))

    assert anyio.run(caller) == ("told", "told")


def test_run_repeats_only_transient_errors_until_its_deadline(target: str, clock: FakeClock) -> None:
    """After `busy_timeout`, `run` raises the transient error; any other exception reaches the caller at once."""
    with Database.open(target, clock=clock, busy_timeout=timedelta(milliseconds=300)) as database:
        work = Mock(side_effect=errors.TransientError("again"))
        with pytest.raises(errors.DatabaseBusyError):
            database.run(work)
        assert work.call_count > 1
        work = Mock(side_effect=ValueError("mine"))
        with pytest.raises(ValueError, match="mine"):
            database.run(work)
        assert work.call_count == 1


def fill(database: Database, count: int) -> None:
    """Add nonces and keys that expire after a minute."""
    with database.unit_of_work() as unit:
        for number in range(count):
            unit.nonces.consume("lamp", f"n{number}", expires_at=START + MINUTE)
            unit.idempotency_keys.insert(IdempotencyScope("lamp", "on", f"k{number}"), 1, ttl=MINUTE)


def test_sweep_ends_at_its_budget(database: Database, clock: FakeClock) -> None:
    """If the budget is spent, the sweep ends after a batch and reports more rows; the next sweep deletes the rest."""
    fill(database, 25)
    clock.advance(hours=2)
    report = database.sweep(batch_size=10, time_budget=timedelta(milliseconds=1))
    assert (report.nonces, report.idempotency_keys, report.more) == (10, 0, True)
    report = database.sweep(batch_size=10)
    assert (report.nonces, report.idempotency_keys, report.more) == (15, 25, False)
    for options in ({"batch_size": 0}, {"time_budget": timedelta(0)}):
        with pytest.raises(errors.InvalidArgumentError):
            database.sweep(**options)  # type: ignore[arg-type]


def test_waits_without_a_bound(target: str, clock: FakeClock) -> None:
    """The longest `timedelta` is valid as a timeout and as a period, though no lock can wait for so long."""
    with Database.open(target, clock=clock, busy_timeout=timedelta.max) as database:
        clients = [threading.Thread(target=database.run, args=[_consume(number)]) for number in range(4)]
        with held(database):
            for client in clients:
                client.start()
        for client in clients:
            client.join(30)
        assert database.status().rows["nonces"] == 4

        def effect(attempt: Attempt) -> bool:
            return _stays("homeagent-lease")

        scope = IdempotencyScope("lamp", "m", "k")
        assert database.run_once(scope, effect, lease=timedelta(days=365 * 7000)).value is True
        with database.sweeper(timedelta.max, check_every=timedelta.max):
            assert _stays("homeagent-sweeper")


def _stays(name: str) -> bool:
    """Return whether the thread of this name exists, and still exists after it had time to begin to wait."""
    (thread,) = (thread for thread in threading.enumerate() if thread.name == name)
    thread.join(0.5)
    return thread.is_alive()


def _consume(number: int) -> Callable[[UnitOfWork], bool]:
    return lambda unit: unit.nonces.consume("lamp", str(number), expires_at=START + MINUTE)


def test_clock_at_the_beginning_of_time(target: str) -> None:
    """If the clock stands in the year 1, a sweep and the doctor find no expired row and do not fail."""
    with Database.open(target, clock=lambda: datetime.min.replace(tzinfo=UTC)) as database:
        assert database.sweep().nonces == 0
        (backlog,) = (found for found in database.doctor().findings if found.check == "expired_backlog")
        assert backlog.facts == {"nonces": 0, "keys": 0}


def test_a_naive_clock_is_refused(sqlite_path: Path, tmp_path: Path) -> None:
    """If the clock returns a naive datetime, the check of a chosen secret and a backup refuse the time."""
    with Database.open(sqlite_path, clock=lambda: START.replace(tzinfo=None)) as database:
        for act in (lambda: database.check_secret("lamp", "a chosen secret"), lambda: database.backup(tmp_path)):
            with pytest.raises(errors.InvalidArgumentError, match="aware"):
                act()


@pytest.mark.parametrize("engine_name", ["sqlite"])
def test_sweeper_survives_errors_and_stops_at_once(
    database: Database, clock: FakeClock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """If a sweep fails, the sweeper logs the error and the next sweep works; stopping takes less than a second."""
    fill(database, 3)
    clock.advance(hours=2)
    times = chain([RuntimeError("clock broke"), errors.TransientError("locked")], repeat(clock.now))
    monkeypatch.setattr(database._settings, "clock", Mock(side_effect=times))
    with caplog.at_level(logging.DEBUG, logger="homeagent"):
        sweeper = database.sweeper(timedelta(milliseconds=1))
        with sweeper:
            assert sweeper.running
            with pytest.raises(errors.UnitStateError):
                sweeper.start()
            while "locked" not in caplog.text or database.status().rows["idempotency_keys"]:
                time.sleep(0.001)
            before = time.monotonic()
        assert time.monotonic() - before < 1
    assert not sweeper.running
    assert "clock broke" in caplog.text
    assert "locked" in caplog.text
    sweeper.stop()


@pytest.mark.parametrize("engine_name", ["sqlite"])
def test_closing_stops_the_sweepers(database: Database) -> None:
    """If the database closes, a waiting sweeper ends, and a closed database starts no sweeper."""
    sweeper = database.sweeper(timedelta(hours=1))
    sweeper.start()
    database.close()
    assert not sweeper.running
    with pytest.raises(errors.DatabaseClosedError):
        database.sweeper()


def test_status_counts_rows_and_expired_rows(database: Database, clock: FakeClock) -> None:
    """`status` counts rows and expired rows separately, and never shows a password of the target."""
    fill(database, 2)
    clock.advance(MINUTE)
    status = database.status()
    assert status.rows == {"agents": 0, "devices": 0, "idempotency_keys": 2, "nonces": 2, "sessions": 0}
    assert status.expired == {"nonces": 2, "idempotency_keys": 2}
    assert status.driver in ("apsw", "psycopg")
    assert status.driver_version


@pytest.mark.usefixtures("dearer_hashes")
def test_a_hash_under_old_costs_is_replaced_when_it_verifies(database: Database) -> None:
    """If the costs were raised, verifying the right secret replaces its hash once; a wrong secret does not."""
    old = stored_hash(database)
    assert database.verify_secret("lamp", "not the secret") is None
    assert stored_hash(database) == old
    for _ in range(2):
        assert database.verify_secret("lamp", HUMAN) is not None
        old, previous = stored_hash(database), old
    assert old == previous
    assert "m=16,t=2" in old


@pytest.mark.parametrize("engine_name", ["sqlite"])
@pytest.mark.usefixtures("dearer_hashes")
def test_a_hash_that_cannot_be_replaced_still_verifies(
    database: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """If the new hash can't be stored because the database is busy, `verify_secret` still accepts the right secret."""
    run = database._runner.run

    def busy(work: Any, **options: Any) -> Any:
        if options.get("read_only"):
            return run(work, **options)
        raise errors.DatabaseBusyError("could not get the write lock")

    monkeypatch.setattr(database._runner, "run", busy)
    assert database.verify_secret("lamp", HUMAN) is not None
    assert "could not be replaced by a hash with newer parameters" in caplog.text


@pytest.mark.parametrize("engine_name", ["sqlite"])
@pytest.mark.usefixtures("dearer_hashes")
def test_a_hash_is_not_replaced_during_a_unit_of_the_same_thread(database: Database) -> None:
    """If the calling thread is in a write unit, the right secret is accepted, and a later call replaces the hash."""
    old = stored_hash(database)
    with database.unit_of_work():
        assert database.verify_secret("lamp", HUMAN) is not None
    assert stored_hash(database) == old
    assert database.verify_secret("lamp", HUMAN) is not None
    assert stored_hash(database) != old


def test_a_secret_is_never_hashed_inside_a_unit(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a slow hash is computed for pairing, verifying or rotating, the write lock is free."""
    during: list[bool] = []
    run = hashing.SecretHasher._run

    def watched(*arguments: Any) -> Any:
        during.append(bool(database._engine.writers._held or database._engine.readers._held))
        return run(*arguments)

    monkeypatch.setattr(hashing.SecretHasher, "_run", watched)
    pair(database, "lamp", HUMAN)
    assert database.verify_secret("lamp", HUMAN) is not None
    assert database.verify_secret("nobody", HUMAN) is None
    database.rotate_secret("lamp", SecretStr("another secret of a human"), overlap=MINUTE)
    assert len(during) >= 4
    assert not any(during)


def test_ping(database: Database, target: str) -> None:
    """`ping` returns nothing while the database answers, and raises a DatabaseError if it does not."""
    database.ping()
    write_past_checks(target, "DELETE FROM store")
    with pytest.raises(errors.CorruptDatabaseError, match="has lost its row"):
        database.ping()
    database.close()
    with pytest.raises(errors.DatabaseClosedError):
        database.ping()
