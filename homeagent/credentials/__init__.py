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

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from homeagent.credentials.secret_format import (
    MAX_SECRET_BYTES,
    MAX_SECRET_CHARACTERS,
    generate_secret,
    is_generated,
    secret_text,
)

if TYPE_CHECKING:
    from pydantic import SecretStr

    from homeagent.credentials.hashing import SecretCheck, SecretHasher

__all__ = [
    "MAX_SECRET_BYTES",
    "MAX_SECRET_CHARACTERS",
    "SecretCheck",
    "SecretHasher",
    "check_secret",
    "generate_secret",
    "hash_secret",
    "is_generated",
    "secret_text",
]


def __getattr__(name: str) -> Any:
    # What hashes is imported with the first secret: a process that meets none starts sooner.
    if name in ("SecretCheck", "SecretHasher"):
        from homeagent.credentials import hashing

        return getattr(hashing, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def hash_secret(secret: SecretStr | str, *, beside: str | None = None) -> str:
    """Hash a secret for storing, with the default costs: see `SecretHasher.hash`.

    Args:
        secret: 1 to 512 characters, at most 1,024 bytes of UTF-8, no control character. It is taken as it is.
        beside: the stored hash that stays valid for a while beside the new one; None where none does.

    Returns:
        `sha256$…` for a generated secret, `$argon2id$…` for any other.

    Raises:
        InvalidArgumentError: it is no usable secret; the message doesn't show it.
        DatabaseBusyError: too many are being hashed, and no turn came within 30 seconds.
        MemoryError: the system would not give Argon2 the memory or the threads for a run.
    """
    from homeagent.credentials.hashing import default_hasher

    return default_hasher.hash(secret, beside=beside)


def check_secret(secret: SecretStr | str, stored: Sequence[str]) -> SecretCheck:
    """Check a presented secret against at most 2 stored hashes, with the default costs: see `SecretHasher.check`.

    Args:
        secret: as it was presented, of any length.
        stored: none for an unknown device, the present hash, and the one before it while that still serves.

    Returns:
        Which one matched, and what to store in its place if it is out of date.

    Raises:
        InvalidArgumentError: more than 2 hashes, or one string in place of a sequence.
        DatabaseBusyError: too many are being hashed, and no turn came within 30 seconds.
        MemoryError: the system would not give Argon2 the memory or the threads for a run.
    """
    from homeagent.credentials.hashing import default_hasher

    return default_hasher.check(secret, stored)
