"""The store of agents."""

from __future__ import annotations

from homeagent import Agent, AgentCreate, AgentUpdate, Database
from tests.conftest import START, add_agent


def test_create_returns_what_is_stored(database: Database) -> None:
    """`create` stores every field, and the creation time comes from the clock."""
    config = {"z": [1, -0.0, 2**70, "é\0"], "a": None}
    made = database.agents.create(AgentCreate(id="ada", name="Ada", workspace_path="/srv/ada", config=config))
    with database.unit_of_work(read_only=True) as unit:
        found = unit.agents.get("ada")
        assert unit.agents.find_by_id("ada") == found
    assert made == found == Agent(id="ada", name="Ada", workspace_path="/srv/ada", created_at=START, config=config)
    assert isinstance(found.config, dict)
    assert list(found.config) == ["z", "a"]


class Renaming(AgentUpdate):
    """An application's request with a field of its own."""

    reason: str


def test_update_changes_only_what_was_given(database: Database) -> None:
    """`update` keeps fields that are not given, empties a config of None, and ignores fields of a subclass."""
    database.agents.create(AgentCreate(id="ada", name="Ada", workspace_path="/srv/ada", config=[1]))
    for changes, expected in (
        (AgentUpdate(name="Ada II"), ("Ada II", "/srv/ada", [1])),
        (AgentUpdate(workspace_path="/mnt/ada", config=None), ("Ada II", "/mnt/ada", None)),
        (AgentUpdate(), ("Ada II", "/mnt/ada", None)),
        (Renaming(name="Countess", reason="title"), ("Countess", "/mnt/ada", None)),
        (Renaming(reason="none"), ("Countess", "/mnt/ada", None)),
    ):
        updated = database.agents.update("ada", changes)
        assert (updated.name, updated.workspace_path, updated.config) == expected
        assert database.agents.get("ada") == updated


def test_list_is_ordered_by_bytes_and_paged(database: Database) -> None:
    """Pages are sorted by UTF-8 bytes on both engines, and a row added before the cursor does not shift a page."""
    ids = ["a", "B", "é", "Z", "aa", "a-b", "a_b", "ß", "日本", "😀", "\uffee", "0"]
    for agent_id in ids:
        add_agent(database, agent_id)
    page = database.agents.list(limit=5)
    found = [*page]
    add_agent(database, "!")
    while page:
        page = database.agents.list(limit=5, after=page[-1].id)
        found += page
    assert [agent.id for agent in found] == sorted(ids, key=str.encode)
