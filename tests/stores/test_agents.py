"""The store of agents."""

from __future__ import annotations

import pytest

from homeagent import Agent, AgentCreate, AgentSessionCreate, AgentUpdate, Database, DeviceUpdate
from homeagent.errors import AgentExistsError, AgentInUseError, AgentNotFoundError, InvalidArgumentError
from tests.conftest import START, add_agent, dump


def test_create_returns_what_is_stored(database: Database) -> None:
    """`create` stores every field, and the creation time comes from the clock."""
    config = {"z": [1, -0.0, 2**70, "é\0"], "a": None}
    with database.unit_of_work() as unit:
        made = unit.agents.create(AgentCreate(id="ada", name="Ada", workspace_path="/srv/ada", config=config))
    with database.unit_of_work(read_only=True) as unit:
        found = unit.agents.get("ada")
        assert unit.agents.find_by_id("ada") == found
    assert made == found == Agent(id="ada", name="Ada", workspace_path="/srv/ada", created_at=START, config=config)
    assert isinstance(found.config, dict)
    assert list(found.config) == ["z", "a"]


def test_duplicate_create_leaves_the_first(database: Database) -> None:
    """If the id is taken, `create` raises an error and the first agent keeps its values."""
    add_agent(database)
    before = dump(database)
    with pytest.raises(AgentExistsError) as caught, database.unit_of_work() as unit:
        unit.agents.create(AgentCreate(id="ada", name="Other", workspace_path="/else"))
    assert caught.value.agent_id == "ada"
    assert dump(database) == before


def test_absent_agent(database: Database) -> None:
    """If an agent does not exist, `find` returns None, `delete` returns False, and other methods raise an error."""
    with database.unit_of_work() as unit:
        assert unit.agents.find_by_id("nobody") is None
        assert unit.agents.delete("nobody") is False
        with pytest.raises(AgentNotFoundError) as caught:
            unit.agents.get("nobody")
        assert caught.value.agent_id == "nobody"
        with pytest.raises(AgentNotFoundError):
            unit.agents.update("nobody", AgentUpdate(name="Any"))
    assert dump(database)["agents"] == []


def test_wrong_argument_types_write_nothing(database: Database) -> None:
    """If the argument is a dict, a row or another table's patch, the method raises an error and writes no row."""
    add_agent(database)
    before = dump(database)
    row = Agent(id="row", name="Row", workspace_path="/row", created_at=START)
    for wrong in ({"id": "new"}, row, None):
        with pytest.raises(InvalidArgumentError, match="AgentCreate"), database.unit_of_work() as unit:
            unit.agents.create(wrong)  # type: ignore[arg-type]  # on purpose
    for changes in ({"name": "New"}, DeviceUpdate(metadata=1), None):
        with pytest.raises(InvalidArgumentError, match="AgentUpdate"), database.unit_of_work() as unit:
            unit.agents.update("ada", changes)  # type: ignore[arg-type]  # on purpose
    assert dump(database) == before


@pytest.mark.parametrize("limit", [0, -1, True, 1.0, "1", None, 2**31])
def test_bad_limits_are_refused(database: Database, limit: int) -> None:
    """A page's limit must be a whole number of 1 or more."""
    with database.unit_of_work(read_only=True) as unit, pytest.raises(InvalidArgumentError):
        unit.agents.list(limit=limit)


class Renaming(AgentUpdate):
    """An application's request with a field of its own."""

    reason: str


def test_update_ignores_fields_of_a_subclass(database: Database) -> None:
    """If the request is a subclass with further fields, `update` sets only the columns."""
    add_agent(database)
    assert database.agents.update("ada", Renaming(name="Countess", reason="title")).name == "Countess"
    assert database.agents.update("ada", Renaming(reason="none")).name == "Countess"


def test_update_changes_only_what_was_given(database: Database) -> None:
    """`update` keeps fields that are not given; a config of None becomes empty."""
    with database.unit_of_work() as unit:
        unit.agents.create(AgentCreate(id="ada", name="Ada", workspace_path="/srv/ada", config=[1]))
        renamed = unit.agents.update("ada", AgentUpdate(name="Ada II"))
        assert (renamed.name, renamed.workspace_path, renamed.config) == ("Ada II", "/srv/ada", [1])
        moved = unit.agents.update("ada", AgentUpdate(workspace_path="/mnt/ada", config=None))
        assert (moved.name, moved.workspace_path, moved.config) == ("Ada II", "/mnt/ada", None)
        assert unit.agents.update("ada", AgentUpdate()) == moved
    with database.unit_of_work(read_only=True) as unit:
        assert unit.agents.get("ada") == moved


def test_list_is_ordered_by_bytes_and_paged(database: Database) -> None:
    """Pages are sorted by UTF-8 bytes on both engines, and a row added before the cursor does not shift a page."""
    ids = ["a", "B", "é", "Z", "aa", "a-b", "a_b", "ß", "日本", "😀", "\uffee", "0"]
    for agent_id in ids:
        add_agent(database, agent_id)
    expected = sorted(ids, key=str.encode)
    found: list[str] = []
    after = None
    while True:
        with database.unit_of_work() as unit:
            page = unit.agents.list(limit=5, after=after)
            found += [agent.id for agent in page]
            if len(page) < 5:
                break
            after = page[-1].id
            if len(found) == 5:
                unit.agents.create(AgentCreate(id="!", name="Early", workspace_path="/early"))
    assert found == expected


def test_delete_refuses_or_deletes_sessions(database: Database) -> None:
    """If an agent has sessions, `delete` raises an error; `delete_sessions` deletes only this agent's sessions too."""
    add_agent(database)
    add_agent(database, "bob")
    with database.unit_of_work() as unit:
        for number in range(3):
            unit.sessions.create(AgentSessionCreate(session_id=f"s{number}", agent_id="ada"))
        unit.sessions.create(AgentSessionCreate(session_id="other", agent_id="bob"))
    before = dump(database)
    with pytest.raises(AgentInUseError) as caught, database.unit_of_work() as unit:
        unit.agents.delete("ada")
    assert (caught.value.agent_id, caught.value.session_count) == ("ada", 3)
    assert dump(database) == before
    with database.unit_of_work() as unit:
        assert unit.agents.delete("ada", delete_sessions=True) is True
        assert [session.session_id for session in unit.sessions.list()] == ["other"]
        assert [agent.id for agent in unit.agents.list()] == ["bob"]
