"""The hashes of secrets, the cost of a check, and what a check does not show."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

import argon2
import pytest
from argon2.low_level import hash_secret as run_argon2
from argon2.profiles import RFC_9106_LOW_MEMORY
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from homeagent.credentials import SecretHasher, SecretMatch, check_secret, generate_secret, hash_secret
from tests.credentials.conftest import HUMAN, OTHER, Runs, cheap, dearer, generated, usable


@pytest.mark.parametrize(
    "stored",
    [
        # From the test program of the reference implementation.
        "$argon2id$v=19$m=256,t=2,p=1$c29tZXNhbHQ$nf65EOgLrQMR/uIPnA4rEsF5h7TKyQwu9U1bMCHGi/4",
        "$argon2id$v=19$m=256,t=2,p=2$c29tZXNhbHQ$bQk8UB/VmZZF4Oo79iDXuL5/0ttZwg2f/5U52iv1cDc",
    ],
)
def test_hashes_of_the_reference_implementation_verify(stored: str) -> None:
    """Hashes of the reference implementation are accepted, and have other costs than new hashes."""
    assert not cheap.check("Password", [stored])
    assert cheap.check("password", [stored]) == SecretMatch(0, is_outdated=True)


@given(usable, usable)
def test_only_the_same_secret_matches(secret: str, other: str) -> None:
    """A hash matches its own secret, and another secret only if the two are equal."""
    stored = [cheap.hash(SecretStr(secret))]
    assert cheap.check(secret, stored) == SecretMatch(0)
    assert bool(cheap.check(SecretStr(other), stored)) == (secret == other)


def test_public_functions_hash_and_check() -> None:
    """`hash_secret` and `check_secret` work together for both kinds of secret, with a recommended option of RFC 9106.

    The costs do not depend on the defaults of a library. argon2-cffi can verify the stored text.
    """
    for secret in (HUMAN, generated()):
        stored = hash_secret(SecretStr(secret))
        assert len(stored) <= 256
        assert check_secret(secret, [stored]) == SecretMatch(0)
        assert not check_secret(generate_secret(), [stored])
        if secret == HUMAN:
            assert argon2.extract_parameters(stored) == RFC_9106_LOW_MEMORY
            assert argon2.PasswordHasher().verify(stored, HUMAN)
            assert not check_secret(SecretStr(OTHER), [stored])


# Costs of a check


_SHA, _HUMANS = cheap.hash(generated()), cheap.hash(OTHER)
STORED = {
    "unknown device": [],
    "human's secret": [_HUMANS],
    "generated secret": [_SHA],
    "unknown kind": ["$2b$12$" + "x" * 53],
    "damaged": [_HUMANS[:-1] + "\ud800"],
    "empty": [""],
    "human's, generated before": [_HUMANS, _SHA],
    "generated, human's before": [_SHA, _HUMANS],
    "generated twice": [_SHA, cheap.hash(generated())],
    "human's twice": [cheap.hash(HUMAN + "!", beside=_HUMANS), _HUMANS],
    "human's, damaged before": [_HUMANS, "$argon2id$v=19$m=8,t=1,p=1$"],
}


@pytest.mark.parametrize("kind", STORED)
def test_wrong_secret_costs_the_same_for_every_device(kind: str, runs: Runs) -> None:
    """The form of the presented secret decides on a slow hash, not the stored hashes."""
    assert not cheap.check(HUMAN, STORED[kind])
    assert runs.count == 1
    assert not cheap.check(generate_secret(), STORED[kind])
    assert runs.count == 1


@pytest.mark.parametrize("kind", [kind for kind in STORED if "human's" in kind])
def test_right_secret_costs_one_run(kind: str, runs: Runs) -> None:
    """A right secret takes the same time as a wrong secret."""
    assert cheap.check(OTHER, STORED[kind])
    assert runs.count == 1


def test_run_without_a_device_has_the_same_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """For an unknown device, Argon2 runs with the same costs, type, and lengths of salt and digest."""
    seen: list[list[Any]] = []

    def record(secret: bytes, salt: bytes, *costs: Any) -> bytes:
        seen.append([len(secret), len(salt), *costs])
        return run_argon2(secret, salt, *costs)

    stored = [dearer.hash(OTHER)]
    monkeypatch.setattr("argon2.low_level.hash_secret", record)
    assert not dearer.check(HUMAN, stored)
    assert not dearer.check(HUMAN, [])
    assert seen[0] == seen[1]


def test_both_kinds_compare_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Digests are compared by hmac.compare_digest, and a generated secret is always compared twice."""
    compared: list[int] = []

    def record(left: bytes, right: bytes) -> bool:
        compared.append(len(left))
        return left == right

    human, secret = cheap.hash(HUMAN), generated()
    monkeypatch.setattr("hmac.compare_digest", record)
    assert cheap.check(HUMAN, [human])
    assert compared == [len(human)]
    for stored in ([], [cheap.hash(secret)], [cheap.hash(generated()), cheap.hash(secret)], [human]):
        compared.clear()
        cheap.check(secret, stored)
        assert compared == [71, 71]


