"""What `Database.run` does about a lost connection. PostgreSQL only: a SQLite file has no line that could be cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import anyio
import pytest

from homeagent import AgentCreate, Attempt, Database, DevicePair, IdempotencyScope, Outcome, Role, UnitOfWork
from homeagent.errors import (
    CommitUnknownError,
    ConnectionLostError,
    DeviceExistsError,
    EffectFailedError,
    EffectNotStartedError,
    HomeAgentError,
    LeaseLostError,
)
from tests.conftest import START, FakeClock
from tests.postgresql.cut_line import CutLine

pytestmark = pytest.mark.usefixtures("postgres_url")

MINUTE = timedelta(minutes=1)
COMMIT = "COMMIT\0"  # the whole statement: READ COMMITTED is in every BEGIN


@pytest.fixture
def engine_name() -> str:
    """The engine with a line to it."""
    return "postgresql"


@pytest.fixture
def line(target: str) -> Iterator[CutLine]:
    """A line to a fresh database that can be cut."""
    line = CutLine(target)
    yield line
    line.close()


@pytest.fixture
def far(line: CutLine, clock: FakeClock) -> Iterator[Database]:
    """A database at the other end of the line."""
    with Database.open(line.url, clock=clock, busy_timeout=timedelta(seconds=10)) as database:
        yield database


def adding(runs: list[int]) -> Callable[[UnitOfWork], str]:
    """Return a unit that adds an agent, and counts how often it is run."""

    def add(unit: UnitOfWork) -> str:
        runs.append(1)
        if unit.agents.find_by_id("ada") is None:
            unit.agents.create(AgentCreate(id="ada", name="Ada", workspace_path="/srv/ada"))
        return "added"

    return add


def count_agents(database: Database) -> int:
    """Return how many agents there are."""
    return database.run(lambda unit: len(unit.agents.list()), read_only=True)


@pytest.mark.parametrize("word", ["BEGIN", "INSERT INTO agents"])
def test_a_line_cut_before_commit_repeats_the_unit(line: CutLine, far: Database, word: str) -> None:
    """What can't have been committed is done again, and the caller hears of nothing."""
    runs: list[int] = []
    line.cut_at(word, answered=False)
    assert far.run(adding(runs)) == "added"
    assert line.cuts == 1
    assert count_agents(far) == 1


@pytest.mark.parametrize("answered", [True, False], ids=["committed", "not committed"])
def test_a_line_cut_in_commit_is_told(line: CutLine, far: Database, answered: bool) -> None:
    """Nobody can know whether it took place: it is not repeated, and the error says so, whichever it was."""
    runs: list[int] = []
    line.cut_at(COMMIT, answered=answered)
    with pytest.raises(CommitUnknownError, match="it is unknown"):
        far.run(adding(runs))
    assert (line.cuts, len(runs)) == (1, 1)
    assert count_agents(far) == (1 if answered else 0)


@pytest.mark.parametrize("answered", [True, False], ids=["committed", "not committed"])
def test_an_idempotent_unit_is_repeated(line: CutLine, far: Database, answered: bool) -> None:
    """A unit that may be done twice is done again after a commit that nobody knows about."""
    runs: list[int] = []
    line.cut_at(COMMIT, answered=answered)
    assert far.run(adding(runs), idempotent=True) == "added"
    assert (line.cuts, len(runs)) == (1, 2)
    assert count_agents(far) == 1


def test_a_read_only_unit_is_repeated(line: CutLine, far: Database) -> None:
    """A unit that can only read has nothing to commit, so it is always done again."""
    far.run(adding([]))
    line.cut_at(COMMIT, answered=True)
    assert count_agents(far) == 1
    assert line.cuts == 1


def test_a_block_is_told_too(line: CutLine, far: Database) -> None:
    """A unit of work as a block says that its commit is unknown, with the ORM session and without it."""
    for opened in (False, True):
        line.cut_at(COMMIT, answered=False)
        with pytest.raises(CommitUnknownError), far.unit_of_work() as unit:
            if opened:
                unit.session.connection()
            unit.nonces.consume("lamp", "n", expires_at=START + MINUTE)
        assert not far.run(lambda unit: unit.nonces.find("lamp", "n"), read_only=True)


def test_the_wait_for_a_server_has_a_bound(line: CutLine, clock: FakeClock) -> None:
    """A server that stays away is waited for until busy_timeout is over, and not longer."""
    with Database.open(line.url, clock=clock, busy_timeout=timedelta(milliseconds=300)) as database:
        line.refusing = True
        line.cut_all()
        with pytest.raises(ConnectionLostError):
            database.run(adding([]))
        line.refusing = False
        assert database.run(adding([]), idempotent=True) == "added"


