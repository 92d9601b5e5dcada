"""Secret checks: their result, their cost, and that a flood of guesses delays no other device."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from typing import Any
from unittest.mock import Mock

import anyio
import pytest
from pydantic import SecretStr, ValidationError
from sqlalchemy import event

from homeagent import Database, DeviceCreate, DevicePair, Role, SecretCheck, hash_secret, retry
from homeagent.credentials import FAILED_CHECKS_PER_MINUTE, WAITING_HASHES, generate_secret, hashing
from homeagent.errors import InvalidArgumentError, TooManyAttemptsError
from homeagent.scram import make_proof, proof_message
from tests.conftest import START, FakeClock, MakeDatabase, dump, pair
from tests.credentials.conftest import Runs, cheap, dearer
from tests.credentials.conftest import runs as runs

HUMAN = SecretStr("correct horse battery staple")
MINUTE = timedelta(minutes=1)


@pytest.fixture(autouse=True)
def cheap_hashes(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Argon2 with the lowest possible costs; a call sets the number of concurrent hashes."""

    def set_concurrency(concurrency: int) -> None:
        hasher = hashing.SecretHasher(time_cost=1, memory_cost=8, parallelism=1, concurrency=concurrency)
        monkeypatch.setattr(hashing, "_default", hasher)

    set_concurrency(2)
    return set_concurrency


def fail(database: Database, device_id: str, times: int) -> None:
    """Present wrong secrets of the kind that people choose."""
    for number in range(times):
        assert database.verify_secret(device_id, f"guess {number}") is None


@pytest.mark.parametrize("secret", [HUMAN, None], ids=["human", "generated"])
def test_only_the_right_secret_gets_status_and_device(database: Database, secret: SecretStr | None) -> None:
    """Only the right secret gets the status and the device, and a check is true only for an approved device."""
    right = database.pair(DevicePair(id="lamp", role=Role.NODE, shared_secret=secret)).shared_secret
    changes: list[tuple[str, Callable[[Any], object]]] = [
        ("pending", lambda unit: None),
        ("approved", lambda unit: unit.devices.approve("lamp")),
        ("revoked", lambda unit: unit.devices.revoke("lamp")),
    ]
    for status, change in changes:
        database.run(change)
        check = database.check_secret("lamp", right)
        assert check.status == status
        assert check.device is not None
        assert check.device.id == "lamp"
        assert bool(check) == (status == "approved")
        assert (database.verify_secret("lamp", right) is not None) == (status == "approved")
        for wrong in ("wrong", generate_secret(), "", check.device.shared_secret_hash, None):
            denied = database.check_secret("nobody" if wrong is None else "lamp", right if wrong is None else wrong)
            assert denied == SecretCheck("denied", None)
            assert not denied


def test_a_right_proof_tells_pending_and_revoked(database: Database) -> None:
    """If the proof is right, the result has status and device; if the proof is wrong, it is denied."""
    secret = database.pair(DevicePair(id="lamp", role=Role.NODE)).shared_secret
    message = proof_message(device_id="lamp", nonce="n", timestamp=START)
    proof = make_proof(secret, database.proof_parameters("lamp"), message)
    for status, change in (("pending", None), ("approved", "approve"), ("revoked", "revoke")):
        if change is not None:
            getattr(database.devices, change)("lamp")
        check = database.check_proof("lamp", nonce="n", timestamp=START, proof=proof)
        assert (check.status, check.device and check.device.id, bool(check)) == (status, "lamp", status == "approved")
        later = partial(database.acheck_proof, "lamp", nonce="n", timestamp=START, proof=proof)
        assert anyio.run(later) == check
        verified = database.verify_proof("lamp", nonce="n", timestamp=START, proof=proof)
        assert (verified is not None) == (status == "approved")
        forged = bytes([proof[0] ^ 1]) + proof[1:]
        for wrong in ({"proof": forged}, {"nonce": "m"}, {"timestamp": START + MINUTE}, {"device_id": "nobody"}):
            given: Any = {"device_id": "lamp", "nonce": "n", "timestamp": START, "proof": proof, **wrong}
            assert database.check_proof(**given) == SecretCheck("denied", None)


