"""Proofs: the vectors of the RFC, what a verifier and a proof are good for, and that nothing of them shows."""

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
    check_server_signature,
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


def test_client_proof_of_the_rfc() -> None:
    """The device's side computes the ClientProof of RFC 7677's example."""
    assert make_proof("pencil", ProofParameters(RFC_SALT, 4096), RFC_MESSAGE) == RFC_PROOF


def test_gateway_accepts_the_proof_of_the_rfc() -> None:
    """The gateway's side, which holds the verifier alone, accepts that proof and gives the RFC's ServerSignature."""
    verifier = make_verifier("pencil", iterations=4096, salt=RFC_SALT)
    assert check_proof(verifier, RFC_MESSAGE, RFC_PROOF)
    assert server_signature(verifier, RFC_MESSAGE) == RFC_SIGNATURE
    assert check_server_signature("pencil", ProofParameters(RFC_SALT, 4096), RFC_MESSAGE, RFC_SIGNATURE)


# Verifiers


def test_verifier_has_the_form_that_postgresql_documents() -> None:
    """Iterations, salt, StoredKey and ServerKey, computed here once more from the formulas of RFC 5802 section 3."""
    verifier = make_verifier("pencil", iterations=5000, salt=b"sixteen bytes ok")
    salted = hashlib.pbkdf2_hmac("sha256", b"pencil", b"sixteen bytes ok", 5000)
    stored = hashlib.sha256(hmac.digest(salted, b"Client Key", "sha256")).digest()
    server = hmac.digest(salted, b"Server Key", "sha256")
    assert verifier == (
        f"SCRAM-SHA-256$5000:{base64.b64encode(b'sixteen bytes ok').decode()}"
        f"${base64.b64encode(stored).decode()}:{base64.b64encode(server).decode()}"
    )


def test_generated_secret_needs_few_iterations_and_a_humans_many() -> None:
    """What nobody can guess needs no slow derivation; what somebody can, does."""
    assert PARAMETERS.iterations == 4096
    assert verifier_parameters(make_verifier(SecretStr("swordfish"))).iterations == 600_000


def test_every_verifier_has_its_own_salt() -> None:
    """The same secret of two devices has two verifiers, each with 16 random bytes of salt."""
    assert make_verifier(SECRET) != VERIFIER
    assert len(PARAMETERS.salt) == 16


def test_longest_verifier_fits_the_column() -> None:
    """A verifier with the longest salt is no longer than the column allows."""
    longest = make_verifier(SECRET, salt=bytes(64))
    assert len(longest) <= 256
    assert check_proof(longest, MESSAGE, make_proof(SECRET, verifier_parameters(longest), MESSAGE))


def test_verifier_holds_neither_secret_nor_client_key() -> None:
    """What the gateway stores is not what a proof is made with."""
    assert SECRET.get_secret_value() not in VERIFIER
    assert base64.b64encode(KEYS.client_key).decode() not in VERIFIER
    assert base64.b64encode(KEYS.stored_key).decode() in VERIFIER


@pytest.mark.parametrize(
    "wrong", [{"iterations": 4095}, {"iterations": 10_000_001}, {"salt": bytes(7)}, {"salt": bytes(65)}], ids=str
)
def test_verifier_out_of_bounds_is_refused(wrong: dict[str, Any]) -> None:
    """Too few iterations, too many, too short a salt or too long a one."""
    with pytest.raises(InvalidArgumentError, match=next(iter(wrong))) as refused:
        make_verifier("swordfish", **wrong)
    assert "swordfish" not in str(refused.value)


@pytest.mark.parametrize("secret", ["", "swordfish\0", "swordfish\ud800", "swordfish" * 100, b"swordfish"], ids=repr)
def test_unusable_secret_makes_neither_verifier_nor_proof(secret: Any) -> None:
    """What can't be hashed as a secret can't be proved either, and the refusal doesn't show it."""
    for work in (
        lambda: make_verifier(secret),
        lambda: make_proof(secret, PARAMETERS, MESSAGE),
        lambda: check_server_signature(secret, PARAMETERS, MESSAGE, bytes(32)),
    ):
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


