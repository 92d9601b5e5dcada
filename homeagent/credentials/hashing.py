"""Secrets are hashed and checked: Argon2id for a human's, one SHA-256 for a generated one, so many at once."""

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

if TYPE_CHECKING:
    from pydantic import SecretStr

__all__ = ["WAITING_HASHES", "SecretHasher", "SecretMatch", "check_secret", "hash_secret"]

WAITING_HASHES = 16
"""How many slow hashes may wait for their turn; callers beyond that get `TooManyAttemptsError` at once."""

# Hashes as they are stored

_ARGON2 = re.compile(
    r"\$argon2id\$v=19\$m=([1-9][0-9]{0,9}),t=([1-9][0-9]{0,9}),p=([1-9][0-9]{0,7})"
    r"\$([A-Za-z0-9+/]{11,86})\$([A-Za-z0-9+/]{22,86})"
)

# Ceilings on what a stored hash may ask for: one that asks for a terabyte is damaged, and must not be obeyed. The
# memory is that of the first recommended option of RFC 9106 section 4, which is the largest that anybody has a use for.
_MAX_MEMORY_COST = 2 * 1024 * 1024
_MAX_TIME_COST = 64
_MAX_PARALLELISM = 64
_MEMORY_PER_THREAD = 8  # kibibytes; RFC 9106 section 3.1

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
    """All that decides an Argon2 digest except the secret: two hashes with one recipe are checked by one run."""

    costs: _Costs
    salt: bytes
    digest_bytes: int


@dataclass(frozen=True, slots=True, repr=False)
class _Argon2Hash:
    recipe: _Recipe
    digest: bytes


def _format_argon2(recipe: _Recipe, digest: bytes) -> str:
    costs = recipe.costs
    # Argon2's text form leaves the padding out.
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
    # One spelling for one value: base64 whose last character has bits left over is damaged (RFC 4648 section 3.5).
    return _Argon2Hash(recipe, digest) if _format_argon2(recipe, digest) == stored else None


def _sha256(text: str) -> str:
    return "sha256$" + hashlib.sha256(text.encode()).hexdigest()


# Takes the place of a hash that is not there, so that a generated secret is compared as often for nobody's device.
_DECOY_HASH = "sha256$" + secrets.token_hex(_DIGEST_BYTES)
_MAX_STORED = 2


# Hashing and checking


@dataclass(frozen=True, slots=True)
class SecretMatch:
    """Which stored hash a secret matched. It is true if there is one: `if check_secret(...):`."""

    matched: int | None = None
    """Which of the stored hashes matched, counted from 0; None where none did."""
    replacement: str | None = field(default=None, repr=False)
    """A hash of the same secret to store in place of the one that matched, because that one was made with other
    costs than today's. None where the stored one is good."""

    def __bool__(self) -> bool:
        # Index 0 is a match too: without this, `if check.matched` would be the natural thing to write, and wrong.
        return self.matched is not None


