"""Devices and their secrets: pair, verify, rotate.

A slow hash is always computed before or after a unit of work and never inside one, where it would hold the writers up.
"""

from __future__ import annotations

import logging
from datetime import datetime, timedelta

from pydantic import SecretStr

from homeagent.clock import Clock
from homeagent.credentials import check_secret, generate_secret, hash_secret, is_generated
from homeagent.errors import (
    DatabaseError,
    DeviceExistsError,
    DeviceNotFoundError,
    InvalidArgumentError,
    UnitStateError,
)
from homeagent.models.device import Device
from homeagent.models.shapes import DeviceCreate, DevicePair, PairedDevice
from homeagent.models.types import check_duration, check_identifier, check_instant, check_label, later
from homeagent.running import Runner
from homeagent.scram import check_proof, make_verifier, proof_message
from homeagent.stores.store import check_kind
from homeagent.unit_of_work import UnitOfWork

__all__ = ["PairedDevice", "Pairing"]

logger = logging.getLogger("homeagent")


class Pairing:
    """What `Database` does with the secrets of devices.

    Args:
        runner: does units of work.
        clock: tells whether the overlap of a rotation is over.
    """

    def __init__(self, runner: Runner, clock: Clock) -> None:
        self._runner = runner
        self._clock = clock

    def pair(self, request: DevicePair) -> PairedDevice:
        """Add a device that waits for its approval; see `Database.pair`."""
        check_kind(request, DevicePair, "request")
        # Asked before the hash is made, which is slow on purpose; `create` decides.
        if self._find_device(request.id) is not None:
            raise DeviceExistsError(request.id)
        secret = generate_secret() if request.shared_secret is None else request.shared_secret
        create = DeviceCreate(
            id=request.id,
            role=request.role,
            shared_secret_hash=hash_secret(secret),
            metadata=request.metadata_,
            proof_verifier=_verifier(secret),
        )

        def add(unit: UnitOfWork) -> Device:
            try:
                device = unit.devices.create(create)
                # A call of a device that had this id may have ended after that was deleted. What is in progress may be
                # the call that pairs.
                unit.idempotency_keys.delete_ended(create.id)
                return device
            except DeviceExistsError:
                stored = unit.devices.find_by_id(create.id)
                # Nobody else has these two, of which one holds a salt: it was committed before, while the connection
                # was lost. The hash of a generated secret is the same for all who send that.
                if stored is None or _stored(stored) != (create.shared_secret_hash, create.proof_verifier):
                    raise
                return stored

        return PairedDevice(device=self._runner.run(add, idempotent=True), shared_secret=secret)

    def verify_secret(self, device_id: str, shared_secret: SecretStr | str) -> Device | None:
        """Return the device if it is approved and this is its secret; see `Database.verify_secret`."""
        check_identifier(device_id, "device_id")
        while True:
            now = self._clock()
            device = self._find_device(device_id)
            stored = [] if device is None else _serving_hashes(device, now)
            check = check_secret(shared_secret, stored)
            if device is None or check.matched is None or not device.approved:
                return None
            # It may have been revoked, rotated or deleted while the hash was computed.
            current = self._find_device(device_id)
            if current is None or not current.approved or current.paired_at != device.paired_at:
                return None
            if stored[check.matched] in _serving_hashes(current, self._clock()):
                if check.matched == 0 and check.replacement is not None:
                    self._rehash(device_id, stored[0], check.replacement)
                return current
            if current.shared_secret_hash == device.shared_secret_hash:
                return None  # the overlap ended meanwhile
            # Another caller replaced the hash, perhaps by one of the same secret under newer parameters: look again.

    def _find_device(self, device_id: str) -> Device | None:
        return self._runner.run(lambda unit: unit.devices.find_by_id(device_id), read_only=True)

    def _rehash(self, device_id: str, old: str, new: str) -> None:
        """Store a hash made under newer parameters. The secret was right all the same where that can't be done now."""
        try:
            self._runner.run(
                lambda unit: unit.devices.rehash_secret(device_id, expected_secret_hash=old, secret_hash=new),
                idempotent=True,
            )
        except (DatabaseError, UnitStateError) as error:  # the latter where this thread has a write unit open
            logger.warning(
                "the hash of a device's secret could not be made anew, and will be at the next check: %s",
                error,
                extra={"event": "rehash_failed", "error": type(error).__name__},
            )

    def verify_proof(self, device_id: str, *, nonce: str, timestamp: datetime, proof: bytes) -> Device | None:
        """Return the device if it is approved and the proof is made with its secret; see `Database.verify_proof`."""
        check_identifier(device_id, "device_id")
        check_label(nonce, "nonce")
        check_instant(timestamp, "timestamp")
        if not isinstance(proof, (bytes, bytearray)):
            raise InvalidArgumentError(f"proof must be bytes, not {type(proof).__name__}")
        device = self._find_device(device_id)
        message = proof_message(device_id=device_id, nonce=nonce, timestamp=timestamp)
        proven = check_proof(None if device is None else device.proof_verifier, message, proof)
        return device if device is not None and proven and device.approved else None

    def rotate_secret(
        self, device_id: str, shared_secret: SecretStr | None = None, *, overlap: timedelta = timedelta(0)
    ) -> SecretStr:
        """Give a device a new secret; see `Database.rotate_secret`."""
        check_duration(overlap, "overlap", zero=True)
        secret = generate_secret() if shared_secret is None else shared_secret
        while True:
            current = self._find_device(device_id)
            if current is None:
                raise DeviceNotFoundError(device_id)
            old = current.shared_secret_hash
            # While both serve, one run of the slow hash must do for both; otherwise each gets a salt of its own.
            new = hash_secret(secret, beside=old if overlap else None)
            verifier = _verifier(secret)

            def replace(unit: UnitOfWork, old: str = old, new: str = new, verifier: str | None = verifier) -> bool:
                device = unit.devices.find_by_id(device_id)
                if device is None:
                    raise DeviceNotFoundError(device_id)
                if new != old and _stored(device) == (new, verifier):
                    return True  # committed before, while the connection was lost
                return unit.devices.set_secret(
                    device_id,
                    expected_secret_hash=old,
                    secret_hash=new,
                    proof_verifier=verifier,
                    # The same secret once more is no old one beside itself, and ends what served beside it.
                    previous_until=later(self._clock(), overlap, "overlap") if overlap and new != old else None,
                )

            # Where somebody else rotated it meanwhile, theirs is the old one now.
            if self._runner.run(replace, idempotent=True):
                return secret


def _verifier(secret: SecretStr) -> str | None:
    # A human's secret is guessed at the speed of the fastest hash that is stored of it. PBKDF2, which SCRAM is built
    # on, is guessed faster than Argon2id; for 256 random bits that makes no difference.
    return make_verifier(secret) if is_generated(secret) else None


def _stored(device: Device) -> tuple[str, str | None]:
    return device.shared_secret_hash, device.proof_verifier


def _serving_hashes(device: Device, now: datetime) -> list[str]:
    hashes = [device.shared_secret_hash]
    until = device.previous_secret_expires_at
    if device.previous_secret_hash is not None and until is not None and until > now:
        hashes.append(device.previous_secret_hash)
    return hashes
