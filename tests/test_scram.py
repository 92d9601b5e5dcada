"""Proofs: the vectors of the RFC, the limits of a verifier and a proof, and the absence of secrets in errors."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import SecretStr

from homeagent.credentials import generate_secret
from homeagent.errors import InvalidArgumentError
from homeagent.scram import (
    ProofKeys,
    ProofParameters,
    _parse_verifier,
    check_proof,
    derive_proof_keys,
    fake_parameters,
    make_proof,
    make_verifier,
    parameters_for,
    proof_message,
    server_signature,
    verifier_parameters,
)

NOON = datetime(2025, 6, 1, 12, 0, 0, 123_456, tzinfo=UTC)
SECRET = generate_secret()
VERIFIER = make_verifier(SECRET)
PARAMETERS = verifier_parameters(VERIFIER)
KEYS = derive_proof_keys(SECRET, PARAMETERS)
MESSAGE = proof_message(device_id="hall-light", nonce="n-1", timestamp=NOON)
PROOF = KEYS.prove(MESSAGE)

text = st.text(st.characters(exclude_categories=["Cs"]))


# The vectors of RFC 7677 section 3

RFC_SALT = base64.b64decode("W22ZaJ0SNY7soEsUEjb6gQ==")
RFC_NONCE = "rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0"
# RFC 5802 section 3: client-first-message-bare, server-first-message and client-final-message-without-proof.
RFC_MESSAGE = (
    f"n=user,r=rOprNGfwEbeRWgbNEkqO,r={RFC_NONCE},s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096,c=biws,r={RFC_NONCE}"
).encode()
RFC_PROOF = base64.b64decode("dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ=")
RFC_SIGNATURE = base64.b64decode("6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4=")


def verifier_of(secret: str, salt: bytes, iterations: int) -> str:
    """Return a verifier in PostgreSQL's form, as RFC 5802 section 3 computes the StoredKey and the ServerKey."""
    salted = hashlib.pbkdf2_hmac("sha256", secret.encode(), salt, iterations)
    stored = hashlib.sha256(hmac.digest(salted, b"Client Key", "sha256")).digest()
    server = hmac.digest(salted, b"Server Key", "sha256")
    texts = [base64.b64encode(part).decode() for part in (salt, stored, server)]
    return "SCRAM-SHA-256${}:{}${}:{}".format(iterations, *texts)


def test_proof_and_signature_of_the_rfc() -> None:
    """The device computes the RFC's proof; the gateway, which holds only the verifier, accepts the proof and signs."""
    verifier = verifier_of("pencil", RFC_SALT, 4096)
    assert check_proof(verifier, RFC_MESSAGE, RFC_PROOF)
    assert server_signature(verifier, RFC_MESSAGE) == RFC_SIGNATURE
    assert derive_proof_keys("pencil", ProofParameters(RFC_SALT, 4096)).recognises(RFC_MESSAGE, RFC_SIGNATURE)
    assert make_proof("pencil", ProofParameters(RFC_SALT, 4096), RFC_MESSAGE) == RFC_PROOF


def test_verifier_has_the_form_that_postgresql_documents() -> None:
    """A verifier holds iterations, salt, StoredKey and ServerKey."""
    assert verifier_of(SECRET.get_secret_value(), PARAMETERS.salt, 4096) == VERIFIER


def test_verifiers_of_generated_and_human_secrets() -> None:
    """A verifier has its own salt, fits the column, has few iterations only for a generated secret, and no secret."""
    assert (PARAMETERS.iterations, len(PARAMETERS.salt)) == (4096, 16)
    assert verifier_parameters(make_verifier(SecretStr("swordfish"))).iterations == 600_000
    assert make_verifier(SECRET) != VERIFIER
    longest = verifier_of(SECRET.get_secret_value(), bytes(64), 10_000)
    assert len(longest) <= 256
    assert check_proof(longest, MESSAGE, make_proof(SECRET, verifier_parameters(longest), MESSAGE))
    assert SECRET.get_secret_value() not in VERIFIER
    assert base64.b64encode(KEYS.client_key).decode() not in VERIFIER


