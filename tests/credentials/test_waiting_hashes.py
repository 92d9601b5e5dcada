"""The number of secrets that are hashed at the same time, and the order of the callers."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from unittest.mock import Mock

import argon2
import pytest

from homeagent.credentials import SecretHasher, generate_secret
from homeagent.errors import DatabaseBusyError
from tests import fork_server
from tests.credentials.conftest import HUMAN, OTHER, Runs


@contextmanager
def _held(runs: Runs, *work: Callable[[], object]) -> Iterator[ThreadPoolExecutor]:
    """Hold one Argon2 run for each function until the block ends, then wait for all of them."""
    runs.go_on.clear()
    with ThreadPoolExecutor(max_workers=16) as pool:
        futures = [pool.submit(one) for one in work]
        try:
            for _ in futures:
                assert runs.inside.acquire(timeout=60)
            yield pool
        finally:
            runs.go_on.set()
            for future in futures:
                future.result(60)


def hasher_of(concurrency: int = 1, timeout: timedelta = timedelta(0)) -> SecretHasher:
    return SecretHasher(time_cost=1, memory_cost=8, parallelism=1, concurrency=concurrency, timeout=timeout)


def test_no_more_than_concurrency_run_at_once(runs: Runs) -> None:
    """If every place is taken, a caller without patience raises an error, leaves the queue and can try again later."""
    hasher = hasher_of(2)
    with _held(runs, lambda: hasher.hash(HUMAN), lambda: hasher.check(HUMAN, [])):
        for refused in (lambda: hasher.hash(OTHER), lambda: hasher.check(OTHER, [])):
            with pytest.raises(DatabaseBusyError, match="try again later") as busy:
                refused()
            assert OTHER not in str(busy.value)
        assert (runs.count, hasher._runs.waiting) == (2, 0)
        # Neither needs Argon2, so neither waits.
        secret = generate_secret()
        assert hasher.check(secret, [hasher.hash(secret)])
    assert hasher.hash(OTHER)


def test_failing_run_releases_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """If Argon2 raises an error, the run's place is released."""
    hasher = hasher_of()
    with monkeypatch.context() as patch:
        failing = Mock(side_effect=argon2.exceptions.HashingError("Threading failure"))
        patch.setattr("argon2.low_level.hash_secret", failing)
        with pytest.raises(MemoryError, match=r"Threading failure.*give the process more memory"):
            hasher.hash(HUMAN)
    assert hasher.hash(HUMAN)


def test_forked_child_has_all_places() -> None:
    """If a run was active in the parent during a fork, the child still has all places."""
    program = """
        import os, threading, warnings
        from datetime import timedelta
        import argon2.low_level as low_level
        from homeagent.credentials import SecretHasher
        warnings.simplefilter("ignore", DeprecationWarning)     # a fork among threads is what this is about
        hasher = SecretHasher(time_cost=1, memory_cost=8, parallelism=1, concurrency=1, timeout=timedelta(0))
        real, inside, go_on = low_level.hash_secret, threading.Event(), threading.Event()
        def held(*args, **kwargs):
            inside.set()
            assert go_on.wait(60)
            return real(*args, **kwargs)
        low_level.hash_secret = held
        thread = threading.Thread(target=hasher.hash, args=("in the parent",))
        thread.start()
        assert inside.wait(60)
        low_level.hash_secret = real
        child = os.fork()
        if child == 0:
            try:
                hasher.hash("in the child")
            except BaseException:
                os._exit(1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        go_on.set()
        thread.join()
        raise SystemExit(os.waitstatus_to_exitcode(status))
    """
    done = fork_server.run(textwrap.dedent(program), timeout=60)
    assert done.returncode == 0, done.stderr
