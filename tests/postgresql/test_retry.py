"""`Database.run` after a lost connection. PostgreSQL only: SQLite has no connection that could be cut."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, NoReturn

import anyio
import psycopg
import pytest
from sqlalchemy import text
from sqlmodel import select

from homeagent import (
    Agent,
    AgentCreate,
    Attempt,
    Database,
    Device,
    DevicePair,
    IdempotencyScope,
    Outcome,
    Role,
    UnitOfWork,
    errors,
)
from tests.conftest import START, FakeClock
from tests.postgresql.cut_line import CutLine

pytestmark = pytest.mark.usefixtures("postgres_url")

MINUTE = timedelta(minutes=1)
COMMIT = "COMMIT\0"  # the whole statement: READ COMMITTED is in every BEGIN


@pytest.fixture
def line(target: str) -> Iterator[CutLine]:
    line = CutLine(target)
    yield line
    line.close()


@pytest.fixture
def far(line: CutLine, clock: FakeClock) -> Iterator[Database]:
    with Database.open(line.url, clock=clock, busy_timeout=timedelta(seconds=10)) as database:
        yield database


def adding(runs: list[int]) -> Callable[[UnitOfWork], str]:
    """Return a unit that adds an agent, and counts its calls."""

    def add(unit: UnitOfWork) -> str:
        runs.append(1)
        if unit.agents.find_by_id("ada") is None:
            unit.agents.create(AgentCreate(id="ada", name="Ada", workspace_path="/srv/ada"))
        return "added"

    return add


def count_agents(database: Database) -> int:
    return database.run(lambda unit: len(unit.agents.list()), read_only=True)


@pytest.mark.parametrize("word", ["BEGIN", "INSERT INTO agents"])
def test_connection_lost_before_commit_repeats_the_unit(line: CutLine, far: Database, word: str) -> None:
    """If the connection is lost before COMMIT, `run` repeats the unit, and the caller sees no error."""
    runs: list[int] = []
    line.cut_at(word, answered=False)
    assert far.run(adding(runs)) == "added"
    assert line.cuts == 1
    assert count_agents(far) == 1


def create_ada(unit: UnitOfWork) -> None:
    unit.agents.create(AgentCreate(id="ada", name="Ada", workspace_path="/srv/ada"))


def flush_ada(unit: UnitOfWork) -> None:
    unit.session.add(Agent(id="ada", name="Ada", workspace_path="/srv/ada", created_at=START))
    unit.session.flush()


def autoflush_ada(unit: UnitOfWork) -> None:
    unit.session.add(Agent(id="ada", name="Ada", workspace_path="/srv/ada", created_at=START))
    unit.session.exec(select(Device)).all()


def insert_two_agents(unit: UnitOfWork) -> None:
    insert = "INSERT INTO agents (id, name, workspace_path, created_at) VALUES (:id, 'Ada', '/srv/ada', 1)"
    unit.session.execute(text(insert), [{"id": "ada"}, {"id": "ada2"}])


def begin_nested(unit: UnitOfWork) -> AbstractContextManager[object]:
    return unit.session.begin_nested()


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("block", [nullcontext, UnitOfWork.savepoint, begin_nested])
@pytest.mark.parametrize("write", [create_ada, flush_ada, autoflush_ada, insert_two_agents])
def test_interrupted_statement_is_not_repeated(
    target: str,
    database: Database,
    kind: type[BaseException],
    block: Callable[[UnitOfWork], AbstractContextManager[object]],
    write: Callable[[UnitOfWork], None],
) -> None:
    """An exception of a signal handler during a statement leaves `run`, and the function is not called again."""
    runs: list[int] = []

    def work(unit: UnitOfWork) -> None:
        runs.append(1)
        if len(runs) == 1:
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            with block(unit):
                write(unit)

    def interrupt(*_signal: object) -> NoReturn:
        raise kind

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with psycopg.connect(target) as other, pytest.raises(kind):
            other.execute("LOCK TABLE agents IN EXCLUSIVE MODE")
            database.run(work, idempotent=True)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert len(runs) == 1
    assert count_agents(database) == 0


ANSWERS = pytest.mark.parametrize("answered", [True, False], ids=["committed", "not committed"])


@ANSWERS
def test_connection_lost_in_commit_raises_commit_unknown(line: CutLine, far: Database, answered: bool) -> None:
    """If the connection is lost during COMMIT, `run` raises CommitUnknownError, and repeats only an idempotent unit."""
    runs: list[int] = []
    line.cut_at(COMMIT, answered=answered)
    with pytest.raises(errors.CommitUnknownError, match="it is unknown"):
        far.run(adding(runs))
    assert (line.cuts, len(runs)) == (1, 1)
    assert count_agents(far) == (1 if answered else 0)
    line.cut_at(COMMIT, answered=answered)
    assert far.run(adding(runs), idempotent=True) == "added"
    assert (line.cuts, len(runs)) == (2, 3)
    # A read unit commits no change, so it is always repeated.
    line.cut_at(COMMIT, answered=True)
    assert count_agents(far) == 1
    assert line.cuts == 3


def test_block_raises_commit_unknown_too(line: CutLine, far: Database) -> None:
    """If a block's commit is unknown, CommitUnknownError is raised, with and without the ORM session."""
    for opened in (False, True):
        line.cut_at(COMMIT, answered=False)
        with pytest.raises(errors.CommitUnknownError), far.unit_of_work() as unit:
            if opened:
                unit.session.connection()
            unit.nonces.consume("lamp", "n", expires_at=START + MINUTE)
        assert not far.run(lambda unit: unit.nonces.find("lamp", "n"), read_only=True)


