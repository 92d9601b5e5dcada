"""The methods of `Database` that pair devices, check secrets and proofs, and rotate secrets."""

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
    """Base class of `Database`, whose `__init__` sets the attributes. Pairs devices, checks and rotates secrets."""

    _runner: Runner
    _clock: Clock
    _limits: Limits
    _mutex: threading.RLock
    _made_pairing: Pairing | None

    @property
    def _pairing(self) -> Pairing:
        if self._made_pairing is None:
            # Import lazily: a process that checks no secret starts sooner.
            from homeagent.pairing import Pairing

            # Do not create a second Pairing in another thread: each would count failed checks separately.
            with self._mutex:
                if self._made_pairing is None:
                    self._made_pairing = Pairing(self._runner, self._clock, self._limits)
        return self._made_pairing

    @clears_locals
    def pair(self, request: models.DevicePair) -> models.PairedDevice:
        """Add a device, pending until its approval. Only a hash of the secret is stored.

        Idempotency keys that are left from an earlier device with this id are deleted.

        Args:
            request: id, role and metadata of the device, with a chosen secret or without a secret. Without a secret,
                256 random bits are generated.

        Returns:
            Device and secret. The secret cannot be read again later.

        Raises:
            DeviceExistsError: if a device with this id exists. The caller so learns that the id exists.
            PendingLimitError: if `Limits.pending_devices` devices already wait for their approval.
            InvalidArgumentError: if the secret is too long or has a control character.
            TooManyAttemptsError: if the secret was chosen, and `Limits.waiting_hashes` slow hashes already wait.
        """
        return self._pairing.pair(request)

    @clears_locals
    async def apair(self, request: models.DevicePair) -> models.PairedDevice:
        """Do the same as `pair`, without blocking the event loop, under asyncio or trio."""
        return await self._pairing.apair(request)

    @clears_locals
    def verify_secret(self, device_id: str, shared_secret: SecretStr | str) -> Device | None:
        """Return the device if it is approved and the secret is right, else None.

        `check_secret` also returns, for the right secret, that the device is pending or revoked.

        Args:
            device_id: presented id.
            shared_secret: presented secret. During the overlap of a rotation the old secret is right too.

        Raises:
            TooManyAttemptsError, DatabaseBusyError: as in `check_secret`.
        """
        return self._pairing.verify_secret(device_id, shared_secret)

    @clears_locals
    def check_secret(self, device_id: str, shared_secret: SecretStr | str) -> models.SecretCheck:
        """Return whether the secret is right, and whether the device is approved, pending or revoked.

        The time of a check of a wrong secret, and its refusal by a limit, depend only on the presented id and secret.
        They do not show whether the device exists, is approved, or has a generated secret.

        Args:
            device_id: presented id.
            shared_secret: presented secret. During the overlap of a rotation the old secret is right too.

        Returns:
            True only if the secret is right and the device is approved. If the secret is wrong or the device is
            absent, `status` is `denied` and `device` is None.

        Raises:
            TooManyAttemptsError: if `Limits.failed_checks_per_minute` checks of this id failed within a minute in this
                process, or `Limits.waiting_hashes` slow hashes already wait. No hash was computed, and the right secret
                is refused too. A secret in the generated form is always checked.
            DatabaseBusyError: if the slow hash could not begin within 30 seconds.
        """
        return self._pairing.check_secret(device_id, shared_secret)

    @clears_locals
    async def acheck_secret(self, device_id: str, shared_secret: SecretStr | str) -> models.SecretCheck:
        """Do the same as `check_secret`, without blocking the event loop, under asyncio or trio.

        Slow hashes have their own worker threads, and do not use up the threads of `arun` and of other checks.
        """
        return await self._pairing.acheck_secret(device_id, shared_secret)

    @clears_locals
    def verify_proof(self, device_id: str, *, nonce: str, timestamp: datetime, proof: bytes) -> Device | None:
        """Return the device if it is approved and the proof was made with its secret, else None.

        `check_proof` also returns, for a right proof, that the device is pending or revoked.

        `homeagent.scram.make_proof` makes the proof: SCRAM's client proof (RFC 5802, section 3) over the device's id,
        the nonce and the timestamp. The stored verifier can check a proof, but cannot make one. Consume the nonce after
        this check and before you grant access. A rotation makes proofs with the old secret wrong at once.

        Args:
            device_id: presented id.
            nonce: signed nonce.
            timestamp: signed time.
            proof: 32 bytes. A proof of another length is wrong.

        Raises:
            InvalidArgumentError: if the nonce is not a text that could be consumed, the timestamp has no time zone, or
                the proof is not `bytes`. The device makes no difference.
        """
        return self._pairing.verify_proof(device_id, nonce=nonce, timestamp=timestamp, proof=proof)

    @clears_locals
    def check_proof(self, device_id: str, *, nonce: str, timestamp: datetime, proof: bytes) -> models.SecretCheck:
        """Return whether the proof is right, and whether the device is approved, pending or revoked.

        Arguments: as in `verify_proof`.

        Returns:
            True only if the proof is right and the device is approved. If the proof is wrong or the device is absent
            or has no verifier, `status` is `denied` and `device` is None.

        Raises:
            InvalidArgumentError: as in `verify_proof`.
        """
        return self._pairing.check_proof(device_id, nonce=nonce, timestamp=timestamp, proof=proof)

    @clears_locals
    async def acheck_proof(
        self, device_id: str, *, nonce: str, timestamp: datetime, proof: bytes
    ) -> models.SecretCheck:
        """Do the same as `check_proof`, without blocking the event loop, under asyncio or trio."""
        return await self._pairing.acheck_proof(device_id, nonce=nonce, timestamp=timestamp, proof=proof)

    def proof_parameters(self, device_id: str) -> models.ProofParameters:
        """Return the salt and the number of iterations with which a device makes its proofs. Any caller may get them.

        If the device is absent or has no verifier, the answer is derived from the id and a key of the store. The
        derived answer takes the same time, and stays the same, also in other processes and after a restore. Only a
        change of the answer reveals a device: a device with this id was paired or deleted, or its secret was rotated.

        Args:
            device_id: presented id.

        Raises:
            InvalidArgumentError: if no device can have this id.
        """
        return self._pairing.proof_parameters(device_id)

    @clears_locals
    def rotate_secret(
        self, device_id: str, shared_secret: SecretStr | None = None, *, overlap: timedelta = timedelta(0)
    ) -> SecretStr:
        """Replace a device's secret, and return the new secret, which cannot be read again later.

        Args:
            device_id: id of the device. Role and approval stay.
            shared_secret: chosen secret; None to generate a secret.
            overlap: time for which the old secret also stays right; 0 by default. The overlap of an earlier rotation
                ends at once.

        Raises:
            DeviceNotFoundError: if the device does not exist.
            DeviceNotApprovedError: if `overlap` is above 0 and the device is pending or revoked.
            InvalidArgumentError: if the secret has fewer than 8 characters, is too long or has a control character.
            TooManyAttemptsError: if the secret was chosen, and `Limits.waiting_hashes` slow hashes already wait.
        """
        return self._pairing.rotate_secret(device_id, shared_secret, overlap=overlap)

    @clears_locals
    async def arotate_secret(
        self, device_id: str, shared_secret: SecretStr | None = None, *, overlap: timedelta = timedelta(0)
    ) -> SecretStr:
        """Do the same as `rotate_secret`, without blocking the event loop, under asyncio or trio."""
        return await self._pairing.arotate_secret(device_id, shared_secret, overlap=overlap)
