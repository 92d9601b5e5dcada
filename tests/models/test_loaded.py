"""Instances that a store loaded: the ORM's state is created when the ORM asks for it."""

from __future__ import annotations

import copy
import pickle

import pytest
from sqlalchemy import inspect
from sqlalchemy.exc import NoInspectionAvailable

from homeagent import Agent, Database
from tests.conftest import START, add_agent


@pytest.fixture
def engine_name() -> str:
    """SQLite only: a store of either engine makes instances in the same way."""
    return "sqlite"


@pytest.fixture
def agent(database: Database) -> Agent:
    """An agent that a store loaded."""
    add_agent(database)
    with database.unit_of_work(read_only=True) as unit:
        return unit.agents.get("ada")


def test_a_loaded_instance_is_detached_and_unchanged(agent: Agent) -> None:
    """SQLAlchemy sees a loaded instance as detached and unchanged, with the same state each time."""
    assert "_sa_instance_state" not in agent.__dict__
    state = inspect(agent)
    assert state.detached
    assert state.identity == ("ada",)
    assert not state.modified
    assert inspect(agent) is state
    assert agent.model_fields_set == set(Agent.model_fields)
    # A change of the key is a pending change of the loaded row.
    agent.id = "bob"
    assert inspect(agent).identity == ("ada",)
    assert inspect(agent).modified


def test_change_of_one_instance_leaves_the_others(database: Database, agent: Agent) -> None:
    """A change of one instance does not change any other instance."""
    agent.name = "Another"
    with pytest.raises(ValueError, match="name"):
        agent.name = ""
    assert agent.name == "Another"
    agent.model_fields_set.clear()
    assert database.agents.get("ada").model_fields_set == set(Agent.model_fields)


def test_pydantic_methods_work_on_a_loaded_instance(agent: Agent) -> None:
    """Comparison, repr, dump and fields of a loaded instance equal those of a constructed instance."""
    constructed = Agent(**{name: getattr(agent, name) for name in Agent.model_fields})
    assert agent == constructed
    assert repr(agent) == repr(constructed)
    assert agent.model_extra is None
    assert agent.model_dump(exclude_unset=True) == constructed.model_dump(exclude_unset=True)
    assert agent.model_fields_set == constructed.model_fields_set
    assert inspect(agent).detached
    assert not hasattr(agent, "__pydantic_nothing__")


def test_loaded_instance_can_be_pickled_and_copied(database: Database, agent: Agent) -> None:
    """An unpickled instance can be merged, the original can be added and changed, and a copy is a new instance."""
    twin = pickle.loads(pickle.dumps(agent))  # noqa: S301  bytes from this test
    assert twin == agent
    assert inspect(twin).identity == ("ada",)
    twin.name = "Twin"
    with database.unit_of_work() as unit:
        unit.session.merge(twin)
    assert database.agents.get("ada").name == "Twin"
    with database.unit_of_work() as unit:
        unit.session.add(agent)
        agent.name = "Another"
    assert database.agents.get("ada").name == "Another"
    assert inspect(copy.copy(agent)).transient


def test_constructed_instances_are_not_loaded() -> None:
    """A constructed instance is transient, and an instance of `model_construct` has no state, as in SQLModel."""
    constructed = Agent(id="eve", name="Eve", workspace_path="/srv", created_at=START)
    assert inspect(constructed).transient
    with pytest.raises(NoInspectionAvailable):
        inspect(Agent.model_construct(id="eve", name="Eve", workspace_path="/srv", created_at=START))