def test_damaged_verifier_accepts_nothing_and_signs_nothing() -> None:
    """A damaged verifier accepts no right proof; where more is asked of it, it is named, and not shown."""
    for damaged in _damage(VERIFIER):
        assert damaged != VERIFIER
        assert not check_proof(damaged, MESSAGE, PROOF), damaged
        for work in (lambda bad=damaged: server_signature(bad, MESSAGE), lambda bad=damaged: verifier_parameters(bad)):
            with pytest.raises(InvalidArgumentError, match="pair the device anew") as refused:
                work()
            assert VERIFIER[-20:-1] not in str(refused.value)
    with pytest.raises(InvalidArgumentError, match="this is no verifier"):
        verifier_parameters(None)  # that of a device whose secret a human chose


# Proofs


def test_device_and_gateway_recognise_each_other() -> None:
    """The proof convinces the gateway, its signature convinces the device, and derived keys do both."""
    assert make_proof(SECRET, PARAMETERS, MESSAGE) == PROOF
    assert len(PROOF) == 32
    assert check_proof(VERIFIER, MESSAGE, PROOF)
    signature = server_signature(VERIFIER, MESSAGE)
    assert check_server_signature(SECRET, PARAMETERS, MESSAGE, signature)
    assert KEYS.recognises(MESSAGE, signature)


@given(st.binary(max_size=200), st.binary(max_size=200))
def test_a_proof_is_good_for_its_own_message_alone(message: bytes, other: bytes) -> None:
    """Another message refuses it, and so it is with the gateway's signature."""
    assert check_proof(VERIFIER, message, KEYS.prove(message))
    assert KEYS.recognises(message, server_signature(VERIFIER, message))
    assume(message != other)
    assert not check_proof(VERIFIER, other, KEYS.prove(message))
    assert not KEYS.recognises(other, server_signature(VERIFIER, message))


@given(st.integers(min_value=0, max_value=255))
def test_a_changed_bit_spoils_a_proof(bit: int) -> None:
    """Each bit of a proof counts, and each bit of a signature."""
    mask = (1 << bit).to_bytes(32, "big")
    assert not check_proof(VERIFIER, MESSAGE, bytes(a ^ b for a, b in zip(PROOF, mask, strict=True)))
    signature = server_signature(VERIFIER, MESSAGE)
    assert not KEYS.recognises(MESSAGE, bytes(a ^ b for a, b in zip(signature, mask, strict=True)))


@given(st.binary(max_size=100))
def test_other_lengths_are_no_proof(proof: bytes) -> None:
    """A proof of another length is false, and doesn't raise; nor does a signature of another length."""
    assume(len(proof) != 32)
    assert not check_proof(VERIFIER, MESSAGE, proof)
    assert not check_proof(VERIFIER, MESSAGE, PROOF + proof + b"\0")
    assert not KEYS.recognises(MESSAGE, proof)


def test_what_the_gateway_stores_makes_no_proof() -> None:
    """Who stole the verifier can make nothing of its two keys that the gateway would accept."""
    stored, server = (base64.b64decode(part) for part in VERIFIER.split("$")[2].split(":"))
    for key in (stored, server, bytes(32)):
        for other in (stored, server, bytes(32)):
            assert not check_proof(VERIFIER, MESSAGE, ProofKeys(key, other).prove(MESSAGE))
    # Nor is the gateway's own signature one, sent back to it.
    assert not check_proof(VERIFIER, MESSAGE, server_signature(VERIFIER, MESSAGE))


def test_stolen_verifier_and_overheard_proof_reveal_the_client_key() -> None:
    """The weakness that the module's text names: both together are enough, which is why TLS is asked for."""
    stored = base64.b64decode(VERIFIER.split("$")[2].split(":")[0])
    signature = hmac.digest(stored, MESSAGE, "sha256")
    assert bytes(a ^ b for a, b in zip(PROOF, signature, strict=True)) == KEYS.client_key


