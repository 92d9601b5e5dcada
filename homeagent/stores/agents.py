from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from sqlalchemy import bindparam, delete, select, update

from homeagent import models
from homeagent.engine.statements import Statement, count, equal
from homeagent.errors import AgentExistsError, AgentInUseError, AgentNotFoundError
from homeagent.models.agent import Agent
from homeagent.models.session import AgentSession
from homeagent.models.types import check_flag, check_limit
from homeagent.stores.store import Store, check_kind, reading, writing

_table: Any = Agent.__table__
_sessions: Any = AgentSession.__table__

_FIND = Statement[Agent](select(Agent).where(equal(_table, "id")), lock=True)
_CREATE = Statement[Agent](lambda insert: insert(_table).on_conflict_do_nothing(index_elements=["id"]), returning=Agent)
_LOCK = Statement[str](select(_table.c.id).where(equal(_table, "id")), lock=True)
_COUNT_SESSIONS = count(_sessions, equal(_sessions, "agent_id"))
_DELETE_SESSIONS = Statement[AgentSession](delete(_sessions).where(equal(_sessions, "agent_id")))
_DELETE = Statement[Agent](delete(_table).where(equal(_table, "id")))


@cache
def _update(given: frozenset[str]) -> Statement[Agent]:
    values: dict[str, Any] = {name: bindparam(f"new_{name}") for name in sorted(given)}
    return Statement(update(_table).where(_table.c.id == bindparam("agent_id")).values(values), returning=Agent)


@cache
def _list(*, after: bool) -> Statement[Agent]:
    conditions = [_table.c.id > bindparam("after")] if after else []
    return Statement(select(Agent).where(*conditions).order_by(_table.c.id).limit(bindparam("limit")))


class AgentStore(Store):
    """Store of agents."""

    __slots__ = ()

    @writing()
    def create(self, agent: models.AgentCreate) -> Agent:
        """Add an agent. If an agent with this id already exists, raise `AgentExistsError`."""
        check_kind(agent, models.AgentCreate, "agent")
        created = self._unit.write_one(
            _CREATE,
            id=agent.id,
            name=agent.name,
            workspace_path=agent.workspace_path,
            created_at=self._unit.now(),
            config=agent.config,
        )
        if created is None:
            raise AgentExistsError(agent.id)
        return created

    @reading
    def find_by_id(self, agent_id: str) -> Agent | None:
        """Return the agent, or None if the agent does not exist."""
        return self._unit.one(_FIND, id=self._searched(agent_id, "agent_id"))

    @reading
    def get(self, agent_id: str) -> Agent:
        """Call `find_by_id()`, and raise `AgentNotFoundError` if the agent does not exist."""
        agent = self._unit.one(_FIND, id=self._searched(agent_id, "agent_id"))
        if agent is None:
            raise AgentNotFoundError(agent_id)
        return agent

    @reading
    def list(self, *, limit: int = 100, after: str | None = None) -> Sequence[Agent]:
        """Return a page of agents, ordered by id.

        Args:
            limit: maximum number of agents, 1 or more.
            after: id of the last agent on the previous page. Default: the first page.
        """
        given: dict[str, Any] = {} if after is None else {"after": self._searched(after, "after")}
        return self._unit.all(_list(after=after is not None), limit=check_limit(limit), **given)

    @writing()
    def update(self, agent_id: str, changes: models.AgentUpdate) -> Agent:
        """Set the given fields, and return the agent. If the agent does not exist, raise `AgentNotFoundError`."""
        check_kind(changes, models.AgentUpdate, "changes")
        # A subclass of `AgentUpdate` can have fields that are not columns.
        given = changes.model_fields_set & models.AgentUpdate.model_fields.keys()
        if not given:
            return self.get(agent_id)
        # Do not read the old row, which can contain an unreadable value.
        values = {f"new_{name}": getattr(changes, name) for name in given}
        changed = self._unit.write_one(
            _update(frozenset(given)), agent_id=self._searched(agent_id, "agent_id"), **values
        )
        if changed is None:
            raise AgentNotFoundError(agent_id)
        return changed

    @writing()
    def delete(self, agent_id: str, *, delete_sessions: bool = False) -> bool:
        """Delete an agent, and with `delete_sessions=True` also its sessions. Return False if the agent did not exist.

        Raises:
            AgentInUseError: if the agent has sessions and `delete_sessions` is False.
        """
        check_flag(delete_sessions, "delete_sessions")
        # Lock the agent first, so that no other unit adds a session.
        key = self._searched(agent_id, "agent_id")
        if self._unit.read_only:
            self._unit.write(_DELETE, id=key)  # raises ReadOnlyError
        if self._unit.one(_LOCK, id=key) is None:
            return False
        if not delete_sessions and (count := self._unit.one(_COUNT_SESSIONS, agent_id=agent_id)):
            raise AgentInUseError(agent_id, count)
        # A foreign key of the application can refuse to delete the agent. Then the sessions must stay too.
        with self._unit.savepoint():
            if delete_sessions:
                self._unit.write(_DELETE_SESSIONS, agent_id=agent_id)
            self._unit.write(_DELETE, id=agent_id)
        return True
