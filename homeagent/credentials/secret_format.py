"""Format and generation of secrets. homeagent does not strip or normalise a secret."""

from __future__ import annotations

import base64
import re
import secrets
import zlib

from pydantic import SecretStr

from homeagent.errors import InvalidArgumentError

MAX_SECRET_CHARACTERS = 512
MAX_SECRET_BYTES = 1024

# The pattern finds control characters and lone surrogates. For a surrogate, `str.encode()` would raise an error that
# shows the secret.
_UNUSABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def reveal(secret: SecretStr | str) -> str:
    """Return the text of a secret. For a value of another type, raise InvalidArgumentError."""
    if isinstance(secret, str):
        return secret
    if isinstance(secret, SecretStr):
        return secret.get_secret_value()
    raise InvalidArgumentError(f"a secret must be a str or a SecretStr, not {type(secret).__name__}")


def what_is_wrong(text: str) -> str | None:
    """Return the reason why a secret is unusable, or None. The reason does not show the secret."""
    if not text:
        return "a secret must not be empty: choose a secret, or leave it out to get a generated secret"
    if len(text) > MAX_SECRET_CHARACTERS:
        return f"a secret must have at most {MAX_SECRET_CHARACTERS} characters, and this has {len(text):,}"
    if _UNUSABLE.search(text):
        return "a secret must have no control character and no lone surrogate: remove it"
    if len(text.encode()) > MAX_SECRET_BYTES:
        return f"a secret must be at most {MAX_SECRET_BYTES:,} bytes of UTF-8: take a shorter one"
    return None


def secret_text(secret: SecretStr | str) -> str:
    """Return the text of a usable secret, or raise InvalidArgumentError. The error does not show the secret."""
    text = reveal(secret)
    problem = what_is_wrong(text)
    if problem is not None:
        raise InvalidArgumentError(problem)
    return text


_GENERATED_PREFIX = "ha1_"
_GENERATED = re.compile(_GENERATED_PREFIX + "([A-Za-z0-9_-]{48})")
_RANDOM_BYTES = 32


def _checksum(random: bytes) -> bytes:
    """Return the CRC-32 of the prefix and the given random bytes."""
    return zlib.crc32(_GENERATED_PREFIX.encode() + random).to_bytes(4, "big")


def generate_secret() -> SecretStr:
    """Return a new secret of 256 random bits. The device must store the secret.

    The text is `ha1_` and a base64url text (RFC 4648 section 5). The base64url text contains the random bytes and a
    CRC-32.
    """
    random = secrets.token_bytes(_RANDOM_BYTES)
    # In base64url, 36 bytes are exactly 48 characters. So different texts decode to different bytes.
    return SecretStr(_GENERATED_PREFIX + base64.urlsafe_b64encode(random + _checksum(random)).decode())


def is_generated(secret: SecretStr | str) -> bool:
    """Return True if a secret has the format of `generate_secret()`.

    Create secrets in this format only from 256 random bits. An attacker could guess a weaker secret from the stored
    SHA-256. A secret that a person chose has a right checksum with probability 2**-32.
    """
    found = _GENERATED.fullmatch(reveal(secret))
    if found is None:
        return False
    decoded = base64.urlsafe_b64decode(found[1])
    return decoded[_RANDOM_BYTES:] == _checksum(decoded[:_RANDOM_BYTES])


def needs_slow_hash(secret: SecretStr | str) -> bool:
    """Return True if a check of the secret runs Argon2."""
    return what_is_wrong(reveal(secret)) is None and not is_generated(secret)