@pytest.mark.parametrize("secret", ["", "swordfish\0", "swordfish\ud800", "swordfish" * 100, b"swordfish"], ids=repr)
def test_unusable_secret_makes_neither_verifier_nor_proof(secret: Any) -> None:
    """If a text can't be hashed as a secret, verifier and proof refuse the text without showing it."""
    for work in (lambda: make_verifier(secret), lambda: make_proof(secret, PARAMETERS, MESSAGE)):
        with pytest.raises(InvalidArgumentError) as refused:
            work()
        assert "swordfish" not in str(refused.value)
        assert refused.value.__context__ is None


def _damage(verifier: str) -> Iterator[str]:
    yield ""
    yield "SCRAM-SHA-1" + verifier[len("SCRAM-SHA-256") :]
    yield verifier + "\n"
    yield verifier[:-1]
    yield verifier.replace("$4096:", "$4095:")
    yield verifier.replace("$4096:", "$04096:")
    yield verifier.replace("$4096:", "$9999999999:")
    yield verifier.replace("$4096:", "$-4096:")
    yield verifier.replace("$4096:", "$4096:====")
    yield verifier.replace("==$", "=$")
    yield verifier.replace("==$", "$")
    head, _, tail = verifier.partition("==$")
    # The last character of 16 bytes in base64 has four bits left over, which must be zero.
    yield head[:-1] + chr(ord(head[-1]) + 1) + "==$" + tail
    yield verifier + "\ud800"


def test_damaged_verifier_accepts_no_proof_and_signs_no_message() -> None:
    """If a verifier is damaged, each proof is false, and the error of other uses does not show the verifier."""
    for damaged in _damage(VERIFIER):
        assert damaged != VERIFIER
        assert not check_proof(damaged, MESSAGE, PROOF), damaged
        for work in (lambda bad=damaged: server_signature(bad, MESSAGE), lambda bad=damaged: verifier_parameters(bad)):
            with pytest.raises(InvalidArgumentError, match="pair the device again") as refused:
                work()
            assert VERIFIER[-20:-1] not in str(refused.value)
    with pytest.raises(InvalidArgumentError, match="this is not a verifier"):
        verifier_parameters(None)  # of a device whose secret a human chose


@given(st.binary(max_size=200), st.binary(max_size=200))
def test_a_proof_is_valid_for_its_own_message_only(message: bytes, other: bytes) -> None:
    """If the message differs, the proof and the gateway's signature are false."""
    assert check_proof(VERIFIER, message, KEYS.prove(message))
    assert KEYS.recognises(message, server_signature(VERIFIER, message))
    assume(message != other)
    assert not check_proof(VERIFIER, other, KEYS.prove(message))
    assert not KEYS.recognises(other, server_signature(VERIFIER, message))


@given(st.integers(min_value=0, max_value=255))
def test_a_changed_bit_spoils_a_proof(bit: int) -> None:
    """If a bit of a proof or of a signature changes, the check is false."""
    mask = (1 << bit).to_bytes(32, "big")
    assert not check_proof(VERIFIER, MESSAGE, bytes(a ^ b for a, b in zip(PROOF, mask, strict=True)))
    signature = server_signature(VERIFIER, MESSAGE)
    assert not KEYS.recognises(MESSAGE, bytes(a ^ b for a, b in zip(signature, mask, strict=True)))


@given(st.binary(max_size=100))
def test_other_lengths_are_false(proof: bytes) -> None:
    """If a proof or a signature has another length, the check is false and does not raise."""
    assume(len(proof) != 32)
    assert not check_proof(VERIFIER, MESSAGE, proof)
    assert not check_proof(VERIFIER, MESSAGE, PROOF + proof + b"\0")
    assert not KEYS.recognises(MESSAGE, proof)


