"""Format, hashing and checks of the secrets of devices.

The database stores the SHA-256 of a generated secret. Any other secret is stored as an Argon2id hash (RFC 9106).
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
