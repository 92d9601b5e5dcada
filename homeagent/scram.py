"""Proofs of secrets. A device proves that it has a secret, without sending the secret. The module does not use a
database.

The computation follows SCRAM (RFC 5802 section 3, with SHA-256 from RFC 7677). The messages differ from SCRAM's
messages:

1. At pairing, `make_verifier()` makes a verifier from the secret. The gateway stores the verifier, which does not
   contain the secret.
2. The device asks for the verifier's salt and iterations. The method `Database.proof_parameters()` also answers for an
   absent device.
3. The device makes a proof by `proof_message()` and `make_proof()`. The device sends its id, a new nonce, the time and
   the proof.
4. The gateway calls `check_proof()`, consumes the nonce, and sends the result of `server_signature()`. The device
   checks the signature by `ProofKeys.recognises()`. A right signature proves that the gateway has the verifier.

| attacker has | attacker can |
|---|---|
| the messages | guess a secret that a human chose, but read neither the secret nor the verifier |
| the verifier | guess a secret that a human chose, or impersonate the gateway |
| the verifier and the messages of one proof | make proofs until the secret is rotated (RFC 5802 section 9) |

An attacker can't guess a generated secret. Use TLS, because an attacker could forward a proof with another body. A
proof covers only the device's id, the nonce and the time.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass, field
from datetime import datetime

from pydantic import SecretStr

from homeagent.canonical_json import canonical_json
from homeagent.credentials import is_generated, secret_text
from homeagent.errors import InvalidArgumentError
from homeagent.frame_locals import clears_locals
from homeagent.models.proof_parameters import MIN_ITERATIONS, ProofParameters
from homeagent.models.types import check_searched, check_timestamp, to_milliseconds

__all__ = [
    "ProofKeys",
    "ProofParameters",
    "check_proof",
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
# OWASP's Password Storage Cheat Sheet recommends 600,000 iterations for PBKDF2 with HMAC-SHA-256.
_HUMAN_ITERATIONS = 600_000
_SALT_BYTES = 16

_KEY_BYTES = hashlib.sha256().digest_size
_MIN_FAKE_KEY_BYTES = 16


def _hmac_sha256(key: bytes, message: bytes) -> bytes:
    """Return HMAC-SHA-256 (HMAC(key, str) in RFC 5802 section 2.2)."""
    return hmac.digest(key, message, "sha256")


def _xor(left: bytes, right: bytes) -> bytes:
    """Return the bitwise XOR of two byte strings. If the lengths differ, raise ValueError."""
    return bytes(a ^ b for a, b in zip(left, right, strict=True))


@dataclass(frozen=True, slots=True)
class ProofKeys:
    """Keys derived from a secret and its proof parameters. Both keys must stay secret. A device can make many proofs
    with the same keys (RFC 5802 section 5.1).
    """

    client_key: bytes = field(repr=False)
    server_key: bytes = field(repr=False)

    @property
    def stored_key(self) -> bytes:
        """SHA-256 hash of the client key. The gateway stores this hash instead of the client key."""
        return hashlib.sha256(self.client_key).digest()

    def prove(self, message: bytes) -> bytes:
        """Return the proof for a message. The proof has 32 bytes (ClientProof in RFC 5802 section 3)."""
        return _xor(self.client_key, _hmac_sha256(self.stored_key, message))

    def recognises(self, message: bytes, signature: bytes) -> bool:
        """Return True if the gateway's signature is right for the message of the device's proof."""
        return hmac.compare_digest(_hmac_sha256(self.server_key, message), signature)


@clears_locals
def derive_proof_keys(secret: SecretStr | str, parameters: ProofParameters) -> ProofKeys:
    """Derive the keys of a secret. The derivation takes about 2 ms for 4,096 iterations, and 0.2 s for 600,000.

    Args:
        secret: generated secret. A false gateway could ask for few iterations, and guess a human's secret. The function
            does not apply SASLprep (RFC 5802) to non-ASCII characters.
        parameters: parameters of the verifier, which the device gets from the gateway.

    Raises:
        InvalidArgumentError: if the secret is invalid. The error message does not show the secret.
    """
    salted = hashlib.pbkdf2_hmac("sha256", secret_text(secret).encode(), parameters.salt, parameters.iterations)
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

    @property
    def text(self) -> str:
        parts = self.parameters.salt, self.stored_key, self.server_key
        salt, stored, server = (base64.b64encode(part).decode() for part in parts)
        return f"SCRAM-SHA-256${self.parameters.iterations}:{salt}${stored}:{server}"


def _parse_verifier(verifier: str) -> _Verifier | None:
    """Return the parts of a verifier, or None if the verifier is damaged."""
    found = _VERIFIER.fullmatch(verifier)
    if found is None:
        return None
    try:
        salt, stored_key, server_key = (base64.b64decode(part) for part in found.groups()[1:])
        parsed = _Verifier(ProofParameters(salt, int(found[1])), stored_key, server_key)
    except ValueError:
        # The base64 padding is incomplete, or a parameter is out of range.
        return None
    # Refuse another base64 text for the same bytes (RFC 4648 section 3.5).
    return parsed if parsed.text == verifier else None


def _require_verifier(verifier: str) -> _Verifier:
    """Return the parts of a verifier. Raise InvalidArgumentError if the verifier is damaged or None."""
    parsed = _parse_verifier(verifier) if isinstance(verifier, str) else None
    if parsed is None:
        raise InvalidArgumentError(
            "this is not a verifier (SCRAM-SHA-256$<iterations>:<salt>$<StoredKey>:<ServerKey>): make a verifier with "
            "make_verifier(), and pair the device again if a stored verifier is damaged"
        )
    return parsed


@clears_locals
def make_verifier(secret: SecretStr | str) -> str:
    """Make a verifier, by which a gateway checks proofs. A verifier does not contain the secret.

    Args:
        secret: 1 to 512 characters, at most 1,024 bytes of UTF-8, without control characters. For a generated secret,
            the verifier has 4,096 iterations of PBKDF2, as for absent devices (see `fake_parameters()`). For any other
            secret, the verifier has 600,000 iterations. This number shows an attacker that the device exists.

    Returns:
        Text of the form `SCRAM-SHA-256$<iterations>:<salt>$<StoredKey>:<ServerKey>`, at most 256 characters. The salt
        and the keys are in base64. PostgreSQL stores passwords in the same format (see pg_authid in PostgreSQL's
        manual).

    Raises:
        InvalidArgumentError: if the secret is invalid. The error message does not show the secret.
    """
    iterations = _GENERATED_ITERATIONS if is_generated(secret) else _HUMAN_ITERATIONS
    parameters = ProofParameters(secrets.token_bytes(_SALT_BYTES), iterations)
    keys = derive_proof_keys(secret, parameters)
    return _Verifier(parameters, keys.stored_key, keys.server_key).text


def verifier_parameters(verifier: str) -> ProofParameters:
    """Return the salt and the iterations of a verifier. The gateway sends both to the device.

    Raises:
        InvalidArgumentError: if the verifier is damaged or None. The error message does not show the verifier.
    """
    return _require_verifier(verifier).parameters


_PROCESS_KEY = secrets.token_bytes(_KEY_BYTES)


def fake_parameters(device_id: str, key: bytes | None = None) -> ProofParameters:
    """Return invented parameters for an absent device. The result looks like the answer for an existing device.

    The same arguments always give the same result. The answer for an existing device changes with each rotation of its
    secret. Different answers before and after a rotation show that the device exists.

    Args:
        device_id: device id in the request.
        key: at least 16 random bytes, by default a random key of the process. Keep the key private, and do not change
            the key. A new key changes only the answers for absent devices. By comparing answers, an attacker could find
            the existing devices.

    Raises:
        InvalidArgumentError: if the key is too short, or the id has a lone surrogate.
    """
    if key is None:
        key = _PROCESS_KEY
    elif len(key) < _MIN_FAKE_KEY_BYTES:
        raise InvalidArgumentError(f"key must be at least {_MIN_FAKE_KEY_BYTES} random bytes")
    derived = _hmac_sha256(key, b"homeagent-fake-parameters-1" + canonical_json([device_id], "device ids"))
    return ProofParameters(derived[:_SALT_BYTES], _GENERATED_ITERATIONS)


@clears_locals
def proof_message(*, device_id: str, nonce: str, timestamp: datetime) -> bytes:
    """Return the message for a proof. The device and the gateway compute the message from the same values.

    The message is the JSON array `["homeagent-proof-1", device_id, nonce, milliseconds]` in UTF-8. The array has no
    spaces and no unnecessary escapes. A device can use JavaScript's `JSON.stringify()` or RFC 8785 (JSON
    Canonicalization Scheme).

    Args:
        device_id: id of the device.
        nonce: nonce of the proof. The gateway accepts each nonce only once.
        timestamp: aware datetime. The function floors the timestamp to milliseconds.

    Raises:
        InvalidArgumentError: if the timestamp is not an aware datetime, or if the id or the nonce is not text. Another
            cause is a lone surrogate in the id or the nonce.
    """
    milliseconds = to_milliseconds(check_timestamp(timestamp, "timestamp"))
    texts = check_searched(device_id, "device_id"), check_searched(nonce, "nonce")
    return canonical_json(["homeagent-proof-1", *texts, milliseconds], "the id and the nonce")


@clears_locals
def make_proof(secret: SecretStr | str, parameters: ProofParameters, message: bytes) -> bytes:
    """Return the 32-byte proof of a secret. Use this function in a device.

    The message is the result of `proof_message()`. For the other arguments and for the errors, see
    `derive_proof_keys()`. For several proofs, derive the keys once, and call `ProofKeys.prove()`.
    """
    return derive_proof_keys(secret, parameters).prove(message)


# A stand-in for an absent or damaged verifier. All checks must take the same time.
_DECOY = _Verifier(
    ProofParameters(secrets.token_bytes(_SALT_BYTES), _GENERATED_ITERATIONS),
    secrets.token_bytes(_KEY_BYTES),
    secrets.token_bytes(_KEY_BYTES),
)
_DECOY_TEXT = _DECOY.text


def check_proof(verifier: str | None, message: bytes, proof: bytes) -> bool:
    """Return True if the proof is right for the message and the verifier. Use this function in a gateway.

    The function takes the same time for right proofs, wrong proofs and absent devices. The caller must also check the
    timestamp and consume the nonce. Otherwise an attacker could send an old proof again.

    Args:
        verifier: verifier of the device. If the verifier is None or damaged, every proof is wrong.
        message: result of `proof_message()`. The gateway must not use a message that the device has sent.
        proof: 32 bytes. A proof that does not have 32 bytes is wrong.
    """
    parsed = _parse_verifier(_DECOY_TEXT if verifier is None else verifier)
    stored_key = (parsed or _DECOY).stored_key
    well_formed = len(proof) == _KEY_BYTES
    client_key = _xor(_hmac_sha256(stored_key, message), proof if well_formed else bytes(_KEY_BYTES))
    same = hmac.compare_digest(hashlib.sha256(client_key).digest(), stored_key)
    return same and well_formed and verifier is not None and parsed is not None


def parameters_for(device_id: str, verifier: str | None, *, key: bytes) -> ProofParameters:
    """Return the parameters that a gateway sends to a device with this id.

    If the verifier is None or damaged, the function returns `fake_parameters(device_id, key)`. The duration of the call
    does not show whether a device exists.
    """
    made_up = fake_parameters(device_id, key)
    parsed = _parse_verifier(_DECOY_TEXT if verifier is None else verifier)
    return made_up if verifier is None or parsed is None else parsed.parameters


@clears_locals
def server_signature(verifier: str, message: bytes) -> bytes:
    """Sign the message of a proof for the device. Use this function in a gateway.

    The signature has 32 bytes (ServerSignature in RFC 5802 section 3). Send the signature only after `check_proof()`
    has returned True. With the signature, an attacker can check guesses at a human's secret.

    Raises:
        InvalidArgumentError: if the verifier is damaged. The error message does not show the verifier.
    """
    return _hmac_sha256(_require_verifier(verifier).server_key, message)
