"""How many secrets are hashed at once, and in which order callers get their turn."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import Any

import argon2
import pytest

from homeagent.credentials import SecretHasher, SecretMatch, generate_secret
from homeagent.credentials.fair_semaphore import FairSemaphore
from homeagent.errors import DatabaseBusyError, TooManyAttemptsError
from tests.credentials.conftest import HUMAN, OTHER, Runs, dearer
from tests.interrupts import interrupt_at


@contextmanager
def _held(runs: Runs, *work: Callable[[], object]) -> Iterator[ThreadPoolExecutor]:
    """Hold one Argon2 run for each piece of work until the block ends, then see them through."""
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


def _until(condition: Callable[[], bool]) -> None:
    """Give way to the other threads until the condition holds."""
    pause = threading.Event()
    for _ in range(60_000):
        if condition():
            return
        pause.wait(0.001)
    pytest.fail("it never came to this")


def test_no_more_than_concurrency_run_at_once(runs: Runs) -> None:
    """With every place taken nobody gets in, and a caller who may not wait is told to try again later."""
    hasher = SecretHasher(time_cost=1, memory_cost=8, parallelism=1, concurrency=2, timeout=timedelta(0))
    with _held(runs, lambda: hasher.hash(HUMAN), lambda: hasher.check(HUMAN, [])):
        for refused in (lambda: hasher.hash(OTHER), lambda: hasher.check(OTHER, [])):
            with pytest.raises(DatabaseBusyError, match="try again later") as busy:
                refused()
            assert OTHER not in str(busy.value)
        assert runs.count == 2
        # Neither costs Argon2 anything, so neither has to wait.
        secret = generate_secret()
        assert hasher.check(secret, [hasher.hash(secret)])
    assert hasher.hash(OTHER)


def test_no_more_than_so_many_wait(runs: Runs) -> None:
    """A caller that finds the queue full is refused at once, and one that leaves the queue makes room."""
    hasher = SecretHasher(time_cost=1, memory_cost=8, parallelism=1, concurrency=1, timeout=timedelta(minutes=1))
    with _held(runs, lambda: hasher.hash(HUMAN)) as pool:
        waiting = [pool.submit(hasher.check, HUMAN, [], waiting=2) for _ in range(2)]
        _until(lambda: hasher.waiting == 2)
        for refused in (lambda: hasher.hash(OTHER, waiting=2), lambda: hasher.check(OTHER, [], waiting=2)):
            with pytest.raises(TooManyAttemptsError, match=r"2 slow hashes of secrets wait .* try again in 1\.000 s"):
                refused()
        assert hasher.waiting == 2
        secret = generate_secret()
        assert hasher.check(secret, [hasher.hash(secret, waiting=0)], waiting=0)
    for future in waiting:
        assert not future.result(60)
    assert hasher.hash(OTHER, waiting=0)


def test_all_places_are_used(runs: Runs) -> None:
    """As many run at once as there are places: the bound is not one big lock."""
    hasher = SecretHasher(time_cost=1, memory_cost=8, parallelism=1, concurrency=3, timeout=timedelta(0))
    with _held(runs, *[lambda: hasher.hash(HUMAN)] * 3):
        assert runs.count == 3


def test_callers_wait_in_order_of_arrival(monkeypatch: pytest.MonkeyPatch, runs: Runs) -> None:
    """Who came first is served first, and everybody is served."""
    hasher = SecretHasher(time_cost=1, memory_cost=8, parallelism=1, concurrency=1, timeout=timedelta(minutes=1))
    order: list[bytes] = []

    def record(secret: bytes, *args: Any, **kwargs: Any) -> bytes:
        order.append(secret)
        return runs(secret, *args, **kwargs)

    monkeypatch.setattr("argon2.low_level.hash_secret_raw", record)
    names = [f"caller {number}" for number in range(6)]
    with _held(runs, lambda: hasher.hash("first")) as pool:
        futures = []
        for number, name in enumerate(names):
            futures.append(pool.submit(hasher.hash, name))
            _until(lambda expected=number + 1: hasher.waiting == expected)  # type: ignore[misc]
    for future in futures:
        assert future.result(60)
    assert order == [b"first", *(name.encode() for name in names)]
    assert hasher.waiting == 0


def test_a_caller_who_gave_up_leaves_the_queue(runs: Runs) -> None:
    """After the timeout a caller holds no place and awaits none: the next one gets it."""
    patient = SecretHasher(time_cost=1, memory_cost=8, parallelism=1, concurrency=1, timeout=timedelta(milliseconds=1))
    with _held(runs, lambda: patient.hash(HUMAN)):
        with pytest.raises(DatabaseBusyError):
            patient.hash(OTHER)
        assert patient.waiting == 0
    assert patient.hash(OTHER)


def test_interrupted_wait_loses_no_place(monkeypatch: pytest.MonkeyPatch, runs: Runs) -> None:
    """Ctrl-C while waiting passes on a place that was handed over at that very moment."""
    hasher = SecretHasher(time_cost=1, memory_cost=8, parallelism=1, concurrency=1, timeout=timedelta(minutes=1))
    wait = threading.Event.wait
    waiting_thread = threading.get_ident()

    for handed_over in (False, True):

        def interrupted(event: threading.Event, timeout: float | None = None, handed: bool = handed_over) -> bool:
            if threading.get_ident() != waiting_thread or timeout != 60:
                return wait(event, timeout)
            if handed:
                runs.go_on.set()
                assert wait(event, 60)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, _held(runs, lambda: hasher.hash(HUMAN)):
            patch.setattr(threading.Event, "wait", interrupted)
            with pytest.raises(KeyboardInterrupt):
                hasher.hash(OTHER)
            patch.undo()
        assert hasher.waiting == 0
        assert hasher.hash(OTHER)


def test_a_failing_run_gives_its_place_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error inside Argon2 takes no place away from the others."""
    hasher = SecretHasher(time_cost=1, memory_cost=8, parallelism=1, concurrency=1, timeout=timedelta(0))

    def fail(*args: Any, **kwargs: Any) -> bytes:
        raise argon2.exceptions.HashingError("Threading failure")

    with monkeypatch.context() as patch:
        patch.setattr("argon2.low_level.hash_secret_raw", fail)
        with pytest.raises(MemoryError, match=r"Threading failure.*give the process more memory"):
            hasher.hash(HUMAN)
    assert hasher.hash(HUMAN)


