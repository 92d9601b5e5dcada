"""Methods of `Database` that pair devices, check secrets and proofs, and rotate secrets."""

from __future__ import annotations

import threading
from datetime import datetime, timedelta
from functools import partial
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
            # Import `homeagent.pairing` lazily, to shorten the start of a process that checks no secrets.
            from homeagent.pairing import Pairing

            # Create only one `Pairing` object, even if several threads need the object. With two objects, two counters
            # would count the failed checks of one device.
            with self._mutex:
                if self._made_pairing is None:
                    self._made_pairing = Pairing(self._runner, self._clock, self._limits)
        return self._made_pairing

    @clears_locals
    def pair(self, request: models.DevicePair) -> models.PairedDevice:
        """Add a device. The device is pending until an administrator approves the device. The store contains only a
        hash of the secret.

        The method deletes idempotency keys that an earlier device with this id left behind.

        Args:
            request: id, role and metadata of the device. If the request contains no secret, homeagent generates a
                secret of 256 random bits.

        Returns:
            Device and secret. A program can't read the secret again later.

        Raises:
            DeviceExistsError: if a device with this id exists. The error tells the caller that the id exists.
            PendingLimitError: if the number of pending devices has reached `Limits.pending_devices`.
            InvalidArgumentError: if the secret is too long or has a control character.
            TooManyAttemptsError: if the caller chose the secret, and the number of waiting slow hashes has reached
                `Limits.waiting_hashes`.
        """
        return self._pairing.pair(request)

    @clears_locals
    async def apair(self, request: models.DevicePair) -> models.PairedDevice:
        """Run `pair()` under asyncio or trio, without blocking the event loop."""
        return await self._runner.in_thread(partial(self._pairing.pair, request), slow=True)

    @clears_locals
    def verify_secret(self, device_id: str, shared_secret: SecretStr | str) -> Device | None:
        """Return the device if the device is approved and the secret is right, or None in all other cases.

        To find out whether a device with the right secret is pending or revoked, call `check_secret()`.

        Args:
            device_id: presented id.
            shared_secret: presented secret. During the overlap of a rotation, the old secret still works.

        Raises:
            TooManyAttemptsError, DatabaseBusyError: see `check_secret()`.
        """
        checked = self._pairing.check_secret(device_id, shared_secret)
        return checked.device if checked else None

    @clears_locals
    def check_secret(self, device_id: str, shared_secret: SecretStr | str) -> models.SecretCheck:
        """Return whether the secret is right, and whether the device is approved, pending or revoked.

        An attacker with a wrong secret can't learn whether the device exists, is approved, or has a generated secret.
        If the secret is wrong, only the presented id and secret decide how long the check takes, and whether a limit
        refuses the check.

        Args:
            device_id: presented id.
            shared_secret: presented secret. During the overlap of a rotation, the old secret still works.

        Returns:
            Result of the check. In an `if` statement, the result is true only if the secret is right and the device is
            approved. For a wrong secret or an absent device, the result has `status="denied"` and `device=None`.

        Raises:
            TooManyAttemptsError: if the failed checks of this id in this process have reached
                `Limits.failed_checks_per_minute`, or if the number of waiting slow hashes has reached
                `Limits.waiting_hashes`. If a limit is reached, the method raises the error even for the right secret.
                The limits do not apply to a secret that has the form of a generated secret.
            DatabaseBusyError: if the slow hash did not begin within 30 seconds.
        """
        return self._pairing.check_secret(device_id, shared_secret)

    @clears_locals
    async def acheck_secret(self, device_id: str, shared_secret: SecretStr | str) -> models.SecretCheck:
        """Run `check_secret()` under asyncio or trio, without blocking the event loop.

        Slow hashes have separate worker threads, so that `arun()` and checks without a slow hash do not wait for slow
        hashes.
        """
        from homeagent.credentials import needs_slow_hash

        check = partial(self._pairing.check_secret, device_id, shared_secret)
        return await self._runner.in_thread(check, slow=needs_slow_hash(shared_secret))

    @clears_locals
    def verify_proof(self, device_id: str, *, nonce: str, timestamp: datetime, proof: bytes) -> Device | None:
        """Return the device if the device is approved and the proof is right, or None in all other cases.

        To find out whether a device with a right proof is pending or revoked, call `check_proof()`.

        A proof is the client proof of SCRAM (RFC 5802, section 3) for the device's id, the nonce and the timestamp. A
        device makes the proof by the function `homeagent.scram.make_proof`. The gateway stores a verifier, which can
        check proofs but not make proofs. Consume the nonce after the check of the proof and before you grant access.
        After a rotation, a proof with the old secret is wrong, even during an overlap.

        Args:
            device_id: presented id.
            nonce: nonce in the message of the proof.
            timestamp: time in the message of the proof.
            proof: 32 bytes. A proof that does not have 32 bytes is wrong.

        Raises:
            InvalidArgumentError: if the nonce has an invalid form, the timestamp has no time zone, or the proof is not
                bytes. The error is the same for every device.
        """
        checked = self._pairing.check_proof(device_id, nonce=nonce, timestamp=timestamp, proof=proof)
        return checked.device if checked else None

    @clears_locals
    def check_proof(self, device_id: str, *, nonce: str, timestamp: datetime, proof: bytes) -> models.SecretCheck:
        """Return whether the proof is right, and whether the device is approved, pending or revoked.

        For the arguments, see `verify_proof()`.

        Returns:
            Result of the check. In an `if` statement, the result is true only if the proof is right and the device is
            approved. For a wrong proof, an absent device or a device without a verifier, the result has
            `status="denied"` and `device=None`.

        Raises:
            InvalidArgumentError: see `verify_proof()`.
        """
        return self._pairing.check_proof(device_id, nonce=nonce, timestamp=timestamp, proof=proof)

    @clears_locals
    async def acheck_proof(
        self, device_id: str, *, nonce: str, timestamp: datetime, proof: bytes
    ) -> models.SecretCheck:
        """Run `check_proof()` under asyncio or trio, without blocking the event loop."""
        check = partial(self._pairing.check_proof, device_id, nonce=nonce, timestamp=timestamp, proof=proof)
        return await self._runner.in_thread(check, slow=False)

    def proof_parameters(self, device_id: str) -> models.ProofParameters:
        """Return the salt and the number of iterations that a device needs to make proofs. The salt and the number of
        iterations are not secret.

        For an absent device or a device without a verifier, the method derives an answer from the id and a key of the
        store. The method takes equally long for an absent device and for a device with a verifier. All processes derive
        the same answer, even after a restore. The answer for an id changes when the id's device is paired or deleted,
        or gets a new secret. A caller can see this change.

        Args:
            device_id: presented id.

        Raises:
            InvalidArgumentError: if the id is not a str.
        """
        return self._pairing.proof_parameters(device_id)

    async def aproof_parameters(self, device_id: str) -> models.ProofParameters:
        """Run `proof_parameters()` under asyncio or trio, without blocking the event loop."""
        return await self._runner.in_thread(partial(self._pairing.proof_parameters, device_id), slow=False)

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
            device_id: id of the device. The rotation does not change the device's role and approval.
            shared_secret: chosen secret. If the caller passes no secret, homeagent generates a secret.
            overlap: time for which the old secret stays right, by default 0. The rotation immediately ends the overlap
                of an earlier rotation.
            expected_secret_hash: hash that the old secret must have. Default: any hash.
            expected_paired_at: time at which the device must have been paired. Default: any time.

        Raises:
            ConflictError: if the old secret or the time of pairing differs from the expected value.
            DeviceNotFoundError: if the device does not exist.
            DeviceNotApprovedError: if the device is pending or revoked, and `overlap=…` is above 0.
            InvalidArgumentError: if the secret has fewer than 8 characters, is too long or has a control character.
            TooManyAttemptsError: if the caller chose the secret, and the number of waiting slow hashes has reached
                `Limits.waiting_hashes`.
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
        """Run `rotate_secret()` under asyncio or trio, without blocking the event loop."""
        rotate = partial(
            self._pairing.rotate_secret,
            device_id,
            shared_secret,
            overlap=overlap,
            expected_secret_hash=expected_secret_hash,
            expected_paired_at=expected_paired_at,
        )
        return await self._runner.in_thread(rotate, slow=True)
