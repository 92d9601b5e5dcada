"""The guard that lets a signed message in once, and only while it is fresh."""

from __future__ import annotations

from datetime import timedelta

import pytest

from homeagent import Database, Freshness, ReplayGuard
from homeagent.errors import InvalidArgumentError, NonceLimitError
from tests.conftest import START, FakeClock

SKEW = timedelta(minutes=5)
MOMENT = timedelta(milliseconds=1)


def judge(database: Database, nonce: str, *, offset: timedelta, guard: ReplayGuard | None = None) -> Freshness:
    """Judge a message that was signed `offset` after START, in a unit of its own."""
    guard = guard or ReplayGuard(skew=SKEW)
    return database.run(lambda unit: guard.check(unit.nonces, "lamp", nonce, signed_at=START + offset))


def test_a_fresh_message_enters_once(database: Database) -> None:
    """The second time it is a replay, for as long as its timestamp is fresh."""
    assert judge(database, "one", offset=timedelta(0)) is Freshness.FRESH
    assert judge(database, "one", offset=timedelta(0)) is Freshness.REPLAYED


@pytest.mark.parametrize(
    ("offset", "verdict"),
    [
        (-SKEW - MOMENT, Freshness.STALE),
        (-SKEW, Freshness.STALE),
        (-SKEW + MOMENT, Freshness.FRESH),
        (SKEW, Freshness.FRESH),
        (SKEW + MOMENT, Freshness.FUTURE),
    ],
)
def test_a_timestamp_is_judged_to_the_millisecond(database: Database, offset: timedelta, verdict: Freshness) -> None:
    """A message is dead at the very instant at which its nonce is, and its signer may be ahead by the skew."""
    assert judge(database, "one", offset=offset) is verdict


def test_what_is_refused_for_its_time_uses_no_nonce_up(database: Database) -> None:
    """A stale or future message leaves nothing behind."""
    judge(database, "one", offset=-SKEW)
    judge(database, "one", offset=SKEW + MOMENT)
    with database.unit_of_work(read_only=True) as unit:
        assert unit.nonces.find("lamp", "one") is None


def test_a_nonce_is_remembered_for_as_long_as_its_message_is_fresh(database: Database, clock: FakeClock) -> None:
    """Signed by a clock that is ahead, it is a replay until the skew after its own timestamp, swept or not."""
    assert judge(database, "one", offset=SKEW) is Freshness.FRESH
    clock.advance(2 * SKEW - MOMENT)
    database.sweep()
    assert judge(database, "one", offset=SKEW) is Freshness.REPLAYED
    clock.advance(MOMENT)
    assert judge(database, "one", offset=SKEW) is Freshness.STALE


def test_a_clock_that_steps_back_readmits_nothing(database: Database, clock: FakeClock) -> None:
    """A sweep keeps a dead nonce for a while, so that it is still known when the clock is set back."""
    assert judge(database, "one", offset=timedelta(0)) is Freshness.FRESH
    clock.advance(SKEW + timedelta(minutes=30))
    database.sweep()
    clock.advance(-timedelta(minutes=34))
    assert judge(database, "one", offset=timedelta(0)) is Freshness.REPLAYED


def test_the_bound_of_a_device_is_the_guards(database: Database) -> None:
    """Beyond the bound new messages are refused, and none of the live ones is forgotten."""
    guard = ReplayGuard(skew=SKEW, limit=3)
    for number in range(3):
        assert judge(database, f"n{number}", offset=timedelta(0), guard=guard) is Freshness.FRESH
    with pytest.raises(NonceLimitError):
        judge(database, "n3", offset=timedelta(0), guard=guard)
    with database.unit_of_work(read_only=True) as unit:
        assert all(unit.nonces.find("lamp", f"n{number}") for number in range(3))


def test_guards_of_two_bounds(database: Database) -> None:
    """What a guard with a high bound found room for is none for one with a low bound."""
    assert judge(database, "first", offset=timedelta(0), guard=ReplayGuard(skew=SKEW)) is Freshness.FRESH
    guard = ReplayGuard(skew=SKEW, limit=3)
    for number in range(2):
        assert judge(database, f"n{number}", offset=timedelta(0), guard=guard) is Freshness.FRESH
    with pytest.raises(NonceLimitError):
        judge(database, "n2", offset=timedelta(0), guard=guard)


def test_a_guard_refuses_bad_settings() -> None:
    """A skew of nothing would let nobody in."""
    for bad in (timedelta(0), -SKEW):
        with pytest.raises(InvalidArgumentError):
            ReplayGuard(skew=bad)
    with pytest.raises(InvalidArgumentError):
        ReplayGuard(skew=SKEW, limit=0)
