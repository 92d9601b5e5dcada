"""Proofs: a device shows that it holds a secret without sending it. No database.

It is the computation of SCRAM (RFC 5802 section 3, with SHA-256 after RFC 7677), without its messages:

1. At pairing the gateway stores `make_verifier(secret)`, from which the secret can't be read.
2. The device asks for its salt and iterations: `Database.proof_parameters` answers for every id (`parameters_for`).
3. It makes a proof of its id, a fresh nonce and the time (`proof_message`, `make_proof`), and sends all four.
4. The gateway checks it (`check_proof`), consumes the nonce, and answers with `server_signature`, by which the device
   knows that the gateway holds its verifier (`check_server_signature`).

Who steals the stored verifiers can't make a proof of a generated secret, and must guess to make one of a human's. Who
only listens learns neither secret nor verifier, but can try guesses at a human's secret. Who does both, steals a
verifier and overhears one proof, can make proofs from then on (RFC 5802 section 9), and who holds a verifier can play
the gateway. Nothing binds a proof to the connection that it came over. So run it inside TLS.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import re
import secrets
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from homeagent.credentials import is_generated, secret_text
from homeagent.errors import InvalidArgumentError
from homeagent.frame_locals import clears_locals
from homeagent.models.proof_parameters import MIN_ITERATIONS, ProofParameters

if TYPE_CHECKING:
    from pydantic import SecretStr

__all__ = [
    "ProofKeys",
    "ProofParameters",
    "check_proof",
    "check_server_signature",
    "derive_proof_keys",
    "fake_parameters",
    "make_proof",
    "make_verifier",
    "parameters_for",
    "proof_message",
    "server_signature",
    "verifier_parameters",
]

_GENERATED_ITERATIONS = MIN_ITERATIONS
# What a human can remember can be guessed: OWASP's Password Storage Cheat Sheet names this number for PBKDF2 with
# HMAC-SHA-256.
_HUMAN_ITERATIONS = 600_000
_SALT_BYTES = 16

_KEY_BYTES = hashlib.sha256().digest_size
_MIN_FAKE_KEY_BYTES = 16

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND = timedelta(milliseconds=1)


def _hmac_sha256(key: bytes, message: bytes) -> bytes:
    return hmac.digest(key, message, "sha256")


def _xor(left: bytes, right: bytes) -> bytes:
    return bytes(a ^ b for a, b in zip(left, right, strict=True))


@dataclass(frozen=True, slots=True)
class ProofKeys:
    """The two keys that a secret stands for under certain parameters; as secret as the secret itself.

    A device may keep them in memory (RFC 5802 section 5.1 allows it), and make many proofs for one derivation.
    """

    client_key: bytes = field(repr=False)
    server_key: bytes = field(repr=False)

    @property
    def stored_key(self) -> bytes:
        """What a gateway stores of the client key: its SHA-256."""
        return hashlib.sha256(self.client_key).digest()

    def prove(self, message: bytes) -> bytes:
        """Return the proof for this message: 32 bytes, the ClientProof of RFC 5802 section 3."""
        return _xor(self.client_key, _hmac_sha256(self.stored_key, message))

    def recognises(self, message: bytes, signature: bytes) -> bool:
        """Tell whether the signature of this message was made by who holds the verifier of the same secret."""
        return hmac.compare_digest(_hmac_sha256(self.server_key, message), signature)


@clears_locals
def derive_proof_keys(
    secret: SecretStr | str, parameters: ProofParameters, *, minimum_iterations: int = MIN_ITERATIONS
) -> ProofKeys:
    """Derive a secret's keys: all that is slow about a proof, about 2 ms for 4,096 iterations and 0.2 s for 600,000.

    Args:
        secret: taken as it is. RFC 5802 would apply SASLprep, which changes only what is not plain ASCII.
        parameters: those of the verifier, as the gateway tells them.
        minimum_iterations: what a device insists on that knows how its verifier was made. Who plays the gateway could
            ask for few iterations, to try guesses at a human's secret cheaply against the proof that it gets.

    Raises:
        InvalidArgumentError: it is no usable secret (the message doesn't show it), or the gateway asks for fewer
            iterations than `minimum_iterations`.
    """
    if parameters.iterations < minimum_iterations:
        raise InvalidArgumentError(
            f"the gateway asks for {parameters.iterations:,} iterations, fewer than {minimum_iterations:,}: make sure "
            "that it is the right one, and pair the device anew if its verifier was made with fewer"
        )
    text = secret_text(secret)
    salted = hashlib.pbkdf2_hmac("sha256", text.encode(), parameters.salt, parameters.iterations)
    return ProofKeys(client_key=_hmac_sha256(salted, b"Client Key"), server_key=_hmac_sha256(salted, b"Server Key"))


_VERIFIER = re.compile(
    r"SCRAM-SHA-256\$([1-9][0-9]{0,9}):([A-Za-z0-9+/]{1,88}={0,2})"
    r"\$([A-Za-z0-9+/]{43}=):([A-Za-z0-9+/]{43}=)"
)


@dataclass(frozen=True, slots=True, repr=False)
class _Verifier:
    parameters: ProofParameters
    stored_key: bytes
    server_key: bytes


def _format_verifier(parameters: ProofParameters, stored_key: bytes, server_key: bytes) -> str:
    salt, stored, server = (base64.b64encode(part).decode() for part in (parameters.salt, stored_key, server_key))
    return f"SCRAM-SHA-256${parameters.iterations}:{salt}${stored}:{server}"


def _parse_verifier(verifier: str) -> _Verifier | None:
    found = _VERIFIER.fullmatch(verifier)
    if found is None:
        return None
    try:
        salt, stored_key, server_key = (base64.b64decode(part) for part in found.groups()[1:])
        parameters = ProofParameters(salt, int(found[1]))
    except ValueError:
        # Base64 with too little padding, or parameters out of their bounds.
        return None
    # One spelling for one value: base64 whose last character has bits left over is damaged (RFC 4648 section 3.5).
    canonical = _format_verifier(parameters, stored_key, server_key) == verifier
    return _Verifier(parameters, stored_key, server_key) if canonical else None


def _require_verifier(verifier: str) -> _Verifier:
    # A device whose secret a human chose has None.
    parsed = _parse_verifier(verifier) if isinstance(verifier, str) else None
    if parsed is None:
        raise InvalidArgumentError(
            "this is no verifier (SCRAM-SHA-256$<iterations>:<salt>$<StoredKey>:<ServerKey>): make it with "
            "make_verifier(), and pair the device anew if a stored one is damaged"
        )
    return parsed


@clears_locals
def make_verifier(secret: SecretStr | str, *, iterations: int | None = None, salt: bytes | None = None) -> str:
    """Make what a gateway stores to check proofs of a secret; the secret can't be read from it.

    Args:
        secret: 1 to 512 characters, at most 1,024 bytes of UTF-8, no control character. It is taken as it is.
        iterations: rounds of PBKDF2, 4,096 to 10,000,000. None: 4,096 for a generated secret (about 2 ms), 600,000
            for any other (about 0.2 s). With another number `fake_parameters` can't hide which devices exist.
        salt: 8 to 64 bytes; None makes 16 random ones.

    Returns:
        `SCRAM-SHA-256$<iterations>:<salt>$<StoredKey>:<ServerKey>`, the last three in base64: the form in which
        PostgreSQL stores a password (its manual, catalogue `pg_authid`). At most 256 characters.

    Raises:
        InvalidArgumentError: one of the arguments is out of its bounds; the message doesn't show the secret.
    """
    if iterations is None:
        iterations = _GENERATED_ITERATIONS if is_generated(secret) else _HUMAN_ITERATIONS
    parameters = ProofParameters(secrets.token_bytes(_SALT_BYTES) if salt is None else salt, iterations)
    keys = derive_proof_keys(secret, parameters)
    return _format_verifier(parameters, keys.stored_key, keys.server_key)


def verifier_parameters(verifier: str) -> ProofParameters:
    """Return the salt and iterations of a verifier, to be told to the device that asks.

    Raises:
        InvalidArgumentError: it is no verifier, or None; the message doesn't show it.
    """
    return _require_verifier(verifier).parameters


_PROCESS_KEY = secrets.token_bytes(_KEY_BYTES)


def fake_parameters(device_id: str, key: bytes | None = None, *, human_share: float = 0.0) -> ProofParameters:
    """Return salt and iterations for a device that doesn't exist, as if it did.

    They are the same for one id and key: by default the iterations of a generated secret, since `Database.pair` and
    `rotate_secret` store no verifier of any other. So one answer doesn't prove that a device exists. Answers over time
    may: those of a real device change when its secret does, and those of a made-up one when the key does.

    Args:
        device_id: what was asked for.
        key: at least 16 random bytes, kept private, and for good: else a restart changes all made-up answers and none
            of the real ones. None takes a key that this process made for itself.
        human_share: the share of ids that get the iterations of a human's secret, 0 to 1. It is for a gateway that
            makes verifiers of such secrets itself; the nearer to the truth, the less an answer tells.

    Raises:
        InvalidArgumentError: the key is too short, the share is out of its bounds, or the id has a lone surrogate.
    """
    if key is None:
        key = _PROCESS_KEY
    elif len(key) < _MIN_FAKE_KEY_BYTES:
        raise InvalidArgumentError(f"key must be at least {_MIN_FAKE_KEY_BYTES} random bytes")
    if not 0 <= human_share <= 1:
        raise InvalidArgumentError("human_share must be 0 to 1")
    derived = _hmac_sha256(key, b"homeagent-fake-parameters-1" + _canonical([device_id]))
    salt, lot = derived[:_SALT_BYTES], derived[_SALT_BYTES:]
    like_a_human = int.from_bytes(lot, "big") < human_share * 256 ** len(lot)
    return ProofParameters(salt, _HUMAN_ITERATIONS if like_a_human else _GENERATED_ITERATIONS)


def _canonical(values: list[str | int]) -> bytes:
    text = json.dumps(values, ensure_ascii=False, separators=(",", ":"))
    if any("\ud800" <= character <= "\udfff" for character in text):
        # Not left to encode(): its error would carry the nonce.
        raise InvalidArgumentError("a lone surrogate has no UTF-8: take it out of the id or the nonce")
    return text.encode()


@clears_locals
def proof_message(*, device_id: str, nonce: str, timestamp: datetime) -> bytes:
    """Return the bytes that a proof is made of, the same for device and gateway, and different for different values.

    It is the JSON array `["homeagent-proof-1", device_id, nonce, milliseconds]` in UTF-8, written as RFC 8785 (the JSON
    Canonicalization Scheme) does and JavaScript's `JSON.stringify` too: no space, no escape that JSON doesn't demand.

    Args:
        device_id: who proves.
        nonce: fresh for every proof. Nothing here consumes it: that is `nonces.consume`, once the proof is checked.
        timestamp: aware; floored to milliseconds.

    Raises:
        InvalidArgumentError: the timestamp is no datetime or has no time zone, or the id or nonce has a lone surrogate.
    """
    if not isinstance(timestamp, datetime) or timestamp.utcoffset() is None:
        raise InvalidArgumentError("timestamp must be an aware datetime: give it a time zone, as in datetime.now(UTC)")
    return _canonical(["homeagent-proof-1", device_id, nonce, (timestamp - _EPOCH) // _MILLISECOND])


@clears_locals
def make_proof(
    secret: SecretStr | str,
    parameters: ProofParameters,
    message: bytes,
    *,
    minimum_iterations: int = MIN_ITERATIONS,
) -> bytes:
    """Prove that one holds a secret, without sending it. The device's side.

    For many proofs, or a proof and then the gateway's signature, derive once: `derive_proof_keys(...).prove(message)`.

    Args:
        secret: the device's own.
        parameters: what the gateway told (`verifier_parameters`).
        message: see `proof_message`.
        minimum_iterations: see `derive_proof_keys`.

    Returns:
        32 bytes.

    Raises:
        InvalidArgumentError: it is no usable secret (the message doesn't show it), or the gateway asks for fewer
            iterations than `minimum_iterations`.
    """
    return derive_proof_keys(secret, parameters, minimum_iterations=minimum_iterations).prove(message)


# Takes the place of a verifier that is not there or is damaged, so that the same is computed for nobody's device.
_DECOY_VERIFIER = _Verifier(
    ProofParameters(secrets.token_bytes(_SALT_BYTES), _GENERATED_ITERATIONS),
    secrets.token_bytes(_KEY_BYTES),
    secrets.token_bytes(_KEY_BYTES),
)
_DECOY_VERIFIER_TEXT = _format_verifier(
    _DECOY_VERIFIER.parameters, _DECOY_VERIFIER.stored_key, _DECOY_VERIFIER.server_key
)


def check_proof(verifier: str | None, message: bytes, proof: bytes) -> bool:
    """Tell whether a proof was made for this message with the secret of this verifier. The gateway's side.

    It computes the same for a good proof, a wrong one and a device that doesn't exist: two hashes and the reading of a
    verifier, whatever the iterations. A proof says nothing of when it was made: judge the timestamp in the message, and
    consume its nonce.

    Args:
        verifier: the device's, or None where there is no such device. A damaged one never matches.
        message: see `proof_message`; made anew from what the device claims, never taken from it as bytes.
        proof: 32 bytes; of any other length it is false.
    """
    parsed = _parse_verifier(_DECOY_VERIFIER_TEXT if verifier is None else verifier)
    known = verifier is not None and parsed is not None
    stored_key = (parsed or _DECOY_VERIFIER).stored_key
    well_formed = len(proof) == _KEY_BYTES
    client_key = _xor(_hmac_sha256(stored_key, message), proof if well_formed else bytes(_KEY_BYTES))
    same = hmac.compare_digest(hashlib.sha256(client_key).digest(), stored_key)
    return same and well_formed and known


def parameters_for(device_id: str, verifier: str | None, *, key: bytes) -> ProofParameters:
    """Return the salt and iterations that a gateway tells to a caller who claims to be this device.

    The same is computed for every device and for an absent one: one made-up answer, and the reading of one verifier.

    Args:
        device_id: the id that is presented.
        verifier: the device's, or None if the device is absent or has no verifier. A damaged one counts as None.
        key: as in `fake_parameters`; the answer for None is made from it.
    """
    made_up = fake_parameters(device_id, key)
    parsed = _parse_verifier(_DECOY_VERIFIER_TEXT if verifier is None else verifier)
    return made_up if verifier is None or parsed is None else parsed.parameters


@clears_locals
def server_signature(verifier: str, message: bytes) -> bytes:
    """Sign the message of a proof, so that the device knows that it spoke with its gateway. The gateway's side.

    Give it only for a proof that `check_proof` found good: it lets guesses at a human's secret be tried.

    Returns:
        32 bytes, the ServerSignature of RFC 5802 section 3.

    Raises:
        InvalidArgumentError: it is no verifier; the message doesn't show it.
    """
    return _hmac_sha256(_require_verifier(verifier).server_key, message)


@clears_locals
def check_server_signature(
    secret: SecretStr | str, parameters: ProofParameters, message: bytes, signature: bytes
) -> bool:
    """Tell whether the gateway's signature is that of who holds the verifier of this secret. The device's side.

    Args:
        secret: the device's own.
        parameters: those that the proof was made with.
        message: the message of that proof.
        signature: what the gateway answered; of another length than 32 bytes it is false.

    Raises:
        InvalidArgumentError: it is no usable secret; the message doesn't show it.
    """
    return derive_proof_keys(secret, parameters).recognises(message, signature)
