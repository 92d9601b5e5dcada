"""Parameters that a gateway sends to a device for a proof. The module `homeagent/scram.py` computes the proofs."""

from __future__ import annotations

from dataclasses import dataclass

from homeagent.errors import InvalidArgumentError

MIN_ITERATIONS = 4_096
"""Minimum number of iterations (RFC 7677, section 4), enough for a generated secret."""

# A proof with 10 million iterations takes a few seconds. With more iterations, a malicious gateway could keep the
# device busy.
_MAX_ITERATIONS = 10_000_000
_MIN_SALT_BYTES = 8
_MAX_SALT_BYTES = 64


@dataclass(frozen=True, slots=True)
class ProofParameters:
    """Public parameters with which a device computes its proofs.

    Args:
        salt: random value of 8 to 64 bytes.
        iterations: number of rounds of PBKDF2 (RFC 8018), from 4,096 to 10,000,000.

    Raises:
        InvalidArgumentError: if a value is out of range or has a wrong type.
    """

    salt: bytes
    iterations: int

    def __post_init__(self) -> None:
        if not isinstance(self.salt, bytes) or type(self.iterations) is not int:
            raise InvalidArgumentError("salt must be bytes and iterations an int: decode the values of the gateway")
        if not _MIN_SALT_BYTES <= len(self.salt) <= _MAX_SALT_BYTES:
            raise InvalidArgumentError(f"salt must be {_MIN_SALT_BYTES} to {_MAX_SALT_BYTES} bytes")
        if not MIN_ITERATIONS <= self.iterations <= _MAX_ITERATIONS:
            raise InvalidArgumentError(f"iterations must be {MIN_ITERATIONS:,} to {_MAX_ITERATIONS:,}")
