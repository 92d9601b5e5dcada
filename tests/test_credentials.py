"""Secrets: their form, their hashes, what a check costs, and that nothing of them shows."""

from __future__ import annotations

import base64
import copy
import hashlib
import os
import re
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import FrozenInstanceError
from datetime import timedelta
from typing import Any

import argon2
import pytest
from argon2.low_level import hash_secret_raw
from argon2.profiles import RFC_9106_LOW_MEMORY
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from homeagent.credentials import (
    MAX_SECRET_BYTES,
    MAX_SECRET_CHARACTERS,
    SecretCheck,
    SecretHasher,
    check_secret,
    generate_secret,
    hash_secret,
    is_generated,
    secret_text,
)
from homeagent.errors import DatabaseBusyError, InvalidArgumentError

HUMAN = "correct horse battery staple"
OTHER = "Tr0ub4dor&3"

cheap = SecretHasher(time_cost=1, memory_cost=8, parallelism=1)
dearer = SecretHasher(time_cost=2, memory_cost=16, parallelism=1)

usable = st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=MAX_SECRET_BYTES // 4)
UNUSABLE = {
    "empty": "",
    "too many characters": "x" * (MAX_SECRET_CHARACTERS + 1),
    "too many bytes": "\N{EURO SIGN}" * (MAX_SECRET_BYTES // 3 + 1),
    "NUL": "swordfish\0",
    "newline": "swordfish\n",
    "C1 control": "swordfish\x85",
    "lone surrogate": "swordfish\ud800",
    "enormous": "swordfish" * 1_000_000,
}
unusable = pytest.mark.parametrize("secret", UNUSABLE.values(), ids=UNUSABLE.keys())


def generated() -> str:
    """Make a secret of the generated kind."""
    return generate_secret().get_secret_value()


class Runs:
    """Stands before Argon2: counts its runs, and can hold them until it is told to let them go."""

    def __init__(self) -> None:
        self.count = 0
        self.inside = threading.Semaphore(0)
        self.go_on = threading.Event()
        self.go_on.set()

    def __call__(self, *args: Any, **kwargs: Any) -> bytes:
        self.count += 1
        self.inside.release()
        assert self.go_on.wait(60)
        return hash_secret_raw(*args, **kwargs)

    def of(self, work: Callable[[], object]) -> int:
        before = self.count
        work()
        return self.count - before


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    """Every Argon2 run of this test."""
    counted = Runs()
    monkeypatch.setattr("argon2.low_level.hash_secret_raw", counted)
    return counted


# The form of a secret


def test_generated_secret_is_random_and_known_by_its_form() -> None:
    """Two generated secrets differ, hold 256 random bits, and are told by looking at them."""
    first, second = generate_secret(), generate_secret()
    assert first != second
    assert re.fullmatch(r"ha1_[A-Za-z0-9_-]{48}", first.get_secret_value())
    assert len(base64.urlsafe_b64decode(first.get_secret_value()[4:])) == 32 + 4
    assert is_generated(first)
    assert is_generated(first.get_secret_value())
    assert first.get_secret_value() not in repr(first)


def test_the_form_never_changes() -> None:
    """A secret made by the first release is known for ever: else its stored hash would never match again."""
    secret = "ha1_AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh-iue7P"
    assert is_generated(secret)
    assert cheap.hash(secret) == "sha256$00da12dfc45a641638d124b8c6dbbd5370a91a7475120e6fba11eb069cfd470c"


@given(usable)
def test_human_secret_is_never_taken_for_a_generated_one(secret: str) -> None:
    """What a human may choose, even behind our prefix, has not the form of a generated secret."""
    assert not is_generated(secret)
    assert not is_generated("ha1_" + secret)


@given(st.binary(min_size=32, max_size=32), st.integers(min_value=1, max_value=2**32 - 1))
def test_wrong_checksum_is_no_generated_secret(random: bytes, error: int) -> None:
    """The right prefix, length and alphabet are not enough: the checksum decides."""
    right = _with_checksum(random)
    checksum = int.from_bytes(right[-4:], "big") ^ error
    assert is_generated(_spell(right))
    assert not is_generated(_spell(random + checksum.to_bytes(4, "big")))


@given(st.integers(min_value=0, max_value=51), st.sampled_from("ABCXYZabcxyz0189-_+/=. \n"))
def test_one_mistyped_character_is_noticed(position: int, character: str) -> None:
    """Any single wrong character takes the form away: a CRC-32 finds every error within 32 bits."""
    secret = generated()
    mistyped = secret[:position] + character + secret[position + 1 :]
    assert is_generated(mistyped) == (mistyped == secret)


@pytest.mark.parametrize(
    "change",
    [str.upper, str.lower, "{}\n".format, " {}".format, lambda secret: secret[:-1]],
    ids=["upper case", "lower case", "newline behind", "blank before", "end missing"],
)
def test_generated_secret_is_taken_as_it_is(change: Callable[[str], str]) -> None:
    """Another case, white space around it or a missing end make it another secret."""
    assert not is_generated(change(generated()))


def _with_checksum(random: bytes) -> bytes:
    # Written out once more, so that a change of the form fails here.
    register = 0xFFFFFFFF
    for byte in b"ha1_" + random:
        register ^= byte
        for _ in range(8):
            register = (register >> 1) ^ (0xEDB88320 if register & 1 else 0)
    return random + (register ^ 0xFFFFFFFF).to_bytes(4, "big")


def _spell(payload: bytes) -> str:
    return "ha1_" + base64.urlsafe_b64encode(payload).decode()


# Bounds


@unusable
def test_unusable_secret_is_not_hashed(secret: str, runs: Runs) -> None:
    """What can't be a secret is refused before anything is computed, and the refusal doesn't show it."""
    with pytest.raises(InvalidArgumentError) as refused:
        cheap.hash(SecretStr(secret))
    assert "swordfish" not in str(refused.value)
    # The error of str.encode() holds the whole text, so it must not be anywhere in the chain.
    assert refused.value.__context__ is None
    assert runs.count == 0


@unusable
def test_unusable_presented_secret_matches_nothing(secret: str, runs: Runs) -> None:
    """A check answers no to what can't be a secret, without hashing it and without raising."""
    stored = [cheap.hash(HUMAN)]
    assert runs.of(lambda: cheap.check(secret, stored)) == 0
    assert not cheap.check(secret, stored)


@pytest.mark.parametrize("secret", ["x", "x" * MAX_SECRET_CHARACTERS, "\N{GRINNING FACE}" * (MAX_SECRET_BYTES // 4)])
def test_longest_and_shortest_secrets_serve(secret: str) -> None:
    """The bounds belong to what is allowed."""
    assert cheap.check(secret, [cheap.hash(secret)])


@pytest.mark.parametrize("secret", [b"swordfish", None, 17, bytearray(b"swordfish")])
def test_secret_must_be_text(secret: Any) -> None:
    """What is no text is refused, and the refusal names its type alone."""
    for work in (cheap.hash, is_generated, secret_text, lambda secret: cheap.check(secret, [])):
        with pytest.raises(InvalidArgumentError, match=f"not {type(secret).__name__}$") as refused:
            work(secret)
        assert "swordfish" not in str(refused.value)


def test_secret_is_not_normalised() -> None:
    """Two spellings that look alike are two secrets, and so is one with a blank behind it."""
    stored = [cheap.hash("caf\N{LATIN SMALL LETTER E WITH ACUTE}")]
    assert not cheap.check("cafe\N{COMBINING ACUTE ACCENT}", stored)
    assert not cheap.check("caf\N{LATIN SMALL LETTER E WITH ACUTE} ", stored)


# Hashes


def test_generated_secret_is_hashed_with_sha256(runs: Runs) -> None:
    """256 random bits need no slow hash."""
    secret = generate_secret()
    stored = cheap.hash(secret)
    assert stored == "sha256$" + hashlib.sha256(secret.get_secret_value().encode()).hexdigest()
    assert cheap.check(secret, [stored]) == SecretCheck(0)
    assert runs.count == 0


def test_human_secret_is_hashed_with_argon2id_that_others_can_verify() -> None:
    """The stored text is Argon2's own form: argon2-cffi verifies ours, and finds its parameters."""
    stored = cheap.hash(HUMAN)
    assert argon2.PasswordHasher().verify(stored, HUMAN)
    found = argon2.extract_parameters(stored)
    assert (found.type, found.version, found.time_cost, found.memory_cost, found.parallelism) == (
        argon2.Type.ID,
        19,
        1,
        8,
        1,
    )
    assert (found.salt_len, found.hash_len) == (16, 32)


@pytest.mark.parametrize(
    "stored",
    [
        # From the test programme of the reference implementation.
        "$argon2id$v=19$m=256,t=2,p=1$c29tZXNhbHQ$nf65EOgLrQMR/uIPnA4rEsF5h7TKyQwu9U1bMCHGi/4",
        "$argon2id$v=19$m=256,t=2,p=2$c29tZXNhbHQ$bQk8UB/VmZZF4Oo79iDXuL5/0ttZwg2f/5U52iv1cDc",
    ],
)
def test_hashes_of_the_reference_implementation_verify(stored: str) -> None:
    """Hashes that were made elsewhere serve, and are replaced by ours at the first right secret."""
    assert not cheap.check("Password", [stored])
    check = cheap.check("password", [stored])
    assert check.matched == 0
    assert check.replacement is not None
    assert cheap.check("password", [check.replacement]) == SecretCheck(0)


def test_every_hash_has_its_own_salt() -> None:
    """The same secret of two devices has two hashes."""
    assert cheap.hash(HUMAN) != cheap.hash(HUMAN)


@given(usable, usable)
def test_only_the_same_secret_matches(secret: str, other: str) -> None:
    """A hash matches its own secret, and another one only where that is the same."""
    stored = [cheap.hash(SecretStr(secret))]
    assert cheap.check(secret, stored) == SecretCheck(0)
    assert bool(cheap.check(SecretStr(other), stored)) == (secret == other)


def test_default_costs_are_those_of_rfc_9106() -> None:
    """The public functions use the second recommended option of RFC 9106, whatever an installed library says."""
    default = SecretHasher()
    assert (default.time_cost, default.memory_cost, default.parallelism) == (3, 64 * 1024, 4)
    assert argon2.extract_parameters(hash_secret(HUMAN)) == RFC_9106_LOW_MEMORY


def test_public_functions_hash_and_check() -> None:
    """hash_secret and check_secret are one pair, for both kinds of secret and both types of argument."""
    for secret in (HUMAN, generated()):
        stored = hash_secret(SecretStr(secret))
        assert len(stored) <= 256
        assert check_secret(secret, [stored]) == SecretCheck(0)
        assert not check_secret(SecretStr(OTHER), [stored])


def test_fits_the_column_whatever_the_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest hash that a hasher can make is no longer than the column allows."""
    widest = SecretHasher(time_cost=64, memory_cost=2 * 1024 * 1024, parallelism=64)
    monkeypatch.setattr("argon2.low_level.hash_secret_raw", lambda *args, hash_len, **costs: bytes(hash_len))
    stored = widest.hash("x" * MAX_SECRET_CHARACTERS)
    assert stored.startswith("$argon2id$v=19$m=2097152,t=64,p=64$")
    assert len(stored) <= 256


# What a check costs


def _stored(kind: str) -> list[str]:
    sha, human = cheap.hash(generated()), cheap.hash(OTHER)
    return {
        "unknown device": [],
        "human's secret": [human],
        "generated secret": [sha],
        "unknown kind": ["$2b$12$" + "x" * 53],
        "damaged": [human[:-1] + "\ud800"],
        "empty": [""],
        "human's, generated before": [human, sha],
        "generated, human's before": [sha, human],
        "generated twice": [sha, cheap.hash(generated())],
        "human's twice": [cheap.hash(HUMAN + "!", beside=human), human],
        "human's, damaged before": [human, "$argon2id$v=19$m=8,t=1,p=1$"],
    }[kind]


KINDS = [
    "unknown device",
    "human's secret",
    "generated secret",
    "unknown kind",
    "damaged",
    "empty",
    "human's, generated before",
    "generated, human's before",
    "generated twice",
    "human's twice",
    "human's, damaged before",
]


@pytest.mark.parametrize("kind", KINDS)
def test_a_humans_secret_costs_one_run_whatever_is_stored(kind: str, runs: Runs) -> None:
    """A wrong secret takes the same time for every device, and for none."""
    stored = _stored(kind)
    runs.count = 0
    assert not cheap.check(HUMAN, stored)
    assert runs.count == 1


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "human's" in kind])
def test_the_right_secret_costs_one_run_too(kind: str, runs: Runs) -> None:
    """A right secret takes the time of a wrong one."""
    stored = _stored(kind)
    runs.count = 0
    assert cheap.check(OTHER, stored)
    assert runs.count == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_generated_secret_costs_no_run_whatever_is_stored(kind: str, runs: Runs) -> None:
    """The form of the presented secret decides, not what is stored."""
    stored = _stored(kind)
    runs.count = 0
    assert not cheap.check(generate_secret(), stored)
    assert runs.count == 0


def test_run_for_nobody_has_the_costs_of_a_real_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """An unknown device is hashed for with the same costs, lengths of salt and digest, and type."""
    seen: list[dict[str, Any]] = []

    def record(secret: bytes, salt: bytes, **costs: Any) -> bytes:
        seen.append({"secret": len(secret), "salt": len(salt), **costs})
        return hash_secret_raw(secret, salt, **costs)

    stored = [dearer.hash(OTHER)]
    monkeypatch.setattr("argon2.low_level.hash_secret_raw", record)
    assert not dearer.check(HUMAN, stored)
    assert not dearer.check(HUMAN, [])
    assert seen[0] == seen[1]


def test_both_kinds_compare_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Digests are compared by hmac.compare_digest, a generated one twice whatever is stored."""
    compared: list[int] = []

    def record(left: bytes, right: bytes) -> bool:
        compared.append(len(left))
        return left == right

    human, secret = cheap.hash(HUMAN), generated()
    monkeypatch.setattr("hmac.compare_digest", record)
    assert cheap.check(HUMAN, [human])
    assert compared == [32]
    for stored in ([], [cheap.hash(secret)], [cheap.hash(generated()), cheap.hash(secret)], [human]):
        compared.clear()
        cheap.check(secret, stored)
        assert compared == [71, 71]


def test_hash_of_the_other_kind_never_matches() -> None:
    """A generated secret is not looked for behind Argon2, nor a human's behind SHA-256."""
    secret = generated()
    assert not cheap.check(secret, [argon2.PasswordHasher(1, 8, 1).hash(secret)])
    assert not cheap.check(HUMAN, ["sha256$" + hashlib.sha256(HUMAN.encode()).hexdigest()])


def _damage(stored: str) -> Iterator[str]:
    _, kind, version, costs, salt, digest = stored.split("$")
    yield "$".join(["", kind, version, costs, salt])
    yield "$".join(["", kind, version, costs, salt, digest[:-1]])
    yield "$".join(["", kind, version, costs, salt, digest, ""])
    yield "$".join(["", kind, version, costs, salt, digest]) + "\n"
    yield "$".join(["", kind, version, costs, salt, digest + "="])
    # 43 characters are 258 bits: one that differs in the last two alone stands for the same 256.
    yield "$".join(["", kind, version, costs, salt, digest[:-1] + chr(ord(digest[-1]) + 1)])
    yield "$".join(["", kind, version, costs, "c2FsdA", digest])
    yield "$".join(["", kind, version, costs, salt + "AAA", digest])
    yield "$".join(["", kind, version, costs, salt, "AAAA"])
    yield "$".join(["", "argon2i", version, costs, salt, digest])
    yield "$".join(["", "argon2d", version, costs, salt, digest])
    yield "$".join(["", kind, "v=16", costs, salt, digest])
    yield "$".join(["", kind, costs, salt, digest])
    for wrong in ("m=8,t=1,p=0", "m=8,t=0,p=1", "m=7,t=1,p=1", "m=8,t=1,p=2", "m=08,t=1,p=1", "t=1,m=8,p=1", "m=8,t=1"):
        yield "$".join(["", kind, version, wrong, salt, digest])
    # Well-formed, and asking for more than anybody would have stored.
    for dear in ("m=2097153,t=1,p=1", "m=8,t=65,p=1", "m=4096,t=1,p=65", "m=9999999999,t=9999999999,p=1"):
        yield "$".join(["", kind, version, dear, salt, digest])


def test_damaged_hash_never_matches_and_is_never_obeyed(runs: Runs) -> None:
    """No damage raises, matches, or makes Argon2 run with what the damaged text asks for."""
    stored = cheap.hash(HUMAN)
    for damaged in _damage(stored):
        assert damaged != stored
        runs.count = 0
        assert not cheap.check(HUMAN, [damaged]), damaged
        assert runs.count == 1


@given(st.lists(st.text(max_size=120) | st.just("$argon2id$v=19$m=8,t=1,p=1$") | st.just("sha256$"), max_size=2))
def test_no_stored_text_raises(stored: list[str]) -> None:
    """Whatever a column holds, surrogates included, is only ever no match."""
    assert not cheap.check(HUMAN, stored)
    assert not cheap.check(generate_secret(), [*stored[:1], "sha256$\ud800"])


@pytest.mark.parametrize("stored", [["a", "b", "c"], "sha256$" + "0" * 64, ""])
def test_more_than_two_hashes_are_refused(stored: Any) -> None:
    """A third hash, or one text where a sequence is wanted, is a mistake of the caller's."""
    with pytest.raises(InvalidArgumentError, match="at most 2") as refused:
        cheap.check(HUMAN, stored)
    assert "0000" not in str(refused.value)


# Two hashes at once


@pytest.mark.parametrize("old", [HUMAN, generated()], ids=["human's", "generated"])
@pytest.mark.parametrize("new", [OTHER, generated()], ids=["human's", "generated"])
def test_either_secret_serves_during_an_overlap(old: str, new: str) -> None:
    """Of two stored hashes the one that matched is named by its index, for every pair of kinds."""
    previous = cheap.hash(old)
    stored = [cheap.hash(new, beside=previous), previous]
    assert cheap.check(new, stored) == SecretCheck(0)
    assert cheap.check(old, stored) == SecretCheck(1)
    assert not cheap.check("neither", stored)
    assert not cheap.check(generate_secret(), stored)


def test_the_present_hash_is_named_where_both_match() -> None:
    """A rotation to the same secret is reported as the present one."""
    previous = cheap.hash(HUMAN)
    assert cheap.check(HUMAN, [cheap.hash(HUMAN, beside=previous), previous]).matched == 0


def test_hash_beside_another_shares_its_salt() -> None:
    """Two hashes that serve together are checked by one run, because they have one salt."""
    previous = cheap.hash(HUMAN)
    assert cheap.hash(OTHER, beside=previous).split("$")[:5] == previous.split("$")[:5]
    assert cheap.hash(OTHER).split("$")[4] != previous.split("$")[4]


@pytest.mark.parametrize("beside", ["", "sha256$" + "0" * 64, "$argon2id$v=19$m=8,t=1,p=1$", "nonsense"])
def test_only_a_sound_argon2_hash_gives_its_salt(beside: str) -> None:
    """Beside anything else the new hash gets a salt of its own."""
    first, second = cheap.hash(HUMAN, beside=beside), cheap.hash(HUMAN, beside=beside)
    assert first != second
    assert cheap.check(HUMAN, [first, beside]) == SecretCheck(0)


def test_older_costs_are_never_taken_over() -> None:
    """Beside a hash with other costs, a new secret is hashed with today's, and both serve."""
    previous = cheap.hash(HUMAN)
    present = dearer.hash(OTHER, beside=previous)
    assert "m=16,t=2,p=1" in present
    assert present.split("$")[4] != previous.split("$")[4]
    assert dearer.check(OTHER, [present, previous]) == SecretCheck(0)
    assert dearer.check(HUMAN, [present, previous]).matched == 1


def test_hashes_made_apart_cost_a_run_each(runs: Runs) -> None:
    """The exception that the docstring names: two salts can't be checked by one run, and both still serve."""
    stored = [cheap.hash(OTHER), cheap.hash(HUMAN)]
    runs.count = 0
    assert cheap.check(HUMAN, stored) == SecretCheck(1)
    assert runs.count == 2


# Other costs than today's


def test_hash_with_older_costs_is_replaced_once() -> None:
    """After the costs were raised, the right secret brings its new hash with it, and that needs no other."""
    old = cheap.hash(HUMAN)
    check = dearer.check(HUMAN, [old])
    assert check.matched == 0
    assert check.replacement is not None
    assert "m=16,t=2,p=1" in check.replacement
    assert dearer.check(HUMAN, [check.replacement]) == SecretCheck(0)


def test_wrong_secret_replaces_nothing(runs: Runs) -> None:
    """Only who knows the secret can have it hashed anew."""
    old = cheap.hash(HUMAN)
    runs.count = 0
    assert dearer.check(OTHER, [old]) == SecretCheck()
    assert runs.count == 1


@pytest.mark.parametrize(
    ("salt_bytes", "digest_bytes"), [(8, 32), (16, 16), (32, 32), (16, 64)], ids=lambda count: f"{count}"
)
def test_other_lengths_are_replaced_too(salt_bytes: int, digest_bytes: int) -> None:
    """A hash from elsewhere with a shorter or longer salt or digest serves, and is replaced."""
    foreign = argon2.PasswordHasher(1, 8, 1, hash_len=digest_bytes, salt_len=salt_bytes).hash(HUMAN)
    check = cheap.check(HUMAN, [foreign])
    assert check.matched == 0
    assert check.replacement is not None
    assert argon2.extract_parameters(check.replacement) == argon2.extract_parameters(cheap.hash(HUMAN))


def test_replacement_during_an_overlap_pairs_with_the_other_hash(runs: Runs) -> None:
    """The replacement takes the salt of the hash that stays beside it, so that one run serves again."""
    present, previous = dearer.hash(OTHER), cheap.hash(HUMAN)
    check = dearer.check(HUMAN, [present, previous])
    assert check.matched == 1
    assert check.replacement is not None
    runs.count = 0
    assert dearer.check(HUMAN, [present, check.replacement]) == SecretCheck(1)
    assert runs.count == 1


# How many run at once


@contextmanager
def _held(runs: Runs, *work: Callable[[], object]) -> Iterator[ThreadPoolExecutor]:
    """Hold one Argon2 run for each piece of work until the block ends, then see them through."""
    runs.go_on.clear()
    with ThreadPoolExecutor(max_workers=16) as pool:
        futures = [pool.submit(one) for one in work]
        try:
            for _ in futures:
                assert runs.inside.acquire(timeout=60)
            yield pool
        finally:
            runs.go_on.set()
            for future in futures:
                future.result(60)


def _until(condition: Callable[[], bool]) -> None:
    """Give way to the other threads until the condition holds."""
    pause = threading.Event()
    for _ in range(60_000):
        if condition():
            return
        pause.wait(0.001)
    pytest.fail("it never came to this")


def test_no_more_than_concurrency_run_at_once(runs: Runs) -> None:
    """With every place taken nobody gets in, and a caller who may not wait is told to try again later."""
    hasher = SecretHasher(time_cost=1, memory_cost=8, parallelism=1, concurrency=2, timeout=timedelta(0))
    with _held(runs, lambda: hasher.hash(HUMAN), lambda: hasher.check(HUMAN, [])):
        for refused in (lambda: hasher.hash(OTHER), lambda: hasher.check(OTHER, [])):
            with pytest.raises(DatabaseBusyError, match="try again later") as busy:
                refused()
            assert OTHER not in str(busy.value)
        assert runs.count == 2
        # Neither costs Argon2 anything, so neither has to wait.
        secret = generate_secret()
        assert hasher.check(secret, [hasher.hash(secret)])
    assert hasher.hash(OTHER)


def test_all_places_are_used(runs: Runs) -> None:
    """As many run at once as there are places: the bound is not one big lock."""
    hasher = SecretHasher(time_cost=1, memory_cost=8, parallelism=1, concurrency=3, timeout=timedelta(0))
    with _held(runs, *[lambda: hasher.hash(HUMAN)] * 3):
        assert runs.count == 3


def test_callers_wait_in_order_of_arrival(monkeypatch: pytest.MonkeyPatch, runs: Runs) -> None:
    """Who came first is served first, and everybody is served."""
    hasher = SecretHasher(time_cost=1, memory_cost=8, parallelism=1, concurrency=1, timeout=timedelta(minutes=1))
    order: list[bytes] = []

    def record(secret: bytes, *args: Any, **kwargs: Any) -> bytes:
        order.append(secret)
        return runs(secret, *args, **kwargs)

    monkeypatch.setattr("argon2.low_level.hash_secret_raw", record)
    names = [f"caller {number}" for number in range(6)]
    with _held(runs, lambda: hasher.hash("first")) as pool:
        futures = []
        for number, name in enumerate(names):
            futures.append(pool.submit(hasher.hash, name))
            _until(lambda expected=number + 1: hasher.waiting == expected)  # type: ignore[misc]
    for future in futures:
        assert future.result(60)
    assert order == [b"first", *(name.encode() for name in names)]
    assert hasher.waiting == 0


def test_a_caller_who_gave_up_leaves_the_queue(runs: Runs) -> None:
    """After the timeout a caller holds no place and awaits none: the next one gets it."""
    patient = SecretHasher(time_cost=1, memory_cost=8, parallelism=1, concurrency=1, timeout=timedelta(milliseconds=1))
    with _held(runs, lambda: patient.hash(HUMAN)):
        with pytest.raises(DatabaseBusyError):
            patient.hash(OTHER)
        assert patient.waiting == 0
    assert patient.hash(OTHER)


def test_interrupted_wait_loses_no_place(monkeypatch: pytest.MonkeyPatch, runs: Runs) -> None:
    """Ctrl-C while waiting passes on a place that was handed over at that very moment."""
    hasher = SecretHasher(time_cost=1, memory_cost=8, parallelism=1, concurrency=1, timeout=timedelta(minutes=1))
    wait = threading.Event.wait
    waiting_thread = threading.get_ident()

    for handed_over in (False, True):

        def interrupted(event: threading.Event, timeout: float | None = None, handed: bool = handed_over) -> bool:
            if threading.get_ident() != waiting_thread or timeout != 60:
                return wait(event, timeout)
            if handed:
                runs.go_on.set()
                assert wait(event, 60)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, _held(runs, lambda: hasher.hash(HUMAN)):
            patch.setattr(threading.Event, "wait", interrupted)
            with pytest.raises(KeyboardInterrupt):
                hasher.hash(OTHER)
            patch.undo()
        assert hasher.waiting == 0
        assert hasher.hash(OTHER)


def test_a_failing_run_gives_its_place_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error inside Argon2 takes no place away from the others."""
    hasher = SecretHasher(time_cost=1, memory_cost=8, parallelism=1, concurrency=1, timeout=timedelta(0))

    def fail(*args: Any, **kwargs: Any) -> bytes:
        raise argon2.exceptions.HashingError("Threading failure")

    with monkeypatch.context() as patch:
        patch.setattr("argon2.low_level.hash_secret_raw", fail)
        with pytest.raises(MemoryError, match=r"Threading failure.*give the process more memory"):
            hasher.hash(HUMAN)
    assert hasher.hash(HUMAN)


def test_no_turn_for_a_replacement_still_lets_the_device_in(monkeypatch: pytest.MonkeyPatch, runs: Runs) -> None:
    """The right secret is right, even when there is no time to hash it anew; the next check offers it again."""
    hasher = SecretHasher(time_cost=1, memory_cost=8, parallelism=1, concurrency=1, timeout=timedelta(0))
    old = dearer.hash(HUMAN)
    intruding: list[Any] = []
    with ThreadPoolExecutor(max_workers=1) as pool:

        def steal_the_place(left: bytes, right: bytes) -> bool:
            # Between the run of the check and that of the replacement, somebody else takes the only place.
            runs.go_on.clear()
            while runs.inside.acquire(blocking=False):
                pass
            intruding.append(pool.submit(hasher.hash, OTHER))
            assert runs.inside.acquire(timeout=60)
            return left == right

        with monkeypatch.context() as patch:
            patch.setattr("hmac.compare_digest", steal_the_place)
            check = hasher.check(HUMAN, [old])
        runs.go_on.set()
        assert intruding.pop().result(60)
    assert check == SecretCheck(0, None)
    assert hasher.check(HUMAN, [old]).replacement is not None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_forked_child_has_all_places() -> None:
    """A run that was under way in the parent doesn't take its place away from the child for ever."""
    program = """
        import os, threading, warnings
        from datetime import timedelta
        import argon2.low_level as low_level
        from homeagent.credentials import SecretHasher
        warnings.simplefilter("ignore", DeprecationWarning)     # a fork among threads is what this is about
        hasher = SecretHasher(time_cost=1, memory_cost=8, parallelism=1, concurrency=1, timeout=timedelta(0))
        real, inside, go_on = low_level.hash_secret_raw, threading.Event(), threading.Event()
        def held(*args, **kwargs):
            inside.set()
            assert go_on.wait(60)
            return real(*args, **kwargs)
        low_level.hash_secret_raw = held
        thread = threading.Thread(target=hasher.hash, args=("in the parent",))
        thread.start()
        assert inside.wait(60)
        low_level.hash_secret_raw = real
        child = os.fork()
        if child == 0:
            try:
                hasher.hash("in the child")
            except BaseException:
                os._exit(1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        go_on.set()
        thread.join()
        raise SystemExit(os.waitstatus_to_exitcode(status))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.skipif(sys.platform != "linux", reason="the limit on address space is Linux's")
def test_lack_of_memory_is_told_as_that() -> None:
    """A system that gives no memory makes an error that names the remedy, not a secret that is wrong."""
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


# What a hasher is made with


@pytest.mark.parametrize(
    "wrong",
    [
        {"time_cost": 0},
        {"time_cost": 65},
        {"parallelism": 0},
        {"parallelism": 65},
        {"memory_cost": 31, "parallelism": 4},
        {"memory_cost": 2 * 1024 * 1024 + 1},
        {"concurrency": 0},
        {"timeout": timedelta(microseconds=-1)},
    ],
    ids=str,
)
def test_hasher_out_of_bounds_is_refused(wrong: dict[str, Any]) -> None:
    """What Argon2 can't do, or would never come to an end with, is refused when the hasher is made."""
    with pytest.raises(InvalidArgumentError, match=next(iter(wrong))):
        SecretHasher(**wrong)


def test_longest_timeout_serves() -> None:
    """A wait without end is asked for with the longest duration there is."""
    assert SecretHasher(time_cost=1, memory_cost=8, parallelism=1, timeout=timedelta.max).hash(HUMAN)


def test_default_concurrency_follows_the_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many at once as there are processors, never more than 4, and 1 where nobody knows."""
    for processors, expected in ((1, 1), (3, 3), (64, 4), (None, 1)):
        monkeypatch.setattr("os.cpu_count", lambda count=processors: count)
        assert SecretHasher().concurrency == expected


# Nothing shows


def test_a_check_is_true_where_the_secret_matched() -> None:
    """Index 0 is a match: the check itself is asked, not its index."""
    assert SecretCheck(0)
    assert SecretCheck(1)
    assert not SecretCheck()


def test_a_check_is_frozen_and_hides_its_replacement() -> None:
    """A new hash is in no repr and no text, and nobody changes what came of a check."""
    check = dearer.check(HUMAN, [cheap.hash(HUMAN)])
    assert check.replacement is not None
    for shown in (repr(check), str(check), f"{check}", repr([check])):
        assert check.replacement not in shown
        assert "argon2" not in shown
    with pytest.raises(FrozenInstanceError):
        check.matched = None  # type: ignore[misc]
    assert copy.copy(check) == check


def test_a_hasher_shows_its_costs_alone() -> None:
    """The repr of a hasher says what it was made with, and no salt."""
    assert repr(SecretHasher(concurrency=2)) == (
        "SecretHasher(time_cost=3, memory_cost=65536, parallelism=4, concurrency=2, "
        "timeout=datetime.timedelta(seconds=30))"
    )


def test_module_costs_little_to_import() -> None:
    """By itself the module brings neither Argon2 nor Pydantic nor SQLAlchemy: the first secret does."""
    program = """
        import sys, types
        import homeagent.clock
        package = types.ModuleType("homeagent")     # the modules by themselves, without the package's public names
        package.__path__ = sys.modules["homeagent"].__path__
        for name in list(sys.modules):
            if name.split(".")[0] not in sys.stdlib_module_names | {"__main__"}:
                del sys.modules[name]
        sys.modules["homeagent"] = package
        import homeagent.credentials
        print(sorted({"argon2", "pydantic", "sqlalchemy", "sqlmodel"} & set(sys.modules)))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, timeout=60, check=True)
    assert done.stdout.decode().strip() == "[]"
