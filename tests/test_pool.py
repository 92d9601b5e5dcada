"""ConnectionPool: first in, first out; each wait has a bound, and no place is lost."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count

import pytest

from homeagent.errors import DatabaseBusyError, DatabaseClosedError
from homeagent.pool import ConnectionPool
from tests.conftest import in_threads
from tests.interrupts import interrupt_at

LANES = ("homeagent.pool",)


class Resource:
    def __init__(self) -> None:
        self.closed = False

    def close(self) -> None:
        self.closed = True


def lanes_of(size: int, make: Callable[[], Resource] = Resource) -> ConnectionPool[Resource]:
    return ConnectionPool(size, make, name="the write lock")


def wait_for_waiters(lanes: ConnectionPool[Resource], number: int) -> None:
    # Read the queue itself: a thread cannot report that it is about to wait.
    while len(lanes._waiters) < number:
        threading.Event().wait(0.001)


def test_longest_waiter_is_next() -> None:
    """If ten threads queue up one after the other, the threads get the connection in the same order."""
    lanes = lanes_of(1)
    first = lanes.acquire(1)
    order: list[int] = []

    def take(number: int) -> None:
        resource = lanes.acquire(10)
        order.append(number)
        lanes.release(resource)

    with ThreadPoolExecutor(10) as threads:
        for number in range(10):
            threads.submit(take, number)
            wait_for_waiters(lanes, number + 1)
        lanes.release(first)
    assert order == list(range(10))


def test_discarded_resource_is_replaced() -> None:
    """If a holder discards a broken connection, the pool closes it, and the waiter opens a new connection."""
    lanes = lanes_of(1)
    broken = lanes.acquire(1)
    with ThreadPoolExecutor(1) as threads:
        got = threads.submit(lanes.acquire, 10)
        wait_for_waiters(lanes, 1)
        lanes.discard(broken)
    assert broken.closed
    assert not got.result().closed


def test_close_refuses_waiters_and_closes_returned_resources() -> None:
    """If the pool is closed, waiting callers raise an error, and a held resource is closed when it is released."""
    lanes = lanes_of(1)
    held = lanes.acquire(1)
    with ThreadPoolExecutor(1) as threads:
        waiter = threads.submit(lanes.acquire, 10)
        wait_for_waiters(lanes, 1)
        lanes.close()
        with pytest.raises(DatabaseClosedError):
            waiter.result()
    assert not held.closed
    lanes.release(held)
    assert held.closed
    with pytest.raises(DatabaseClosedError):
        lanes.acquire(0)


def test_no_more_than_size_are_held() -> None:
    """Sixteen threads never hold more than the three resources of a pool."""
    lanes = lanes_of(3)
    mutex = threading.Lock()
    out = most = 0

    def work() -> None:
        nonlocal out, most
        for _ in range(50):
            resource = lanes.acquire(10)
            with mutex:
                out += 1
                most = max(most, out)
            with mutex:
                out -= 1
            lanes.release(resource)

    in_threads(*[work] * 16)
    assert 1 <= most <= 3


@pytest.mark.parametrize("waits", [False, True], ids=["free", "handed over"])
@pytest.mark.parametrize("is_made", [False, True], ids=["new", "made"])
def test_interrupt_while_taking_loses_no_place(is_made: bool, waits: bool) -> None:
    """If an interrupt comes while a caller takes a resource, the caller holds it or the next caller can take it."""
    for turn in count():
        lanes = lanes_of(1)
        if is_made or waits:
            first = lanes.acquire(0)
            if waits:
                # The resource is free at once, so the rest of the waiting code is all that follows here.
                threading.Timer(0, lanes.release if is_made else lanes.discard, [first]).start()
            else:
                lanes.release(first)
        came = interrupt_at(turn, LANES, partial(lanes.acquire, 30))
        if came:
            assert lanes.acquire(30) is not None
        assert (lanes._count, len(lanes._held)) == (1, 1)
        if not came:
            break
    assert turn > 2


def test_interrupt_while_giving_back_loses_no_place() -> None:
    """If an interrupt comes at any point of a release, the resource is released or its holder can release it again."""
    for turn in count():
        lanes = lanes_of(1)
        resource = lanes.acquire(0)
        came = interrupt_at(turn, LANES, partial(lanes.release, resource))
        if came:
            lanes.release_own(resource)
        assert lanes.acquire(0) is resource
        if not came:
            break
    assert turn > 1


@pytest.mark.parametrize("gives_back", [False, True], ids=["taking", "giving back"])
def test_signal_handler_may_ask_for_a_resource(gives_back: bool) -> None:
    """If a signal handler asks during a request or a release, no call blocks, and the waiting thread gets its turn."""
    for turn in count():
        lanes = lanes_of(1)
        held = lanes.acquire(0)
        got: list[Resource] = []
        other = threading.Thread(target=lambda: got.append(lanes.acquire(30)))  # noqa: B023  ends within the loop

        def refused() -> None:
            with pytest.raises(DatabaseBusyError):
                lanes.acquire(0)  # noqa: B023

        if gives_back:
            other.start()
            wait_for_waiters(lanes, 1)
        came = interrupt_at(turn, LANES, partial(lanes.release, held) if gives_back else refused, refused)
        if not gives_back:
            lanes.release(held)
            other.start()
        other.join()
        assert got == [held]
        assert lanes.waiting == 0
        if not came:
            break
    assert turn > 1
