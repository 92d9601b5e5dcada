"""Code for type checkers only: the types of an application's stores and units, and mistakes that they must report.

mypy, pyright and ty check this module. A `type: ignore` without an error is itself an error for mypy and pyright (see
`pyproject.toml`).
"""

from __future__ import annotations

from typing import assert_type

from hub.models import Message
from hub.stores import HubUnit, MessageStore
from sqlalchemy import insert
from sqlmodel import col, select

from homeagent import AgentUpdate, Database, Statement, UnitOfWork


def of_any(database: Database) -> UnitOfWork:
    """Return a unit of a database with any class of units."""
    with database.unit_of_work() as uow:
        return uow


async def types(hub: Database[HubUnit], path: str) -> None:
    """Show the types that a checker infers."""
    assert_type(Database.open(path, unit=HubUnit), Database[HubUnit])
    assert_type(Database.open(path), Database[UnitOfWork])
    with hub.unit_of_work() as uow:
        assert_type(uow, HubUnit)
        assert_type(uow.messages.of_sender("s"), list[Message])
    assert_type(hub.run(lambda uow: uow.messages.add("s", "t")), Message)
    assert_type(await hub.arun(lambda uow: uow.messages.add("s", "t")), Message)
    assert_type(hub.store(MessageStore), MessageStore)
    assert_type(Statement(select(Message)), Statement[Message])
    assert_type(Statement(select(col(Message.text))), Statement[str])
    assert_type(Statement(insert(Message), returning=Message), Statement[Message])
    assert_type(of_any(hub), UnitOfWork)


async def mistakes(hub: Database[HubUnit], path: str) -> None:
    """Make fourteen mistakes."""
    plain: Database = Database.open(path)
    with hub.unit_of_work() as uow:
        uow.mesages.of_sender("s")  # type: ignore[attr-defined]
        uow.messages.of_sendr("s")  # type: ignore[attr-defined]
        uow.messages.of_sender(1)  # type: ignore[arg-type]
        uow.messages.add("s")  # type: ignore[call-arg]
        uow.messages.add("s", txt="t")  # type: ignore[call-arg]
        number: int = uow.messages.add("s", "t")  # type: ignore[assignment]
        uow.one(insert(Message))  # type: ignore[arg-type]
        uow.agents.update("butler", AgentUpdate(nmae="Jeeves"))  # type: ignore[call-arg]
    hub.unit_of_work().messages.of_sender("s")  # type: ignore[attr-defined]
    with plain.unit_of_work() as uow_without_stores:
        uow_without_stores.messages.of_sender("s")  # type: ignore[attr-defined]
    hub.run(lambda uow: uow.mesages.of_sender("s"))  # type: ignore[attr-defined]
    Database.open(path, unit=MessageStore)  # type: ignore[type-var]
    hub.store(Message)  # type: ignore[type-var]
    narrow: Database[HubUnit] = plain  # type: ignore[assignment]
    print(number, narrow)  # noqa: T201
