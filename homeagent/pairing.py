"""Devices and their secrets: pair, verify, rotate.

A slow hash is always computed before or after a unit of work and never inside one, where it would hold the writers up.
"""

from __future__ import annotations

import logging
from datetime import datetime, timedelta
from functools import partial

from pydantic import SecretStr

from homeagent.clock import Clock
from homeagent.credentials import (
    FailedChecks,
    check_secret,
    generate_secret,
    hash_secret,
    is_generated,
    needs_slow_hash,
)
from homeagent.errors import (
    DatabaseError,
    DeviceExistsError,
    DeviceNotApprovedError,
    DeviceNotFoundError,
    InvalidArgumentError,
    PendingLimitError,
    UnitStateError,
)
from homeagent.models.device import Device
from homeagent.models.limits import Limits
from homeagent.models.schemas import DeviceCreate, DevicePair, PairedDevice, SecretCheck
from homeagent.models.types import (
    check_duration,
    check_identifier,
    check_label,
    check_new_secret,
    check_timestamp,
    later,
)
from homeagent.retry import Runner
from homeagent.scram import ProofParameters, check_proof, make_verifier, parameters_for, proof_message
from homeagent.stores.devices import SecretHashes
from homeagent.stores.store import check_kind
from homeagent.unit_of_work import UnitOfWork

__all__ = ["PairedDevice", "Pairing"]

logger = logging.getLogger("homeagent")

_DENIED = SecretCheck("denied")


