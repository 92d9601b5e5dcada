"""Secrets that devices present: what they look like, how they are hashed and how they are checked. No database.

There are two kinds, told apart by looking at the secret alone:

- A *generated* one (`generate_secret`) carries 256 random bits, more than anybody can try: one SHA-256 guards it.
- Any other is taken for a human's, which can be guessed: Argon2id guards it (RFC 9106), by default with the second
  recommended option of its section 4, 64 MiB.

The form decides when a secret is stored and when it is presented. So the time of a check follows from what the
caller presented, and tells nothing of the device: whether it exists, which kind of secret it has, whether an older one
still serves beside it. A human's secret costs one Argon2 run against any of them (`SecretHasher.check` names the one
exception), a generated one none.

A secret is taken as it is, neither stripped nor normalised. It has 1 to 512 characters, at most 1,024 bytes of UTF-8,
and no control character. How a device shows that it holds one without sending it is in `homeagent.scram`.
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
