"""Hashing and checking of secrets, with a limited number of concurrent slow hashes.

A generated secret is hashed with SHA-256, and any other secret with Argon2id.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
import re
import secrets
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING

from homeagent.credentials.fair_semaphore import FairSemaphore
from homeagent.credentials.secret_format import is_generated, reveal, secret_text, what_is_wrong
from homeagent.errors import DatabaseBusyError, InvalidArgumentError, TooManyAttemptsError
from homeagent.frame_locals import clears_locals

if TYPE_CHECKING:
    from pydantic import SecretStr

WAITING_HASHES = 16
"""Maximum number of waiting slow hashes. Further callers get `TooManyAttemptsError` at once."""

# Format of stored hashes

_ARGON2 = re.compile(
    r"\$argon2id\$v=19\$m=([1-9][0-9]{0,9}),t=([1-9][0-9]{0,9}),p=([1-9][0-9]{0,7})"
    r"\$([A-Za-z0-9+/]{11,86})\$([A-Za-z0-9+/]{22,86})"
)

# Limits for the costs of a stored hash. Without limits, a damaged hash could ask for a terabyte of memory. The memory
# limit, 2 GiB, is the first recommended option of RFC 9106 section 4.
_MAX_MEMORY_COST = 2 * 1024 * 1024
_MAX_TIME_COST = 64
_MAX_PARALLELISM = 64
_MEMORY_PER_THREAD = 8  # kibibytes (RFC 9106 section 3.1)

_SALT_BYTES = 16
_DIGEST_BYTES = 32


@dataclass(frozen=True, slots=True)
class _Costs:
    time_cost: int
    memory_cost: int
    parallelism: int

    def problem(self) -> str | None:
        if not 1 <= self.time_cost <= _MAX_TIME_COST:
            return f"time_cost must be 1 to {_MAX_TIME_COST}"
        if not 1 <= self.parallelism <= _MAX_PARALLELISM:
            return f"parallelism must be 1 to {_MAX_PARALLELISM}"
        if not _MEMORY_PER_THREAD * self.parallelism <= self.memory_cost <= _MAX_MEMORY_COST:
            return f"memory_cost must be {_MEMORY_PER_THREAD} KiB for each thread to {_MAX_MEMORY_COST:,} KiB"
        return None


@dataclass(frozen=True, slots=True)
class _Recipe:
    """The inputs of an Argon2 digest except the secret. One Argon2 run checks all hashes with equal inputs."""

    costs: _Costs
    salt: bytes
    digest_bytes: int


@dataclass(frozen=True, slots=True, repr=False)
class _Argon2Hash:
    recipe: _Recipe
    digest: bytes


def _format_argon2(recipe: _Recipe, digest: bytes) -> str:
    costs = recipe.costs
    # The base64 in Argon2's text form has no padding.
    salt, tail = (base64.b64encode(part).decode().rstrip("=") for part in (recipe.salt, digest))
    return f"$argon2id$v=19$m={costs.memory_cost},t={costs.time_cost},p={costs.parallelism}${salt}${tail}"


def _parse_argon2(stored: str) -> _Argon2Hash | None:
    found = _ARGON2.fullmatch(stored)
    if found is None:
        return None
    memory_cost, time_cost, parallelism = (int(number) for number in found.groups()[:3])
    costs = _Costs(time_cost=time_cost, memory_cost=memory_cost, parallelism=parallelism)
    if costs.problem() is not None:
        return None
    try:
        salt, digest = (base64.b64decode(part + "=" * (-len(part) % 4)) for part in found.groups()[3:])
    except binascii.Error:
        return None
    recipe = _Recipe(costs, salt, len(digest))
    # Refuse a different base64 text for the same hash, such as a text with unused bits set (RFC 4648 section 3.5).
    return _Argon2Hash(recipe, digest) if _format_argon2(recipe, digest) == stored else None


def _sha256(text: str) -> str:
    return "sha256$" + hashlib.sha256(text.encode()).hexdigest()


# A check of a generated secret of an unknown device uses this hash, and so takes as long as for a known device.
_DECOY_HASH = "sha256$" + secrets.token_hex(_DIGEST_BYTES)
_MAX_STORED = 2


@dataclass(frozen=True, slots=True)
class SecretMatch:
    """The result of a check. The result counts as true in an `if` statement if a stored hash matched."""

    matched: int | None = None
    """Index of the matching stored hash, or None if no hash matched."""
    replacement: str | None = field(default=None, repr=False)
    """A new hash of the presented secret if the costs of the matching hash differ from the hasher's costs. Otherwise
    None.

    Store the new hash in place of the matching hash.
    """

    def __bool__(self) -> bool:
        # Write `matched is not None`, because an index of 0 counts as false.
        return self.matched is not None


@dataclass(frozen=True, kw_only=True, eq=False)
class SecretHasher:
    """Hashes and checks secrets. The arguments set the costs of an Argon2 run and the number of concurrent runs.

    The default costs are the defaults of argon2-cffi, and the second recommended option of RFC 9106 section 4. A hash
    matches even if its costs differ from the hasher's costs. A check with the right secret returns a new hash if the
    stored hash has other costs.

    Args:
        time_cost: number of passes over the memory, 1 to 64.
        memory_cost: memory of one run in kibibytes, from 8 for each lane to 2,097,152 (2 GiB).
        parallelism: lanes (threads) of one run, 1 to 64.
        concurrency: maximum number of concurrent Argon2 runs, which together use at most `concurrency * memory_cost`.
            The default is the number of processors, at most 4.
        timeout: maximum time for which a caller waits for the start of an Argon2 run. Waiting callers start their
            Argon2 runs in the order of their arrival.

    Raises:
        InvalidArgumentError: if an argument is out of its bounds.
    """

    time_cost: int = 3
    memory_cost: int = 64 * 1024
    parallelism: int = 4
    concurrency: int = field(default_factory=lambda: min(4, os.cpu_count() or 1))
    timeout: timedelta = timedelta(seconds=30)
    _costs: _Costs = field(init=False, repr=False)
    _decoy: _Recipe = field(init=False, repr=False)
    _decoy_text: str = field(init=False, repr=False)
    _turns: FairSemaphore = field(init=False, repr=False)

    def __post_init__(self) -> None:
        costs = _Costs(self.time_cost, self.memory_cost, self.parallelism)
        problem = costs.problem()
        if problem is not None:
            raise InvalidArgumentError(problem)
        if self.concurrency < 1:
            raise InvalidArgumentError(f"concurrency must be 1 or more, not {self.concurrency}")
        if self.timeout < timedelta(0):
            raise InvalidArgumentError("timeout must be zero or more")
        object.__setattr__(self, "_costs", costs)
        object.__setattr__(self, "_decoy", self._fresh_recipe())
        object.__setattr__(self, "_decoy_text", _format_argon2(self._decoy, bytes(_DIGEST_BYTES)))
        object.__setattr__(self, "_turns", FairSemaphore(self.concurrency))

    @property
    def waiting(self) -> int:
        """The number of waiting callers."""
        return self._turns.waiting

    def hash(self, secret: SecretStr | str, *, beside: str | None = None, waiting: int = WAITING_HASHES) -> str:
        """Return a hash of a secret for storing.

        Args:
            secret: text of 1 to 512 characters, at most 1,024 bytes of UTF-8 and no control character. The text of the
                secret is not normalised.
            beside: stored hash that stays valid together with the new hash during a rotation. If the old and the new
                hash are Argon2 hashes, the new hash takes over the old salt. One Argon2 run checks both hashes. With a
                shared salt, the duration of a check does not reveal a rotation. RFC 9106 section 3.1 asks for a salt
                for each password, so that an attacker can't try one guess on many accounts. Both hashes belong to one
                device, so the two hashes can share a salt. Pass None if the old secret becomes invalid at once.
            waiting: maximum number of callers that wait for this hasher, including the caller of the method.

        Returns:
            A text of at most 256 characters. For a generated secret, the text is `sha256$` and 64 hex digits. For any
            other secret, the text has Argon2's format `$argon2id$v=19$…`.

        Raises:
            InvalidArgumentError: if the secret is unusable. The error message does not show the secret.
            TooManyAttemptsError: if too many callers already wait. The limit does not apply to a check of a generated
                secret.
            DatabaseBusyError: if no Argon2 run could start in time. Try again later.
            MemoryError: if the system did not give Argon2 enough memory or threads.
        """
        text = secret_text(secret)
        if is_generated(text):
            return _sha256(text)
        companion = None if beside is None else _parse_argon2(beside)
        recipe = companion.recipe if companion and self._is_current(companion.recipe) else self._fresh_recipe()
        return _format_argon2(recipe, self._run(text, recipe, waiting))

    def check(self, secret: SecretStr | str, stored: Sequence[str], *, waiting: int = WAITING_HASHES) -> SecretMatch:
        """Check a presented secret against the stored hashes of one device.

        The duration of a check depends only on the presented secret. The check computes one SHA-256 for a generated
        secret, no hash for an unusable secret, and one Argon2 run for any other secret. A check for an unknown device
        takes as long as a check for a known device.

        A check has a different duration if a stored hash has other costs than a new hash. If the device has two hashes
        with different salts, the check takes two Argon2 runs. After the caller has stored the replacement hash, a check
        takes one Argon2 run.

        Args:
            secret: presented secret, of any length.
            stored: at most 2 hashes: the present hash, and the previous hash while the previous secret is valid. For an
                unknown device, pass an empty sequence. A damaged hash or a hash of an unknown kind does not match. A
                generated secret does not match an Argon2 hash.
            waiting: maximum number of callers that wait for this hasher, including the caller of the method.

        Raises:
            InvalidArgumentError: if more than 2 hashes are given, or if the hashes are a single string.
            TooManyAttemptsError: if too many callers already wait. The limit does not apply to a check of a generated
                secret.
            DatabaseBusyError: if no Argon2 run could start in time. Try again later.
            MemoryError: if the system did not give Argon2 enough memory or threads.
        """
        if isinstance(stored, str) or len(stored) > _MAX_STORED:
            raise InvalidArgumentError(f"stored must be a sequence of at most {_MAX_STORED} hashes")
        text = reveal(secret)
        if what_is_wrong(text) is not None:
            return SecretMatch()
        return self._check_generated(text, stored) if is_generated(text) else self._check_human(text, stored, waiting)

    def _check_generated(self, text: str, stored: Sequence[str]) -> SecretMatch:
        presented = _sha256(text).encode()
        hashes = [*stored, _DECOY_HASH, _DECOY_HASH][:_MAX_STORED]
        # Compare bytes, because `compare_digest` raises an error for text outside ASCII. Encode with the error handler
        # `replace`, because a surrogate in a stored hash must not raise an error.
        same = [hmac.compare_digest(presented, one.encode(errors="replace")) for one in hashes]
        return SecretMatch(next((index for index, yes in enumerate(same[: len(stored)]) if yes), None))

    def _check_human(self, text: str, stored: Sequence[str], waiting: int) -> SecretMatch:
        hashes = [_parse_argon2(one) for one in stored]
        if not any(hashes):
            _parse_argon2(self._decoy_text)  # so that an unknown device takes the same time
        # The dictionary of recipes is used as an ordered set. If the device has no Argon2 hash, run Argon2 with the
        # costs of the decoy hash.
        recipes = dict.fromkeys(one.recipe for one in hashes if one is not None) or {self._decoy: None}
        digests = {recipe: self._run(text, recipe, waiting) for recipe in recipes}
        same = [one is not None and hmac.compare_digest(digests[one.recipe], one.digest) for one in hashes]
        matched = next((index for index, yes in enumerate(same) if yes), None)
        if matched is None:
            return SecretMatch()
        found = hashes[matched]
        if found is None or self._is_current(found.recipe):
            return SecretMatch(matched)
        others = [one for index, one in enumerate(stored) if index != matched]
        replacement = None
        # The secret was right, so accept the device even without a run for the new hash. The next check tries again to
        # make a new hash.
        with suppress(DatabaseBusyError, TooManyAttemptsError):
            replacement = self.hash(text, beside=others[0] if others else None, waiting=waiting)
        return SecretMatch(matched, replacement)

    def _fresh_recipe(self) -> _Recipe:
        return _Recipe(self._costs, secrets.token_bytes(_SALT_BYTES), _DIGEST_BYTES)

    def _is_current(self, recipe: _Recipe) -> bool:
        return recipe.costs == self._costs and (len(recipe.salt), recipe.digest_bytes) == (_SALT_BYTES, _DIGEST_BYTES)

    def _run(self, text: str, recipe: _Recipe, waiting: int) -> bytes:
        from argon2.exceptions import HashingError
        from argon2.low_level import Type, hash_secret_raw

        costs = recipe.costs
        timeout = min(self.timeout.total_seconds(), threading.TIMEOUT_MAX)
        with self._turns.turn(timeout, most_waiting=waiting) as taken:
            if not taken:
                raise DatabaseBusyError(
                    f"the slow hash of a secret could not start within {self.timeout.total_seconds():g} s, because "
                    f"{self.concurrency} run at a time and others wait: try again later, and limit the rate of logins"
                )
            try:
                return hash_secret_raw(
                    text.encode(),
                    recipe.salt,
                    time_cost=costs.time_cost,
                    memory_cost=costs.memory_cost,
                    parallelism=costs.parallelism,
                    hash_len=recipe.digest_bytes,
                    type=Type.ID,
                )
            except HashingError as error:
                # The costs are valid, so Argon2 can fail only for lack of memory or threads.
                raise MemoryError(
                    f"Argon2id could not run with {costs.memory_cost:,} KiB and {costs.parallelism} lane(s) ({error}): "
                    "give the process more memory, or lower memory_cost"
                ) from error


# The whole process uses one hasher, so that its limit of concurrent runs applies to all callers.
_default = SecretHasher()


@clears_locals
def hash_secret(secret: SecretStr | str, *, beside: str | None = None, waiting: int = WAITING_HASHES) -> str:
    """Return a hash of a secret for storing. The method `SecretHasher.hash()` documents the arguments, the result and
    the errors.

    The costs are the defaults of `SecretHasher`. A call waits at most 30 s for a slow hash. With `waiting=16`, at most
    16 callers of the process can wait at the same time.
    """
    return _default.hash(secret, beside=beside, waiting=waiting)


def check_secret(secret: SecretStr | str, stored: Sequence[str], *, waiting: int = WAITING_HASHES) -> SecretMatch:
    """Check a presented secret. The method `SecretHasher.check()` documents the arguments, the result and the errors.

    The costs are the defaults of `SecretHasher`. A call waits at most 30 s for a slow hash. With `waiting=16`, at most
    16 callers of the process can wait at the same time.
    """
    return _default.check(secret, stored, waiting=waiting)
