"""Pair devices, check their secrets and proofs, and rotate their secrets.

Do not compute a slow hash inside a unit of work, because other writers would wait.
"""

from __future__ import annotations

import logging
from datetime import datetime, timedelta

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
    ConflictError,
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
from homeagent.models.types import check_duration, check_label, check_new_secret, check_searched, check_timestamp, later
from homeagent.retry import Runner
from homeagent.scram import ProofParameters, check_proof, make_verifier, parameters_for, proof_message
from homeagent.stores.device_statements import SecretHashes
from homeagent.stores.store import check_kind
from homeagent.unit_of_work import UnitOfWork

logger: logging.Logger = logging.getLogger("homeagent")

_DENIED = SecretCheck("denied")

_DECIDE = "show it again, then decide. The secret was not changed"


class Pairing:
    """Implementation of those methods of `Database` that use the secrets of devices."""

    def __init__(self, runner: Runner, clock: Clock, limits: Limits) -> None:
        self._runner = runner
        self._clock = clock
        self._max_pending = limits.pending_devices
        self._waiting_hashes = limits.waiting_hashes
        self._failed_checks = FailedChecks(clock, per_minute=limits.failed_checks_per_minute)

    def pair(self, request: DevicePair) -> PairedDevice:
        """Add a pending device (see `Database.pair`)."""
        check_kind(request, DevicePair, "request")
        # Check the id and the limit before the slow hash, so that a refusal costs no hash.
        if self._find_device(request.id) is not None:
            raise DeviceExistsError(request.id)
        limit = self._max_pending
        if self._runner.run(lambda unit: unit.devices.count_pending(limit=limit + 1), read_only=True) >= limit:
            raise PendingLimitError(limit)
        secret = generate_secret() if request.shared_secret is None else request.shared_secret
        create = DeviceCreate(
            id=request.id,
            role=request.role,
            shared_secret_hash=hash_secret(secret, waiting=self._waiting_hashes),
            metadata=request.metadata_,
            proof_verifier=_make_verifier(secret),
        )

        def add(unit: UnitOfWork) -> Device:
            try:
                device = unit.devices.create(create)
                # Check the limit after the insert. If the unit runs a second time, the insert raises DeviceExistsError,
                # and the limit can't refuse the device of the first run.
                unit.devices.require_pending_room(limit)
                # Do not delete a key in progress: a call of `run_once()` with the key can be pairing the device.
                unit.idempotency_keys.delete_ended(create.id)
                return device
            except DeviceExistsError:
                stored = unit.devices.find_by_id(create.id)
                # If the hash and the verifier are equal, an earlier run of the unit stored the device, because the hash
                # or the verifier has a random salt.
                if stored is None or _hash_and_verifier(stored) != (create.shared_secret_hash, create.proof_verifier):
                    raise
                return stored

        return PairedDevice(device=self._runner.run(add, idempotent=True), shared_secret=secret)

    def check_secret(self, device_id: str, shared_secret: SecretStr | str) -> SecretCheck:
        """Check a secret, and return the state of the device (see `Database.check_secret`)."""
        check_searched(device_id, "device_id")
        if not needs_slow_hash(shared_secret):
            return self._runner.run(lambda unit: self._check_fast(unit, device_id, shared_secret), read_only=True)
        with self._failed_checks.attempt(device_id) as attempt:
            checked = self._check_slowly(device_id, shared_secret)
            attempt.failed = checked.device is None
        return checked

    def _check_fast(self, unit: UnitOfWork, device_id: str, shared_secret: SecretStr | str) -> SecretCheck:
        # For a wrong secret, run one statement and at most one hash, even if the device is absent.
        stored = _valid_hashes(unit.devices.find_secret_hashes(device_id), self._clock())
        device = unit.devices.find_by_id(device_id) if check_secret(shared_secret, stored) else None
        return _DENIED if device is None else SecretCheck(device.status.value, device)

    def _check_slowly(self, device_id: str, shared_secret: SecretStr | str) -> SecretCheck:
        # For a wrong secret, run one statement and one hash, even if the device is absent.
        while True:
            now = self._clock()
            stored = _valid_hashes(
                self._runner.run(lambda unit: unit.devices.find_secret_hashes(device_id), read_only=True), now
            )
            match = check_secret(shared_secret, stored, waiting=self._waiting_hashes)
            if match.matched is None:
                return _DENIED
            # Read the device again, because another caller can change or delete the device while the hash is computed.
            device = self._find_device(device_id)
            if device is None:
                return _DENIED
            if stored[match.matched] in _valid_hashes(device, self._clock()):
                # Do not replace the hash of a pending device. An approval can require an unchanged hash.
                if device.approved and match.matched == 0 and match.replacement is not None:
                    self._rehash(device_id, stored[0], match.replacement)
                return SecretCheck(device.status.value, device)
            if device.shared_secret_hash == stored[0]:
                return _DENIED  # The old secret expired during the check.
            # Another caller has replaced the hash. The new hash can be a hash of the same secret with different costs,
            # so check the presented secret again.

    def _find_device(self, device_id: str) -> Device | None:
        return self._runner.run(lambda unit: unit.devices.find_by_id(device_id), read_only=True)

    def _rehash(self, device_id: str, old: str, new: str) -> None:
        """Replace a hash by a hash with current parameters. Only log an error, because the check has succeeded."""
        try:
            self._runner.run(
                lambda unit: unit.devices.rehash_secret(device_id, expected_secret_hash=old, secret_hash=new),
                idempotent=True,
            )
        # The cause of a UnitStateError is an open write unit of this thread.
        except (DatabaseError, UnitStateError) as error:
            logger.warning(
                "a hash could not be replaced by a hash with newer parameters; the next check tries again: %s",
                error,
                extra={"event": "rehash_failed", "error": type(error).__name__},
            )

    def proof_parameters(self, device_id: str) -> ProofParameters:
        """Return parameters for proofs, even for an absent device (see `Database.proof_parameters`)."""
        key, verifier = self._runner.run(lambda unit: unit.devices.find_proof_secrets(device_id), read_only=True)
        return parameters_for(_encodable(device_id), verifier, key=key.encode())

    def check_proof(self, device_id: str, *, nonce: str, timestamp: datetime, proof: bytes) -> SecretCheck:
        """Check a proof, and return the state of the device (see `Database.check_proof`)."""
        check_searched(device_id, "device_id")
        check_label(nonce, "nonce")
        check_timestamp(timestamp, "timestamp")
        if not isinstance(proof, (bytes, bytearray)):
            raise InvalidArgumentError(f"proof must be bytes, not {type(proof).__name__}")
        verifier = self._runner.run(lambda unit: unit.devices.find_proof_verifier(device_id), read_only=True)
        message = proof_message(device_id=_encodable(device_id), nonce=nonce, timestamp=timestamp)
        if not check_proof(verifier, message, proof):
            return _DENIED
        device = self._find_device(device_id)
        # Another caller can delete the device or rotate the secret after the verifier was read.
        if device is None or device.proof_verifier != verifier:
            return _DENIED
        return SecretCheck(device.status.value, device)

    def rotate_secret(
        self,
        device_id: str,
        shared_secret: SecretStr | None = None,
        *,
        overlap: timedelta = timedelta(0),
        expected_secret_hash: str | None = None,
        expected_paired_at: datetime | None = None,
    ) -> SecretStr:
        """Give a device a new secret (see `Database.rotate_secret`)."""
        check_duration(overlap, "overlap", zero=True)
        if expected_paired_at is not None:
            expected_paired_at = check_timestamp(expected_paired_at, "expected_paired_at")
        secret = generate_secret() if shared_secret is None else check_new_secret(shared_secret)
        while True:
            current = self._find_device(device_id)
            if current is None:
                raise DeviceNotFoundError(device_id)
            if overlap and not current.approved:
                raise DeviceNotApprovedError(device_id)  # set_secret() checks the approval again
            old = current.shared_secret_hash
            # During an overlap, a check needs only one slow hash if the two stored hashes have the same salt.
            new = hash_secret(secret, beside=old if overlap else None, waiting=self._waiting_hashes)
            verifier = _make_verifier(secret)

            def replace(unit: UnitOfWork, old: str = old, new: str = new, verifier: str | None = verifier) -> bool:
                device = unit.devices.find_by_id(device_id)
                if device is None:
                    raise DeviceNotFoundError(device_id)
                if new != old and _hash_and_verifier(device) == (new, verifier):
                    return True  # an earlier run of the unit stored the hash
                if expected_paired_at not in (None, device.paired_at):
                    raise ConflictError(f"device {device_id!r} was paired at another time: {_DECIDE}")
                if expected_secret_hash not in (None, device.shared_secret_hash):
                    raise ConflictError(f"device {device_id!r} has another secret now: {_DECIDE}")
                return unit.devices.set_secret(
                    device_id,
                    expected_secret_hash=old,
                    secret_hash=new,
                    proof_verifier=verifier,
                    # If the new secret equals the old secret, no overlap begins, and an earlier overlap ends.
                    previous_until=later(self._clock(), overlap, "overlap") if overlap and new != old else None,
                )

            # If another caller has rotated the secret, replace() returns False. Begin again with the newly stored hash.
            if self._runner.run(replace, idempotent=True):
                return secret


def _make_verifier(secret: SecretStr) -> str | None:
    # An attacker could guess a human's secret faster with a verifier (PBKDF2) than with the hash (Argon2id).
    return make_verifier(secret) if is_generated(secret) else None


def _encodable(device_id: str) -> str:
    """Replace each lone surrogate in an id. No device has an id with a lone surrogate."""
    return device_id.encode(errors="replace").decode()


def _hash_and_verifier(device: Device) -> tuple[str, str | None]:
    return device.shared_secret_hash, device.proof_verifier


def _valid_hashes(device: Device | SecretHashes, now: datetime) -> list[str]:
    """Return the hash of the current secret and, during an overlap, the hash of the previous secret."""
    hashes = [device.shared_secret_hash]
    until = device.previous_secret_expires_at
    if device.previous_secret_hash is not None and until is not None and until > now:
        hashes.append(device.previous_secret_hash)
    return hashes