def test_proof_parameters_do_not_tell_which_devices_exist(
    database: Database, reopen: MakeDatabase, statements: list[str]
) -> None:
    """If a device is absent, its parameters look like real ones, are equal in each process and cost one statement."""
    pair(database, "human", HUMAN)
    pair(database, "generated", metadata="x" * 10_000)
    asked = "human", "generated", "absent", "b" * 128
    assert "metadata" not in only_select(statements, database.proof_parameters, *asked)
    found = {device_id: database.proof_parameters(device_id) for device_id in asked}
    assert {(len(one.salt), one.iterations) for one in found.values()} == {(16, 4096)}
    assert len({one.salt for one in found.values()}) == len(asked)
    database.close()
    again = reopen()
    assert {device_id: again.proof_parameters(device_id) for device_id in asked} == found
    with Database.open(":memory:") as other:
        assert other.proof_parameters("absent") != found["absent"]
    assert again.proof_parameters("nul\0").iterations == 4096


@pytest.fixture
def statements(database: Database) -> list[str]:
    seen: list[str] = []

    def before(connection: Any, cursor: Any, statement: str, *rest: Any) -> None:
        seen.append(statement)

    # Connections that are opened from now on call the listener.
    event.listen(database._engine.sa_engine, "before_cursor_execute", before)
    return seen


def only_select(statements: list[str], check: Callable[[str], object], *device_ids: str) -> str:
    """Return the only statement of a check, which must be the same for all devices."""
    costs = set()
    for device_id in device_ids:
        statements.clear()
        check(device_id)
        costs.add(tuple(statements))
    (cost,) = costs
    (select,) = [statement for statement in cost if "devices" in statement]
    return select


def test_a_wrong_secret_costs_the_same_for_every_device_and_for_none(
    database: Database, statements: list[str], runs: Runs
) -> None:
    """If the secret is wrong, each check costs a single statement, and only the secret decides on a slow hash."""
    pair(database, "human", HUMAN)
    pair(database, "generated", metadata="x" * 10_000)
    pair(database, "rotated", HUMAN)
    database.rotate_secret("rotated", overlap=MINUTE)
    database.pair(DevicePair(id="pending", role=Role.NODE))
    pair(database, "revoked", HUMAN)
    database.run(lambda unit: unit.devices.revoke("revoked"))
    for wrong, hashes in ("not the secret", 1), (generate_secret(), 0), ("", 0):

        def check(device_id: str, wrong: Any = wrong, hashes: int = hashes) -> None:
            assert runs.of(lambda: database.check_secret(device_id, wrong)) == hashes

        select = only_select(statements, check, "human", "generated", "rotated", "pending", "revoked", "absent")
        assert "metadata" not in select
        assert "proof_verifier" not in select


def test_a_wrong_proof_costs_the_same_for_every_device_and_for_none(database: Database, statements: list[str]) -> None:
    """If the proof is wrong, the check costs a single statement, which reads only the verifier."""
    pair(database, "human", HUMAN)
    pair(database, "generated", metadata="x" * 10_000)

    def check(device_id: str) -> None:
        assert database.verify_proof(device_id, nonce="n", timestamp=START, proof=bytes(32)) is None

    select = only_select(statements, check, "human", "generated", "absent")
    assert "metadata" not in select
    assert "secret_hash" not in select


@pytest.mark.parametrize("engine_name", ["sqlite"])
@pytest.mark.parametrize("there", [True, False], ids=["known", "unknown"])
def test_wrong_secrets_of_an_id_are_limited_per_minute(
    database: Database, clock: FakeClock, runs: Runs, there: bool
) -> None:
    """After 30 wrong secrets in a minute an id is refused without a hash, also with the right secret."""
    if there:
        pair(database, "lamp", HUMAN)
    fail(database, "lamp", FAILED_CHECKS_PER_MINUTE)
    for secret in "another guess", HUMAN:
        with pytest.raises(TooManyAttemptsError, match="generated secret") as refused:
            runs.of(lambda: database.check_secret("lamp", secret))  # noqa: B023  called at once
        assert refused.value.device_id == "lamp"
        assert timedelta(seconds=1) < refused.value.retry_after <= MINUTE
        assert secret not in (str(refused.value), repr(refused.value.__dict__))
    assert runs.count == FAILED_CHECKS_PER_MINUTE + there
    assert not database.check_secret("lamp", generate_secret())
    fail(database, "other", 1)
    clock.advance(refused.value.retry_after)
    assert bool(database.check_secret("lamp", HUMAN)) == there