def test_the_stored_keys_make_no_proof() -> None:
    """A thief of the verifier can't make a proof of its two keys that the gateway accepts."""
    stored, server = (base64.b64decode(part) for part in VERIFIER.split("$")[2].split(":"))
    for key in (stored, server, bytes(32)):
        for other in (stored, server, bytes(32)):
            assert not check_proof(VERIFIER, MESSAGE, ProofKeys(key, other).prove(MESSAGE))
    # The gateway's own signature, sent back to the gateway, is not a proof either.
    assert not check_proof(VERIFIER, MESSAGE, server_signature(VERIFIER, MESSAGE))


def test_other_secrets_or_parameters_give_false_proofs() -> None:
    """If the secret, the salt or the iterations differ from the verifier's, the proof is false."""
    for secret, parameters in (
        (generate_secret(), PARAMETERS),
        (SECRET, ProofParameters(bytes(16), 4096)),
        (SECRET, ProofParameters(PARAMETERS.salt, 4097)),
    ):
        keys = derive_proof_keys(secret, parameters)
        assert not check_proof(VERIFIER, MESSAGE, keys.prove(MESSAGE))
        assert not keys.recognises(MESSAGE, server_signature(VERIFIER, MESSAGE))


@pytest.mark.parametrize("verifier", [None, "damaged"])
def test_proof_for_the_stand_in_is_false(verifier: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the verifier is missing, even a proof for its stand-in is false."""
    monkeypatch.setattr("homeagent.scram._DECOY_TEXT", VERIFIER)
    monkeypatch.setattr("homeagent.scram._DECOY", _parse_verifier(VERIFIER))
    assert not check_proof(verifier, MESSAGE, PROOF)


@pytest.mark.parametrize("proof", [PROOF, bytes(32), b"", bytes(1000)], ids=["right", "wrong", "empty", "long"])
def test_a_check_computes_the_same_for_every_verifier(proof: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A check does the same work for every sound verifier and for none; a damaged verifier skips the read."""
    seen: list[tuple[str, int]] = []

    def count(module: Any, name: str) -> None:
        original = getattr(module, name)

        def counted(*arguments: Any) -> Any:
            seen.append((name, sum(map(len, arguments[:2]))))
            return original(*arguments)

        monkeypatch.setattr(module, name, counted)

    count(base64, "b64decode")
    count(hmac, "digest")
    count(hashlib, "sha256")
    count(hmac, "compare_digest")
    for verifier in (VERIFIER, None, "damaged", verifier_of(SECRET.get_secret_value(), bytes(16), 20_000)):
        seen.clear()
        check_proof(verifier, MESSAGE, proof)
        read = [] if verifier == "damaged" else [("b64decode", 24), ("b64decode", 44), ("b64decode", 44)]
        assert seen == [*read, ("digest", 32 + len(MESSAGE)), ("sha256", 32), ("compare_digest", 64)]


def test_message_has_the_documented_form() -> None:
    """A client in another language can build the same bytes from the docstring."""
    assert MESSAGE == b'["homeagent-proof-1","hall-light","n-1",1748779200123]'
    # The characters that JSON writers encode differently: RFC 8785 section 3.2.2.2.
    message = proof_message(device_id="\N{EURO SIGN}/\x7f\u2028<", nonce='"\\\b\t\x1f', timestamp=NOON)
    assert message == '["homeagent-proof-1","€/\x7f\u2028<","\\"\\\\\\b\\t\\u001f",1748779200123]'.encode()


@given(text, text, st.datetimes())
def test_message_can_be_read(device_id: str, nonce: str, at: datetime) -> None:
    """A message gives back its id, nonce and millisecond, so other values have another message."""
    message = proof_message(device_id=device_id, nonce=nonce, timestamp=at.replace(tzinfo=UTC))
    *texts, milliseconds = json.loads(message)
    assert texts == ["homeagent-proof-1", device_id, nonce]
    floored = at.replace(tzinfo=UTC, microsecond=at.microsecond // 1000 * 1000)
    assert datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=milliseconds) == floored


def test_message_does_not_depend_on_the_time_zone() -> None:
    """Equal timestamps in different time zones give the same message, also at the ends of the calendar."""
    there = NOON.astimezone(timezone(timedelta(hours=-9, minutes=-30)))
    assert proof_message(device_id="hall-light", nonce="n-1", timestamp=there) == MESSAGE
    before = datetime(1969, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC)
    assert proof_message(device_id="d", nonce="n", timestamp=before).endswith(b",-1]")


@pytest.mark.parametrize("timestamp", [NOON.replace(tzinfo=None), NOON.isoformat(), None], ids=str)
def test_naive_timestamp_is_refused(timestamp: Any) -> None:
    """If a timestamp has no time zone, the message is refused, as device and gateway could read different times."""
    with pytest.raises(InvalidArgumentError, match="timestamp must be"):
        proof_message(device_id="d", nonce="n", timestamp=timestamp)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("salt", bytes(7), "salt"),
        ("salt", bytes(65), "salt"),
        ("iterations", 4095, "iterations"),
        ("iterations", 10_000_001, "iterations"),
        ("salt", "x" * 16, "decode"),
        ("iterations", 4.5, "decode"),
        ("iterations", "4096", "decode"),
    ],
)
def test_device_refuses_invalid_parameters(name: str, value: Any, words: str) -> None:
    """If received parameters make guessing cheap, keep the device busy or were not decoded, the device refuses them."""
    with pytest.raises(InvalidArgumentError, match=words):
        ProofParameters(**{"salt": bytes(16), "iterations": 4096, name: value})