def test_another_secret_or_other_parameters_prove_nothing() -> None:
    """A proof needs the secret, the salt and the iterations of the verifier."""
    for secret, parameters in (
        (generate_secret(), PARAMETERS),
        (SECRET, ProofParameters(bytes(16), 4096)),
        (SECRET, ProofParameters(PARAMETERS.salt, 4097)),
    ):
        assert not check_proof(VERIFIER, MESSAGE, make_proof(secret, parameters, MESSAGE))
        assert not check_server_signature(secret, parameters, MESSAGE, server_signature(VERIFIER, MESSAGE))


def test_nobody_proves_to_a_device_that_does_not_exist() -> None:
    """Without a verifier every proof is false."""
    for proof in (PROOF, bytes(32), b""):
        assert not check_proof(None, MESSAGE, proof)


@pytest.mark.parametrize("verifier", [None, "damaged"])
def test_proof_for_the_stand_in_is_false(verifier: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even who could make a proof for what stands in for a missing verifier would not get in."""
    keys = ProofKeys(bytes(32), bytes(32))
    stand_in = (
        make_verifier(SECRET).rpartition("$")[0]
        + "$"
        + ":".join(base64.b64encode(key).decode() for key in (keys.stored_key, keys.server_key))
    )
    assert check_proof(stand_in, MESSAGE, keys.prove(MESSAGE))
    monkeypatch.setattr("homeagent.scram._DECOY_VERIFIER_TEXT", stand_in)
    monkeypatch.setattr("homeagent.scram._DECOY_VERIFIER", _parse_verifier(stand_in))
    assert not check_proof(verifier, MESSAGE, keys.prove(MESSAGE))


@pytest.mark.parametrize("proof", [PROOF, bytes(32), b"", bytes(1000)], ids=["right", "wrong", "empty", "long"])
def test_a_check_computes_the_same_for_everybody(proof: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read, hashed and compared is the same for every sound verifier and for none; a damaged one saves the reading."""
    seen: list[tuple[str, int]] = []
    digest, sha256, compare, decode = hmac.digest, hashlib.sha256, hmac.compare_digest, base64.b64decode

    def count_digest(key: bytes, message: bytes, algorithm: str) -> bytes:
        seen.append(("hmac", len(key) + len(message)))
        return digest(key, message, algorithm)

    def count_sha256(data: bytes) -> Any:
        seen.append(("sha256", len(data)))
        return sha256(data)

    def count_compare(left: bytes, right: bytes) -> bool:
        seen.append(("compare", len(left) + len(right)))
        return compare(left, right)

    def count_decode(encoded: str) -> bytes:
        seen.append(("decode", len(encoded)))
        return decode(encoded)

    monkeypatch.setattr("homeagent.scram.base64.b64decode", count_decode)
    monkeypatch.setattr("homeagent.scram.hmac.digest", count_digest)
    monkeypatch.setattr("homeagent.scram.hashlib.sha256", count_sha256)
    monkeypatch.setattr("homeagent.scram.hmac.compare_digest", count_compare)
    for verifier in (VERIFIER, None, "damaged", make_verifier(SECRET, iterations=20_000)):
        seen.clear()
        check_proof(verifier, MESSAGE, proof)
        read = [] if verifier == "damaged" else [("decode", 24), ("decode", 44), ("decode", 44)]
        assert seen == [*read, ("hmac", 32 + len(MESSAGE)), ("sha256", 32), ("compare", 64)]


def test_device_may_insist_on_iterations() -> None:
    """Who plays the gateway gets no cheap proof from a device that knows how its verifier was made."""
    for work in (make_proof, lambda *args, **kwargs: derive_proof_keys(*args[:2], **kwargs)):
        with pytest.raises(InvalidArgumentError, match="fewer than 600,000") as refused:
            work("swordfish", PARAMETERS, MESSAGE, minimum_iterations=600_000)
        assert "swordfish" not in str(refused.value)
    assert make_proof(SECRET, PARAMETERS, MESSAGE, minimum_iterations=4096) == PROOF


@pytest.mark.parametrize(("salt", "iterations"), [(bytes(7), 4096), (bytes(16), 1), (bytes(16), 10**9)])
def test_device_answers_no_gateway_that_asks_for_too_little_or_too_much(salt: bytes, iterations: int) -> None:
    """Parameters that would make guessing cheap, or keep the device busy, are refused when they are received."""
    with pytest.raises(InvalidArgumentError):
        ProofParameters(salt, iterations)


# The message


def test_message_has_the_documented_form() -> None:
    """A client in another language can build the same bytes from the docstring."""
    assert MESSAGE == b'["homeagent-proof-1","hall-light","n-1",1748779200123]'
    # The characters in which writers of JSON differ: RFC 8785 section 3.2.2.2.
    message = proof_message(device_id="\N{EURO SIGN}/\x7f\u2028<", nonce='"\\\b\t\x1f', timestamp=NOON)
    assert message == '["homeagent-proof-1","€/\x7f\u2028<","\\"\\\\\\b\\t\\u001f",1748779200123]'.encode()


@given(st.tuples(text, text, st.datetimes()), st.tuples(text, text, st.datetimes()))
def test_message_is_injective(one: tuple[str, str, datetime], other: tuple[str, str, datetime]) -> None:
    """Two messages are the same only where id, nonce and millisecond are."""
    messages = []
    for device_id, nonce, at in (one, other):
        message = proof_message(device_id=device_id, nonce=nonce, timestamp=at.replace(tzinfo=UTC))
        version, read_id, read_nonce, milliseconds = json.loads(message)
        assert (version, read_id, read_nonce) == ("homeagent-proof-1", device_id, nonce)
        floored = at.replace(tzinfo=UTC, microsecond=at.microsecond // 1000 * 1000)
        assert datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=milliseconds) == floored
        messages.append((message, (device_id, nonce, floored)))
    (first, first_values), (second, second_values) = messages
    assert (first == second) == (first_values == second_values)


@pytest.mark.parametrize(("one", "other"), [(("a", "b,c"), ("a,b", "c")), (('a","b', "c"), ("a", 'b","c'))])
def test_separators_in_a_message_never_collide(one: tuple[str, str], other: tuple[str, str]) -> None:
    """An id or nonce that holds what separates them is not mistaken for two."""
    messages = {proof_message(device_id=id_, nonce=nonce, timestamp=NOON) for id_, nonce in (one, other)}
    assert len(messages) == 2


def test_message_does_not_depend_on_the_time_zone() -> None:
    """The same instant makes the same message wherever the clock hangs, at the ends of the calendar too."""
    there = NOON.astimezone(timezone(timedelta(hours=-9, minutes=-30)))
    assert proof_message(device_id="hall-light", nonce="n-1", timestamp=there) == MESSAGE
    last = datetime.max.replace(tzinfo=timezone(timedelta(hours=-12)))
    assert proof_message(device_id="d", nonce="n", timestamp=last).endswith(b",253402343999999]")
    before = datetime(1969, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC)
    assert proof_message(device_id="d", nonce="n", timestamp=before).endswith(b",-1]")


@pytest.mark.parametrize("timestamp", [NOON.replace(tzinfo=None), NOON.isoformat(), None], ids=str)
def test_naive_timestamp_is_refused(timestamp: Any) -> None:
    """Without a time zone device and gateway could mean two instants."""
    with pytest.raises(InvalidArgumentError, match="aware"):
        proof_message(device_id="d", nonce="n", timestamp=timestamp)


@pytest.mark.parametrize("wrong", [{"salt": "x" * 16}, {"iterations": 4096.5}, {"iterations": "4096"}], ids=str)
def test_parameters_that_were_not_decoded_are_refused(wrong: dict[str, Any]) -> None:
    """What a gateway sent is refused where it comes in, and not in the middle of a derivation."""
    with pytest.raises(InvalidArgumentError, match="decode"):
        ProofParameters(**{"salt": bytes(16), "iterations": 4096, **wrong})


@pytest.mark.parametrize(("device_id", "nonce"), [("d", "n-17\ud800"), ("d\udfff", "n-17")])
def test_lone_surrogate_is_refused_without_showing_the_nonce(device_id: str, nonce: str) -> None:
    """What has no UTF-8 makes no message, and the refusal holds no nonce, nor does anything in its chain."""
    with pytest.raises(InvalidArgumentError, match="lone surrogate") as refused:
        proof_message(device_id=device_id, nonce=nonce, timestamp=NOON)
    assert "n-17" not in str(refused.value)
    assert refused.value.__context__ is None


# Devices that don't exist

KEY = bytes(range(32))


def test_made_up_parameters_are_stable() -> None:
    """Asked again, the gateway answers the same for the same id and key, and for no other."""
    assert fake_parameters("ghost") == fake_parameters("ghost")
    assert fake_parameters("ghost", KEY) == fake_parameters("ghost", KEY)
    salts = {
        fake_parameters(*asked).salt for asked in (("ghost", KEY), ("ghost", KEY[::-1]), ("ghost",), ("host", KEY))
    }
    assert len(salts) == 4


def test_made_up_parameters_stay_the_same_over_releases() -> None:
    """An answer that changed with an upgrade would tell the made-up ones from the real ones."""
    assert fake_parameters("ghost", KEY) == ProofParameters(bytes.fromhex("6a920d60a919dc6e8b09aaf4a37b4fb2"), 4_096)


@given(text)
def test_made_up_parameters_look_like_real_ones(device_id: str) -> None:
    """Salt and iterations are such as make_verifier would give, and serve to make a proof that nobody accepts."""
    made_up = fake_parameters(device_id, KEY)
    assert len(made_up.salt) == len(PARAMETERS.salt)
    assert made_up.iterations == 4096
    assert parameters_for(device_id, None, key=KEY) == parameters_for(device_id, "damaged", key=KEY) == made_up
    assert parameters_for(device_id, VERIFIER, key=KEY) == PARAMETERS
    assert fake_parameters(device_id, KEY, human_share=1).iterations == 600_000


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_made_up_parameters_keep_the_share_of_human_secrets(share: float) -> None:
    """Of many made-up devices about that share seems to hold a human's secret."""
    ids = [f"ghost-{number}" for number in range(2000)]
    human = sum(fake_parameters(ghost, KEY, human_share=share).iterations == 600_000 for ghost in ids)
    # Four standard deviations; the key is fixed, so this is the same on every run.
    assert abs(human - share * 2000) < 4 * (2000 * share * (1 - share)) ** 0.5


@pytest.mark.parametrize(
    ("device_id", "key", "share", "message"),
    [
        ("ghost", bytes(15), 0.5, "16 random bytes"),
        ("ghost", KEY, -0.1, "human_share"),
        ("ghost", KEY, 1.1, "human_share"),
        ("ghost", KEY, float("nan"), "human_share"),
        ("\ud800", KEY, 0.5, "lone surrogate"),
    ],
)
def test_made_up_parameters_need_a_key_and_a_share(device_id: str, key: bytes, share: float, message: str) -> None:
    """A key that could be guessed, or a share that is none, is refused."""
    with pytest.raises(InvalidArgumentError, match=message):
        fake_parameters(device_id, key, human_share=share)


# Nothing shows


def test_keys_are_in_no_repr() -> None:
    """Keys that make proofs can't be read from a log."""
    shown = repr(KEYS) + str(KEYS)
    for key in (KEYS.client_key, KEYS.server_key, KEYS.stored_key):
        assert repr(key) not in shown
        assert key.hex() not in shown
    assert repr(KEYS) == "ProofKeys()"
