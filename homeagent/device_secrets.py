"""Methods of `Database` for the secrets and proofs of devices.

Do not compute a slow hash inside a unit: other writers would wait.
"""

from __future__ import annotations

import logging
from datetime import datetime, timedelta
from functools import partial

from pydantic import SecretStr

# Do not import `homeagent.models.schemas`, because the slow import delays the start.
from homeagent import models
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
    TooManyAttemptsError,
    UnitStateError,
)
from homeagent.frame_locals import clears_locals
from homeagent.models.device import Device
from homeagent.models.limits import Limits
from homeagent.models.types import check_duration, check_label, check_new_secret, check_searched, check_timestamp, later
from homeagent.retry import Runner
from homeagent.scram import check_proof, make_verifier, parameters_for, proof_message
from homeagent.stores.device_statements import SecretHashes
from homeagent.stores.store import check_kind
from homeagent.unit_of_work import UnitOfWork

logger: logging.Logger = logging.getLogger("homeagent")

_DECIDE = "show it again, then decide. The secret was not changed"


class DeviceSecrets:
    """Base class of `Database` with the methods for the secrets of devices. `Database.__init__` sets the attributes."""

    _runner: Runner
    _clock: Clock
    _limits: Limits
    _failed_checks: FailedChecks

    @clears_locals
    def pair(self, request: models.DevicePair) -> models.PairedDevice:
        """Add a device. The device is pending until an administrator approves the device. The store contains a hash,
        not the secret. For a generated secret, the store also contains a verifier.

        An earlier device can have used the same id. The method deletes the earlier device's completed and failed
        idempotency keys.

        Args:
            request: id, role and metadata of the device. Without a secret, homeagent generates a secret of 256 random
                bits.

        Returns:
            Device and secret. A program can't read the secret again later.

        Raises:
            DeviceExistsError: if a device with this id exists. The error reveals to a caller that the id exists.
            PendingLimitError: if the number of pending devices has reached `Limits.pending_devices`.
            TooManyAttemptsError: if the secret is chosen and the limit `Limits.waiting_hashes` is reached.
            DatabaseBusyError: if the slow hash of a chosen secret did not begin within 30 seconds.
        """
        check_kind(request, models.DevicePair, "request")
        # A refusal must not cost a slow hash.
        if self._find_device(request.id) is not None:
            raise DeviceExistsError(request.id)
        limit = self._limits.pending_devices
        if self._runner.run(lambda unit: unit.devices.count_pending(limit=limit + 1), read_only=True) >= limit:
            raise PendingLimitError(limit)
        secret = generate_secret() if request.shared_secret is None else request.shared_secret
        create = models.DeviceCreate(
            id=request.id,
            role=request.role,
            shared_secret_hash=hash_secret(secret, waiting=self._limits.waiting_hashes),
            metadata=request.metadata_,
            proof_verifier=_make_verifier(secret),
        )
        device = self._runner.run(lambda unit: _add_pending(unit, create, limit), idempotent=True)
        return models.PairedDevice(device=device, shared_secret=secret)

    @clears_locals
    async def apair(self, request: models.DevicePair) -> models.PairedDevice:
        """Run `pair()` under asyncio or trio, without blocking the event loop."""
        self._runner.refuse_inside_unit()
        return await self._runner.in_thread(partial(self.pair, request), slow=True)

    @clears_locals
    def verify_secret(self, device_id: str, shared_secret: SecretStr | str) -> Device | None:
        """Return the approved device if the secret is right, otherwise None.

        To recognise pending and revoked devices, call `check_secret()`.

        Args:
            device_id: presented id.
            shared_secret: presented secret. During the overlap of a rotation, the old secret still works.

        Raises:
            TooManyAttemptsError, DatabaseBusyError: see `check_secret()`.
        """
        checked = self.check_secret(device_id, shared_secret)
        return checked.device if checked else None

    @clears_locals
    def check_secret(self, device_id: str, shared_secret: SecretStr | str) -> models.SecretCheck:
        """Check a secret, and return the result with the device's status.

        A wrong secret does not reveal the existence or approval of a device. The kind of the stored secret also stays
        hidden. The duration of a failed check normally depends only on the presented values. The limits treat known and
        unknown device ids alike.

        Args:
            device_id: presented id.
            shared_secret: presented secret. During the overlap of a rotation, the old secret still works.

        Returns:
            Result of the check. A true result means an approved device with the right secret. A wrong secret or an
            absent device gives `status="denied"` and `device=None`.

        Raises:
            TooManyAttemptsError: if the id has reached `Limits.failed_checks_per_minute` in this process. The error
                also occurs at the limit `Limits.waiting_hashes`. At a limit, even the right secret raises the error.
                The limits do not apply to a secret with the format of generated secrets.
            DatabaseBusyError: if the slow hash did not begin within 30 seconds.
        """
        check_searched(device_id, "device_id")
        if not needs_slow_hash(shared_secret):
            return self._runner.run(lambda unit: self._check_fast(unit, device_id, shared_secret), read_only=True)
        check = partial(self._check_slowly, device_id, shared_secret)
        return _checked(self._failed_checks.run(device_id, check))

    def _check_fast(self, unit: UnitOfWork, device_id: str, shared_secret: SecretStr | str) -> models.SecretCheck:
        # A wrong secret costs one statement, even if the device is absent.
        stored = _valid_hashes(unit.devices.find_secret_hashes(device_id), self._clock())
        return _checked(unit.devices.find_by_id(device_id) if check_secret(shared_secret, stored) else None)

    def _check_slowly(self, device_id: str, shared_secret: SecretStr | str) -> Device | None:
        # A wrong secret costs one statement and a hash, even without a device.
        while True:
            now = self._clock()
            stored = _valid_hashes(
                self._runner.run(lambda unit: unit.devices.find_secret_hashes(device_id), read_only=True), now
            )
            match = check_secret(shared_secret, stored, waiting=self._limits.waiting_hashes)
            if match.matched is None:
                return None
            # Another caller can change or delete the device during the slow hash.
            device = self._find_device(device_id)
            if device is None:
                return None
            if stored[match.matched] in _valid_hashes(device, self._clock()):
                # Do not replace the hash of a pending device. An approval with the old hash could fail.
                if device.approved and match.matched == 0 and match.is_outdated:
                    self._rehash(device_id, shared_secret, *stored)
                return device
            if device.shared_secret_hash == stored[0]:
                return None  # The old secret expired during the check.
            # Another caller has replaced the hash. The new hash can belong to the same secret, so check again.

    def _find_device(self, device_id: str) -> Device | None:
        """Read a device in a separate read-only unit. Return None if the device does not exist."""
        return self._runner.run(lambda unit: unit.devices.find_by_id(device_id), read_only=True)

    def _rehash(self, device_id: str, secret: SecretStr | str, old: str, beside: str | None = None) -> None:
        """Replace a stored hash by a hash with the current costs. Only log an error, because the secret is right."""
        try:
            new = hash_secret(secret, beside=beside, waiting=self._limits.waiting_hashes)
            self._runner.run(
                lambda unit: unit.devices.rehash_secret(device_id, expected_secret_hash=old, secret_hash=new),
                idempotent=True,
            )
        # UnitStateError means that this thread already has an open write unit.
        except (DatabaseError, TooManyAttemptsError, UnitStateError) as error:
            logger.warning(
                "a hash could not be replaced by a hash with newer parameters; the next check tries again: %s",
                str(error),  # the traceback of the error can show the secret
                extra={"event": "rehash_failed", "error": type(error).__name__},
            )

    @clears_locals
    async def acheck_secret(self, device_id: str, shared_secret: SecretStr | str) -> models.SecretCheck:
        """Run `check_secret()` under asyncio or trio, without blocking the event loop.

        Slow hashes have separate worker threads. Therefore `arun()` does not wait for slow hashes. A check of a
        generated secret also does not wait for slow hashes.
        """
        check = partial(self.check_secret, device_id, shared_secret)
        return await self._runner.in_thread(check, slow=needs_slow_hash(shared_secret))

    @clears_locals
    def verify_proof(self, device_id: str, *, nonce: str, timestamp: datetime, proof: bytes) -> Device | None:
        """Return the approved device if the proof is right, otherwise None.

        To recognise pending and revoked devices, call `check_proof()`.

        A proof is the ClientProof of SCRAM (RFC 5802, section 3). The proof covers the device's id, the nonce and the
        timestamp. The proof does not cover the body of a message. A device makes the proof with
        `homeagent.scram.make_proof`. The gateway stores a verifier. With a verifier, the gateway can check proofs but
        can't make proofs. After the check, consume the nonce before you grant access. Even during an overlap, a proof
        with the old secret is wrong.

        Args:
            device_id: presented id.
            nonce: nonce in the message of the proof.
            timestamp: aware time in the message of the proof.
            proof: 32 bytes. A proof that does not have 32 bytes is wrong.

        Raises:
            InvalidArgumentError: if the nonce, the timestamp or the type of the proof is invalid. The error does not
                reveal whether the device exists.
        """
        checked = self.check_proof(device_id, nonce=nonce, timestamp=timestamp, proof=proof)
        return checked.device if checked else None

    @clears_locals
    def check_proof(self, device_id: str, *, nonce: str, timestamp: datetime, proof: bytes) -> models.SecretCheck:
        """Check a proof, and return the result with the device's status.

        For the arguments, see `verify_proof()`.

        Returns:
            Result of the check. A true result means an approved device with a right proof. Without a device or a
            verifier, every proof is wrong. A wrong proof gives `status="denied"` and `device=None`.

        Raises:
            InvalidArgumentError: see `verify_proof()`.
        """
        check_searched(device_id, "device_id")
        check_label(nonce, "nonce")
        check_timestamp(timestamp, "timestamp")
        if not isinstance(proof, (bytes, bytearray)):
            raise InvalidArgumentError(f"proof must be bytes, not {type(proof).__name__}")
        _, verifier = self._runner.run(lambda unit: unit.devices.find_proof_secrets(device_id), read_only=True)
        message = proof_message(device_id=_encodable(device_id), nonce=nonce, timestamp=timestamp)
        if not check_proof(verifier, message, proof):
            return _checked(None)
        device = self._find_device(device_id)
        # Another caller can change or delete the device between the two reads.
        return _checked(None if device is None or device.proof_verifier != verifier else device)

    @clears_locals
    async def acheck_proof(
        self, device_id: str, *, nonce: str, timestamp: datetime, proof: bytes
    ) -> models.SecretCheck:
        """Run `check_proof()` under asyncio or trio, without blocking the event loop."""
        check = partial(self.check_proof, device_id, nonce=nonce, timestamp=timestamp, proof=proof)
        return await self._runner.in_thread(check, slow=False)

    def proof_parameters(self, device_id: str) -> models.ProofParameters:
        """Return the salt and the iterations for a device's proofs. The salt and the iterations are not secret.

        For an id without a verifier, the method computes a fake answer. All processes compute the same fake answer,
        even after a restore. The duration of the call does not show whether a device exists. A pairing, a deletion or a
        rotation can change the answer. A caller can notice the change.

        Args:
            device_id: presented id.

        Raises:
            InvalidArgumentError: if the id is not a str.
        """
        key, verifier = self._runner.run(lambda unit: unit.devices.find_proof_secrets(device_id), read_only=True)
        return parameters_for(_encodable(device_id), verifier, key=key.encode())

    async def aproof_parameters(self, device_id: str) -> models.ProofParameters:
        """Run `proof_parameters()` under asyncio or trio, without blocking the event loop."""
        return await self._runner.in_thread(partial(self.proof_parameters, device_id), slow=False)

    @clears_locals
    def rotate_secret(
        self,
        device_id: str,
        shared_secret: SecretStr | None = None,
        *,
        overlap: timedelta = timedelta(0),
        expected_secret_hash: str | None = None,
        expected_paired_at: datetime | None = None,
    ) -> SecretStr:
        """Replace a device's secret, and return the new secret. A program can't read the secret again later.

        Args:
            device_id: id of the device. The rotation does not change the role or the approval.
            shared_secret: chosen secret. By default, homeagent generates a secret.
            overlap: time for which the old secret stays right, by default 0. The rotation ends an earlier overlap at
                once.
            expected_secret_hash: expected hash of the old secret. Default: any hash.
            expected_paired_at: expected time of pairing. Default: any time.

        Raises:
            ConflictError: if the old secret or the pairing time is not as expected.
            DeviceNotFoundError: if the device does not exist.
            DeviceNotApprovedError: if `overlap=…` is above 0 for a pending or revoked device.
            InvalidArgumentError: if the secret has fewer than 8 or too many characters. A control character also raises
                the error.
            TooManyAttemptsError: if the secret is chosen and the limit `Limits.waiting_hashes` is reached.
            DatabaseBusyError: if the slow hash of a chosen secret did not begin within 30 seconds.
        """
        check_duration(overlap, "overlap", zero=True)
        if expected_paired_at is not None:
            expected_paired_at = check_timestamp(expected_paired_at, "expected_paired_at")
        secret = generate_secret() if shared_secret is None else check_new_secret(shared_secret)
        # If another caller rotates the secret at the same time, begin again.
        while not self._rotate(device_id, secret, overlap, expected_secret_hash, expected_paired_at):
            pass
        return secret

    def _rotate(
        self, device_id: str, secret: SecretStr, overlap: timedelta, wanted_hash: str | None, paired_at: datetime | None
    ) -> bool:
        """Replace the secret. Return False if another caller was faster."""
        current = self._find_device(device_id)
        if current is None:
            raise DeviceNotFoundError(device_id)
        if overlap and not current.approved:
            raise DeviceNotApprovedError(device_id)  # set_secret() checks the approval again
        old = current.shared_secret_hash
        # With equal salts, a check during an overlap needs one slow hash.
        new = hash_secret(secret, beside=old if overlap else None, waiting=self._limits.waiting_hashes)
        verifier = _make_verifier(secret)

        def replace(unit: UnitOfWork) -> bool:
            device = unit.devices.find_by_id(device_id)
            if device is None:
                raise DeviceNotFoundError(device_id)
            if new != old and _hash_and_verifier(device) == (new, verifier):
                return True  # an earlier run of this unit has already stored the new hash
            if paired_at not in (None, device.paired_at):
                raise ConflictError(f"device {device_id!r} was paired at another time: {_DECIDE}")
            if wanted_hash not in (None, device.shared_secret_hash):
                raise ConflictError(f"device {device_id!r} has another secret now: {_DECIDE}")
            return unit.devices.set_secret(
                device_id,
                expected_secret_hash=old,
                secret_hash=new,
                proof_verifier=verifier,
                # For an unchanged secret, no overlap begins, and an earlier overlap ends.
                previous_until=later(self._clock(), overlap, "overlap") if overlap and new != old else None,
            )

        return self._runner.run(replace, idempotent=True)

    @clears_locals
    async def arotate_secret(
        self,
        device_id: str,
        shared_secret: SecretStr | None = None,
        *,
        overlap: timedelta = timedelta(0),
        expected_secret_hash: str | None = None,
        expected_paired_at: datetime | None = None,
    ) -> SecretStr:
        """Run `rotate_secret()` under asyncio or trio, without blocking the event loop."""
        rotate = partial(
            self.rotate_secret,
            device_id,
            shared_secret,
            overlap=overlap,
            expected_secret_hash=expected_secret_hash,
            expected_paired_at=expected_paired_at,
        )
        self._runner.refuse_inside_unit()
        return await self._runner.in_thread(rotate, slow=True)


