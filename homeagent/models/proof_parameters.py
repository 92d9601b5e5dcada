"""What a gateway tells a device that is to make a proof; `homeagent.scram` has the proofs themselves."""

from __future__ import annotations

from dataclasses import dataclass

from homeagent.errors import InvalidArgumentError

__all__ = ["MIN_ITERATIONS", "ProofParameters"]

MIN_ITERATIONS = 4_096
"""The least that RFC 7677 section 4 allows, which is plenty for a secret that can't be guessed."""

# A gateway that asks for more would only want to keep the device busy: this much is a few seconds.
_MAX_ITERATIONS = 10_000_000
_MIN_SALT_BYTES = 8
_MAX_SALT_BYTES = 64


@dataclass(frozen=True, slots=True)
class ProofParameters:
    """What a device must know beside its secret to make a proof. It is no secret: anybody may ask for it.

    Args:
        salt: 8 to 64 bytes.
        iterations: rounds of PBKDF2 (RFC 8018), 4,096 to 10,000,000.

    Raises:
        InvalidArgumentError: one of them is out of its bounds, or of another type.
    """

    salt: bytes
    iterations: int

    def __post_init__(self) -> None:
        if not isinstance(self.salt, bytes) or type(self.iterations) is not int:
            raise InvalidArgumentError("salt must be bytes and iterations a whole number: decode what the gateway sent")
        if not _MIN_SALT_BYTES <= len(self.salt) <= _MAX_SALT_BYTES:
            raise InvalidArgumentError(f"salt must be {_MIN_SALT_BYTES} to {_MAX_SALT_BYTES} bytes")
        if not MIN_ITERATIONS <= self.iterations <= _MAX_ITERATIONS:
            raise InvalidArgumentError(f"iterations must be {MIN_ITERATIONS:,} to {_MAX_ITERATIONS:,}")