def test_hash_of_the_other_kind_never_matches() -> None:
    """A generated secret never matches an Argon2 hash, and a human secret never matches a SHA-256 hash."""
    secret = generated()
    assert not cheap.check(secret, [argon2.PasswordHasher(1, 8, 1).hash(secret)])
    assert not cheap.check(HUMAN, ["sha256$" + hashlib.sha256(HUMAN.encode()).hexdigest()])


def _damage(stored: str) -> Iterator[str]:
    _, kind, version, costs, salt, digest = stored.split("$")
    for parts in (
        (kind, version, costs, salt),
        (kind, version, costs, salt, digest[:-1]),
        (kind, version, costs, salt, digest, ""),
        (kind, version, costs, salt, digest + "\n"),
        (kind, version, costs, salt, digest + "="),
        # 43 characters are 258 bits: a digest that differs only in the last two bits stands for the same 256 bits.
        (kind, version, costs, salt, digest[:-1] + chr(ord(digest[-1]) + 1)),
        (kind, version, costs, "c2FsdA", digest),
        (kind, version, costs, salt + "AAA", digest),
        (kind, version, costs, salt, "AAAA"),
        ("argon2i", version, costs, salt, digest),
        ("argon2d", version, costs, salt, digest),
        (kind, "v=16", costs, salt, digest),
        (kind, costs, salt, digest),
    ):
        yield "$".join(("", *parts))
    # The last four are well-formed, but with higher costs than any hasher allows.
    for wrong in (
        "m=8,t=1,p=0", "m=8,t=0,p=1", "m=7,t=1,p=1", "m=8,t=1,p=2", "m=08,t=1,p=1", "t=1,m=8,p=1", "m=8,t=1",
        "m=2097153,t=1,p=1", "m=8,t=65,p=1", "m=4096,t=1,p=65", "m=9999999999,t=9999999999,p=1",
    ):  # fmt: skip
        yield "$".join(["", kind, version, wrong, salt, digest])


def test_damaged_hash_never_matches(runs: Runs) -> None:
    """If a hash is damaged, the check returns no match, raises no error and ignores the costs in the damaged text."""
    stored = cheap.hash(HUMAN)
    for damaged in _damage(stored):
        assert damaged != stored
        runs.count = 0
        assert not cheap.check(HUMAN, [damaged]), damaged
        assert runs.count == 1


@given(st.lists(st.text(max_size=120) | st.just("$argon2id$v=19$m=8,t=1,p=1$") | st.just("sha256$"), max_size=2))
def test_no_stored_text_raises(stored: list[str]) -> None:
    """For any two stored texts, surrogates included, a check returns no match and raises no error."""
    assert not cheap.check(HUMAN, stored)
    assert not cheap.check(generate_secret(), [*stored[:1], "sha256$\ud800"])


