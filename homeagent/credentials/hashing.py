"""Hashing and checking of secrets, with a limit of concurrent slow hashes."""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

from pydantic import SecretStr

from homeagent.credentials.secret_format import is_generated, reveal, secret_text, what_is_wrong
from homeagent.errors import DatabaseBusyError, TooManyAttemptsError
from homeagent.frame_locals import clears_locals
from homeagent.pool import ConnectionPool, QueueFullError

WAITING_HASHES = 16
"""Maximum number of waiting slow hashes. Further callers get `TooManyAttemptsError` at once."""

_ARGON2 = re.compile(
    r"\$argon2id\$v=19\$m=([1-9][0-9]{0,9}),t=([1-9][0-9]{0,9}),p=([1-9][0-9]{0,7})"
    r"\$([A-Za-z0-9+/]{11,86})\$([A-Za-z0-9+/]{22,86})"
)

# Limits for the costs of a stored hash. Without limits, a damaged hash could ask for a terabyte of memory. The memory
# limit, 2 GiB, comes from RFC 9106 section 4.
_MAX_MEMORY_COST = 2 * 1024 * 1024
_MAX_TIME_COST = 64
_MAX_PARALLELISM = 64
_MEMORY_PER_THREAD = 8  # kibibytes (RFC 9106 section 3.1)

_RETRY_AFTER = timedelta(seconds=1)
"""Suggested wait of a caller if too many callers wait. A second is the time of a few hashes."""

_SALT_BYTES = 16
_DIGEST_BYTES = 32
_MAX_STORED = 2


@dataclass(frozen=True, slots=True)
class _Recipe:
    """Costs, salt and digest length of an Argon2 hash. If two stored hashes have equal recipes, one Argon2 run checks
    both.
    """

    costs: tuple[int, int, int]  # memory (in kibibytes), number of passes, number of threads
    digest_bytes: int
    salt: bytes


