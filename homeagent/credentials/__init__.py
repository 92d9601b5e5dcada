"""Format, hashing and checks of the secrets of devices. This package does not use the database.

A secret is of one of two kinds, which its text alone decides:

- A *generated* secret, which `generate_secret` returns, has 256 random bits and can't be guessed. The database stores a
  SHA-256 of the secret.
- Any other secret could be guessed, because a person can have chosen it. The database stores an Argon2id hash (RFC
  9106). The default costs are the RFC's second recommended option, with 64 MiB.

The duration of a check therefore depends only on the presented secret, with one exception (see `SecretHasher.check`).
The duration of a check does not reveal whether the device exists, which kind of secret it has, or whether an older
secret is valid.

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