@pytest.mark.parametrize(("device_id", "nonce"), [("d", "n-17\ud800"), ("d\udfff", "n-17")])
def test_lone_surrogate_is_refused_without_showing_the_nonce(device_id: str, nonce: str) -> None:
    """If a nonce has no UTF-8 form, the message is refused, and no error of the chain holds the nonce."""
    with pytest.raises(InvalidArgumentError, match="lone surrogate") as refused:
        proof_message(device_id=device_id, nonce=nonce, timestamp=NOON)
    assert "n-17" not in str(refused.value)
    assert refused.value.__context__ is None


@pytest.mark.parametrize("name", ["device_id", "nonce"])
def test_id_and_nonce_are_text(name: str) -> None:
    """If the id or the nonce is not text, the message is refused, and the error names the argument."""
    values: dict[str, Any] = {"device_id": "d", "nonce": "n", name: 5}
    with pytest.raises(InvalidArgumentError, match=f"{name} must be text, not int"):
        proof_message(**values, timestamp=NOON)


# Absent devices

KEY = bytes(range(32))


def test_made_up_parameters_are_stable() -> None:
    """The same id and key give the same made-up parameters, in every release; another id or key gives others."""
    assert fake_parameters("ghost") == fake_parameters("ghost")
    assert fake_parameters("ghost", KEY) == ProofParameters(bytes.fromhex("6a920d60a919dc6e8b09aaf4a37b4fb2"), 4_096)
    salts = {
        fake_parameters(*asked).salt for asked in (("ghost", KEY), ("ghost", KEY[::-1]), ("ghost",), ("host", KEY))
    }
    assert len(salts) == 4


@given(text)
def test_made_up_parameters_look_like_real_ones(device_id: str) -> None:
    """Made-up salt and iterations match make_verifier's, and serve to make a proof, which is not accepted."""
    made_up = fake_parameters(device_id, KEY)
    assert len(made_up.salt) == len(PARAMETERS.salt)
    assert made_up.iterations == 4096
    assert parameters_for(device_id, None, key=KEY) == parameters_for(device_id, "damaged", key=KEY) == made_up
    assert parameters_for(device_id, VERIFIER, key=KEY) == PARAMETERS


@pytest.mark.parametrize(
    ("device_id", "key", "message"), [("ghost", bytes(15), "16 random bytes"), ("\ud800", KEY, "lone surrogate")]
)
def test_made_up_parameters_need_a_key_and_an_id(device_id: str, key: bytes, message: str) -> None:
    """If the key is guessable or the id has no UTF-8 form, making up parameters raises."""
    with pytest.raises(InvalidArgumentError, match=message):
        fake_parameters(device_id, key)


def test_keys_are_in_no_repr() -> None:
    """The repr of an object with keys shows no key."""
    assert repr(KEYS) == str(KEYS) == "ProofKeys()"
