"""Format, hashing and checks of the secrets of devices. This package does not use the database.

A *generated* secret comes from `generate_secret`, has 256 random bits and can't be guessed. The database stores the
SHA-256 of a generated secret. A secret that is not generated could be guessed, because a person can have chosen the
text. The database stores an Argon2id hash (RFC 9106) of a secret that is not generated.

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
