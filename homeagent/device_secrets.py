"""Methods of `Database` that pair devices, check secrets and proofs, and rotate secrets."""

from __future__ import annotations

import threading
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from pydantic import SecretStr

from homeagent import models
from homeagent.clock import Clock
from homeagent.frame_locals import clears_locals
from homeagent.models.device import Device
from homeagent.models.limits import Limits
from homeagent.retry import Runner

if TYPE_CHECKING:
    from homeagent.pairing import Pairing

__all__ = ["DeviceSecrets"]


class DeviceSecrets:
    """Base class of `Database` with the methods for the secrets of devices. `Database.__init__` sets the attributes."""

    _runner: Runner
    _clock: Clock
    _limits: Limits
    _mutex: threading.RLock
    _made_pairing: Pairing | None

    @property
    def _pairing(self) -> Pairing:
        if self._made_pairing is None:
            # Import `homeagent.pairing` lazily, because a process that checks no secret then starts sooner.
            from homeagent.pairing import Pairing

            # Do not create a second `Pairing` object in another thread, because each object would count failed checks
            # separately.
            with self._mutex:
                if self._made_pairing is None:
                    self._made_pairing = Pairing(self._runner, self._clock, self._limits)
        return self._made_pairing

    @clears_locals
    def pair(self, request: models.DevicePair) -> models.PairedDevice:
        """Add a device, which is pending until an administrator approves the device. The store gets only a hash of the
        secret.

        If an earlier device with this id left idempotency keys, the keys are deleted.

        Args:
            request: id, role and metadata of the device, and optionally a chosen secret. If the request has no secret,
                homeagent generates a secret of 256 random bits.

        Returns:
            Device and secret. The secret cannot be read again later.

        Raises:
            DeviceExistsError: if a device with this id exists. The error tells the caller that the id exists.
            PendingLimitError: if `Limits.pending_devices` devices already wait for approval.
            InvalidArgumentError: if the secret is too long or has a control character.
            TooManyAttemptsError: if the secret was chosen, and `Limits.waiting_hashes` slow hashes already wait.
        """
        return self._pairing.pair(request)

    @clears_locals
    async def apair(self, request: models.DevicePair) -> models.PairedDevice:
        """Do the same as the method `pair()` under asyncio or trio, without blocking the event loop."""
        return await self._pairing.apair(request)

    @clears_locals
    def verify_secret(self, device_id: str, shared_secret: SecretStr | str) -> Device | None:
        """Return the device if it is approved and the secret is right, else None.

        The method `check_secret()` also returns whether a device with the right secret is pending or revoked.

        Args:
            device_id: presented id.
            shared_secret: presented secret. During the overlap of a rotation, the old secret is right too.

        Raises:
            TooManyAttemptsError, DatabaseBusyError: in the same cases as for `check_secret()`.
        """
        return self._pairing.verify_secret(device_id, shared_secret)

    @clears_locals
    def check_secret(self, device_id: str, shared_secret: SecretStr | str) -> models.SecretCheck:
        """Return whether the secret is right, and whether the device is approved, pending or revoked.

        For a wrong secret, the duration of the check and the refusal by a limit depend only on the presented id and
        secret. An attacker can't learn whether the device exists, is approved, or has a generated secret.

        Args:
            device_id: presented id.
            shared_secret: presented secret. During the overlap of a rotation, the old secret is right too.

        Returns:
            Result of the check. In an if statement it is true only if the secret is right and the device is approved.
            If the secret is wrong or the device is absent, the attribute `status` of the result is "denied" and the
            attribute `device` is None.

        Raises:
            TooManyAttemptsError: if `Limits.failed_checks_per_minute` checks of this id failed within a minute in this
                process, or if `Limits.waiting_hashes` slow hashes already wait. Beyond these limits even the right
                secret is refused. A secret in the form of generated secrets is always checked.
            DatabaseBusyError: if the slow hash could not begin within 30 seconds.
        """
        return self._pairing.check_secret(device_id, shared_secret)

    @clears_locals
    async def acheck_secret(self, device_id: str, shared_secret: SecretStr | str) -> models.SecretCheck:
        """Do the same as `check_secret()` under asyncio or trio, without blocking the event loop.

        Slow hashes have their own worker threads. Therefore `arun()` and checks without a slow hash do not wait for a
        thread that computes a slow hash.
        """
        return await self._pairing.acheck_secret(device_id, shared_secret)

    @clears_locals
    def verify_proof(self, device_id: str, *, nonce: str, timestamp: datetime, proof: bytes) -> Device | None:
        """Return the device if it is approved and the proof was made with its secret, else None.

        The method `check_proof()` also returns whether a device with a right proof is pending or revoked.

        The function `homeagent.scram.make_proof` makes a proof. A proof is SCRAM's client proof (RFC 5802, section 3)
        over the device's id, the nonce and the timestamp. The gateway stores a verifier, with which proofs can be
        checked but not made. Consume the nonce after the check of the proof and before you grant access. After a
        rotation, proofs with the old secret are wrong at once.

        Args:
            device_id: presented id.
            nonce: nonce for which the proof was made.
            timestamp: time for which the proof was made.
            proof: 32 bytes. A proof of another length is wrong.

        Raises:
            InvalidArgumentError: if the nonce has a form that `nonces.consume()` refuses, the timestamp has no time
                zone, or the proof is not bytes. The check of the arguments does not depend on the device.
        """
        return self._pairing.verify_proof(device_id, nonce=nonce, timestamp=timestamp, proof=proof)

    @clears_locals
    def check_proof(self, device_id: str, *, nonce: str, timestamp: datetime, proof: bytes) -> models.SecretCheck:
        """Return whether the proof is right, and whether the device is approved, pending or revoked.

        The arguments are the same as for `verify_proof()`.

        Returns:
            Result of the check. In an if statement it is true only if the proof is right and the device is approved. If
            the proof is wrong, the device is absent or it has no verifier, the attribute `status` is "denied" and the
            attribute `device` is None.

        Raises:
            InvalidArgumentError: in the same cases as for `verify_proof()`.
        """
        return self._pairing.check_proof(device_id, nonce=nonce, timestamp=timestamp, proof=proof)

    @clears_locals
    async def acheck_proof(
        self, device_id: str, *, nonce: str, timestamp: datetime, proof: bytes
    ) -> models.SecretCheck:
        """Do the same as `check_proof()` under asyncio or trio, without blocking the event loop."""
        return await self._pairing.acheck_proof(device_id, nonce=nonce, timestamp=timestamp, proof=proof)

    def proof_parameters(self, device_id: str) -> models.ProofParameters:
        """Return the salt and the number of iterations with which a device makes proofs. The salt and the number of
        iterations are not secret.

        If the device is absent or has no verifier, the method derives an answer from the id and a key of the store. A
        derived answer takes as long as a stored answer, and is the same in all processes and after a restore. If the
        answer for an id changes, a caller can learn that a device was paired or deleted, or that its secret was
        rotated.

        Args:
            device_id: presented id.

        Raises:
            InvalidArgumentError: if the id is not a str.
        """
        return self._pairing.proof_parameters(device_id)

    async def aproof_parameters(self, device_id: str) -> models.ProofParameters:
        """Do the same as `proof_parameters()` under asyncio or trio, without blocking the event loop."""
        return await self._pairing.aproof_parameters(device_id)

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
        """Replace a device's secret, and return the new secret, which cannot be read again later.

        Args:
            device_id: id of the device. The rotation does not change the device's role and approval.
            shared_secret: chosen secret. If `secret` is None, homeagent generates a secret.
            overlap: time for which the old secret stays right too, by default 0. If an earlier rotation still has an
                overlap, its overlap ends at once.
            expected_secret_hash: hash that the old secret must have. Default: any hash.
            expected_paired_at: time at which the device must have been paired. Default: any time.

        Raises:
            ConflictError: if the old secret or the time of pairing differs from the expected value.
            DeviceNotFoundError: if the device does not exist.
            DeviceNotApprovedError: if the argument `overlap` is above 0, and the device is pending or revoked.
            InvalidArgumentError: if the secret has fewer than 8 characters, is too long or has a control character.
            TooManyAttemptsError: if the secret was chosen, and `Limits.waiting_hashes` slow hashes already wait.
        """
        return self._pairing.rotate_secret(
            device_id,
            shared_secret,
            overlap=overlap,
            expected_secret_hash=expected_secret_hash,
            expected_paired_at=expected_paired_at,
        )

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
        """Do the same as `rotate_secret()` under asyncio or trio, without blocking the event loop."""
        return await self._pairing.arotate_secret(
            device_id,
            shared_secret,
            overlap=overlap,
            expected_secret_hash=expected_secret_hash,
            expected_paired_at=expected_paired_at,
        )