@dataclass(frozen=True, kw_only=True, eq=False)
class SecretHasher:
    """Hashes and checks secrets with given Argon2 costs, so many at once.

    The defaults are those of argon2-cffi, the second recommended option of RFC 9106 section 4. What is hashed with
    other costs still verifies, and is replaced when its secret is presented next.

    Args:
        time_cost: passes over the memory, 1 to 64.
        memory_cost: memory of one run in kibibytes, from 8 for each lane to 2,097,152 (2 GiB).
        parallelism: lanes, 1 to 64.
        concurrency: how many Argon2 runs this hasher does at once, so that a flood of callers can't exhaust memory:
            `concurrency * memory_cost` is the most that it takes for hashes with its own costs. The default is the
            number of processors, at most 4.
        timeout: how long a caller waits for its turn at most. Turns are taken in order of arrival.

    Raises:
        InvalidArgumentError: one of them is out of its bounds.
    """

    time_cost: int = 3
    memory_cost: int = 64 * 1024
    parallelism: int = 4
    concurrency: int = field(default_factory=lambda: min(4, os.cpu_count() or 1))
    timeout: timedelta = timedelta(seconds=30)
    _costs: _Costs = field(init=False, repr=False)
    _decoy: _Recipe = field(init=False, repr=False)
    _turns: FairSemaphore = field(init=False, repr=False)

    def __post_init__(self) -> None:
        costs = _Costs(self.time_cost, self.memory_cost, self.parallelism)
        problem = costs.problem()
        if problem is not None:
            raise InvalidArgumentError(problem)
        if self.concurrency < 1:
            raise InvalidArgumentError("concurrency must be 1 or more, or nobody would ever get a turn")
        if self.timeout < timedelta(0):
            raise InvalidArgumentError("timeout must be zero or more")
        object.__setattr__(self, "_costs", costs)
        object.__setattr__(self, "_decoy", self._fresh_recipe())
        object.__setattr__(self, "_turns", FairSemaphore(self.concurrency))

    @property
    def waiting(self) -> int:
        """How many callers wait for their turn at this moment."""
        return self._turns.waiting

    def hash(self, secret: SecretStr | str, *, beside: str | None = None, waiting: int = WAITING_HASHES) -> str:
        """Hash a secret for storing.

        Args:
            secret: 1 to 512 characters, at most 1,024 bytes of UTF-8, no control character. It is taken as it is.
            beside: the stored hash that stays valid for a while beside the new one. If both are Argon2 hashes, the new
                one takes over its salt, and one run checks the two: a check then doesn't take longer, and nobody
                can time that a device is changing its secret. RFC 9106 section 3.1 asks for a salt of its own for each
                password, so that one guess doesn't serve against many accounts; here it serves against two secrets of
                one device. Leave it out where the old secret is to stop at once.
            waiting: how many callers of this hasher may wait for their turn, this one included.

        Returns:
            `sha256$` and 64 hex digits for a generated secret, else Argon2's own text form, `$argon2id$v=19$…`. At most
            256 characters.

        Raises:
            InvalidArgumentError: it is no usable secret; the message doesn't show it.
            TooManyAttemptsError: `waiting` callers wait already; not for a generated secret, which is never refused.
            DatabaseBusyError: no turn came within `timeout`. As with a busy database, try again later.
            MemoryError: the system would not give Argon2 the memory or the threads for a run.
        """
        text = secret_text(secret)
        if is_generated(text):
            return _sha256(text)
        companion = None if beside is None else _parse_argon2(beside)
        recipe = companion.recipe if companion and self._is_current(companion.recipe) else self._fresh_recipe()
        return _format_argon2(recipe, self._run(text, recipe, waiting))

    def check(self, secret: SecretStr | str, stored: Sequence[str], *, waiting: int = WAITING_HASHES) -> SecretMatch:
        """Check a presented secret against the hashes that are stored for one device.

        What matters for the time is only what was presented. A generated secret is hashed once with SHA-256. Any other
        costs one Argon2 run, whatever is stored: nothing, a hash of the other kind or of no known kind, one hash or
        two. An unusable secret (empty, too long, a control character) is refused without hashing.

        The exception is a hash made with other costs than this hasher's: it takes what those costs take, and a run of
        its own beside another. The same holds for two that were not made `beside` each other. So store the
        `replacement`, which is made when the right secret was presented.

        Args:
            secret: as it was presented, of any length.
            stored: at most 2 hashes: none for an unknown device, the present one, and the one before it while that
                still serves. One that is damaged or of an unknown kind never matches, nor does a generated secret
                match an Argon2 hash.
            waiting: how many callers of this hasher may wait for their turn, this one included.

        Raises:
            InvalidArgumentError: more than 2 hashes, or one string in place of a sequence.
            TooManyAttemptsError: `waiting` callers wait already; not for a generated secret, which is never refused.
            DatabaseBusyError: no turn came within `timeout`. As with a busy database, try again later.
            MemoryError: the system would not give Argon2 the memory or the threads for a run.
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
        # compare_digest refuses text that is not ASCII: bytes it is, and a stored surrogate must not raise either.
        same = [hmac.compare_digest(presented, one.encode(errors="replace")) for one in hashes]
        return SecretMatch(next((index for index, yes in enumerate(same[: len(stored)]) if yes), None))

    def _check_human(self, text: str, stored: Sequence[str], waiting: int) -> SecretMatch:
        hashes = [_parse_argon2(one) for one in stored]
        # A dictionary for a set that keeps its order; the decoy is for a device that has no such hash.
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
        # The secret was right: no turn for the new hash is no reason to turn the device away, and the next check tries
        # again.
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
                    f"{self.concurrency} secret(s) are being hashed and others wait, for more than "
                    f"{self.timeout.total_seconds():g} s: try again later, and slow down who presents so many"
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
                # The costs were judged before, so only memory or threads can be lacking.
                raise MemoryError(
                    f"Argon2id could not run with {costs.memory_cost:,} KiB and {costs.parallelism} lane(s) ({error}): "
                    "give the process more memory, or lower memory_cost"
                ) from error


# One for the whole process, so that `concurrency` bounds all of its callers.
_default = SecretHasher()


def hash_secret(secret: SecretStr | str, *, beside: str | None = None, waiting: int = WAITING_HASHES) -> str:
    """Hash a secret for storing, with the default costs: see `SecretHasher.hash`.

    Args:
        secret: 1 to 512 characters, at most 1,024 bytes of UTF-8, no control character. It is taken as it is.
        beside: the stored hash that stays valid for a while beside the new one; None where none does.
        waiting: how many slow hashes may wait for their turn in this process, this one included.

    Returns:
        `sha256$…` for a generated secret, `$argon2id$…` for any other.

    Raises:
        InvalidArgumentError: it is no usable secret; the message doesn't show it.
        TooManyAttemptsError: `waiting` slow hashes wait already; not for a generated secret, which is never refused.
        DatabaseBusyError: too many are being hashed, and no turn came within 30 seconds.
        MemoryError: the system would not give Argon2 the memory or the threads for a run.
    """
    return _default.hash(secret, beside=beside, waiting=waiting)


def check_secret(secret: SecretStr | str, stored: Sequence[str], *, waiting: int = WAITING_HASHES) -> SecretMatch:
    """Check a presented secret against at most 2 stored hashes, with the default costs: see `SecretHasher.check`.

    Args:
        secret: as it was presented, of any length.
        stored: none for an unknown device, the present hash, and the one before it while that still serves.
        waiting: how many slow hashes may wait for their turn in this process, this one included.

    Returns:
        Which one matched, and what to store in its place if it is out of date.

    Raises:
        InvalidArgumentError: more than 2 hashes, or one string in place of a sequence.
        TooManyAttemptsError: `waiting` slow hashes wait already; not for a generated secret, which is never refused.
        DatabaseBusyError: too many are being hashed, and no turn came within 30 seconds.
        MemoryError: the system would not give Argon2 the memory or the threads for a run.
    """
    return _default.check(secret, stored, waiting=waiting)