@pytest.mark.parametrize("old", [HUMAN, generated()], ids=["human's", "generated"])
@pytest.mark.parametrize("new", [OTHER, generated()], ids=["human's", "generated"])
def test_either_secret_matches_during_an_overlap(old: str, new: str) -> None:
    """The result has the index of the first matching hash, for every pair of kinds."""
    previous = cheap.hash(old)
    stored = [cheap.hash(new, beside=previous), previous]
    assert cheap.check(new, stored) == SecretMatch(0)
    assert cheap.check(old, stored) == SecretMatch(1)
    assert cheap.check(old, [cheap.hash(old, beside=previous), previous]) == SecretMatch(0)
    assert not cheap.check("neither", stored)
    assert not cheap.check(generate_secret(), stored)


@pytest.mark.parametrize("beside", ["", "sha256$" + "0" * 64, "$argon2id$v=19$m=8,t=1,p=1$", "nonsense"])
def test_only_a_valid_argon2_hash_shares_its_salt(beside: str) -> None:
    """If the other hash is not a valid Argon2 hash, the new hash gets a new salt."""
    first, second = cheap.hash(HUMAN, beside=beside), cheap.hash(HUMAN, beside=beside)
    assert first != second
    assert cheap.check(HUMAN, [first, beside]) == SecretMatch(0)


def test_older_costs_are_not_reused() -> None:
    """If the other hash has other costs, the new secret is hashed with the hasher's costs, and both secrets match."""
    previous = cheap.hash(HUMAN)
    present = dearer.hash(OTHER, beside=previous)
    assert "m=16,t=2,p=1" in present
    assert present.split("$")[4] != previous.split("$")[4]
    assert dearer.check(OTHER, [present, previous]) == SecretMatch(0)
    assert dearer.check(HUMAN, [present, previous]) == SecretMatch(1, is_outdated=True)


def test_hashes_with_two_salts_cost_two_runs(runs: Runs) -> None:
    """If two hashes have different salts, the check takes two runs, as documented, and both secrets match."""
    stored = [cheap.hash(OTHER), cheap.hash(HUMAN)]
    runs.count = 0
    assert cheap.check(HUMAN, stored) == SecretMatch(1)
    assert runs.count == 2


@pytest.mark.parametrize(
    ("salt_bytes", "digest_bytes"), [(8, 32), (16, 16), (32, 32), (16, 64)], ids=lambda count: f"{count}"
)
def test_other_lengths_are_outdated_too(salt_bytes: int, digest_bytes: int) -> None:
    """A hash with a shorter or longer salt or digest is accepted, and should be replaced."""
    foreign = argon2.PasswordHasher(1, 8, 1, hash_len=digest_bytes, salt_len=salt_bytes).hash(HUMAN)
    assert cheap.check(HUMAN, [foreign]) == SecretMatch(0, is_outdated=True)


@pytest.mark.skipif(sys.platform != "linux", reason="the limit on address space is Linux's")
def test_lack_of_memory_raises_memory_error() -> None:
    """If the system has too little memory, MemoryError names the remedy; the secret is not reported as wrong."""
    program = """
        import resource
        from homeagent.credentials import SecretHasher
        hasher = SecretHasher(time_cost=1, memory_cost=1024 * 1024, parallelism=1)
        import argon2, pydantic
        resource.setrlimit(resource.RLIMIT_AS, (512 * 1024 * 1024, resource.RLIM_INFINITY))
        try:
            hasher.check("swordfish", [])
        except MemoryError as error:
            assert "swordfish" not in str(error)
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, timeout=60, check=True)
    assert "1,048,576 KiB" in done.stdout.decode()
    assert "lower memory_cost" in done.stdout.decode()


def test_default_concurrency_follows_the_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    """The default concurrency is the number of processors, at most 4, and 1 if the number is unknown."""
    for processors, expected in ((1, 1), (3, 3), (64, 4), (None, 1)):
        monkeypatch.setattr("os.cpu_count", lambda count=processors: count)
        assert SecretHasher().concurrency == expected