def test_wait_for_a_server_is_bounded(line: CutLine, clock: FakeClock) -> None:
    """If a server stays away, the wait ends after busy_timeout."""
    with Database.open(line.url, clock=clock, busy_timeout=timedelta(milliseconds=300)) as database:
        line.refusing = True
        line.cut_all()
        with pytest.raises(errors.ConnectionLostError):
            database.run(adding([]))
        line.refusing = False
        assert database.run(adding([]), idempotent=True) == "added"


def test_unknown_commit_stays_unknown(line: CutLine, clock: FakeClock) -> None:
    """If a commit is unknown and later attempts fail otherwise, the error is still CommitUnknownError."""
    with Database.open(line.url, clock=clock, busy_timeout=timedelta(milliseconds=300)) as database:
        line.cut_at(COMMIT, answered=True)

        def add(unit: UnitOfWork) -> None:
            unit.agents.create(AgentCreate(id="ada", name="Ada", workspace_path="/srv/ada"))
            line.refusing = True

        with pytest.raises(errors.CommitUnknownError):
            database.run(add, idempotent=True)
        line.refusing = False
        assert count_agents(database) == 1


# Repeated units of the package itself

ORDER = IdempotencyScope("lamp", "order", "k")


def effect_of(line: CutLine, ran: list[int], *, answered: bool, error: Exception | None = None) -> Any:
    """Return an effect after which the next COMMIT loses its connection."""

    def effect(attempt: Attempt) -> str:
        ran.append(attempt.number)
        line.cut_at(COMMIT, answered=answered)
        if error is not None:
            raise error
        return "ordered"

    return effect


@ANSWERS
def test_claim_and_record_are_recognised(line: CutLine, far: Database, answered: bool) -> None:
    """If the commits of claim and record are unknown, both are repeated or found; the effect runs once."""
    ran: list[int] = []
    line.cut_at(COMMIT, answered=answered)
    assert far.run_once(ORDER, effect_of(line, ran, answered=answered)) == Outcome("ordered", False, 1)
    assert line.cuts == 2
    assert far.run_once(ORDER, effect_of(line, ran, answered=answered)) == Outcome("ordered", True, 1)
    assert ran == [1]


@ANSWERS
@pytest.mark.parametrize(
    "error", [errors.EffectFailedError("no"), errors.EffectNotStartedError()], ids=["failed", "not started"]
)
def test_failed_effect_keeps_its_error(
    line: CutLine, far: Database, answered: bool, error: errors.HomeAgentError
) -> None:
    """If the connection is lost after a failed effect, the effect's error is raised, not a lost lease."""
    ran: list[int] = []
    with pytest.raises(type(error)):
        far.run_once(ORDER, effect_of(line, ran, answered=answered, error=error))
    assert line.cuts == 1
    if isinstance(error, errors.EffectFailedError):
        with pytest.raises(errors.EffectFailedError) as caught:
            far.run_once(ORDER, effect_of(line, ran, answered=answered))
        assert caught.value.replayed
    else:
        assert far.run_once(ORDER, lambda attempt: attempt.number).value == 1
    assert ran == [1]


@ANSWERS
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_coroutine_effects_run_once(line: CutLine, far: Database, answered: bool, backend: str) -> None:
    """If the effect is a coroutine function, claim, effect and record still take place once."""

    async def effect(attempt: Attempt) -> str:
        line.cut_at(COMMIT, answered=answered)
        return "ordered"

    async def main() -> None:
        line.cut_at(COMMIT, answered=answered)
        assert await far.arun_once(ORDER, effect) == Outcome("ordered", False, 1)
        assert await far.arun_once(ORDER, effect) == Outcome("ordered", True, 1)

    anyio.run(main, backend=backend)
    assert line.cuts == 2


def test_taken_key_stays_lost(line: CutLine, far: Database, clock: FakeClock) -> None:
    """If another attempt took the key, a repeated record raises LeaseLostError."""

    def slow(attempt: Attempt) -> str:
        clock.advance(MINUTE)
        far.run_once(ORDER, lambda attempt: "ordered", on_abandoned="rerun")
        line.cut_at("UPDATE idempotency_keys", answered=False)
        return "ordered"

    with pytest.raises(errors.LeaseLostError):
        far.run_once(ORDER, slow, lease=MINUTE)
    assert line.cuts == 1


@ANSWERS
def test_devices_are_paired_and_rotated_once(line: CutLine, far: Database, answered: bool) -> None:
    """If a commit is unknown, the returned secret is the stored one, and a previous secret keeps its overlap."""
    line.cut_at(COMMIT, answered=answered)
    paired = far.pair(DevicePair(id="lamp", role=Role.NODE))
    with pytest.raises(errors.DeviceExistsError):
        far.pair(DevicePair(id="lamp", role=Role.NODE))
    far.run(lambda unit: unit.devices.approve("lamp"))
    line.cut_at(COMMIT, answered=answered)
    rotated = far.rotate_secret("lamp", overlap=MINUTE)
    assert line.cuts == 2
    for secret in (paired.shared_secret, rotated):
        assert far.verify_secret("lamp", secret) is not None