def _recipe_of(stored: str | None) -> _Recipe | None:
    """Return the recipe of a stored Argon2id hash. Return None for another value or for costs outside the limits."""
    found = _ARGON2.fullmatch(stored or "")
    if found is None:
        return None
    memory, passes, threads = costs = (int(found[1]), int(found[2]), int(found[3]))
    if passes > _MAX_TIME_COST or threads > _MAX_PARALLELISM:
        return None
    if not _MEMORY_PER_THREAD * threads <= memory <= _MAX_MEMORY_COST:
        return None
    try:
        salt = base64.b64decode(found[4] + "=" * (-len(found[4]) % 4))
    except ValueError:
        return None
    return _Recipe(costs, len(found[5]) * 3 // 4, salt)


def _sha256(text: str) -> str:
    """Return the stored form of a generated secret. Do not call the function for a secret that a person chose."""
    return "sha256$" + hashlib.sha256(text.encode()).hexdigest()


# For an unknown device, compare a generated secret with the decoy. A shorter duration would reveal that the device is
# unknown.
_DECOY_HASH = "sha256$" + secrets.token_hex(_DIGEST_BYTES)


@dataclass(frozen=True, slots=True)
class SecretMatch:
    """The result of a check. `bool(match)` is True if a stored hash matched."""

    matched: int | None = None
    """Index of the matching stored hash, or None if no hash matched."""
    is_outdated: bool = False
    """True if a new hash of the secret would have other costs or lengths than the matching hash."""

    def __bool__(self) -> bool:
        # Compare the index with None, because the index 0 counts as false.
        return self.matched is not None


class _Run:
    """A permit to run Argon2. Waiting callers get permits in the order of their calls."""

    def close(self) -> None:
        """Do nothing, because there is no system resource to close."""


class SecretHasher:
    """Computes and checks the hashes of secrets. RFC 9106 section 4 recommends the default costs as the second option.

    A stored hash with different costs can match too. The memory cost is in kibibytes.
    """

    def __init__(
        self,
        *,
        time_cost: int = 3,
        memory_cost: int = 64 * 1024,
        parallelism: int = 4,
        concurrency: int | None = None,
        timeout: timedelta = timedelta(seconds=30),
    ) -> None:
        self._costs = (memory_cost, time_cost, parallelism)
        self._decoy_recipe = self._fresh_recipe()
        salt, digest = self._decoy_recipe.salt, secrets.token_bytes(_DIGEST_BYTES)
        encoded = "$".join(base64.b64encode(part).decode().rstrip("=") for part in (salt, digest))
        self._decoy = f"$argon2id$v=19$m={memory_cost},t={time_cost},p={parallelism}${encoded}"
        self._timeout = timeout.total_seconds()
        self.concurrency: int = concurrency or min(4, os.cpu_count() or 1)
        self._free_all_runs()
        # Give a forked child new permits. Threads of the parent can hold the old permits.
        os.register_at_fork(after_in_child=self._free_all_runs)

    def _free_all_runs(self) -> None:
        self._runs = ConnectionPool(self.concurrency, _Run, name="a run of Argon2")

    def hash(self, secret: SecretStr | str, *, beside: str | None = None, waiting: int = WAITING_HASHES) -> str:
        """Return a hash of a secret for storing (see `hash_secret()`)."""
        text = secret_text(secret)
        if is_generated(text):
            return _sha256(text)
        recipe = _recipe_of(beside)
        if recipe is None or not self._is_current(recipe):
            recipe = self._fresh_recipe()
        return self._run(text, recipe, waiting)

    def check(self, secret: SecretStr | str, stored: Sequence[str], *, waiting: int = WAITING_HASHES) -> SecretMatch:
        """Check a presented secret against the stored hashes of a device. During an overlap, a device has two hashes.

        An unknown device does not change the duration. For a generated secret, the method computes one SHA-256. For an
        unusable secret, the method computes no hash. For any other secret, the method runs Argon2 once. Two stored
        hashes with different salts need two Argon2 runs. A stored hash with outdated costs also changes the duration.
        """
        text = reveal(secret)
        if what_is_wrong(text) is not None:
            return SecretMatch()
        return self._check_generated(text, stored) if is_generated(text) else self._check_human(text, stored, waiting)

    def _check_generated(self, text: str, stored: Sequence[str]) -> SecretMatch:
        presented = _sha256(text).encode()
        hashes = [*stored, _DECOY_HASH, _DECOY_HASH][:_MAX_STORED]
        # Compare bytes, because `compare_digest` raises an error for text outside ASCII. Without `errors="replace"`, a
        # surrogate in a stored hash would raise an error.
        same = [hmac.compare_digest(presented, one.encode(errors="replace")) for one in hashes][: len(stored)]
        return SecretMatch(same.index(True) if any(same) else None)

    def _check_human(self, text: str, stored: Sequence[str], waiting: int) -> SecretMatch:
        # For an unknown device, parse and compare the decoy. A shorter duration would reveal that the device is unknown
        # (`test_time_tells_nothing`). The decoy's digest is random, so no secret matches the decoy.
        texts = [one for one in stored if one.startswith("$")] or [self._decoy]
        recipes = {one: recipe for one in texts if (recipe := _recipe_of(one))} or {self._decoy: self._decoy_recipe}
        hashes = {recipe: self._run(text, recipe, waiting) for recipe in dict.fromkeys(recipes.values())}
        same = [one for one, recipe in recipes.items() if hmac.compare_digest(hashes[recipe], one)]
        if not same:
            return SecretMatch()
        return SecretMatch(stored.index(same[0]), is_outdated=not self._is_current(recipes[same[0]]))

    def _fresh_recipe(self) -> _Recipe:
        """Return a recipe with a new random salt and the hasher's costs."""
        return _Recipe(self._costs, _DIGEST_BYTES, secrets.token_bytes(_SALT_BYTES))

    def _is_current(self, recipe: _Recipe) -> bool:
        """Return True if the recipe has the costs and lengths of a new hash."""
        lengths = len(recipe.salt), recipe.digest_bytes
        return recipe.costs == self._costs and lengths == (_SALT_BYTES, _DIGEST_BYTES)

    def _run(self, text: str, recipe: _Recipe, waiting: int) -> str:
        """Wait for a permit, and return the Argon2id hash of a text. A full queue or the timeout raises an error."""
        from argon2.exceptions import HashingError
        from argon2.low_level import Type, hash_secret

        memory, passes, threads = recipe.costs
        runs = self._runs
        try:
            run = runs.acquire(self._timeout, most_waiting=waiting)
        except QueueFullError:
            raise TooManyAttemptsError(
                f"{runs.waiting} slow hashes of secrets wait already", retry_after=_RETRY_AFTER
            ) from None
        except DatabaseBusyError:
            raise DatabaseBusyError(
                f"the slow hash of a secret could not start within {self._timeout:g} s, because {self.concurrency} run "
                "at a time and others wait: try again later, and limit the rate of logins"
            ) from None
        try:
            return hash_secret(
                text.encode(), recipe.salt, passes, memory, threads, recipe.digest_bytes, Type.ID
            ).decode()
        except HashingError as error:
            # With valid costs, Argon2 fails only for lack of memory or threads.
            raise MemoryError(
                f"Argon2id could not run with {memory:,} KiB and {threads} lane(s) ({error}): "
                "give the process more memory, or lower memory_cost"
            ) from error
        finally:
            runs.release(run)


# All callers in a process share one limit of concurrent Argon2 runs.
_default = SecretHasher()


@clears_locals
def hash_secret(secret: SecretStr | str, *, beside: str | None = None, waiting: int = WAITING_HASHES) -> str:
    """Return a hash of a secret for storing. A call waits at most 30 s for a slow hash.

    Args:
        secret: text of 1 to 512 characters, at most 1,024 bytes of UTF-8. Control characters and lone surrogates are
            not allowed. The text is not normalised.
        beside: stored hash of an old secret that stays valid during an overlap. If both hashes have the current costs,
            both get the same salt. With the same salt, a check needs only one Argon2 run. A slower check with
            two runs would reveal a rotation. RFC 9106 section 3.1 asks for a different salt for each password. For two
            secrets of one device, an equal salt is harmless. Pass None if the old secret becomes invalid at once.
        waiting: maximum number of waiting callers in the process, including this caller.

    Returns:
        A text of at most 256 characters. For a generated secret, the text is `sha256$` and 64 hex digits. For any other
        secret, the text has Argon2's format `$argon2id$v=19$…`.

    Raises:
        InvalidArgumentError: if the secret is unusable. The error message does not show the secret.
        TooManyAttemptsError: if too many callers already wait. The limit does not apply to a generated secret.
        DatabaseBusyError: if no Argon2 run could start in time. Try again later.
        MemoryError: if the system did not give Argon2 enough memory or threads.
    """
    return _default.hash(secret, beside=beside, waiting=waiting)


def check_secret(secret: SecretStr | str, stored: Sequence[str], *, waiting: int = WAITING_HASHES) -> SecretMatch:
    """Check a presented secret (see `SecretHasher.check()`), with the default costs."""
    return _default.check(secret, stored, waiting=waiting)
