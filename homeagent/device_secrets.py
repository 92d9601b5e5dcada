"""The methods of `Database` that pair devices, and check and rotate their secrets."""

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
    """Base class of `Database`, which sets the attributes: pair devices, check and rotate their secrets."""

    _runner: Runner
    _clock: Clock
    _limits: Limits
    _mutex: threading.RLock
    _made_pairing: Pairing | None

    @property
    def _pairing(self) -> Pairing:
        if self._made_pairing is None:
            # A process that checks no secret starts sooner without it.
            from homeagent.pairing import Pairing

            # Two threads must not make two: each would count failed checks by itself.
            with self._mutex:
                if self._made_pairing is None:
                    self._made_pairing = Pairing(self._runner, self._clock, self._limits)
        return self._made_pairing

    @clears_locals
    def pair(self, request: models.DevicePair) -> models.PairedDevice:
        """Add a device that waits for its approval. Only a hash of its secret is stored.

        What calls of an earlier device under this id recorded after it was deleted is removed.

        Args:
            request: with the secret that a human chose, or without one: then 256 random bits are made.

        Returns:
            The device and its secret, which can't be asked for again.

        Raises:
            DeviceExistsError: the id is taken. So `pair` tells its caller that the id exists.
            PendingLimitError: as many devices wait for their approval as `Limits.pending_devices` allows.
            InvalidArgumentError: the secret is too long or has a control character.
            TooManyAttemptsError: a human chose the secret, and 16 slow hashes wait for their turn already.
        """
        return self._pairing.pair(request)

    @clears_locals
    async def apair(self, request: models.DevicePair) -> models.PairedDevice:
        """Do as `pair` does without blocking the event loop, under asyncio or trio."""
        return await self._pairing.apair(request)

    @clears_locals
    def verify_secret(self, device_id: str, shared_secret: SecretStr | str) -> Device | None:
        """Return the device if it is approved and this is its secret, else None.

        `check_secret` also tells a caller with the right secret that the device is pending or revoked.

        Args:
            device_id: who it claims to be.
            shared_secret: what it presents. During the overlap of a rotation the old secret serves too.

        Raises:
            TooManyAttemptsError, DatabaseBusyError: as in `check_secret`.
        """
        return self._pairing.verify_secret(device_id, shared_secret)

    @clears_locals
    def check_secret(self, device_id: str, shared_secret: SecretStr | str) -> models.SecretCheck:
        """Tell whether this is the device's secret, and whether the device is approved, pending or revoked.

        What a check of a wrong secret costs, and whether it is refused, depends on the id and the secret that are
        presented, and not on the device: not on whether it exists, is approved, or has a generated secret.

        Args:
            device_id: the id that is presented.
            shared_secret: the secret that is presented. During the overlap of a rotation the old secret serves too.

        Returns:
            True only if the secret is right and the device is approved. If the secret is wrong or the device is
            absent, `status` is `denied` and `device` is None.

        Raises:
            TooManyAttemptsError: 30 checks of this id failed within a minute in this process, or 16 slow hashes wait
                for their turn already. No hash was computed, and the right secret is refused too. A secret in the
                generated form is never refused.
            DatabaseBusyError: no turn to hash the secret came within 30 seconds.
        """
        return self._pairing.check_secret(device_id, shared_secret)

    @clears_locals
    async def acheck_secret(self, device_id: str, shared_secret: SecretStr | str) -> models.SecretCheck:
        """Do as `check_secret` does without blocking the event loop, under asyncio or trio.

        Slow hashes run in threads of their own, and take none from `arun` or from checks of generated secrets.
        """
        return await self._pairing.acheck_secret(device_id, shared_secret)

    @clears_locals
    def verify_proof(self, device_id: str, *, nonce: str, timestamp: datetime, proof: bytes) -> Device | None:
        """Return the device if it is approved and the proof is made with its secret, else None.

        `check_proof` also tells a caller with a right proof that the device is pending or revoked.

        The proof is the client's of SCRAM (RFC 5802, section 3) over the device's id, the nonce and the timestamp:
        `homeagent.scram.make_proof` makes it. What is stored can check a proof and can't make one. Consume the nonce
        after this, before access is given. After a rotation only the new secret's proofs serve, at once.

        Args:
            device_id: who it claims to be.
            nonce: the number used once that was signed.
            timestamp: the instant that was signed.
            proof: 32 bytes; of any other length it is wrong.

        Raises:
            InvalidArgumentError: one of them can't be what it is to be, whatever the device: the nonce is no text that
                could be consumed, the timestamp has no time zone, or the proof is no `bytes`.
        """
        return self._pairing.verify_proof(device_id, nonce=nonce, timestamp=timestamp, proof=proof)

    @clears_locals
    def check_proof(self, device_id: str, *, nonce: str, timestamp: datetime, proof: bytes) -> models.SecretCheck:
        """Tell whether a proof is made with the device's secret, and where the device stands.

        Args:
            device_id: the id that is presented.
            nonce: the number used once that was signed.
            timestamp: the time that was signed.
            proof: 32 bytes; of any other length it is wrong.

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
        """Do as `check_proof` does without blocking the event loop, under asyncio or trio."""
        return await self._pairing.acheck_proof(device_id, nonce=nonce, timestamp=timestamp, proof=proof)

    def proof_parameters(self, device_id: str) -> models.ProofParameters:
        """Return the salt and iterations with which this device makes a proof, to be told to any caller who asks.

        An absent device, or a device without a verifier, gets a made-up answer of the same kind. The answer is derived
        from a key of the store, so that it is the same every time, also in other processes, after a restart and after a
        restore. It costs the same. Only a change tells a real device: the answer for an id changes when a device pairs
        under it, rotates its secret or is deleted.

        Args:
            device_id: the id that is presented.

        Raises:
            InvalidArgumentError: no device can have this id.
        """
        return self._pairing.proof_parameters(device_id)

    @clears_locals
    def rotate_secret(
        self, device_id: str, shared_secret: SecretStr | None = None, *, overlap: timedelta = timedelta(0)
    ) -> SecretStr:
        """Give a device a new secret, and return it, once.

        Args:
            device_id: the device; it keeps its role and its approval.
            shared_secret: the secret that a human chose; None to have one made.
            overlap: how long the old secret serves as well; not at all by default. One that still served from an
                earlier rotation ends at once.

        Raises:
            DeviceNotFoundError: it is absent.
            DeviceNotApprovedError: an overlap was given and the device is pending or revoked.
            InvalidArgumentError: the secret has fewer than 8 characters, is too long or has a control character.
            TooManyAttemptsError: a human chose the secret, and 16 slow hashes wait for their turn already.
        """
        return self._pairing.rotate_secret(device_id, shared_secret, overlap=overlap)

    @clears_locals
    async def arotate_secret(
        self, device_id: str, shared_secret: SecretStr | None = None, *, overlap: timedelta = timedelta(0)
    ) -> SecretStr:
        """Do as `rotate_secret` does without blocking the event loop, under asyncio or trio."""
        return await self._pairing.arotate_secret(device_id, shared_secret, overlap=overlap)