@pytest.mark.parametrize("waiting", [0, 1], ids=["queue full", "timed out"])
def test_no_turn_for_a_replacement_still_lets_the_device_in(
    monkeypatch: pytest.MonkeyPatch, runs: Runs, waiting: int
) -> None:
    """The right secret is right, even when there is no time to hash it anew; the next check offers it again."""
    hasher = SecretHasher(time_cost=1, memory_cost=8, parallelism=1, concurrency=1, timeout=timedelta(0))
    old = dearer.hash(HUMAN)
    intruding: list[Any] = []
    with ThreadPoolExecutor(max_workers=1) as pool:

        def steal_the_place(left: bytes, right: bytes) -> bool:
            # Between the run of the check and that of the replacement, somebody else takes the only place.
            runs.go_on.clear()
            while runs.inside.acquire(blocking=False):
                pass
            intruding.append(pool.submit(hasher.hash, OTHER))
            assert runs.inside.acquire(timeout=60)
            return left == right

        with monkeypatch.context() as patch:
            patch.setattr("hmac.compare_digest", steal_the_place)
            check = hasher.check(HUMAN, [old], waiting=waiting)
        runs.go_on.set()
        assert intruding.pop().result(60)
    assert check == SecretMatch(0, None)
    assert hasher.check(HUMAN, [old]).replacement is not None


def asked_at(turn: int, *, gives_back: bool) -> bool:
    """Ask for a place in a signal's handler, at one point of taking one in vain or of giving one to who waits."""
    semaphore = FairSemaphore(1)
    taken, go_on = threading.Event(), threading.Event()
    came: list[bool] = []

    def hold(timeout: float) -> None:
        with semaphore.turn(timeout, most_waiting=9) as free:
            assert free
            taken.set()
            assert go_on.wait(30)

    def ask() -> None:
        with semaphore.turn(0, most_waiting=9):
            pass

    def give_back() -> None:
        with ExitStack() as stack:
            stack.enter_context(semaphore.turn(0, most_waiting=9))
            other.start()
            _until(lambda: semaphore.waiting == 1)
            signalled(stack.close)

    def signalled(act: Callable[[], None] = ask) -> None:
        came.append(interrupt_at(turn, {"homeagent.credentials.fair_semaphore"}, act, ask))

    other = threading.Thread(target=hold, args=(30,), daemon=True)
    if not gives_back:
        other.start()
        assert taken.wait(30)
    thread = threading.Thread(target=give_back if gives_back else signalled, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
    go_on.set()
    other.join(30)
    assert semaphore.waiting == 0
    with semaphore.turn(0, most_waiting=9) as free:
        assert free
    return came[0]


@pytest.mark.parametrize("gives_back", [False, True], ids=["taking", "giving back"])
def test_a_signal_s_handler_may_ask_for_a_place(gives_back: bool) -> None:
    """Wherever it comes while its thread takes or gives back a place, it waits for no lock, and no place is lost."""
    turn = 0
    while asked_at(turn, gives_back=gives_back):
        turn += 1
    assert turn > 5


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_forked_child_has_all_places() -> None:
    """A run that was under way in the parent doesn't take its place away from the child for ever."""
    program = """
        import os, threading, warnings
        from datetime import timedelta
        import argon2.low_level as low_level
        from homeagent.credentials import SecretHasher
        warnings.simplefilter("ignore", DeprecationWarning)     # a fork among threads is what this is about
        hasher = SecretHasher(time_cost=1, memory_cost=8, parallelism=1, concurrency=1, timeout=timedelta(0))
        real, inside, go_on = low_level.hash_secret_raw, threading.Event(), threading.Event()
        def held(*args, **kwargs):
            inside.set()
            assert go_on.wait(60)
            return real(*args, **kwargs)
        low_level.hash_secret_raw = held
        thread = threading.Thread(target=hasher.hash, args=("in the parent",))
        thread.start()
        assert inside.wait(60)
        low_level.hash_secret_raw = real
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
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
