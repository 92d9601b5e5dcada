"""The application's own tables, stores and units."""

from __future__ import annotations

import asyncio
import gc
import random
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import datetime, timedelta
from decimal import Decimal
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar

import pytest
import sqlalchemy
from pydantic import JsonValue, ValidationError
from sqlalchemy import (
    CheckConstraint,
    Column,
    Computed,
    Float,
    Integer,
    MetaData,
    Numeric,
    Select,
    String,
    bindparam,
    cast,
    delete,
    func,
    insert,
    inspect,
    text,
    type_coerce,
    update,
)
from sqlalchemy.orm import Mapped, WriteOnlyMapped, aliased, relationship
from sqlmodel import Field, Relationship, SQLModel, col, select

from homeagent import AgentCreate, AgentSession, Database, Statement, Store, Table, Timestamp, UnitOfWork
from homeagent.errors import (
    ConflictError,
    CorruptDatabaseError,
    DatabaseError,
    InvalidArgumentError,
    ReadOnlyError,
    UnitStateError,
)
from tests.batches import counted_commits, run_together
from tests.conftest import START, FakeClock, add_agent


class Message(Table, table=True):
    __tablename__ = "own_messages"
    id: int | None = Field(default=None, primary_key=True)
    session_id: str = Field(foreign_key="sessions.session_id", ondelete="CASCADE", index=True)
    text: str = Field(min_length=1)
    sent_at: Timestamp


class Mood(StrEnum):
    CALM = "calm"
    LOUD = "loud"


class Preference(Table, table=True):
    """A table with a field of each type that `Table` stores in the same way on both engines."""

    __tablename__ = "own_preferences"
    name: str = Field(primary_key=True)
    session_id: str | None = Field(default=None, foreign_key="sessions.session_id")
    size: int = Field(default=2**40, gt=0)
    weight: float = 0.1
    mood: Mood = Mood.CALM
    is_on: bool = False
    seen_at: Timestamp | None = None
    tags: list[str] = Field(default_factory=list)
    extra: JsonValue = None
    session: AgentSession = Relationship()


class Tag(Table, table=True):
    __tablename__ = "own_tags"
    __table_args__ = (CheckConstraint("size > 0", name="size"),)
    id: int | None = Field(default=None, primary_key=True)
    session_id: str = Field(foreign_key="sessions.session_id")
    name: str = Field(unique=True)
    note: str = Field(default="", index=True)
    size: int = 1


class Room(Table, table=True):
    __tablename__ = "own_rooms"
    name: str = Field(primary_key=True)
    lamps: Mapped[list[Lamp]] = Relationship(
        sa_relationship=relationship(back_populates="room", order_by="Lamp.name", cascade="all")
    )
    found: WriteOnlyMapped[Lamp] = Relationship(
        sa_relationship=relationship(overlaps="lamps,room", lazy="write_only", passive_deletes=True)
    )


class Lamp(Table, table=True):
    __tablename__ = "own_lamps"
    name: str = Field(primary_key=True)
    room_name: str = Field(foreign_key="own_rooms.name")
    watts: int = 5
    room: Room = Relationship(back_populates="lamps")


class Measure(Table, table=True):
    __tablename__ = "own_measures"
    id: int | None = Field(default=None, primary_key=True)
    width: int
    height: int
    area: int | None = Field(default=None, sa_column=Column(Integer, Computed("width * height", persisted=True)))


class PlainNote(SQLModel, table=True):
    __tablename__ = "own_plain_notes"
    id: int | None = Field(default=None, primary_key=True)
    text: str


_message = Message.__table__.c

ADD = Statement(insert(Message), returning=Message)
RENAME = Statement[None](update(Message).where(_message.id == bindparam("id_")).values(text=bindparam("new_text")))
REMOVE = Statement[None](delete(Message).where(_message.id == bindparam("id_")))
REMOVE_BY_TEXT = Statement[None](text("DELETE FROM own_messages WHERE id = :id_"))
OF_SESSION = Statement(select(Message).where(_message.session_id == bindparam("session_id")).order_by(_message.id))
COUNT = Statement(select(func.count()).select_from(Message))
SET = Statement[None](lambda insert: insert(Preference).values(name=bindparam("name")).on_conflict_do_nothing())


