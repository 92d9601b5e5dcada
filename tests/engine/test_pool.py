"""ConnectionPool: first in, first out, nobody waits forever, and nothing is lost on the way."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

import pytest

from homeagent.engine.pool import ConnectionPool
from homeagent.errors import DatabaseBusyError, DatabaseClosedError
from tests.interrupts import interrupt_at

LANES = ("homeagent.engine.pool",)


class Resource:
    """Something that can be closed."""

    def __init__(self) -> None:
        self.closed = False

    def close(self) -> None:
        """Remember it."""
        self.closed = True


def lanes_of(size: int, make: Callable[[], Resource] = Resource) -> ConnectionPool[Resource]:
    """Return lanes of so many resources."""
    return ConnectionPool(size, make, name="the write lock")


def wait_for_waiters(lanes: ConnectionPool[Resource], count: int) -> None:
    """Return once so many threads have queued up."""
    # Only the queue itself says who waits; a thread that is about to wait can't say so.
    while len(lanes._waiters) < count:
        threading.Event().wait(0.001)


def test_who_waits_longest_is_next() -> None:
    """Ten threads that queue up one after the other get the lane in that order."""
    lanes = lanes_of(1)
    first = lanes.acquire(1)
    order: list[int] = []

    def take(number: int) -> None:
        resource = lanes.acquire(10)
        order.append(number)
        lanes.release(resource)

    threads = []
    for number in range(10):
        threads.append(threading.Thread(target=take, args=(number,)))
        threads[-1].start()
        wait_for_waiters(lanes, number + 1)
    lanes.release(first)
    for thread in threads:
        thread.join()
    assert order == list(range(10))
    assert lanes.waits == 10


def test_a_timeout_says_who_holds_the_lane() -> None:
    """The one that waits in vain learns the holder's thread and since when."""
    lanes = lanes_of(1)
    held = lanes.acquire(1)
    with pytest.raises(DatabaseBusyError, match=r"thread 'MainThread' has held it for \d"):
        lanes.acquire(0.01)
    lanes.release(held)
    assert lanes.acquire(0) is held


def test_what_can_not_be_made_leaves_its_place_free() -> None:
    """A failure to open reaches its caller, and the next one may try again."""
    tries = iter([OSError("no"), None])

    def make() -> Resource:
        if error := next(tries):
            raise error
        return Resource()

    lanes = lanes_of(1, make)
    with pytest.raises(OSError, match="no"):
        lanes.acquire(0)
    assert lanes.acquire(0)


def test_a_discarded_resource_is_replaced_for_the_next() -> None:
    """A broken connection is closed, and the waiter makes a new one."""
    lanes = lanes_of(1)
    broken = lanes.acquire(1)
    got: list[Resource] = []
    waiter = threading.Thread(target=lambda: got.append(lanes.acquire(10)))
    waiter.start()
    wait_for_waiters(lanes, 1)
    lanes.discard(broken)
    waiter.join()
    assert broken.closed
    assert got[0] is not broken
    assert not got[0].closed


def test_closing_refuses_who_waits_and_closes_what_is_given_back() -> None:
    """Nobody hangs on closed lanes, and a held resource is closed on its release."""
    lanes = lanes_of(1)
    held = lanes.acquire(1)
    refused: list[BaseException] = []

    def take() -> None:
        try:
            lanes.acquire(10)
        except DatabaseClosedError as error:
            refused.append(error)

    waiter = threading.Thread(target=take)
    waiter.start()
    wait_for_waiters(lanes, 1)
    lanes.close()
    waiter.join()
    assert len(refused) == 1
    assert not held.closed
    lanes.release(held)
    assert held.closed
    with pytest.raises(DatabaseClosedError):
        lanes.acquire(0)


def test_no_more_than_its_size_are_out_at_once() -> None:
    """Sixteen threads on three lanes never hold more than three."""
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

    threads = [threading.Thread(target=work) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 1 <= most <= 3


@pytest.mark.parametrize("waits", [False, True], ids=["free", "handed over"])
@pytest.mark.parametrize("is_made", [False, True], ids=["new", "made"])
def test_an_interrupt_loses_no_place(is_made: bool, waits: bool) -> None:
    """Wherever it comes while a lane is taken, the lane is taken for good or can be taken by the next one."""
    turn = 0
    came = True
    while came:
        lanes = lanes_of(1)
        if is_made or waits:
            first = lanes.acquire(0)
            if waits:
                # Given at once: what is left of the wait is all that comes after it.
                threading.Timer(0, lanes.release if is_made else lanes.discard, [first]).start()
            else:
                lanes.release(first)
        came = interrupt_at(turn, LANES, partial(lanes.acquire, 30))
        if came:
            assert lanes.acquire(30) is not None
        assert (lanes._count, len(lanes._held)) == (1, 1)
        turn += 1
    assert turn > 3


def test_an_interrupt_leaves_what_is_given_back_whole() -> None:
    """Wherever it comes while a lane is given back, it was given back, or its holder can do that still."""
    turn = 0
    came = True
    while came:
        lanes = lanes_of(1)
        resource = lanes.acquire(0)
        came = interrupt_at(turn, LANES, partial(lanes.release, resource))
        if came:
            lanes.release_own(resource)
        assert lanes.acquire(0) is resource
        turn += 1
    assert turn > 2
