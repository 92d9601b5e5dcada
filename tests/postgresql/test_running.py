"""What `Database.run` does about a lost connection. PostgreSQL only: a SQLite file has no line that could be cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest

from homeagent import AgentCreate, Database, UnitOfWork
from homeagent.errors import CommitUnknownError, ConnectionLostError
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
    with pytest.raises(CommitUnknownError, match="nobody knows"):
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