class MessageStore(Store):
    def add(self, session_id: str, text: str) -> Message:
        added = self.unit.write_one(ADD, session_id=session_id, text=text, sent_at=self.unit.now())
        assert added is not None
        return added

    def add_all(self, texts: Iterable[str]) -> int:
        rows = [{"session_id": "s", "text": text, "sent_at": self.unit.now()} for text in texts]
        return self.unit.write_many(ADD, rows)

    def of_session(self, session_id: str) -> list[Message]:
        return self.unit.all(OF_SESSION, session_id=session_id)

    def count_twice(self) -> tuple[int | None, int | None]:
        """Return the number of messages, by two statements."""
        return self.unit.one(COUNT), self.unit.one(COUNT)

    def add_once(self, text: str) -> int | None:
        """Add a message if there is none, and return the number of messages before."""
        count = self.unit.one(COUNT)
        if not count:
            self.add("s", text)
        return count

    def lazily(self) -> Iterator[Message]:
        yield from self.unit.all(OF_SESSION, session_id="s")

    def add_lazily(self) -> Iterator[Message]:
        yield self.add("s", "refused")

    def add_later(self) -> Callable[[], Message]:
        return lambda: self.add("s", "refused")

    async def add_async(self) -> Message:
        return self.add("s", "refused")

    @contextmanager
    def savepoint(self) -> Iterator[None]:
        with self.unit.savepoint():
            yield

    def add_and_suppress(self) -> None:
        """Write a row, and suppress any exception."""
        try:
            self.add("s", "kept")
        except:  # noqa: E722  the exception that asks for a unit is not an Exception
            return


class HubUnit(UnitOfWork):
    messages: MessageStore
    limit: ClassVar[int] = 5


@pytest.fixture
def hub(target: str, clock: FakeClock) -> Iterator[Database[HubUnit]]:
    """A database on each engine with the own tables, an agent and the session `s`."""
    with Database.open(target, clock=clock, busy_timeout=timedelta(seconds=20), unit=HubUnit) as database:
        prepare(database)
        yield database


def prepare(database: Database) -> None:
    """Create the own tables, an agent and the session `s`."""
    with database.unit_of_work() as unit:
        tables: list[Any] = [Message.__table__, Preference.__table__, Tag.__table__, Room.__table__, Lamp.__table__]
        tables += [vars(PlainNote)["__table__"], Measure.__table__]
        for table in tables:
            table.create(unit.session.connection())
    add_agent(database)
    with database.unit_of_work() as unit:
        unit.session.add(AgentSession(session_id="s", agent_id="ada", created_at=START, last_active_at=START))


def message(text: str = "hello") -> Message:
    return Message(session_id="s", text=text, sent_at=START)


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


def test_values_of_a_new_row() -> None:
    """`model_values` validates as the constructor does, and returns the defaults, without an instance of the ORM."""
    values = Preference.model_values(name="a", mood="loud", seen_at=START)
    assert values == Preference(name="a", mood=Mood.LOUD, seen_at=START).model_dump()
    assert values["mood"] is Mood.LOUD
    for wrong in ({"name": "a", "size": 0}, {"name": "a", "colour": "red"}, {}):
        with pytest.raises(ValidationError):
            Preference.model_values(**wrong)


def test_each_type_is_stored_and_loaded(hub: Database[HubUnit]) -> None:
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
    assert (loaded[1].mood, loaded[1].is_on, loaded[1].size, loaded[1].weight) == (Mood.LOUD, True, 2**40, 0.1)


def test_numbers_have_the_declared_python_type(hub: Database[HubUnit]) -> None:
    """A column of the type `Numeric` has a Decimal, and `Float` has a float, whatever type the driver returns."""
    numbers = [
        cast(2.5, Numeric(8, 2)),
        cast(2.5, Float),
        cast(2.5, Float(asdecimal=True)),
        type_coerce(cast(2.5, Numeric(8, 2)), Float),
    ]
    with hub.unit_of_work(read_only=True) as unit:
        row = unit.one(Statement(select(*numbers)))
    assert row == (Decimal("2.5"), 2.5, Decimal("2.5"), 2.5)
    assert [type(value) for value in row] == [Decimal, float, Decimal, float]


def test_constraints_have_names() -> None:
    """Each constraint and index of an own table has a name, so that a revision can change it."""
    table = Message.__table__
    names = {str(each.name) for each in [*table.constraints, *table.indexes]}
    assert names == {"pk_own_messages", "fk_own_messages_session_id_sessions", "idx_own_messages_session_id"}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("sessions", "reserved"),
        ("Devices", "reserved"),
        ("homeagent_notes", "reserved"),
        ("application_schema_version", "reserved"),
        ("Own_Messages", r"defined already, by .*test_own_tables\.Message:"),
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