def _add_pending(unit: UnitOfWork, create: models.DeviceCreate, limit: int) -> Device:
    try:
        device = unit.devices.create(create)
        # Insert the device before the limit check. If a committed unit runs again, the insert raises DeviceExistsError.
        # The limit check could raise PendingLimitError.
        unit.devices.require_pending_room(limit)
        # Do not delete a key in progress. The key can belong to the `run_once()` call that runs this pairing.
        unit.idempotency_keys.delete_ended(create.id)
        return device
    except DeviceExistsError:
        stored = unit.devices.find_by_id(create.id)
        # The hash or the verifier has a random salt. Only an earlier run of this unit can have stored the same salt.
        if stored is None or _hash_and_verifier(stored) != (create.shared_secret_hash, create.proof_verifier):
            raise
        return stored


def _checked(device: Device | None) -> models.SecretCheck:
    """Return the result of a check. After a wrong secret or proof, pass None."""
    return models.SecretCheck("denied") if device is None else models.SecretCheck(device.status.value, device)


def _make_verifier(secret: SecretStr) -> str | None:
    """Return a new proof verifier of a generated secret, otherwise None."""
    # Do not store a verifier of a secret that a person chose. An attacker could guess the secret faster by the verifier
    # (PBKDF2) than by the hash (Argon2id).
    return make_verifier(secret) if is_generated(secret) else None


def _encodable(device_id: str) -> str:
    """Replace lone surrogates, so that UTF-8 can encode the id. A stored id has no lone surrogate."""
    return device_id.encode(errors="replace").decode()


def _hash_and_verifier(device: Device) -> tuple[str, str | None]:
    """Return the stored hash and the proof verifier of the current secret. An absent verifier is None."""
    return device.shared_secret_hash, device.proof_verifier


def _valid_hashes(device: Device | SecretHashes, now: datetime) -> list[str]:
    """Return the current hash and, during an overlap, the previous hash."""
    hashes = [device.shared_secret_hash]
    until = device.previous_secret_expires_at
    if device.previous_secret_hash is not None and until is not None and until > now:
        hashes.append(device.previous_secret_hash)
    return hashes