def test_an_unknown_commit_stays_unknown(line: CutLine, clock: FakeClock) -> None:
    """What the tries after it met does not hide that the first one's commit may have taken place."""
    with Database.open(line.url, clock=clock, busy_timeout=timedelta(milliseconds=300)) as database:
        line.cut_at(COMMIT, answered=True)

        def add(unit: UnitOfWork) -> None:
            unit.agents.create(AgentCreate(id="ada", name="Ada", workspace_path="/srv/ada"))
            line.refusing = True

        with pytest.raises(CommitUnknownError):
            database.run(add, idempotent=True)
        line.refusing = False
        assert count_agents(database) == 1


# What the package itself does twice

ORDER = IdempotencyScope("lamp", "order", "k")
ANSWERS = pytest.mark.parametrize("answered", [True, False], ids=["committed", "not committed"])


def effect_of(line: CutLine, ran: list[int], *, answered: bool, error: Exception | None = None) -> Any:
    """Return an effect after which the line is cut in the next COMMIT."""

    def effect(attempt: Attempt) -> str:
        ran.append(attempt.number)
        line.cut_at(COMMIT, answered=answered)
        if error is not None:
            raise error
        return "ordered"

    return effect


@ANSWERS
def test_a_claim_knows_its_own(line: CutLine, far: Database, answered: bool) -> None:
    """A claim whose commit was not answered is made again, and finds that the key is its own."""
    ran: list[int] = []
    line.cut_at(COMMIT, answered=answered)
    assert far.run_once(ORDER, lambda attempt: ran.append(attempt.number)) == Outcome(None, False, 1)
    assert (line.cuts, ran) == (1, [1])


@ANSWERS
def test_an_outcome_is_recorded_once(line: CutLine, far: Database, answered: bool) -> None:
    """A record whose commit was not answered is made again, or found; the effect ran once, and is replayed."""
    ran: list[int] = []
    assert far.run_once(ORDER, effect_of(line, ran, answered=answered)) == Outcome("ordered", False, 1)
    assert line.cuts == 1
    assert far.run_once(ORDER, effect_of(line, ran, answered=answered)) == Outcome("ordered", True, 1)
    assert ran == [1]


@ANSWERS
@pytest.mark.parametrize("error", [EffectFailedError("no"), EffectNotStartedError()], ids=["failed", "not started"])
def test_an_effect_that_fails_is_told_as_such(
    line: CutLine, far: Database, answered: bool, error: HomeAgentError
) -> None:
    """Neither a stored failure nor a key that was given back turns into a lost lease."""
    ran: list[int] = []
    with pytest.raises(type(error)):
        far.run_once(ORDER, effect_of(line, ran, answered=answered, error=error))
    assert line.cuts == 1
    if isinstance(error, EffectFailedError):
        with pytest.raises(EffectFailedError) as caught:
            far.run_once(ORDER, effect_of(line, ran, answered=answered))
        assert caught.value.replayed
    else:
        assert far.run_once(ORDER, lambda attempt: attempt.number).value == 1
    assert ran == [1]


@ANSWERS
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_coroutines_know_their_own(line: CutLine, far: Database, answered: bool, backend: str) -> None:
    """The same holds for an effect that is a coroutine function: claim, effect and record, each done once."""

    async def effect(attempt: Attempt) -> str:
        line.cut_at(COMMIT, answered=answered)
        return "ordered"

    async def main() -> None:
        line.cut_at(COMMIT, answered=answered)
        assert await far.arun_once(ORDER, effect) == Outcome("ordered", False, 1)
        assert await far.arun_once(ORDER, effect) == Outcome("ordered", True, 1)

    anyio.run(main, backend=backend)
    assert line.cuts == 2


def test_a_taken_key_is_lost_though_the_line_was_cut(line: CutLine, far: Database, clock: FakeClock) -> None:
    """Being run again doesn't make another attempt's record one's own."""

    def slow(attempt: Attempt) -> str:
        clock.advance(MINUTE)
        far.run_once(ORDER, lambda attempt: "ordered", on_abandoned="rerun")
        line.cut_at("UPDATE idempotency_keys", answered=False)
        return "ordered"

    with pytest.raises(LeaseLostError):
        far.run_once(ORDER, slow, lease=MINUTE)
    assert line.cuts == 1


@ANSWERS
def test_devices_pair_and_rotate_once(line: CutLine, far: Database, answered: bool) -> None:
    """The secret that is given back is the one that is stored, and an old one serves as long as it was to."""
    line.cut_at(COMMIT, answered=answered)
    paired = far.pair(DevicePair(id="lamp", role=Role.NODE))
    with pytest.raises(DeviceExistsError):
        far.pair(DevicePair(id="lamp", role=Role.NODE))
    far.run(lambda unit: unit.devices.approve("lamp"))
    line.cut_at(COMMIT, answered=answered)
    rotated = far.rotate_secret("lamp", overlap=MINUTE)
    assert line.cuts == 2
    for secret in (paired.shared_secret, rotated):
        assert far.verify_secret("lamp", secret) is not None