def test_an_own_store_writes_in_the_unit(hub: Database[HubUnit]) -> None:
    """An own store reads and writes in the unit's transaction, and a statement's row is an instance for later use."""
    with hub.unit_of_work() as unit:
        added = unit.messages.add("s", "first")
        unit.sessions.touch("s")
        assert (added.id, added.text, added.sent_at) == (1, "first", START)
        assert unit.messages.add_all(["second", "third"]) == 2
        assert unit.write(ADD, session_id="s", text="fourth", sent_at=START) == 1
        assert unit.write(RENAME, id_=2, new_text="changed") == 1
        assert [each.text for each in unit.messages.of_session("s")] == ["first", "changed", "third", "fourth"]
        assert (unit.write(SET, name="a"), unit.write(SET, name="a")) == (1, 0)
        # The INSERT gets the defaults of the model for the columns that the statement does not name.
        (preference,) = unit.all(Statement(select(Preference)))
        assert (preference.size, preference.mood, preference.tags) == (2**40, Mood.CALM, [])
        unit.rollback()
    assert hub.store(MessageStore).of_session("s") == []


def test_own_stores_share_a_commit(sqlite_path: Path, clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Units with an own store share a commit, each with its own error, even for a rolled back transaction."""

    def lose(unit: HubUnit) -> None:
        unit.messages.add("s", "lost")
        transaction = unit.session.connection().get_transaction()
        assert transaction is not None
        transaction.rollback()

    works: list[Callable[[HubUnit], Any]] = [
        lambda unit: unit.messages.add("s", "first").id,
        lambda unit: unit.messages.add("absent", "second").id,
        lambda unit: unit.messages.add("s", "third").id,
    ]
    losing: list[Callable[[HubUnit], Any]] = [lose, lambda unit: unit.messages.add("s", "kept")]
    with Database.open(sqlite_path, clock=clock, unit=HubUnit) as database:
        prepare(database)
        with counted_commits(monkeypatch) as count:
            first, refused, third = run_together(database, works)
        assert (first, third, count) == (1, 2, [1])
        assert isinstance(refused, ConflictError)
        lost, _ = run_together(database, losing)
        assert isinstance(lost, UnitStateError)
        texts = [each.text for each in database.store(MessageStore).of_session("s")]
        assert texts == ["first", "third", "kept"]


def test_each_call_of_an_own_store_is_a_unit(hub: Database[HubUnit]) -> None:
    """A method of one SELECT takes no lock. A method with several statements, or a write, runs in one unit."""
    store = hub.store(MessageStore)
    assert store.add("s", "first").id == 1
    before = hub.counters()
    with hub.unit_of_work():
        assert [each.text for each in store.of_session("s")] == ["first"]
        assert store.count_twice() == (1, 1)
        with pytest.raises(UnitStateError, match="already has an open write unit"):
            store.add("s", "refused")
    assert hub.counters().commits == before.commits + 1
    assert store.add_once("never") == 1
    assert store.add_all(text for text in ["second", "third"]) == 2
    store.add_and_suppress()
    assert [each.text for each in store.of_session("s")] == ["first", "second", "third", "kept"]


_room = insert(Room).values(name="hall").returning(col(Room.name)).cte()
LOCKING: dict[str, Statement[Any]] = {
    "for update": Statement(select(Message).with_for_update()),
    "subquery": Statement(select(Message).where(_message.id.in_(select(_message.id).with_for_update()))),
    "insert": Statement(select(_room.c.name)),
    "added": Statement(select(Message).add_cte(_room)),
}


@pytest.mark.parametrize("statement", LOCKING)
@pytest.mark.parametrize("engine_name", ["postgresql"])
def test_a_select_that_locks_or_writes_needs_a_unit(hub: Database[HubUnit], statement: str) -> None:
    """A SELECT with FOR UPDATE or with an INSERT in a CTE runs in a write unit. A read-only unit refuses the SELECT,
    but ignores FOR UPDATE at its end.
    """

    class Selects(Store):
        def all(self) -> list[Any]:
            return self.unit.all(LOCKING[statement])

    with hub.unit_of_work(), pytest.raises(UnitStateError, match="already has an open write unit"):
        hub.store(Selects).all()
    hub.store(Selects).all()
    refused = nullcontext() if statement == "for update" else pytest.raises(ReadOnlyError)
    with refused, hub.unit_of_work(read_only=True) as unit:
        unit.all(LOCKING[statement])


@pytest.mark.parametrize("wrong", ["SELECT 1", None, select(Message)], ids=["text", "None", "select"])
def test_an_object_that_is_no_statement_is_refused(hub: Database[HubUnit], wrong: Any) -> None:
    """A unit, a unit with a session, and a store of a database raise InvalidArgumentError for another object."""

    class Wrong(Store):
        def all(self) -> Any:
            return self.unit.all(wrong)

    with hub.unit_of_work() as unit:
        for session in (False, True):
            assert not session or unit.session
            for act in (unit.one, unit.all, unit.write, unit.write_one, lambda wrong: unit.write_many(wrong, [])):
                with pytest.raises(InvalidArgumentError, match="a unit runs a Statement"):
                    act(wrong)
    with pytest.raises(InvalidArgumentError, match="a unit runs a Statement"):
        hub.store(Wrong).all()
    if not isinstance(wrong, Select):
        with pytest.raises(InvalidArgumentError, match=r"wrap SQL in text\(\)"):
            Statement(wrong)


LATE: dict[str, Callable[[MessageStore], object]] = {
    "generator that reads": lambda store: list(store.lazily()),
    "generator that writes": lambda store: list(store.add_lazily()),
    "function": lambda store: store.add_later()(),
    "coroutine": lambda store: asyncio.run(store.add_async()),
    "context manager": lambda store: store.savepoint().__enter__(),
}


@pytest.mark.parametrize("kind", LATE)
def test_a_statement_after_the_end_of_a_call_is_refused(hub: Database[HubUnit], kind: str) -> None:
    """If a method returns a generator, function, coroutine or context manager, its later statement is refused."""
    with pytest.raises(UnitStateError, match="return the rows, not a generator"):
        LATE[kind](hub.store(MessageStore))
    assert hub.store(MessageStore).of_session("s") == []


def test_a_statement_checks_its_parameters(hub: Database[HubUnit]) -> None:
    """A wrong name, a naive datetime and an unknown member raise InvalidArgumentError without the value."""
    set_mood = Statement[None](update(Preference).values(mood=bindparam("mood")))
    lamps = sqlalchemy.Table("lamps", MetaData(), Column("name", String), Column("watts", Integer, default=5))
    add_lamp = Statement[None](insert(lamps).values(name=bindparam("name")))
    message: dict[str, Any] = {"session_id": "s", "text": "t", "sent_at": START}
    with hub.unit_of_work() as unit:
        for act, words in (
            (lambda: unit.write(ADD, session_id="s", sent_at=START), "needs a value for the parameter 'text'"),
            (lambda: unit.write(ADD, id=7, **message), "no parameter 'id'.*: sent_at, session_id, text"),
            (lambda: unit.write_many(ADD, [{"id": 7, **message}]), "no parameter 'id'"),
            (lambda: unit.all(OF_SESSION, session_id="s", sesion="geheim"), "no parameter 'sesion'"),
            (lambda: unit.write(add_lamp, name="a", wats=3), "no parameter 'wats'"),
            (lambda: unit.write(ADD, session_id="s", text="t", sent_at=datetime(2026, 1, 1)), "aware"),  # noqa: DTZ001
            (lambda: unit.write(set_mood, mood="geheim"), "not a member of Mood"),
            (lambda: unit.all(Statement(select(PlainNote))), "does not derive from homeagent.Table"),
            (lambda: unit.all(Statement[Any](select(Message, Preference))), "select the columns"),
            (lambda: unit.all(Statement(select(Message).where(_message.id.in_([1])))), r"in_\(.*unit\.session"),
        ):
            with pytest.raises(InvalidArgumentError, match=words) as caught:
                act()
            assert "geheim" not in str(caught.value)


def test_a_select_of_an_alias_gives_instances(hub: Database[HubUnit]) -> None:
    """A SELECT of an aliased model gives instances of the model."""
    with hub.unit_of_work() as unit:
        unit.messages.add("s", "first")
        (found,) = unit.all(Statement[Message](select(aliased(Message))))
        assert (type(found), found.text) == (Message, "first")


def test_a_statement_inserts_the_rows_of_a_select(hub: Database[HubUnit]) -> None:
    """An INSERT with a SELECT copies the selected rows."""
    copy = Statement[None](insert(Lamp).from_select(["name", "room_name", "watts"], select(Room.name, Room.name, 7)))
    with hub.unit_of_work() as unit:
        unit.write(Statement[None](insert(Room)), name="hall")
        assert unit.write(copy) == 1
        assert [each.watts for each in unit.all(Statement(select(Lamp)))] == [7]


@pytest.mark.parametrize("name", ["self", "statement"])
def test_a_parameter_has_any_name(hub: Database[HubUnit], name: str) -> None:
    """A parameter can have the name of an argument of the methods that run statements, in a unit and outside."""
    search: Statement[Any] = Statement(select(func.length(bindparam(name, type_=String))))

    class Searches(Store):
        def one(self) -> Any:
            return self.unit.one(search, **{name: "abc"})

        def all(self) -> Any:
            return self.unit.all(search, **{name: "abc"})

        def twice(self) -> Any:
            return self.one(), self.all()

    searches = hub.store(Searches)
    assert (searches.one(), searches.all(), searches.twice()) == (3, [3], (3, [3]))
    add = Statement[Any](text(f"INSERT INTO own_rooms VALUES (:{name}) RETURNING name"))
    with hub.unit_of_work() as unit:
        assert unit.write(add, **{name: "hall"}) == 1
        assert unit.write_one(add, **{name: "attic"}) == ("attic",)


def test_a_computed_column_has_no_parameter(hub: Database[HubUnit]) -> None:
    """`model_values` gives the parameters of an INSERT also for a table with a computed column, and so does a row."""
    add = Statement(insert(Measure), returning=Measure)
    with hub.unit_of_work() as unit:
        added = unit.write_one(add, **Measure.model_values(width=2, height=5))
        assert added is not None
        assert (added.width, added.height, added.area) == (2, 5, 10)
        copied = unit.write_one(add, **added.model_dump(exclude={"id"}))
    assert copied is not None
    assert copied.id != added.id


def test_a_statement_of_text_returns_its_rows(hub: Database[HubUnit]) -> None:
    """The rows of a text, whose columns only the database knows, are tuples. A text without rows returns none."""
    change = "UPDATE own_messages SET text = :text WHERE session_id = 's'"
    with hub.unit_of_work() as unit:
        unit.messages.add("s", "first")
        assert unit.all(Statement(text("SELECT session_id, text FROM own_messages"))) == [("s", "first")]
        assert unit.one(Statement(text(change + " RETURNING text")), text="second") == ("second",)
        assert unit.write(Statement(text(change)), text="third") == 1
        assert unit.all(Statement(text(change)), text="fourth") == []
    assert [each.text for each in hub.store(MessageStore).of_session("s")] == ["fourth"]
    with hub.unit_of_work(read_only=True) as unit:
        assert unit.one(Statement(text("SELECT text FROM own_messages"))) == ("fourth",)
        with pytest.raises(ReadOnlyError):
            unit.write(Statement(text(change)), text="fifth")
        unit.rollback()


def test_an_unreadable_value_names_its_row_without_a_secret(hub: Database[HubUnit]) -> None:
    """The error for an unreadable value names table and column, and only a numeric key, as a text can be a secret."""
    with hub.unit_of_work() as unit:
        unit.session.execute(insert(Preference).values(name="geheim"))
        unit.session.execute(text("UPDATE own_preferences SET tags = 'no JSON'"))
        with pytest.raises(CorruptDatabaseError, match=r"own_preferences\.tags holds") as caught:
            unit.all(Statement(select(Preference)))
        assert "geheim" not in str(caught.value)
        unit.rollback()


def test_a_missing_table_names_the_remedy(target: str) -> None:
    """If no revision created the table of a store, the error names the table and the argument `migrations`."""
    with (
        Database.open(target, unit=HubUnit) as database,
        pytest.raises(DatabaseError, match=r"own_messages.*pass migrations= to Database\.open"),
    ):
        database.store(MessageStore).of_session("s")


def test_a_wrong_unit_is_refused(sqlite_path: Path) -> None:
    """`open` refuses a class that is not a unit, an annotation that is not a store, and a name of `UnitOfWork`."""

    class NoStore(UnitOfWork):
        messages: int

    class Hiding(UnitOfWork):
        agents: MessageStore  # type: ignore[assignment]

    wrong: list[tuple[Any, str]] = [
        (int, "must be a subclass of UnitOfWork"),
        (NoStore, r"NoStore\.messages must be annotated with a subclass of homeagent.Store, not <class 'int'>"),
        (Hiding, r"Hiding\.agents hides UnitOfWork.agents"),
    ]
    for unit, words in wrong:
        with pytest.raises(InvalidArgumentError, match=words):
            Database.open(sqlite_path, unit=unit)


@pytest.mark.parametrize(("length", "shown"), [(3000, "idx_own_tags_note"), (20_000, "index row requires 20")])
@pytest.mark.parametrize("by", ["statement", "session"])
@pytest.mark.parametrize("engine_name", ["postgresql"])
def test_a_value_too_long_for_an_index_names_the_table(
    hub: Database[HubUnit], by: str, length: int, shown: str
) -> None:
    """PostgreSQL refuses a long value in an index. The error shows the server's message, but not the value. Above 8,191
    bytes, the server's message does not name the index.
    """
    note = "".join(map(chr, random.Random(1).choices(range(33, 127), k=length)))  # does not compress

    def work(unit: HubUnit) -> None:
        if by == "statement":
            unit.write(Statement[None](insert(Tag)), session_id="s", name="n", note=note, size=1)
        else:
            unit.session.add(Tag(session_id="s", name="n", note=note))

    with pytest.raises(InvalidArgumentError, match=rf"at most 2,704 bytes.*{shown}.* of table 'own_tags'") as caught:
        hub.run(work)
    assert note not in str(caught.value)


@pytest.mark.parametrize("by", ["statement", "session", "read_connection"])
@pytest.mark.parametrize("engine_name", ["postgresql"])
def test_a_word_too_long_for_a_search_is_not_shown(hub: Database[HubUnit], by: str) -> None:
    """PostgreSQL's message shows the word of a tsquery that is too long. The error does not show the word."""
    search, word = text("SELECT CAST(CAST(:word AS text) AS tsquery)"), "hidden" + "x" * 2100

    with pytest.raises(DatabaseError) as caught, hub.read_connection() as connection, hub.unit_of_work() as unit:
        if by == "statement":
            unit.all(Statement(search.bindparams(bindparam("word"))), word=word)
        elif by == "session":
            unit.session.execute(search, {"word": word})
        else:
            connection.execute(search, {"word": word})
    assert type(caught.value) is DatabaseError
    assert "hidden" not in f"{caught.value} {caught.value.__cause__} {caught.value.__context__}"
    assert "index" not in str(caught.value)


def test_own_rows_stay_usable(hub: Database[HubUnit]) -> None:
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


@pytest.mark.parametrize("kind", ["rollback", "session.rollback", "flush", "exception", "run", "arun"])
def test_rows_stay_usable_after_a_rollback(hub: Database[HubUnit], kind: str) -> None:
    """If a unit rolls back, the session's objects keep the values that they had before."""
    hub.run(lambda unit: unit.session.add(message("old")))
    rows: list[Message] = []

    def work(unit: UnitOfWork) -> None:
        rows.append(unit.session.get_one(Message, 1))
        rows.append(message("new"))
        unit.session.add(rows[-1])
        unit.write(RENAME, id_=1, new_text="undone")
        if kind == "flush":
            with pytest.raises(ConflictError):
                unit.session.add(Message(session_id="absent", text="x", sent_at=START))
                unit.session.flush()
        elif kind == "rollback":
            unit.rollback()
        elif kind == "exception":
            raise LookupError
        else:
            unit.session.rollback()

    if kind == "arun":
        asyncio.run(hub.arun(work))
    elif kind == "run":
        hub.run(work)
    else:
        with suppress(LookupError), hub.unit_of_work() as unit:
            work(unit)
    assert [(row.id, row.text) for row in rows] == [(1, "old"), (2, "new")]
    assert [each.text for each in hub.store(MessageStore).of_session("s")] == ["old"]


def test_a_deleted_object_stays_usable_after_a_refused_flush(hub: Database[HubUnit]) -> None:
    """If a refused flush rolls back the unit, an object that an earlier flush deleted keeps its values."""
    hub.run(lambda unit: unit.session.add(message("old")))
    with hub.unit_of_work() as unit:
        row = unit.session.get_one(Message, 1)
        unit.session.delete(row)
        unit.session.flush()
        unit.session.add(Message(session_id="absent", text="x", sent_at=START))
        with pytest.raises(ConflictError):
            unit.session.flush()
    assert row.text == "old"


def test_rows_stay_usable_after_an_undone_savepoint(hub: Database[HubUnit]) -> None:
    """If a savepoint and then the unit are undone, the changed objects keep values."""
    hub.run(lambda unit: unit.session.add_all([message("old"), message("old")]))
    with suppress(LookupError), hub.unit_of_work() as unit:
        rows = [unit.session.get_one(Message, key) for key in (1, 2)]
        with unit.savepoint():
            rows[0].text = "flushed"
            unit.session.flush()
            rows[1].text = "not flushed"
            raise LookupError
    assert [row.text for row in rows] == ["flushed", "not flushed"]


@pytest.mark.parametrize("kind", ["savepoint", "begin_nested"])
def test_a_new_object_of_an_undone_block_can_be_added_again(hub: Database[HubUnit], kind: str) -> None:
    """If a store changed the row of a new object in an undone block, the unit can add the object again."""
    new = message("new")
    with hub.unit_of_work() as unit:
        with suppress(LookupError), unit.savepoint() if kind == "savepoint" else unit.session.begin_nested():
            unit.session.add(new)
            unit.session.flush()
            unit.write(RENAME, id_=new.id, new_text="undone")
            raise LookupError
        unit.session.add(new)
        unit.session.flush()
        assert unit.session.get(Message, new.id) is new
    assert new.text == "new"
    assert [each.text for each in hub.store(MessageStore).of_session("s")] == ["new"]


@pytest.mark.parametrize("by", ["store", "session"])
@pytest.mark.parametrize("kind", ["savepoint", "begin_nested"])
def test_a_new_object_that_an_undone_block_deleted_can_be_added_again(
    hub: Database[HubUnit], kind: str, by: str
) -> None:
    """If an undone block added and deleted an object, the unit can add the object again and change it."""
    new = message("new")
    with hub.unit_of_work() as unit:
        with suppress(LookupError), unit.savepoint() if kind == "savepoint" else unit.session.begin_nested():
            unit.session.add(new)
            unit.session.flush()
            if by == "session":
                unit.session.delete(new)
                unit.session.flush()
            else:
                key = new.id
                unit.write(REMOVE, id_=key)
                assert unit.session.get(Message, key) is None
            raise LookupError
        unit.session.add(new)
        unit.session.flush()
        assert inspect(new).persistent
        new.text = "changed"
    assert [each.text for each in hub.store(MessageStore).of_session("s")] == ["changed"]


@pytest.mark.parametrize("key", [1, None], ids=["same key", "next key"])
def test_an_object_that_an_undone_block_replaced(hub: Database[HubUnit], key: int | None) -> None:
    """If an undone block gave the key of a deleted row to a new object, the old object can still be changed."""
    hub.run(lambda unit: unit.session.add(message("old")))
    with hub.unit_of_work() as unit:
        old = unit.session.get_one(Message, 1)
        with suppress(LookupError), unit.savepoint():
            unit.write(REMOVE, id_=1)
            unit.session.add(Message(id=key, session_id="s", text="new", sent_at=START))
            unit.session.flush()
            raise LookupError
        assert unit.session.get(Message, 1) is old
        old.text = "changed"
    assert [each.text for each in hub.store(MessageStore).of_session("s")] == ["changed"]


LAMPS: dict[str, Statement[None]] = {
    "insert": Statement(insert(Lamp).values(name="new", room_name="hall", watts=5)),
    "update of lamps": Statement(update(Lamp).values(watts=9)),
    "update of rooms": Statement(update(Room).values(name="hall")),
    "delete": Statement(delete(Lamp)),
}


@pytest.mark.parametrize("end", ["commit", "savepoint", "exception", "rollback", "rollback of the session"])
@pytest.mark.parametrize("kind", ["insert", "update of lamps", "update of rooms"])
def test_relationships_stay_usable(hub: Database[HubUnit], kind: str, end: str) -> None:
    """A relationship that was loaded before a store's write stays usable after the unit, and follows the write."""
    hub.run(lambda unit: unit.session.add_all([Room(name="hall"), Lamp(name="old", room_name="hall")]))
    with suppress(LookupError), hub.unit_of_work() as unit:
        room = unit.session.get_one(Room, "hall")
        lamp = unit.session.get_one(Lamp, "old")
        assert room.lamps == [lamp]
        assert lamp.room is room
        with suppress(LookupError) if end == "savepoint" else nullcontext(), unit.savepoint():
            unit.write(LAMPS[kind])
            if end in ("savepoint", "exception"):
                raise LookupError
        if end == "rollback":
            unit.rollback()
        elif end == "rollback of the session":
            unit.session.rollback()
    is_kept = end == "commit"
    assert [each.name for each in room.lamps] == (["new", "old"] if is_kept and kind == "insert" else ["old"])
    assert lamp.room is room
    assert lamp.watts == (9 if is_kept and kind == "update of lamps" else 5)
    room.lamps.clear()  # without a warning of SQLAlchemy


@pytest.mark.parametrize("kind", ["update of lamps", "delete"])
def test_dropped_objects_do_not_stay_in_memory(hub: Database[HubUnit], kind: str) -> None:
    """After a store's write, the session keeps no object in memory that the application has dropped."""
    hub.run(lambda unit: unit.session.add_all([Room(name="hall"), Lamp(name="old", room_name="hall")]))
    with hub.unit_of_work() as unit:
        room = unit.session.get_one(Room, "hall")
        lamp = weakref.ref(room.lamps[0])
        unit.write(LAMPS[kind])
        assert len(room.lamps) == (kind != "delete")
        if kind != "delete":
            del room
            gc.collect()
            assert lamp() is None


def test_a_deleted_object_keeps_its_values(hub: Database[HubUnit]) -> None:
    """A store's write after the deletion of a related object does not take the object's values."""
    hub.run(lambda unit: unit.session.add_all([Room(name="hall"), Lamp(name="old", room_name="hall")]))
    with hub.unit_of_work() as unit:
        lamp = unit.session.get_one(Room, "hall").lamps[0]
        unit.session.delete(lamp)
        unit.session.flush()
        unit.write(LAMPS["update of rooms"])
    assert (lamp.name, lamp.watts) == ("old", 5)
    assert vars(lamp).keys() <= {"_sa_instance_state", "name", "room_name", "watts", "room"}


def test_an_object_that_is_detached_and_added_is_current(hub: Database[HubUnit]) -> None:
    """After a store's write, an object that leaves the session and comes back has the row's present values."""
    hub.run(lambda unit: unit.session.add_all([Room(name="hall"), Lamp(name="old", room_name="hall")]))
    with hub.unit_of_work() as unit:
        lamp = unit.session.get_one(Lamp, "old")
        unit.write(LAMPS["update of lamps"])
        unit.session.expunge(lamp)
        unit.session.add(lamp)
        assert lamp.watts == 9
        lamp.watts += 1
    assert hub.run(lambda unit: unit.session.get_one(Lamp, "old").watts) == 10


def test_the_kept_values_are_not_part_of_a_reply(hub: Database[HubUnit]) -> None:
    """The values that the session keeps in an object are not part of FastAPI's encoding of the object."""
    hub.run(lambda unit: unit.session.add(Room(name="hall")))
    with hub.unit_of_work() as unit:
        room = unit.session.get_one(Room, "hall")
        unit.write(LAMPS["update of rooms"])
        assert room.name == "hall"
        kept = {name for name in vars(room) if not name.startswith("_sa")}
    assert "name" in kept
    assert all(name in inspect(Room).attrs for name in kept)


def test_a_write_only_relationship_stays_usable(hub: Database[HubUnit]) -> None:
    """A store's write does not disturb a relationship that never loads objects."""
    with hub.unit_of_work() as unit:
        room = Room(name="hall")
        unit.session.add(room)
        room.found.add(Lamp(name="new", room_name="hall"))
        unit.write(LAMPS["update of lamps"])
        assert [lamp.watts for lamp in unit.session.scalars(room.found.select())] == [9]


def test_own_rows_follow_the_writes_of_stores(hub: Database[HubUnit]) -> None:
    """A store's write changes the session's objects of its table, by cascades too, and expires no other row."""
    with hub.unit_of_work() as unit:
        kept, changed = message("kept"), message("old")
        unit.session.add_all([kept, changed])
        unit.sessions.touch("s")
        assert not inspect(kept).expired_attributes  # so the end of the unit sends no SELECT for the row
        unit.write(RENAME, id_=changed.id, new_text="new")
    assert (kept.text, changed.text) == ("kept", "new")
    with hub.unit_of_work() as unit:
        rows = unit.session.exec(select(Message)).all()
        unit.sessions.delete("s")
        assert unit.session.get(Message, 1) is None
        assert unit.session.exec(select(Message)).all() == []
    assert [row.text for row in rows] == ["kept", "new"]


@pytest.mark.parametrize("key", [2, None], ids=["same key", "next key"])
@pytest.mark.parametrize("statement", [REMOVE, REMOVE_BY_TEXT], ids=["delete", "text"])
def test_a_new_object_replaces_a_deleted_row(
    hub: Database[HubUnit], statement: Statement[None], key: int | None
) -> None:
    """If a new object gets the key of a row that a store deleted, the session returns the new object."""
    hub.run(lambda unit: unit.session.add_all([message("kept"), message("old")]))
    with hub.unit_of_work() as unit:
        kept, old = unit.session.exec(select(Message).order_by(_message.id)).all()
        unit.write(statement, id_=2)
        kept.text = "changed"
        new = Message(id=key, session_id="s", text="new", sent_at=START)
        unit.session.add(new)
        if key is None:
            unit.session.flush()
        assert unit.session.get(Message, new.id) is new
        assert inspect(old).deleted == (new.id == 2)  # on PostgreSQL, the next key is 3
        new.text = "stored"
    assert [each.text for each in hub.store(MessageStore).of_session("s")] == ["changed", "stored"]
    assert (kept.text, old.text, new.text) == ("changed", "old", "stored")
