"""Valid secrets, and the form of a generated secret."""

from __future__ import annotations

import base64
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from homeagent.credentials import MAX_SECRET_BYTES, MAX_SECRET_CHARACTERS, generate_secret, is_generated, secret_text
from homeagent.errors import InvalidArgumentError
from tests.credentials.conftest import HUMAN, Runs, cheap, generated, usable

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


def test_generated_secret_is_random_and_known_by_its_form() -> None:
    """Two generated secrets differ, hold 256 random bits, and only their exact text is recognised by its form."""
    first, second = generate_secret(), generate_secret()
    plain = first.get_secret_value()
    assert first != second
    assert re.fullmatch(r"ha1_[A-Za-z0-9_-]{48}", plain)
    assert len(base64.urlsafe_b64decode(plain[4:])) == 32 + 4
    assert is_generated(first)
    assert is_generated(plain)
    assert plain not in repr(first)
    for changed in (plain.upper(), plain.lower(), f"{plain}\n", f" {plain}", plain[:-1]):
        assert not is_generated(changed)


def test_the_form_never_changes() -> None:
    """A secret from the first release keeps its form, or its stored hash would no longer match."""
    secret = "ha1_AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh-iue7P"
    assert is_generated(secret)
    assert cheap.hash(secret) == "sha256$00da12dfc45a641638d124b8c6dbbd5370a91a7475120e6fba11eb069cfd470c"


@given(usable)
def test_human_secret_is_never_taken_for_a_generated_one(secret: str) -> None:
    """A secret that a human chose, even with homeagent's prefix, does not have the form of a generated secret."""
    assert not is_generated(secret)
    assert not is_generated("ha1_" + secret)


@given(st.integers(min_value=0, max_value=51), st.sampled_from("ABCXYZabcxyz0189-_+/=. \n"))
def test_one_mistyped_character_is_noticed(position: int, character: str) -> None:
    """If any one character is wrong, the text is not a generated secret: a CRC-32 finds each error within 32 bits."""
    secret = generated()
    mistyped = secret[:position] + character + secret[position + 1 :]
    assert is_generated(mistyped) == (mistyped == secret)


@pytest.mark.parametrize("secret", UNUSABLE.values(), ids=UNUSABLE.keys())
def test_unusable_secret(secret: str, runs: Runs) -> None:
    """An invalid secret is not hashed, its error omits the secret, and a presented invalid secret matches no hash."""
    stored = [cheap.hash(HUMAN)]
    before = runs.count
    with pytest.raises(InvalidArgumentError) as refused:
        cheap.hash(SecretStr(secret))
    assert "swordfish" not in str(refused.value)
    # The error of str.encode() holds the whole text, so it must not be anywhere in the chain.
    assert refused.value.__context__ is None
    assert not cheap.check(secret, stored)
    assert runs.count == before


@pytest.mark.parametrize("secret", ["x", "x" * MAX_SECRET_CHARACTERS, "\N{GRINNING FACE}" * (MAX_SECRET_BYTES // 4)])
def test_longest_and_shortest_secrets_are_accepted(secret: str) -> None:
    """The shortest and the longest secret are accepted."""
    assert cheap.check(secret, [cheap.hash(secret)])


@pytest.mark.parametrize("secret", [b"swordfish", None, 17, bytearray(b"swordfish")])
def test_secret_must_be_text(secret: Any) -> None:
    """If a secret is not a text, the error names only its type."""
    for work in (cheap.hash, is_generated, secret_text, lambda secret: cheap.check(secret, [])):
        with pytest.raises(InvalidArgumentError, match=f"not {type(secret).__name__}$") as refused:
            work(secret)
        assert "swordfish" not in str(refused.value)


def test_secret_is_not_normalised() -> None:
    """Two spellings that look alike are two secrets, and a trailing blank makes another secret."""
    stored = [cheap.hash("caf\N{LATIN SMALL LETTER E WITH ACUTE}")]
    assert not cheap.check("cafe\N{COMBINING ACUTE ACCENT}", stored)
    assert not cheap.check("caf\N{LATIN SMALL LETTER E WITH ACUTE} ", stored)
