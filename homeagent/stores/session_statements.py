"""SQL statements of `SessionStore`. A route is the combination of agent, sender and channel. The parameter `:route`
holds the value of `route_key`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from sqlalchemy import (
    Integer,
    and_,
    bindparam,
    case,
    delete,
    exists,
    literal_column,
    not_,
    null,
    or_,
    select,
    tuple_,
    update,
)

from homeagent.engine.statements import LenientStatement, Statement, bindparams, constant
from homeagent.models.agent import Agent
from homeagent.models.session import AgentSession

_table: Any = AgentSession.__table__
_columns: Any = _table.c
_others: Any = _table.alias("others")
_agents: Any = Agent.__table__
_route = bindparam("route", type_=_columns.route_key.type)

ROUTE = ("agent_id", "sender_id", "channel_id")

FIND = Statement[AgentSession](select(AgentSession).where(_columns.session_id == bindparam("id")), lock=True)
BY_ROUTE = Statement[AgentSession](select(AgentSession).where(_columns.route_key == _route), lock=True)
# Do not lock the session. With a lock, two opposite moves between two routes could deadlock.
BY_ROUTE_UNLOCKED = Statement[AgentSession](select(AgentSession).where(_columns.route_key == _route))
# With the lock, no other unit can delete the agent.
AGENT = Statement[str](
    select(_agents.c.id).where(_agents.c.id == bindparam("agent_id")).with_for_update(read=True, key_share=True)
)
_VALUES = {**bindparams("session_id", *ROUTE, "created_at", "last_active_at"), "metadata": bindparam("metadata_")}
# Do not add `index_elements=…`. The statement must ignore conflicts of the id and of the route.
CREATE = Statement[AgentSession](
    lambda insert: insert(_table).values(**_VALUES, route_key=_route).on_conflict_do_nothing(), returning=AgentSession
)
TOUCH = Statement[AgentSession](
    update(AgentSession)
    .where(_columns.session_id == bindparam("id"), _columns.last_active_at < bindparam("at"))
    .values(last_active_at=bindparam("at"))
)
UPDATE_METADATA = Statement[AgentSession](
    update(_table).where(_columns.session_id == bindparam("id")).values(metadata=bindparam("value")),
    returning=AgentSession,
)
DELETE = Statement[AgentSession](delete(AgentSession).where(_columns.session_id == bindparam("id")))
MOVE = Statement[AgentSession](
    update(AgentSession).where(_columns.session_id == bindparam("id")).values(**bindparams(*ROUTE), route_key=_route)
)
RELEASE = Statement[AgentSession](update(AgentSession).where(_columns.route_key == _route).values(route_key=None))

# Do not compare the stored route key, which can be stale.
_IS_ON_ROUTE = and_(*(_columns[name].is_not_distinct_from(bindparam(name)) for name in ROUTE))
# A route key is stale, for example, after a bulk UPDATE of senders.
RELEASE_STALE = Statement[AgentSession](
    update(AgentSession).where(_columns.route_key == _route, not_(_IS_ON_ROUTE)).values(route_key=None)
)
INDEX = LenientStatement[AgentSession](
    lambda insert: (
        statement := insert(_table).values(
            **_VALUES, route_key=case((exists().where(_columns.route_key == _route), null()), else_=_route)
        )
    ).on_conflict_do_update(
        index_elements=["session_id"],
        set_={
            "last_active_at": case(
                (statement.excluded.last_active_at > _columns.last_active_at, statement.excluded.last_active_at),
                else_=_columns.last_active_at,
            )
        },
    )
)


def _activity(columns: Any) -> tuple[Any, Any, Any]:
    """Return the columns for sorting. The session with the latest activity comes last."""
    # Do not simplify the expression `last_active_at + 0`. To sort by `last_active_at`, SQLite would use an index that
    # also contains other routes (`test_a_route_is_searched_by_its_index`).
    return columns.last_active_at.op("+")(literal_column("0")), columns.created_at, columns.session_id


def _others_on(route: Any, given: frozenset[str]) -> list[Any]:
    """Return conditions for the sessions on the route. The argument `given=` names the columns that are not NULL."""
    # For IS NOT DISTINCT FROM, PostgreSQL would not use an index.
    return [_others.c[name] == route[name] if name in given else _others.c[name].is_(None) for name in ROUTE]


def _last_active(given: frozenset[str], *conditions: Any) -> Any:
    """Return a SELECT for the id of a route's last active session. Add the conditions to the WHERE clause."""
    return (
        select(_others.c.session_id)
        .where(*_others_on(_VALUES, given), *conditions)
        .order_by(*(column.desc() for column in _activity(_others.c)))
        .limit(constant(1, Integer()))
    )


@cache
def last_active(given: frozenset[str]) -> Statement[str]:
    """Return the statement that reads the id of a route's last active session."""
    return LenientStatement(_last_active(given))


@cache
def give(given: frozenset[str]) -> Statement[AgentSession]:
    """Return the statement that sets a route key. If the route is free, its last active session gets the route key. On
    PostgreSQL, simultaneous statements can violate the unique index.
    """
    is_free = not_(exists().where(_columns.route_key == _route).correlate(None))
    candidate = _last_active(given, is_free).correlate(None)
    return LenientStatement(
        update(AgentSession)
        # Keep the condition `_IS_ON_ROUTE`. PostgreSQL checks the condition again if another transaction moves the
        # session.
        .where(_columns.session_id == candidate.scalar_subquery(), _IS_ON_ROUTE)
        .values(route_key=_route)
    )


@cache
def release_earlier(given: frozenset[str]) -> Statement[AgentSession]:
    """Return the statement that frees a route. A holder that is the last active session keeps the route."""
    is_later = tuple_(*_activity(_others.c)) > tuple_(*_activity(_columns))
    has_rival = exists().where(*_others_on(_VALUES, given), is_later)
    return LenientStatement(
        update(AgentSession)
        .where(_columns.route_key == _route, or_(not_(_IS_ON_ROUTE), has_rival))
        .values(route_key=None)
    )


@cache
def routes_of(count: int) -> Statement[tuple[Any, ...]]:
    """Return the statement that reads the ids, route keys and routes of the sessions `:id0`, `:id1` and so on."""
    ids: list[Any] = [bindparam(f"id{number}") for number in range(count)]
    return Statement(
        select(*(_columns[name] for name in ("session_id", "route_key", *ROUTE))).where(_columns.session_id.in_(ids))
    )


@cache
def page_of(given: frozenset[str]) -> Statement[AgentSession]:
    """Return the statement that lists a page of sessions. The statement has a parameter for each given name."""
    conditions = [_columns[name] == bindparam(name) for name in ROUTE if name in given]
    if "after_id" in given:
        last_active_at = bindparam("after_active", type_=_columns.last_active_at.type)
        last = bindparam("after_id", type_=_columns.session_id.type)
        conditions.append(tuple_(_columns.last_active_at, _columns.session_id) < tuple_(last_active_at, last))
    return Statement(
        select(AgentSession)
        .where(*conditions)
        .order_by(_columns.last_active_at.desc(), _columns.session_id.desc())
        .limit(bindparam("limit"))
    )
