"""Secrets of devices: their format, hashing and checks. This package does not use the database.

The text of a secret alone decides between two kinds:

- A *generated* secret (`generate_secret`) has 256 random bits, too many to guess. It is stored as a SHA-256.
- Any other secret may be chosen by a person and guessed. It is stored as an Argon2id hash (RFC 9106), by default with
  the second recommended option of section 4, 64 MiB.

The duration of a check therefore depends on the presented secret only (`SecretHasher.check` names the exception). It
does not reveal whether the device exists, which kind of secret the device has, or whether an older secret is valid.

`homeagent.scram` lets a device prove a secret without sending the secret.
"""

from homeagent.credentials.failed_checks import FAILED_CHECKS_PER_MINUTE, FailedChecks
from homeagent.credentials.hashing import WAITING_HASHES, SecretHasher, SecretMatch, check_secret, hash_secret
from homeagent.credentials.secret_format import (
    MAX_SECRET_BYTES,
    MAX_SECRET_CHARACTERS,
    generate_secret,
    is_generated,
    needs_slow_hash,
    secret_text,
)

__all__ = [
    "FAILED_CHECKS_PER_MINUTE",
    "MAX_SECRET_BYTES",
    "MAX_SECRET_CHARACTERS",
    "WAITING_HASHES",
    "FailedChecks",
    "SecretHasher",
    "SecretMatch",
    "check_secret",
    "generate_secret",
    "hash_secret",
    "is_generated",
    "needs_slow_hash",
    "secret_text",
]
