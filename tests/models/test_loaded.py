"""Instances that a store loaded: what the ORM asks of them is made when it asks."""

from __future__ import annotations

import copy
import pickle

import pytest
from sqlalchemy import inspect
from sqlalchemy.exc import NoInspectionAvailable

from homeagent import Agent, Database
from tests.conftest import START, add_agent


@pytest.fixture
def agent(database: Database) -> Agent:
    """An agent that a store loaded."""
    add_agent(database)
    with database.unit_of_work(read_only=True) as unit:
        return unit.agents.get("ada")


def test_a_loaded_instance_is_detached_and_unchanged(agent: Agent) -> None:
    """SQLAlchemy sees an identity and no change, the same each time it looks."""
    assert "_sa_instance_state" not in agent.__dict__
    state = inspect(agent)
    assert state.detached
    assert state.identity == ("ada",)
    assert not state.modified
    assert inspect(agent) is state
    assert agent.model_fields_set == set(Agent.model_fields)


def test_it_can_be_added_changed_and_saved(database: Database, agent: Agent) -> None:
    """An instance that was loaded in one unit is attached to the session of another, and its change is saved."""
    with database.unit_of_work() as unit:
        unit.session.add(agent)
        agent.name = "Another"
    with database.unit_of_work(read_only=True) as unit:
        assert unit.agents.get("ada").name == "Another"


def test_its_identity_is_what_was_loaded(agent: Agent) -> None:
    """A changed key is a pending change of the row that was loaded, and no other row."""
    agent.id = "bob"
    assert inspect(agent).identity == ("ada",)
    assert inspect(agent).modified


def test_a_change_of_one_leaves_the_others(database: Database, agent: Agent) -> None:
    """What is done to one instance is done to no other."""
    agent.name = "Another"
    with pytest.raises(ValueError, match="name"):
        agent.name = ""
    assert agent.name == "Another"
    agent.model_fields_set.clear()
    with database.unit_of_work(read_only=True) as unit:
        assert unit.agents.get("ada").model_fields_set == set(Agent.model_fields)


def test_what_pydantic_asks_of_it_changes_nothing(agent: Agent) -> None:
    """It is compared, shown, dumped and asked for its fields like an instance that was constructed."""
    constructed = Agent(**{name: getattr(agent, name) for name in Agent.model_fields})
    assert agent == constructed
    assert repr(agent) == repr(constructed)
    assert agent.model_extra is None
    assert agent.model_dump(exclude_unset=True) == constructed.model_dump(exclude_unset=True)
    assert agent.model_fields_set == constructed.model_fields_set
    assert inspect(agent).detached
    assert not hasattr(agent, "__pydantic_nothing__")


def test_it_survives_pickling_and_copying(database: Database, agent: Agent) -> None:
    """An unpickled instance can be merged as the original could; a copy is a new one."""
    twin = pickle.loads(pickle.dumps(agent))  # noqa: S301  our own bytes
    assert twin == agent
    assert inspect(twin).identity == ("ada",)
    twin.name = "Twin"
    with database.unit_of_work() as unit:
        unit.session.merge(twin)
    with database.unit_of_work(read_only=True) as unit:
        assert unit.agents.get("ada").name == "Twin"
    assert inspect(copy.copy(agent)).transient


def test_what_was_not_loaded_is_not_taken_for_it() -> None:
    """A constructed instance is new, and one that skipped all validation has no state at all, as ever."""
    constructed = Agent(id="eve", name="Eve", workspace_path="/srv", created_at=START)
    assert inspect(constructed).transient
    with pytest.raises(NoInspectionAvailable):
        inspect(Agent.model_construct(id="eve", name="Eve", workspace_path="/srv", created_at=START))
