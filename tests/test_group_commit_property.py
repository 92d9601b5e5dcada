"""Group commit: each unit of a batch ends as the unit would alone, with any steps and any failing commits."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import insert

from homeagent import Agent, Database, UnitOfWork
from homeagent.errors import AgentExistsError, AgentNotFoundError, ConflictError, DiskFullError, UnitStateError
from tests.batches import counted_commits, create, run_together
from tests.conftest import START, FakeClock, dump

# Savepoints that no unit ends; garbage collection would end a savepoint without a reference.
left_open: list[Any] = []

names = st.sampled_from(["a", "b", "c"])
orm_acts = ["orm", "orm add", "orm nested", "orm rollback", "orm close"]
acts = st.sampled_from(["create", "delete", "get", "nested", "nested error", "left open", "callback", *orm_acts])
steps = st.lists(st.tuples(acts, names), max_size=4)
ends = st.sampled_from(["return", "return", "return", "raise", "rollback"])


def play_orm(unit: UnitOfWork, act: str, name: str) -> Any:
    found = unit.session.get(Agent, name)
    if act == "orm add" and unit.session.get(Agent, f"{name}{name}") is None:
        unit.session.add(Agent(id=f"{name}{name}", name="added", workspace_path="/orm", created_at=START))
    elif act == "orm rollback":
        unit.session.rollback()
    elif act == "orm nested":
        with suppress(ConflictError), unit.session.begin_nested():
            unit.session.execute(insert(Agent).values(id="a", name="added", workspace_path="/orm", created_at=START))
    elif act == "orm close":
        unit.session.close()
    elif found is not None:
        found.name = "by the ORM"
    return found is not None


def play(unit: UnitOfWork, script: Sequence[tuple[str, str]], end: str, called: list[str]) -> Any:
    shown: list[Any] = []
    for act, name in script:
        if act == "create":
            shown.append(create(unit, name))
        elif act == "delete":
            shown.append(unit.agents.delete(name))
        elif act == "get":
            shown.append(unit.agents.get(name).name)
        elif act == "nested":
            with suppress(LookupError), unit.savepoint():
                unit.agents.delete(name)
                raise LookupError
        elif act == "nested error":
            with suppress(AgentExistsError), unit.savepoint(), unit.savepoint():
                create(unit, "d")
                create(unit, name)
        elif act == "left open":
            left_open.append(unit.savepoint())
            left_open[-1].__enter__()
            shown.append(unit.agents.delete(name))
        elif act.startswith("orm"):
            shown.append(play_orm(unit, act, name))
        else:
            unit.after_commit(functools.partial(called.append, name))
    if end == "raise":
        raise LookupError(str(shown))
    if end == "rollback":
        unit.rollback()
    return shown


def comparable(outcome: Any) -> Any:
    return (type(outcome), str(outcome)) if isinstance(outcome, BaseException) else outcome


@settings(max_examples=100, deadline=None)
@given(
    scripts=st.lists(st.tuples(steps, ends), min_size=2, max_size=6),
    faults=st.lists(st.booleans(), max_size=3),
    coroutines=st.booleans(),
)
def test_units_of_a_batch_equal_units_alone(
    pair: tuple[Database, Database],
    scripts: list[tuple[list[tuple[str, str]], str]],
    faults: list[bool],
    coroutines: bool,
) -> None:
    """The units of a batch, of threads or of coroutines, give the same results and rows as the units in blocks."""
    batched, alone = pair
    order: list[int] = []
    called: dict[int, list[str]] = {number: [] for number in range(len(scripts))}
    failing = [DiskFullError("no room") if fault else None for fault in faults]

    def work(unit: UnitOfWork, number: int) -> Any:
        if number in order:
            order.remove(number)
        order.append(number)
        return play(unit, *scripts[number], called[number])

    for database in pair:
        with database.unit_of_work() as unit:
            for agent in unit.agents.list():
                unit.agents.delete(agent.id)
            create(unit, "a")
    works = [functools.partial(work, number=number) for number in range(len(scripts))]
    with pytest.MonkeyPatch.context() as patch, counted_commits(patch, *failing):
        patch.setattr("homeagent.group_commit._MAX_BATCH_SECONDS", 60)
        outcomes = run_together(batched, works, coroutines=coroutines)
    left_open.clear()
    for number in order:
        expected: list[str] = []
        if isinstance(outcomes[number], DiskFullError):
            # The commit of the unit failed alone: no row of the unit exists.
            assert called[number] == []
            continue
        try:
            with alone.unit_of_work() as unit:
                result: Any = play(unit, *scripts[number], expected)
        except (LookupError, AgentExistsError, AgentNotFoundError, UnitStateError) as error:
            result = error
        assert comparable(outcomes[number]) == comparable(result)
        assert called[number] == expected
    left_open.clear()
    assert dump(batched) == dump(alone)


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[Database, Database]]:
    """Two databases that stay open for all examples, as opening takes most of the time."""
    clock = FakeClock()
    with (
        Database.open(":memory:", clock=clock, durability="normal") as batched,
        Database.open(":memory:", clock=clock, durability="normal") as alone,
    ):
        yield batched, alone