@pytest.mark.parametrize("engine_name", ["sqlite"])
def test_a_generated_secret_is_never_refused(database: Database, runs: Runs) -> None:
    """A generated secret is never refused, whatever wrong secrets were tried for the device."""
    secret = pair(database, "lamp")
    for _ in range(3 * FAILED_CHECKS_PER_MINUTE):
        assert not database.check_secret("lamp", generate_secret())
    fail(database, "lamp", FAILED_CHECKS_PER_MINUTE)
    before = runs.count
    assert database.check_secret("lamp", secret)
    assert runs.count == before


@pytest.mark.parametrize("engine_name", ["sqlite"])
def test_threads_do_not_exceed_the_bound_together(
    database: Database, runs: Runs, cheap_hashes: Callable[[int], None]
) -> None:
    """If threads make 60 guesses at an id at once, exactly 30 are checked."""
    cheap_hashes(60)
    together = threading.Barrier(60)

    def guess(number: int) -> bool:
        together.wait()
        try:
            return bool(database.check_secret("lamp", f"guess {number}"))
        except TooManyAttemptsError:
            return True

    with ThreadPoolExecutor(max_workers=60) as pool:
        refused = sum(pool.map(guess, range(60)))
    assert (refused, runs.count) == (60 - FAILED_CHECKS_PER_MINUTE, FAILED_CHECKS_PER_MINUTE)


def test_a_flood_of_guesses_delays_no_generated_secret(database: Database, runs: Runs) -> None:
    """If every slow hash hangs, 2 run, 16 wait, all others are refused, and a generated secret is still checked."""
    secret, human = pair(database, "lamp"), pair(database, "door", HUMAN)
    before = runs.count
    runs.go_on.clear()
    refused: list[timedelta] = []
    all_refused = threading.Event()
    callers = 60

    def guess(number: int) -> bool:
        try:
            return database.check_secret(f"nobody {number}", f"guess {number}").status == "denied"
        except TooManyAttemptsError as error:
            refused.append(error.retry_after)
            if len(refused) == callers - 2 - WAITING_HASHES:
                all_refused.set()
            return False

    with ThreadPoolExecutor(max_workers=callers) as pool:
        guesses = [pool.submit(guess, number) for number in range(callers)]
        try:
            assert all_refused.wait(60)
            assert runs.count - before == 2
            assert database.verify_secret("lamp", secret) is not None
            assert not database.check_secret("door", secret)
            slow: list[Callable[[], object]] = [
                lambda: database.check_secret("door", human),
                lambda: database.pair(DevicePair(id="new", role=Role.NODE, shared_secret=HUMAN)),
                lambda: database.rotate_secret("lamp", HUMAN),
            ]
            for one in slow:
                with pytest.raises(TooManyAttemptsError, match="16 slow hashes of secrets wait") as full:
                    one()
                assert full.value.device_id is None
                assert full.value.retry_after > timedelta(0)
            assert database.rotate_secret("lamp")
        finally:
            runs.go_on.set()
        assert sum(future.result(60) for future in guesses) == 2 + WAITING_HASHES
    assert database.check_secret("door", human)


@pytest.mark.anyio
@pytest.mark.parametrize("engine_name", ["sqlite"])
@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
async def test_coroutines_that_hash_take_no_thread_from_the_others(
    database: Database, runs: Runs, monkeypatch: pytest.MonkeyPatch, cheap_hashes: Callable[[int], None]
) -> None:
    """While more slow checks wait than threads exist, units and checks of generated secrets continue."""
    cheap_hashes(1)
    monkeypatch.setattr(retry, "_WORKERS", 2)
    found: list[SecretCheck] = []

    async def check(device_id: str, secret: SecretStr) -> None:
        found.append(await database.acheck_secret(device_id, secret))

    with anyio.fail_after(60):
        paired = await database.apair(DevicePair(id="lamp", role=Role.NODE))
        await database.apair(DevicePair(id="door", role=Role.NODE, shared_secret=HUMAN))
        runs.go_on.clear()
        async with anyio.create_task_group() as tasks:
            try:
                for _ in range(5):
                    tasks.start_soon(check, "door", HUMAN)
                await anyio.sleep(0.05)
                assert await database.arun(lambda unit: unit.devices.approve("lamp"))
                assert await database.arun(lambda unit: len(unit.devices.list()), read_only=True) == 2
                assert await database.acheck_secret("lamp", paired.shared_secret)
                assert found == []
            finally:
                runs.go_on.set()
        assert [one.status for one in found] == ["pending"] * 5
        new = await database.arotate_secret("lamp", overlap=MINUTE)
        assert await database.acheck_secret("lamp", new)
        assert await database.acheck_secret("lamp", paired.shared_secret)


