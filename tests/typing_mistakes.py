"""Code for mypy only: types of own stores and units, and mistakes that mypy must report.

A `type: ignore` without an error is itself an error in this module (see `pyproject.toml`).
"""

from __future__ import annotations

from typing import assert_type

from sqlalchemy import insert
from sqlmodel import col, select

from homeagent import Database, Statement, UnitOfWork
from tests.test_own_tables import HubUnit, Message, MessageStore


def of_any(database: Database) -> UnitOfWork:
    """Accept a database with any class of units."""
    return database.unit_of_work()


async def types(hub: Database[HubUnit], path: str) -> None:
    """Show the types that mypy infers."""
    assert_type(Database.open(path, unit=HubUnit), Database[HubUnit])
    assert_type(Database.open(path), Database[UnitOfWork])
    with hub.unit_of_work() as uow:
        assert_type(uow, HubUnit)
        assert_type(uow.messages.of_session("s"), list[Message])
    assert_type(hub.run(lambda uow: uow.messages.add("s", "t")), Message)
    assert_type(await hub.arun(lambda uow: uow.messages.add("s", "t")), Message)
    assert_type(hub.store(MessageStore), MessageStore)
    assert_type(Statement(select(Message)), Statement[Message])
    assert_type(Statement(select(col(Message.text))), Statement[str])
    assert_type(Statement(insert(Message), returning=Message), Statement[Message])
    assert_type(of_any(hub), UnitOfWork)


async def mistakes(hub: Database[HubUnit], path: str) -> None:
    """Make twelve mistakes."""
    plain: Database = Database.open(path)
    with hub.unit_of_work() as uow:
        uow.mesages.of_session("s")  # type: ignore[attr-defined]
        uow.messages.of_sesion("s")  # type: ignore[attr-defined]
        uow.messages.of_session(1)  # type: ignore[arg-type]
        uow.messages.add("s")  # type: ignore[call-arg]
        uow.messages.add("s", txt="t")  # type: ignore[call-arg]
        number: int = uow.messages.add("s", "t")  # type: ignore[assignment]
        uow.one(insert(Message))  # type: ignore[arg-type]
    plain.unit_of_work().messages.of_session("s")  # type: ignore[attr-defined]
    hub.run(lambda uow: uow.mesages.of_session("s"))  # type: ignore[attr-defined]
    Database.open(path, unit=MessageStore)  # type: ignore[type-var]
    hub.store(Message)  # type: ignore[type-var]
    narrow: Database[HubUnit] = plain  # type: ignore[assignment]
    print(number, narrow)  # noqa: T201