class Pairing:
    """What `Database` does with the secrets of devices.

    Args:
        runner: does units of work.
        clock: tells whether the overlap of a rotation is over.
        limits: how many devices may wait, how many slow hashes, and how many checks may fail.
    """

    def __init__(self, runner: Runner, clock: Clock, limits: Limits) -> None:
        self._runner = runner
        self._clock = clock
        self._most_pending = limits.pending_devices
        self._waiting_hashes = limits.waiting_hashes
        self._failed_checks = FailedChecks(clock, per_minute=limits.failed_checks_per_minute)

    def pair(self, request: DevicePair) -> PairedDevice:
        """Add a device that waits for its approval; see `Database.pair`."""
        check_kind(request, DevicePair, "request")
        # Asked before the hash is made, which is slow on purpose; `create` decides.
        if self._find_device(request.id) is not None:
            raise DeviceExistsError(request.id)
        most = self._most_pending
        if self._runner.run(lambda unit: unit.devices.count_pending(limit=most + 1), read_only=True) >= most:
            raise PendingLimitError(most)
        secret = generate_secret() if request.shared_secret is None else request.shared_secret
        create = DeviceCreate(
            id=request.id,
            role=request.role,
            shared_secret_hash=hash_secret(secret, waiting=self._waiting_hashes),
            metadata=request.metadata_,
            proof_verifier=_verifier(secret),
        )

        def add(unit: UnitOfWork) -> Device:
            try:
                device = unit.devices.create(create)
                # After the insert: a unit that is run again, since its commit is unknown, finds its own device.
                unit.devices.require_pending_room(most)
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
        checked = self.check_secret(device_id, shared_secret)
        return checked.device if checked else None

    def check_secret(self, device_id: str, shared_secret: SecretStr | str) -> SecretCheck:
        """Tell whether this is the device's secret, and where the device stands; see `Database.check_secret`."""
        check_identifier(device_id, "device_id")
        if not needs_slow_hash(shared_secret):
            return self._check(device_id, shared_secret)
        with self._failed_checks.attempt(device_id) as attempt:
            checked = self._check(device_id, shared_secret)
            attempt.failed = checked.device is None
        return checked

    async def acheck_secret(self, device_id: str, shared_secret: SecretStr | str) -> SecretCheck:
        """Do as `check_secret` does without blocking the event loop; see `Database.acheck_secret`."""
        check = partial(self.check_secret, device_id, shared_secret)
        return await self._runner.in_thread(check, slow=needs_slow_hash(shared_secret))

    async def apair(self, request: DevicePair) -> PairedDevice:
        """Do as `pair` does without blocking the event loop; see `Database.apair`."""
        return await self._runner.in_thread(partial(self.pair, request), slow=True)

    async def arotate_secret(
        self, device_id: str, shared_secret: SecretStr | None = None, *, overlap: timedelta = timedelta(0)
    ) -> SecretStr:
        """Do as `rotate_secret` does without blocking the event loop; see `Database.arotate_secret`."""
        return await self._runner.in_thread(
            partial(self.rotate_secret, device_id, shared_secret, overlap=overlap), slow=True
        )

    def _check(self, device_id: str, shared_secret: SecretStr | str) -> SecretCheck:
        while True:
            now = self._clock()
            # A wrong secret costs this statement and one hash, whether or not there is such a device.
            stored = _serving_hashes(
                self._runner.run(lambda unit: unit.devices.find_secret_hashes(device_id), read_only=True), now
            )
            match = check_secret(shared_secret, stored, waiting=self._waiting_hashes)
            if match.matched is None:
                return _DENIED
            # The device may have been revoked, rotated or deleted while the hash was computed.
            device = self._find_device(device_id)
            if device is None:
                return _DENIED
            if stored[match.matched] in _serving_hashes(device, self._clock()):
                # Not before its approval: the administrator may insist on the hash that was shown.
                if device.approved and match.matched == 0 and match.replacement is not None:
                    self._rehash(device_id, stored[0], match.replacement)
                return SecretCheck(device.status.value, device)
            if device.shared_secret_hash == stored[0]:
                return _DENIED  # the overlap ended meanwhile
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

    def proof_parameters(self, device_id: str) -> ProofParameters:
        """Return what the device must know to make a proof, whether or not it exists; see `Database`."""
        key, verifier = self._runner.run(lambda unit: unit.devices.find_proof_secrets(device_id), read_only=True)
        return parameters_for(device_id, verifier, key=key.encode())

    def verify_proof(self, device_id: str, *, nonce: str, timestamp: datetime, proof: bytes) -> Device | None:
        """Return the device if it is approved and the proof is made with its secret; see `Database.verify_proof`."""
        checked = self.check_proof(device_id, nonce=nonce, timestamp=timestamp, proof=proof)
        return checked.device if checked else None

    async def acheck_proof(self, device_id: str, *, nonce: str, timestamp: datetime, proof: bytes) -> SecretCheck:
        """Do as `check_proof` does without blocking the event loop; see `Database.acheck_proof`."""
        check = partial(self.check_proof, device_id, nonce=nonce, timestamp=timestamp, proof=proof)
        return await self._runner.in_thread(check, slow=False)

    def check_proof(self, device_id: str, *, nonce: str, timestamp: datetime, proof: bytes) -> SecretCheck:
        """Tell whether the proof is made with the device's secret, and where the device stands; see `Database`."""
        check_identifier(device_id, "device_id")
        check_label(nonce, "nonce")
        check_timestamp(timestamp, "timestamp")
        if not isinstance(proof, (bytes, bytearray)):
            raise InvalidArgumentError(f"proof must be bytes, not {type(proof).__name__}")
        verifier = self._runner.run(lambda unit: unit.devices.find_proof_verifier(device_id), read_only=True)
        message = proof_message(device_id=device_id, nonce=nonce, timestamp=timestamp)
        if not check_proof(verifier, message, proof):
            return _DENIED
        device = self._find_device(device_id)
        # The device may have been deleted or rotated since its verifier was read.
        if device is None or device.proof_verifier != verifier:
            return _DENIED
        return SecretCheck(device.status.value, device)

    def rotate_secret(
        self, device_id: str, shared_secret: SecretStr | None = None, *, overlap: timedelta = timedelta(0)
    ) -> SecretStr:
        """Give a device a new secret; see `Database.rotate_secret`."""
        check_duration(overlap, "overlap", zero=True)
        secret = generate_secret() if shared_secret is None else check_new_secret(shared_secret)
        while True:
            current = self._find_device(device_id)
            if current is None:
                raise DeviceNotFoundError(device_id)
            if overlap and not current.approved:
                raise DeviceNotApprovedError(device_id)  # before the slow hash; `set_secret` decides
            old = current.shared_secret_hash
            # While both serve, one run of the slow hash must do for both; otherwise each gets a salt of its own.
            new = hash_secret(secret, beside=old if overlap else None, waiting=self._waiting_hashes)
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


def _serving_hashes(device: Device | SecretHashes, now: datetime) -> list[str]:
    hashes = [device.shared_secret_hash]
    until = device.previous_secret_expires_at
    if device.previous_secret_hash is not None and until is not None and until > now:
        hashes.append(device.previous_secret_hash)
    return hashes
