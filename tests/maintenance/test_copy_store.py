"""Copy a whole store, between any two engines, completely or not at all."""

from __future__ import annotations

import importlib.util
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import make_url, text

from homeagent import Database, DeviceChange, IdempotencyScope, UnitOfWork, errors
from homeagent.engine.sqlite.dialect import connect
from homeagent.maintenance import CopyProgress
from homeagent.maintenance.copied_tables import PAGE, PAGE_WITH_JSON, CopiedTable
from homeagent.models import DATA_TABLES, SCHEMA
from tests.conftest import (
    Administer,
    Children,
    FakeClock,
    add_agent,
    add_device,
    copy_template,
    postgres_database,
    postgres_execute,
    write_past_checks,
)

# Most tests copy to PostgreSQL or from PostgreSQL.
pytestmark = pytest.mark.postgresql

ROOT = Path(__file__).parents[2]
BOTH = ("sqlite", "postgresql")
DIRECTIONS = list(itertools.product(BOTH, BOTH))

Rows = dict[str, list[tuple[Any, ...]]]
MakeStore = Callable[[str], str]


@pytest.fixture
def make_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MakeStore]:
    """Creates empty stores of either engine, and returns the locations to open."""
    made: list[str] = []
    numbers = itertools.count(1)

    def make(engine: str) -> str:
        number = next(numbers)
        if engine == "sqlite":
            return str(copy_template(request.getfixturevalue("sqlite_template"), tmp_path / f"store-{number}"))
        url: str = request.getfixturevalue("postgres_url")
        template: str = request.getfixturevalue("postgres_template")
        name = f"copying_{os.getpid()}_{number}"
        administer: Administer = request.getfixturevalue("administer")
        administer(f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY FILE_COPY")
        made.append(name)
        return postgres_database(url, name)

    yield make
    for name in made:
        request.getfixturevalue("administer")(f"DROP DATABASE {name} WITH (FORCE)")


def stored(database: Database) -> Rows:
    """Return every row of every copied table as the driver returns it, with the driver's types."""
    with database.unit_of_work(read_only=True) as unit:
        connection = unit.session.connection()
        return {
            table.name: sorted(
                (
                    tuple((type(value).__name__, value) for value in row)
                    for row in connection.execute(
                        text(f"SELECT {', '.join(c.name for c in table.columns)} FROM {table.name}")
                    )
                ),
                key=repr,
            )
            for table in SCHEMA
            if table is not DeviceChange.__table__
        }


def stored_in(target: str) -> Rows:
    """Return the stored rows of a database that is opened for the call."""
    with Database.open(target, migrate=False) as database:
        return stored(database)


def put(database: Database, table: str, **values: Any) -> None:
    """Insert a row by SQL, without any model."""
    with database.unit_of_work() as unit:
        unit.session.connection().execute(
            text(f"INSERT INTO {table} ({', '.join(values)}) VALUES ({', '.join(f':{name}' for name in values)})"),
            values,
        )


# Text, as in a COPY
ODD = [
    "\\N", "\\.", "\\", "'\"`", "a\u00a0b", "ключ", "🔑", "ﬀ", "e\u0301", "%s", "{}", "NULL", " ",
]  # fmt: skip
ODD_JSON = [
    "-0.0",
    '{"b": 1, "a": -0.0, "b": 2}',
    '"\\u0000 \\ud83d\\udd11"',
    "[1e400,\n\t123456789012345678901234567890]",
    "null",
    '"\\\\N"',
]


def fill(database: Database) -> None:
    """Insert rows for each table, unusual values included, and more than one page if the test needs pages."""
    for number, odd in enumerate(ODD):
        put(database, "agents", id=f"agent-{number}", name=odd, workspace_path=odd, created_at=-number, config=None)
        put(
            database,
            "sessions",
            session_id=f"session-{number}",
            agent_id=f"agent-{number}",
            sender_id=odd,
            channel_id=None,
            created_at=2**62,
            last_active_at=-(2**62),
            route_key=odd if number % 2 else None,
        )
    for number, json in enumerate(ODD_JSON):
        common = {"shared_secret_hash": f"sha256$of-{number}", "paired_at": number, "metadata": json}
        put(database, "devices", id=ODD[number], role="admin", approved=number % 2, **common)
        put(
            database,
            "idempotency_keys",
            key=ODD[number],
            method="m",
            device_id="gone",
            result=json,
            created_at=1,
            expires_at=2,
            state=("completed", "failed")[number % 2],
            omitted=number % 2,
            attempt=number + 1,
        )
    with database.unit_of_work() as unit:
        for number in range(PAGE_WITH_JSON * 2):
            scope = IdempotencyScope("lamp", "door.open", f"k{number}")
            unit.idempotency_keys.claim(
                scope, fingerprint="f" * 64, lease=timedelta(seconds=number), ttl=timedelta(days=1)
            )
        unit.insert_rows(
            "nonces",
            ("device_id", "nonce", "created_at", "expires_at"),
            [(f"d{number % 7}", f"{number:05}", number, 2**53 + number) for number in range(PAGE * 2 + 1)],
        )
        unit.session.connection().execute(text("UPDATE store SET epoch = 7, restored_at = 1234567890123"))


# The copied rows


@pytest.mark.parametrize(("source", "target"), DIRECTIONS)
def test_rows_are_copied_unchanged(source: str, target: str, make_store: MakeStore, clock: FakeClock) -> None:
    """Every value of every row has the same value and type in the target, and the source does not change."""
    with Database.open(make_store(source), clock=clock) as ours, Database.open(make_store(target)) as theirs:
        fill(ours)
        before = stored(ours)
        report = ours.copy_to(theirs)
        assert stored(theirs) == stored(ours) == before
        assert report.rows == {name: len(before[name]) for name in DATA_TABLES}
        assert report.rows["nonces"] > 2 * PAGE
        # Both are open, valid and idle.
        add_agent(ours, "after")
        add_agent(theirs, "after")


printable = st.text(
    st.characters(exclude_categories=("Cs",), exclude_characters="\0"), min_size=1, max_size=20
)  # wider than a store accepts


def test_text_and_numbers_survive_a_round_trip(make_store: MakeStore) -> None:
    """Any text and number that both engines can hold is the same after a copy there and back."""
    columns = ("device_id", "method", "key", "result", "created_at", "expires_at", "lease_expires_at")
    stores = [make_store(engine) for engine in ("sqlite", "postgresql", "sqlite")]
    with (
        Database.open(stores[0], durability="normal") as here,
        Database.open(stores[1]) as there,
        Database.open(stores[2], durability="normal") as back,
    ):

        @settings(max_examples=20, deadline=None)
        @given(
            rows=st.lists(
                st.tuples(printable, printable, printable, st.integers(-(2**63), 2**63 - 1), st.none() | st.just(9)),
                max_size=20,
                unique_by=lambda row: row[:2],
            )
        )
        def check(rows: list[Any]) -> None:
            for database in (here, there, back):
                with database.unit_of_work() as unit:
                    unit.session.connection().execute(text("DELETE FROM idempotency_keys"))
            with here.unit_of_work() as unit:
                unit.insert_rows("idempotency_keys", columns, [(a, b, a, c, n, n, o) for a, b, c, n, o in rows])
            here.copy_to(there)
            there.copy_to(back)
            assert stored(here) == stored(there) == stored(back)

        check()


@pytest.mark.slow
def test_copied_gateway_refuses_replays(make_store: MakeStore) -> None:
    """A gateway's PostgreSQL copy refuses every nonce and answers every retry that the SQLite store knew."""
    spec = importlib.util.spec_from_file_location("gateway_example", ROOT / "docs" / "examples" / "gateway.py")
    assert spec is not None
    assert spec.loader is not None
    gateway_example = importlib.util.module_from_spec(spec)
    sys.modules["gateway_example"] = gateway_example
    spec.loader.exec_module(gateway_example)
    events = gateway_example.read_trace(gateway_example.TRACE)
    trace_clock = gateway_example.TraceClock()
    with (
        Database.open(make_store("sqlite"), clock=trace_clock, durability="normal") as old,
        Database.open(make_store("postgresql"), clock=trace_clock) as new,
        Database.open(make_store("sqlite"), clock=trace_clock) as back,
    ):
        gateway = gateway_example.Gateway(old, trace_clock)
        for event in events:
            gateway.handle(event)
        report = old.copy_to(new)
        assert report.rows["nonces"] > 20
        new.copy_to(back)
        assert stored(back) == stored(new) == stored(old)
        moved = gateway_example.Gateway(new, trace_clock)
        again = events[-20:]
        for event in again:
            moved.handle(event)
        assert (moved.tally.replays_refused, moved.tally.paired) == (20, 0)


def test_progress_is_reported(make_store: MakeStore, clock: FakeClock) -> None:
    """Both steps report progress for each page, and each ends at its total."""
    with Database.open(make_store("sqlite"), clock=clock) as ours, Database.open(make_store("sqlite")) as theirs:
        fill(ours)
        seen: list[CopyProgress] = []
        ours.copy_to(theirs, progress=seen.append)
        total = sum(map(len, stored(ours).values()))
    for step in ("copying", "comparing"):
        done = [at for at in seen if at.step == step]
        assert [at.rows for at in done] == sorted(at.rows for at in done)
        assert {at.total for at in done} == {done[-1].rows} == {total}
        assert len([at for at in done if at.table == "nonces"]) == 3


# Refused copies


KEY = {"device_id": "d", "method": "m", "key": "k", "result": "1", "created_at": 0, "expires_at": 0}
PUT: dict[str, Callable[[Database], object]] = {
    "agents": add_agent,
    "devices": add_device,
    "nonces": lambda database: put(database, "nonces", device_id="d", nonce="n", created_at=0, expires_at=0),
    "idempotency_keys": lambda database: put(database, "idempotency_keys", **KEY),
}


@pytest.mark.parametrize("table", PUT)
@pytest.mark.parametrize("target", BOTH)
def test_target_with_data_is_refused(target: str, table: str, make_store: MakeStore, clock: FakeClock) -> None:
    """If the target has a single row, an expired row included, the copy raises an error and the target stays."""
    with Database.open(make_store("sqlite"), clock=clock) as ours, Database.open(make_store(target)) as theirs:
        fill(ours)
        PUT[table](theirs)
        before = stored(theirs)
        with pytest.raises(errors.TargetNotEmptyError, match="empty database"):
            ours.copy_to(theirs)
        assert stored(theirs) == before


def test_target_must_be_open(make_store: MakeStore) -> None:
    """If the target is a path instead of an open Database, the copy raises an error."""
    target = make_store("sqlite")
    with Database.open(make_store("sqlite")) as ours, pytest.raises(errors.InvalidArgumentError, match="open Database"):
        ours.copy_to(target)  # type: ignore[arg-type]  # on purpose


@pytest.mark.parametrize("engine", BOTH)
def test_database_is_not_copied_onto_itself(engine: str, make_store: MakeStore) -> None:
    """If source and target are the same database under two names, the copy raises an error."""
    target = make_store(engine)
    other = str(Path(target).parent / ".." / Path(target).parent.name / Path(target).name)
    if engine == "postgresql":
        other = make_url(target).update_query_dict({"application_name": "other"}).render_as_string(hide_password=False)
    with Database.open(target) as ours, Database.open(other) as theirs:
        with pytest.raises(errors.InvalidArgumentError, match="same database"):
            ours.copy_to(theirs)
        with pytest.raises(errors.InvalidArgumentError, match="same database"):
            ours.copy_to(ours)


def test_two_schemas_are_two_stores(make_store: MakeStore, clock: FakeClock) -> None:
    """Two schemas of one database are two stores. PostgreSQL only: SQLite has no schemas."""
    target = make_store("postgresql")
    postgres_execute(target, "CREATE SCHEMA other")
    url = make_url(target).update_query_dict({"options": "-csearch_path=other"})
    with Database.open(target, clock=clock) as ours, Database.open(url) as theirs:
        fill(ours)
        ours.copy_to(theirs)
        assert stored(theirs) == stored(ours)


@pytest.mark.parametrize(("source", "target"), DIRECTIONS)
def test_source_that_changes_during_the_copy_is_refused(
    source: str, target: str, make_store: MakeStore, clock: FakeClock
) -> None:
    """If the source changes, the copy raises an error and the target stays empty; `live` copies the first state."""
    with Database.open(make_store(source), clock=clock) as ours, Database.open(make_store(target)) as theirs:
        fill(ours)
        before, empty = stored(ours), stored(theirs)
        numbers = itertools.count()

        def write(progress: CopyProgress) -> None:
            if progress.step == "copying" and progress.table == "nonces":
                add_device(ours, f"late-{next(numbers)}")

        with pytest.raises(errors.SourceChangedError, match="devices of the source was written"):
            ours.copy_to(theirs, progress=write)
        assert stored(theirs) == empty
        with ours.unit_of_work() as unit:
            for device in unit.devices.list():
                if device.id.startswith("late-"):
                    unit.devices.delete(device.id)
        ours.copy_to(theirs, live=True, progress=write)
        assert stored(theirs) == before
        assert stored(ours) != before


@pytest.mark.parametrize("target", BOTH)
def test_target_is_locked_during_the_copy(target: str, make_store: MakeStore, clock: FakeClock) -> None:
    """During a copy, another writer of the target waits, and a reader sees the target empty."""
    name = make_store(target)
    with (
        Database.open(make_store("sqlite"), clock=clock) as ours,
        Database.open(name) as theirs,
        Database.open(name, busy_timeout=timedelta(milliseconds=50)) as other,
    ):
        fill(ours)
        refused: list[str] = []

        def write(progress: CopyProgress) -> None:
            if not refused and progress.table == "nonces":
                with pytest.raises(errors.DatabaseBusyError):
                    add_agent(other, "intruder")
                with other.unit_of_work(read_only=True) as unit:
                    refused.append(str(unit.agents.list()))

        ours.copy_to(theirs, progress=write)
        assert refused == ["[]"]
        assert stored(theirs) == stored(ours)


def test_another_revision_is_refused(make_store: MakeStore) -> None:
    """If another version upgraded an open database, the copy raises an error, since new columns may exist."""
    with Database.open(make_store("sqlite")) as ours, Database.open(make_store("sqlite")) as theirs:
        for database, kind in ((ours, errors.SchemaTooNewError), (theirs, errors.SchemaOutdatedError)):
            revision = "9999" if database is ours else "0001"
            with database.unit_of_work() as unit:
                (kept,) = unit.session.connection().execute(text("SELECT * FROM homeagent_schema_version")).one()
                change = text("UPDATE homeagent_schema_version SET version_num = :revision")
                unit.session.connection().execute(change, {"revision": revision})
            with pytest.raises(kind):
                ours.copy_to(theirs)
            with database.unit_of_work() as unit:
                unit.session.connection().execute(change, {"revision": kept})
        ours.copy_to(theirs)


# Errors during a copy


BAD_ROWS = {
    "a number with a fraction": ("nonces", {"device_id": "d", "nonce": "s3cret", "created_at": 1.5, "expires_at": 0}),
    "bytes": ("nonces", {"device_id": "d", "nonce": b"s3cret", "created_at": 0, "expires_at": 0}),
    "a NUL": ("nonces", {"device_id": "d", "nonce": "s3cret\0", "created_at": 0, "expires_at": 0}),
    "a number over 32 bits": ("idempotency_keys", {**KEY, "key": "s3cret", "attempt": 2**40}),
}


@pytest.mark.parametrize("bad", BAD_ROWS)
def test_unstorable_value_is_refused(bad: str, make_store: MakeStore, clock: FakeClock) -> None:
    """If SQLite holds a value that PostgreSQL cannot hold, the copy raises an error that omits the value."""
    table, values = BAD_ROWS[bad]
    with Database.open(make_store("sqlite"), clock=clock) as ours, Database.open(make_store("postgresql")) as theirs:
        fill(ours)
        put(ours, table, **values)
        empty = stored(theirs)
        with pytest.raises(errors.DatabaseError) as raised:
            ours.copy_to(theirs)
        # Some values only the server can refuse.
        expected = errors.DatabaseError if "32 bits" in bad else errors.CorruptDatabaseError
        assert type(raised.value) is expected
        assert "s3cret" not in repr(raised.value)
        assert raised.value.__cause__ is raised.value.__context__ is None
        assert stored(theirs) == empty


@pytest.mark.parametrize("target", BOTH)
@pytest.mark.parametrize("name", ["approved", "omitted"])
def test_flag_other_than_0_and_1_is_refused(name: str, target: str, make_store: MakeStore, clock: FakeClock) -> None:
    """If a flag is neither 0 nor 1, the error names the column of the source, and the target stays as before."""
    source = make_store("sqlite")
    with Database.open(source, clock=clock) as ours, Database.open(make_store(target)) as theirs:
        fill(ours)
        table = {"approved": "devices", "omitted": "idempotency_keys"}[name]
        write_past_checks(source, f"UPDATE {table} SET {name} = 2")
        empty = stored(theirs)
        with pytest.raises(errors.CorruptDatabaseError, match=rf"{table}\.{name} .* neither 0 nor 1.*is unchanged"):
            ours.copy_to(theirs)
        assert stored(theirs) == empty


@pytest.mark.parametrize("target", BOTH)
def test_session_without_its_agent_is_refused(target: str, make_store: MakeStore) -> None:
    """If another program left a session without its agent, the copy raises an error."""
    source = make_store("sqlite")
    with closing(connect(source)) as raw:
        raw.execute(
            "INSERT INTO sessions (session_id, agent_id, created_at, last_active_at) VALUES ('s', 'nobody', 0, 0)"
        )
    with Database.open(source) as ours, Database.open(make_store(target)) as theirs:
        empty = stored(theirs)
        with pytest.raises(errors.ConflictError):
            ours.copy_to(theirs)
        assert stored(theirs) == empty


TRIGGERS = {
    "sqlite": [
        "CREATE TRIGGER meddle AFTER INSERT ON nonces BEGIN"
        " UPDATE nonces SET created_at = 0 WHERE nonce = NEW.nonce AND nonce = '01000'; END"
    ],
    "postgresql": [
        "CREATE FUNCTION meddle() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN IF NEW.nonce = '01000' THEN NEW.created_at = 0; END IF; RETURN NEW; END $$",
        "CREATE TRIGGER meddle BEFORE INSERT ON nonces FOR EACH ROW EXECUTE FUNCTION meddle()",
    ],
}


@pytest.mark.parametrize("target", BOTH)
def test_differing_rows_are_detected(
    target: str, make_store: MakeStore, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If one number in one of two thousand rows differs in the target, the copy raises an error and is undone."""
    with Database.open(make_store("sqlite"), clock=clock) as ours, Database.open(make_store(target)) as theirs:
        fill(ours)
        empty = stored(theirs)
        insert, statements = CopiedTable.insert, list(TRIGGERS[target])

        def meddle(table: CopiedTable, unit: UnitOfWork, page: Any) -> None:
            # Create the trigger in the copy's own transaction: an existing trigger would be refused before.
            while statements and table.name == "nonces":
                unit.session.connection().exec_driver_sql(statements.pop(0))
            insert(table, unit, page)

        monkeypatch.setattr(CopiedTable, "insert", meddle)
        with pytest.raises(errors.DatabaseError, match="nonces is not the same on both sides"):
            ours.copy_to(theirs)
        assert stored(theirs) == empty


RULE = "CREATE RULE z AS ON INSERT TO devices DO ALSO UPDATE devices SET approved = 1"


@pytest.mark.parametrize("changed", ["source", "target"])
@pytest.mark.parametrize(("engine", "kind"), [("sqlite", "trigger"), ("postgresql", "trigger"), ("postgresql", "rule")])
def test_changed_schema_is_not_copied(
    engine: str, kind: str, changed: str, make_store: MakeStore, clock: FakeClock
) -> None:
    """If either side has a trigger or rule on homeagent's tables, the error names it, and no row is copied."""
    other = "postgresql" if engine == "sqlite" else "sqlite"
    pair = (engine, other) if changed == "source" else (other, engine)
    with Database.open(make_store(pair[0]), clock=clock) as ours, Database.open(make_store(pair[1])) as theirs:
        add_device(ours)
        with (ours if changed == "source" else theirs).unit_of_work() as unit:
            for statement in TRIGGERS[engine] if kind == "trigger" else [RULE]:
                unit.session.connection().exec_driver_sql(statement)
        empty = stored(theirs)
        with pytest.raises(errors.SchemaChangedError, match=f"the schema of the {changed} .* {kind} ") as caught:
            ours.copy_to(theirs)
        assert len(caught.value.changes) == 1
        assert stored(theirs) == empty


@pytest.mark.parametrize("step", ["copying", "comparing"])
@pytest.mark.parametrize("target", BOTH)
def test_interrupted_copy_leaves_no_rows(target: str, step: str, make_store: MakeStore, clock: FakeClock) -> None:
    """If an exception interrupts either step, the target stays empty, and the next copy succeeds."""
    with Database.open(make_store("sqlite"), clock=clock) as ours, Database.open(make_store(target)) as theirs:
        fill(ours)
        empty = stored(theirs)

        def interrupt(progress: CopyProgress) -> None:
            if progress.step == step and progress.table == "nonces":
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            ours.copy_to(theirs, progress=interrupt)
        assert stored(theirs) == empty
        ours.copy_to(theirs)
        assert stored(theirs) == stored(ours)


KILLED = """
import sys
from homeagent import Database

source, target, step = sys.argv[1:]


def stop(progress):
    if progress.step == step and progress.table == "nonces":
        print("here", flush=True)
        sys.stdin.readline()


with Database.open(source) as ours, Database.open(target) as theirs:
    ours.copy_to(theirs, progress=stop)
"""


@pytest.mark.parametrize("step", ["copying", "comparing"])
@pytest.mark.parametrize("target", BOTH)
def test_killed_copy_leaves_no_rows(
    target: str, step: str, make_store: MakeStore, clock: FakeClock, children: Children
) -> None:
    """After `kill -9` during a copy, the target is empty, the source unchanged, and the copy can be repeated."""
    source, destination = make_store("sqlite"), make_store(target)
    with Database.open(source, clock=clock) as ours:
        fill(ours)
    before, empty = stored_in(source), stored_in(destination)
    child = children.start(KILLED, source, destination, step)
    assert child.stdout.readline() == "here\n"
    child.kill()
    child.wait(timeout=30)
    assert stored_in(destination) == empty
    assert stored_in(source) == before
    with Database.open(source) as ours, Database.open(destination) as theirs:
        ours.copy_to(theirs)
    assert stored_in(destination) == before


def test_only_a_write_unit_accepts_rows(make_store: MakeStore) -> None:
    """If a read unit gets stored rows, `insert_rows` raises ReadOnlyError."""
    with (
        Database.open(make_store("sqlite")) as database,
        database.unit_of_work(read_only=True) as unit,
        pytest.raises(errors.ReadOnlyError),
    ):
        unit.insert_rows("agents", ("id",), [("a",)])


@pytest.mark.parametrize("side", ["source", "target"])
def test_lost_server_raises_an_error(side: str, make_store: MakeStore, clock: FakeClock) -> None:
    """If the connection to a server is lost during a copy, homeagent's error is raised, and the target is empty."""
    origin, destination = make_store("postgresql"), make_store("postgresql")
    lost = make_url(origin if side == "source" else destination).database
    with Database.open(origin, clock=clock) as ours, Database.open(destination) as theirs:
        fill(ours)
        empty = stored(theirs)

        def end(progress: CopyProgress) -> None:
            if progress.step == "copying" and progress.table == "nonces":
                postgres_execute(
                    origin if side == "target" else destination,
                    f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{lost}'",
                )

        with pytest.raises(errors.ConnectionLostError):
            ours.copy_to(theirs, progress=end)
        assert stored(theirs) == empty
        ours.copy_to(theirs)
        assert stored(theirs) == stored(ours)


def test_role_with_row_privileges_is_enough(make_store: MakeStore, clock: FakeClock) -> None:
    """A role that can read and write rows can copy to and from a server; it does not need to own the tables."""
    names = [make_store("postgresql"), make_store("postgresql")]
    role = f"mover_{os.getpid()}"
    postgres_execute(names[0], f"CREATE ROLE {role} LOGIN")
    try:
        for name in names:
            postgres_execute(name, f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO {role}")
        with Database.open(names[0], clock=clock) as ours:
            fill(ours)
        origin, destination = (make_url(name).set(username=role) for name in names)
        with Database.open(origin, migrate=False) as ours, Database.open(destination, migrate=False) as theirs:
            ours.copy_to(theirs)
            assert stored(theirs) == stored(ours)
    finally:
        for name in names:
            postgres_execute(name, f"DROP OWNED BY {role}")
        postgres_execute(names[0], f"DROP ROLE {role}")


@pytest.mark.parametrize("target", BOTH)
def test_one_of_two_concurrent_copies_is_made(target: str, make_store: MakeStore, clock: FakeClock) -> None:
    """The second of two concurrent copies waits for the first, then finds data and raises an error."""
    name = make_store(target)
    origins = [make_store("sqlite"), make_store("sqlite")]
    for origin in origins:
        with Database.open(origin, clock=clock) as database:
            fill(database)
            add_device(database, Path(origin).parent.name)

    def copy(origin: str) -> str:
        with Database.open(origin) as ours, Database.open(name) as theirs:
            try:
                ours.copy_to(theirs)
            except errors.TargetNotEmptyError:
                return "refused"
            return origin

    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(copy, origins))
    assert outcomes.count("refused") == 1
    assert stored_in(name) == stored_in(next(origin for origin in outcomes if origin != "refused"))


# Large copies


MEASURED = """
import sys
from pathlib import Path
from homeagent import Database

source, target = sys.argv[1:]
with Database.open(source) as ours, Database.open(target) as theirs:
    rows = sum(ours.copy_to(theirs).rows.values())
# Not ru_maxrss, which begins with what the parent took: that of a test's process hid all that a copy takes.
print(rows, Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
"""


def row_of(size: str, number: int) -> dict[str, Any]:
    """Return a nonce, or a key with a result of 250 kB."""
    if size == "small":
        return {"device_id": f"d{number % 500}", "nonce": f"{number:032x}", "created_at": number, "expires_at": number}
    return {**KEY, "key": str(number), "result": f'"{number % 10}"' + " " * 250_000}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("source", "target", "size", "counts"),
    [
        ("sqlite", "postgresql", "small", (100_000, 1_000_000)),
        ("postgresql", "sqlite", "small", (100_000, 1_000_000)),
        ("sqlite", "postgresql", "large", (200, 1000)),
    ],
)
def test_memory_is_independent_of_the_number_of_rows(
    source: str, target: str, size: str, counts: tuple[int, int], make_store: MakeStore, children: Children
) -> None:
    """A copy of the second number of rows needs at most 16 MiB more memory than a copy of the first number."""
    peaks, table = [], "nonces" if size == "small" else "idempotency_keys"
    for count in counts:
        origin = make_store(source)
        with Database.open(origin, durability="normal") as database, database.unit_of_work() as unit:
            step = 10_000 if size == "small" else 1
            for start in range(0, count, step):
                rows = [row_of(size, number) for number in range(start, start + step)]
                unit.insert_rows(table, tuple(rows[0]), [tuple(row.values()) for row in rows])
        copied, peak = map(int, children.run(MEASURED, origin, make_store(target)).split())
        assert copied == count
        peaks.append(peak)
    assert peaks[1] - peaks[0] < 16 * 1024  # KiB
