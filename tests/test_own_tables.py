"""The application's own tables, stores and units."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Any

import pytest
from pydantic import JsonValue, ValidationError
from sqlalchemy import bindparam, inspect, update
from sqlmodel import Field, Relationship, SQLModel, select

from homeagent import AgentCreate, AgentSession, Database, Statement, Table, Timestamp, UnitOfWork
from homeagent.errors import InvalidArgumentError
from tests.conftest import START, add_agent


class Message(Table, table=True):
    """A message of a session."""

    __tablename__ = "messages"
    id: int | None = Field(default=None, primary_key=True)
    session_id: str = Field(foreign_key="sessions.session_id", ondelete="CASCADE", index=True)
    text: str = Field(min_length=1)
    sent_at: Timestamp


class Mood(StrEnum):
    """The mood of a preference."""

    CALM = "calm"
    LOUD = "loud"


class Preference(Table, table=True):
    """A table with a field of each type that `Table` stores in the same way on both engines."""

    name: str = Field(primary_key=True)
    session_id: str | None = Field(default=None, foreign_key="sessions.session_id")
    size: int = Field(default=2**40, gt=0)
    mood: Mood = Mood.CALM
    is_on: bool = False
    seen_at: Timestamp | None = None
    tags: list[str] = Field(default_factory=list)
    extra: JsonValue = None
    session: AgentSession = Relationship()


class PlainNote(SQLModel, table=True):
    """A table in the MetaData of SQLModel."""

    __tablename__ = "plain_notes"
    id: int | None = Field(default=None, primary_key=True)
    text: str


RENAME = Statement[None](
    update(Message).where(Message.__table__.c.id == bindparam("id_")).values(text=bindparam("new_text"))
)


@pytest.fixture
def hub(database: Database) -> Database:
    """A database on each engine with the own tables, an agent and the session `s`."""
    with database.unit_of_work() as unit:
        tables: list[Any] = [Message.__table__, Preference.__table__, vars(PlainNote)["__table__"]]
        for table in tables:
            table.create(unit.session.connection())
    add_agent(database)
    with database.unit_of_work() as unit:
        unit.session.add(AgentSession(session_id="s", agent_id="ada", created_at=START, last_active_at=START))
    return database


def message(text: str = "hello") -> Message:
    """Return a new message of the session `s`."""
    return Message(session_id="s", text=text, sent_at=START)


# Tables


def test_an_own_table_validates() -> None:
    """A model validates on construction and on assignment. A refused assignment changes nothing."""
    with pytest.raises(ValidationError):
        message("")
    row = message()
    with pytest.raises(ValidationError):
        row.sent_at = datetime(2026, 1, 1)  # noqa: DTZ001  naive on purpose
    with pytest.raises(ValidationError):
        Message(session_id="s", text="hello", sent_at=START, colour="red")
    assert row.sent_at == START


def test_each_type_is_stored_and_loaded(hub: Database) -> None:
    """Values of each type survive both ways, by the ORM and by a statement, and a relationship leads to the session."""
    with hub.unit_of_work() as unit:
        session = unit.session.get_one(AgentSession, "s")
        row = Preference(
            name="é", mood=Mood.LOUD, is_on=True, seen_at=START, tags=["a"], extra={"b": 1}, session=session
        )
        unit.session.add_all([row, Preference(name="Z", session=session)])
        unit.session.flush()
        assert row.session_id == "s"
        loaded = unit.all(Statement[Preference](select(Preference).order_by(Preference.name)))
    assert [each.model_dump() for each in loaded] == [
        Preference(name="Z", session_id="s").model_dump(),
        row.model_dump(),
    ]
    assert (loaded[1].mood, loaded[1].is_on, loaded[1].size) == (Mood.LOUD, True, 2**40)


def test_constraints_have_names() -> None:
    """Each constraint and index of an own table has a name, so that a revision can change it."""
    table = Message.__table__
    names = {str(each.name) for each in [*table.constraints, *table.indexes]}
    assert names == {"pk_messages", "fk_messages_session_id_sessions", "idx_messages_session_id"}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("sessions", "reserved"),
        ("Devices", "reserved"),
        ("homeagent_notes", "reserved"),
        ("application_schema_version", "reserved"),
        ("Messages", r"defined already, by .*test_own_tables\.Message:"),
    ],
)
def test_a_taken_table_name_is_refused(name: str, reason: str) -> None:
    """A name of homeagent, a reserved name or the name of another own table raises when the class is defined."""
    with pytest.raises(InvalidArgumentError, match=reason):

        class Taken(Table, table=True):
            __tablename__ = name
            id: int = Field(primary_key=True)


def test_a_plain_datetime_is_refused() -> None:
    """A field of type datetime without the checks of `Timestamp` raises when the class is defined."""
    with pytest.raises(InvalidArgumentError, match=r"Naive\.sent_at is a datetime: annotate it as homeagent.Timestamp"):

        class Naive(Table, table=True):
            id: int = Field(primary_key=True)
            sent_at: datetime | None = None


# The ORM session


def test_own_rows_stay_usable(hub: Database) -> None:
    """After the unit, own rows have their values, whether a store wrote before, between or after."""
    with hub.unit_of_work() as unit:
        rows = [message("first"), PlainNote(text="plain")]
        unit.session.add_all(rows)
        unit.sessions.touch("s")
        rows.append(message("second"))
        unit.session.add(rows[-1])
        unit.session.commit()
        unit.agents.create(AgentCreate(id="bob", name="Bob", workspace_path="/bob"))
    assert [row.text for row in rows] == ["first", "plain", "second"]
    assert [row.id for row in rows] == [1, 1, 2]
    assert all(inspect(row).detached for row in rows)


def test_own_rows_show_the_writes_of_statements(hub: Database) -> None:
    """A statement on an own table changes the session's objects, in the unit and after the unit."""
    with hub.unit_of_work() as unit:
        kept, changed = message("kept"), message("old")
        unit.session.add_all([kept, changed])
        unit.session.flush()
        unit.write(RENAME, id_=changed.id, new_text="new")
    assert (kept.text, changed.text) == ("kept", "new")


def test_own_rows_follow_a_cascade(hub: Database) -> None:
    """If a store deletes a session, the ORM session no longer finds the messages, which the foreign key deleted."""
    with hub.unit_of_work() as unit:
        unit.session.add(message())
        unit.sessions.touch("s")
        assert unit.session.get(Message, 1) is not None
        unit.sessions.delete("s")
        assert unit.session.get(Message, 1) is None
        assert unit.session.exec(select(Message)).all() == []


def test_a_store_write_sends_no_query_for_other_rows(hub: Database) -> None:
    """A store's write to another table does not expire own rows, so the end of the unit sends no SELECT for them."""

    def work(unit: UnitOfWork) -> bool:
        row = message()
        unit.session.add(row)
        unit.sessions.touch("s")
        return bool(inspect(row).expired_attributes)

    assert not hub.run(work)
