"""Two secrets, hashers with low costs, and a counter of Argon2 runs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from argon2.low_level import hash_secret
from hypothesis import strategies as st

from homeagent.credentials import MAX_SECRET_BYTES, SecretHasher, generate_secret, hashing

HUMAN = "correct horse battery staple"
OTHER = "Tr0ub4dor&3"

cheap = SecretHasher(time_cost=1, memory_cost=8, parallelism=1)
dearer = SecretHasher(time_cost=2, memory_cost=16, parallelism=1)

usable = st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=MAX_SECRET_BYTES // 4)


def generated() -> str:
    return generate_secret().get_secret_value()


class Runs:
    """Replaces Argon2: counts its runs, and can hold them until a test lets them continue."""

    def __init__(self) -> None:
        self.count = 0
        self.inside = threading.Semaphore(0)
        self.go_on = threading.Event()
        self.go_on.set()

    def __call__(self, *args: Any, **kwargs: Any) -> bytes:
        self.count += 1
        self.inside.release()
        assert self.go_on.wait(60)
        return hash_secret(*args, **kwargs)

    def of(self, work: Callable[[], object]) -> int:
        before = self.count
        work()
        return self.count - before


@pytest.fixture
def cheap_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the default hasher the lowest possible costs, for tests that do not need slow hashes."""
    monkeypatch.setattr(hashing, "_default", cheap)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    counted = Runs()
    monkeypatch.setattr("argon2.low_level.hash_secret", counted)
    return counted