@pytest.mark.parametrize("engine_name", ["sqlite"])
def test_a_new_secret_has_eight_characters(database: Database) -> None:
    """If a new secret is shorter than 8 characters, pairing and rotation refuse it without showing or storing it."""
    short, long_enough = SecretStr("sev3n7!"), SecretStr("e1ght!88")
    pair(database, "lamp", long_enough)
    before = dump(database)
    with pytest.raises(ValidationError, match="at least 8 characters, and this has 7: choose a longer one") as refused:
        database.pair(DevicePair(id="new", role=Role.NODE, shared_secret=short))
    assert "sev3n7!" not in str(refused.value) + refused.value.json()
    with pytest.raises(InvalidArgumentError, match="at least 8 characters, and this has 7: choose a longer one"):
        database.rotate_secret("lamp", short)
    wrong: Any = "a plain text of the right length"
    with pytest.raises(InvalidArgumentError, match="must be a SecretStr, not str"):
        database.rotate_secret("lamp", wrong)
    with pytest.raises(InvalidArgumentError, match="expected_paired_at must be aware"):
        database.rotate_secret("lamp", expected_paired_at=START.replace(tzinfo=None))
    assert dump(database) == before
    assert database.rotate_secret("lamp", expected_paired_at=START + timedelta(microseconds=999))


def test_a_shorter_secret_that_is_stored_already_serves(database: Database) -> None:
    """If a stored secret has three characters from an older version, the device still passes the check."""
    device = DeviceCreate(id="lamp", role=Role.NODE, shared_secret_hash=hash_secret("abc"))
    database.run(lambda unit: unit.devices.create(device) and unit.devices.approve("lamp"))
    assert database.verify_secret("lamp", "abc") is not None
    assert not database.check_secret("lamp", "abd")


def test_a_full_queue_keeps_an_outdated_hash(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """If no place is free to hash a right secret again, the check accepts the secret, and the next check replaces."""
    pair(database, "lamp", HUMAN)
    monkeypatch.setattr(hashing, "_default", dearer)
    with monkeypatch.context() as patch:
        full = Mock(side_effect=TooManyAttemptsError("16 hashes wait", retry_after=MINUTE))
        patch.setattr("homeagent.device_secrets.hash_secret", full)
        assert database.check_secret("lamp", HUMAN)
    for expected in (False, True):
        assert ("m=16,t=2" in database.devices.get("lamp").shared_secret_hash) == expected
        assert database.check_secret("lamp", HUMAN)


def test_only_the_present_secret_of_an_approved_device_gets_a_new_hash(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A check of an older secret, or of a pending or revoked device, does not replace an outdated hash."""
    database.pair(DevicePair(id="phone", role=Role.NODE, shared_secret=HUMAN))
    for device_id in ("lamp", "lock"):
        pair(database, device_id, HUMAN)
    database.rotate_secret("lamp", SecretStr("another secret"), overlap=MINUTE)
    database.devices.revoke("lock")
    monkeypatch.setattr(hashing, "_default", dearer)
    before = dump(database)
    statuses = [database.check_secret(device_id, HUMAN).status for device_id in ("phone", "lamp", "lock")]
    assert statuses == ["pending", "approved", "revoked"]
    assert dump(database) == before


def test_a_replaced_hash_shares_the_salt_of_an_overlap(
    database: Database, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """During an overlap, the new hash has the salt of the previous secret's hash, so that one run checks both."""
    monkeypatch.setattr(hashing, "_default", dearer)
    pair(database, "lamp", HUMAN)
    monkeypatch.setattr(hashing, "_default", cheap)
    new = database.rotate_secret("lamp", SecretStr("another secret"), overlap=MINUTE)
    monkeypatch.setattr(hashing, "_default", dearer)
    assert runs.of(lambda: database.check_secret("lamp", "a guess")) == 2
    assert database.check_secret("lamp", new)
    assert runs.of(lambda: database.check_secret("lamp", "a guess")) == 1
    assert all(database.verify_secret("lamp", secret) for secret in (HUMAN, new))
