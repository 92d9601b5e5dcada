"""Copy a whole store, between any two engines, completely or not at all."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import make_url, text

from homeagent import Database, DeviceChange, Freshness, IdempotencyScope, UnitOfWork, errors
from homeagent.maintenance import CopyProgress, copied_tables
from homeagent.maintenance.copied_tables import CopiedTable
from homeagent.migrations import REVISION
from homeagent.models import DATA_TABLES, SCHEMA
from tests.conftest import (
    Children,
    FakeClock,
    add_agent,
    add_device,
    copy_template,
    postgres_copy,
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
OpenPair = Callable[[str, str], tuple[Database, Database]]


@pytest.fixture(autouse=True)
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let few rows fill several pages."""
    monkeypatch.setattr(copied_tables, "PAGE", 40)
    monkeypatch.setattr(copied_tables, "PAGE_WITH_JSON", 5)


@pytest.fixture
def make_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MakeStore]:
    """Creates empty stores of either engine, and returns the locations to open."""
    numbers = itertools.count(1)
    with ExitStack() as stack:

        def make(engine: str) -> str:
            if engine == "sqlite":
                directory = tmp_path / f"store-{next(numbers)}"
                return str(copy_template(request.getfixturevalue("sqlite_template"), directory))
            return stack.enter_context(postgres_copy(request))

        yield make


@pytest.fixture
def open_pair(make_store: MakeStore, clock: FakeClock) -> Iterator[OpenPair]:
    """Opens a filled source and an empty target of these engines."""
    with ExitStack() as stack:

        def open_pair(source: str, target: str) -> tuple[Database, Database]:
            ours, theirs = (stack.enter_context(Database.open(make_store(e), clock=clock)) for e in (source, target))
            fill(ours)
            return ours, theirs

        yield open_pair


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


@contextmanager
def refused(theirs: Database, error: type[BaseException], match: str | None = None) -> Iterator[Any]:
    """Expect an error of a copy, and check that the target is as before."""
    before = stored(theirs)
    with pytest.raises(error, match=match) as caught:
        yield caught
    assert stored(theirs) == before


def execute(database: Database, *statements: str) -> None:
    """Run SQL statements in one unit."""
    with database.unit_of_work() as unit:
        for statement in statements:
            unit.session.connection().exec_driver_sql(statement)


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
    """Insert rows for each table, unusual values included, and more than two pages of several tables."""
    count = len(ODD)
    nothing, more = itertools.repeat(None), [json for _, json in zip(ODD, itertools.cycle(ODD_JSON), strict=False)]
    agents = zip(map("agent-{}".format, range(count)), ODD, ODD, range(0, -count, -1), nothing, strict=False)
    sessions = (
        (f"session-{number}", f"agent-{number}", odd, None, 2**62, -(2**62), odd if number % 2 else None)
        for number, odd in enumerate(ODD)
    )
    devices = ((odd, "admin", n % 2, f"sha256$of-{n}", n, more[n]) for n, odd in enumerate(ODD[: len(ODD_JSON)]))
    keys = (
        (odd, "m", "gone", more[n], 1, 2, ("completed", "failed")[n % 2], n % 2, n + 1)
        for n, odd in enumerate(ODD[: len(ODD_JSON)])
    )
    nonces = ((f"d{n % 7}", f"{n:05}", n, 2**53 + n) for n in range(2 * copied_tables.PAGE + 1))
    with database.unit_of_work() as unit:
        for table, columns, rows in (
            ("agents", "id name workspace_path created_at config", agents),
            ("sessions", "session_id agent_id sender_id channel_id created_at last_active_at route_key", sessions),
            ("devices", "id role approved shared_secret_hash paired_at metadata", devices),
            ("idempotency_keys", "key method device_id result created_at expires_at state omitted attempt", keys),
            ("nonces", "device_id nonce created_at expires_at", nonces),
        ):
            unit.insert_rows(table, columns.split(), rows)
        for number in range(copied_tables.PAGE_WITH_JSON * 2):
            scope = IdempotencyScope("lamp", "door.open", f"k{number}")
            unit.idempotency_keys.claim(
                scope, fingerprint="f" * 64, lease=timedelta(seconds=number), ttl=timedelta(days=1)
            )
        unit.session.connection().execute(text("UPDATE store SET epoch = 7, restored_at = 1234567890123"))


# The copied rows


@pytest.mark.parametrize(("source", "target"), DIRECTIONS)
def test_rows_are_copied_unchanged(
    source: str, target: str, open_pair: OpenPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every value has the same value and type in the target, the source does not change, and pages are reported."""
    monkeypatch.undo()  # full pages
    ours, theirs = open_pair(source, target)
    before = stored(ours)
    seen: list[CopyProgress] = []
    report = ours.copy_to(theirs, progress=seen.append)
    assert stored(theirs) == stored(ours) == before
    assert report.rows == {name: len(before[name]) for name in DATA_TABLES}
    assert report.rows["nonces"] > 2 * copied_tables.PAGE
    for step in ("copying", "comparing"):
        done = [at for at in seen if at.step == step]
        assert [at.rows for at in done] == sorted(at.rows for at in done)
        assert {at.total for at in done} == {done[-1].rows} == {sum(map(len, before.values()))}
        assert len([at for at in done if at.table == "nonces"]) == 3
    # Both are open, valid and idle.
    add_agent(ours, "after")
    add_agent(theirs, "after")


@pytest.mark.parametrize("target", BOTH)
def test_target_checks_timestamps_like_its_source(target: str, open_pair: OpenPair, clock: FakeClock) -> None:
    """The target checks signed timestamps with the source's time of restore, also if it has checked some before."""
    ours, theirs = open_pair("sqlite", target)
    execute(ours, f"UPDATE store SET restored_at = {clock().timestamp() * 1000:.0f}")
    signed: Any = {"signed_at": clock(), "skew": timedelta(minutes=1)}
    with theirs.unit_of_work() as unit:
        assert unit.nonces.consume_signed("lamp", "early", **signed) is Freshness.FRESH
        unit.rollback()
    ours.copy_to(theirs)
    for database in (ours, theirs):
        assert database.nonces.consume_signed("lamp", "late", **signed) is Freshness.STALE


printable = st.text(
    st.characters(exclude_categories=("Cs",), exclude_characters="\0"), min_size=1, max_size=20
)  # wider than a store accepts


def test_text_and_numbers_survive_a_round_trip(make_store: MakeStore) -> None:
    """Any text and number that both engines can hold is the same after a copy there and back."""
    columns = ("device_id", "method", "key", "result", "created_at", "expires_at", "lease_expires_at")
    rows: dict[tuple[str, str], tuple[Any, ...]] = {}

    @settings(max_examples=20, deadline=None)
    @given(
        st.lists(st.tuples(printable, printable, printable, st.integers(-(2**63), 2**63 - 1), st.none() | st.just(9)))
    )
    def collect(examples: list[Any]) -> None:
        rows.update({(a, b): (a, b, a, c, n, n, o) for a, b, c, n, o in examples})

    collect()
    here, there, back = (Database.open(make_store(engine)) for engine in ("sqlite", "postgresql", "sqlite"))
    with here, there, back:
        with here.unit_of_work() as unit:
            unit.insert_rows("idempotency_keys", columns, rows.values())
        here.copy_to(there)
        there.copy_to(back)
        assert stored(here) == stored(there) == stored(back)


# Refused copies


ONE_ROW = {
    "agents": "(id, name, workspace_path, created_at) VALUES ('a', 'A', '/a', 0)",
    "devices": "(id, role, approved, shared_secret_hash, paired_at) VALUES ('d', 'node', 0, 'h', 0)",
    "nonces": "(device_id, nonce, created_at, expires_at) VALUES ('d', 'n', 0, 0)",
    "idempotency_keys": "(device_id, method, key, result, created_at, expires_at) VALUES ('d', 'm', 'k', '1', 0, 0)",
}


@pytest.mark.parametrize("target", BOTH)
def test_target_with_data_is_refused(target: str, open_pair: OpenPair) -> None:
    """If the target has a single row, an expired row included, the copy raises an error and the target stays."""
    ours, theirs = open_pair("sqlite", target)
    for table, row in ONE_ROW.items():
        execute(theirs, f"INSERT INTO {table} {row}")
        with refused(theirs, errors.TargetNotEmptyError, f"{table}.*empty database"):
            ours.copy_to(theirs)
        execute(theirs, f"DELETE FROM {table}")


@pytest.mark.parametrize("engine", BOTH)
def test_database_is_not_copied_onto_itself(engine: str, make_store: MakeStore) -> None:
    """If the target is the source under another name, or if an argument is invalid, the copy raises an error."""
    target = make_store(engine)
    other = str(Path(target).parent / ".." / Path(target).parent.name / Path(target).name)
    if engine == "postgresql":
        other = make_url(target).update_query_dict({"application_name": "other"}).render_as_string(hide_password=False)
    with Database.open(target) as ours, Database.open(other) as theirs:
        for same in (theirs, ours):
            with pytest.raises(errors.InvalidArgumentError, match="same database"):
                ours.copy_to(same)
        report: Any = 1
        with pytest.raises(errors.InvalidArgumentError, match="progress must be a function"):
            ours.copy_to(ours, progress=report)
        with pytest.raises(errors.InvalidArgumentError, match="open Database"):
            ours.copy_to(target)  # type: ignore[arg-type]  # on purpose


def test_two_schemas_are_two_stores(make_store: MakeStore, clock: FakeClock) -> None:
    """Two schemas of one database are two stores. PostgreSQL only: SQLite has no schemas."""
    target = make_store("postgresql")
    postgres_execute(target, "CREATE SCHEMA other")
    url = make_url(target).update_query_dict({"options": "-csearch_path=other"})
    with Database.open(target, clock=clock) as ours, Database.open(url) as theirs:
        fill(ours)
        ours.copy_to(theirs)
        assert stored(theirs) == stored(ours)


@pytest.mark.parametrize(("source", "target"), [BOTH, BOTH[::-1]])
def test_source_that_changes_during_the_copy_is_refused(source: str, target: str, open_pair: OpenPair) -> None:
    """If the source changes, the copy raises an error and the target stays empty; `live` copies the first state."""
    ours, theirs = open_pair(source, target)
    before = stored(ours)
    numbers = itertools.count()

    def write(progress: CopyProgress) -> None:
        if progress.step == "copying" and progress.table == "nonces":
            add_device(ours, f"late-{next(numbers)}")

    with refused(theirs, errors.SourceChangedError, "devices of the source was written"):
        ours.copy_to(theirs, progress=write)
    with ours.unit_of_work() as unit:
        for device in unit.devices.list():
            if device.id.startswith("late-"):
                unit.devices.delete(device.id)
    ours.copy_to(theirs, live=True, progress=write)
    assert stored(theirs) == before != stored(ours)


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
    change = "UPDATE homeagent_schema_version SET version_num = '{}'"
    with Database.open(make_store("sqlite")) as ours, Database.open(make_store("sqlite")) as theirs:
        for database, other, kind in (
            (ours, "9999", errors.SchemaTooNewError),
            (theirs, "0001", errors.SchemaOutdatedError),
        ):
            execute(database, change.format(other))
            with pytest.raises(kind):
                ours.copy_to(theirs)
            execute(database, change.format(REVISION))
        ours.copy_to(theirs)


# Errors during a copy


NONCE = "INSERT INTO nonces (device_id, nonce, created_at, expires_at) VALUES ('d', {}, {}, 0)"
ATTEMPT = (
    "INSERT INTO idempotency_keys (device_id, method, key, result, created_at, expires_at, attempt)"
    " VALUES ('d', 'm', 's3cret', '1', 0, 0, 1 << 40)"
)
NO_AGENT = "INSERT INTO sessions (session_id, agent_id, created_at, last_active_at) VALUES ('s3cret', 'nobody', 0, 0)"
FLAG = " holds a value that is neither 0 nor 1, in the row with "
# The statement that makes the row, and the text of the error
BAD_ROWS = {
    "a number with a fraction": (NONCE.format("'s3cret'", 1.5), "nonces.created_at"),
    "bytes": (NONCE.format("x'733363726574'", 0), "nonces.nonce"),
    "a NUL": (NONCE.format("'s3cret' || char(0)", 0), "nonces.nonce"),
    "approved": ("UPDATE devices SET approved = 2", f"devices.approved{FLAG}"),
    "omitted": ("UPDATE idempotency_keys SET omitted = 2", f"idempotency_keys.omitted{FLAG}"),
    "no agent": (NO_AGENT, "sessions"),
    "no store record": ("DELETE FROM store", "table `store` of the source has lost its row"),
    "a number over 32 bits": (ATTEMPT, "."),
}
# The other errors are CorruptDatabaseError.
ERRORS = {"no agent": errors.ConflictError, "a number over 32 bits": errors.InvalidArgumentError}


@pytest.mark.parametrize(
    ("bad", "target"),
    [
        *itertools.product([*BAD_ROWS][:-1], BOTH),
        ("a number over 32 bits", "postgresql"),  # only the server refuses the number
    ],
)
def test_bad_row_is_refused(bad: str, target: str, open_pair: OpenPair) -> None:
    """If SQLite holds a row that a store would not write, the copy raises an error that omits the row's values."""
    ours, theirs = open_pair("sqlite", target)
    statement, match = BAD_ROWS[bad]
    write_past_checks(ours.status().location, statement)
    with refused(theirs, errors.HomeAgentError, match) as raised:
        ours.copy_to(theirs)
    assert type(raised.value) is ERRORS.get(bad, errors.CorruptDatabaseError)
    assert "s3cret" not in repr(raised.value)
    assert raised.value.__cause__ is raised.value.__context__ is None


TRIGGERS = {
    "sqlite": [
        "CREATE TRIGGER meddle AFTER INSERT ON nonces BEGIN"
        " UPDATE nonces SET created_at = 0 WHERE nonce = NEW.nonce AND nonce = '00076'; END"
    ],
    "postgresql": [
        "CREATE FUNCTION meddle() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN IF NEW.nonce = '00076' THEN NEW.created_at = 0; END IF; RETURN NEW; END $$",
        "CREATE TRIGGER meddle BEFORE INSERT ON nonces FOR EACH ROW EXECUTE FUNCTION meddle()",
    ],
}


@pytest.mark.parametrize("target", BOTH)
def test_differing_rows_are_detected(target: str, open_pair: OpenPair, monkeypatch: pytest.MonkeyPatch) -> None:
    """If one number in one of many rows differs in the target, the copy raises an error and is undone."""
    ours, theirs = open_pair("sqlite", target)
    insert, statements = CopiedTable.insert, list(TRIGGERS[target])

    def meddle(table: CopiedTable, unit: UnitOfWork, page: Any) -> None:
        # Create the trigger in the copy's own transaction: an existing trigger would be refused before.
        while statements and table.name == "nonces":
            unit.session.connection().exec_driver_sql(statements.pop(0))
        insert(table, unit, page)

    monkeypatch.setattr(CopiedTable, "insert", meddle)
    with refused(theirs, errors.DatabaseError, "nonces is not the same on both sides"):
        ours.copy_to(theirs)


RULE = "CREATE RULE z AS ON INSERT TO devices DO ALSO UPDATE devices SET approved = 1"


@pytest.mark.parametrize("changed", ["source", "target"])
@pytest.mark.parametrize(("engine", "kind"), [("sqlite", "trigger"), ("postgresql", "trigger"), ("postgresql", "rule")])
def test_changed_schema_is_not_copied(engine: str, kind: str, changed: str, open_pair: OpenPair) -> None:
    """If either side has a trigger or rule on homeagent's tables, the error names it, and no row is copied."""
    other = "postgresql" if engine == "sqlite" else "sqlite"
    ours, theirs = open_pair(*((engine, other) if changed == "source" else (other, engine)))
    execute(ours if changed == "source" else theirs, *(TRIGGERS[engine] if kind == "trigger" else [RULE]))
    with refused(theirs, errors.SchemaChangedError, f"the schema of the {changed} .* {kind} ") as caught:
        ours.copy_to(theirs)
    assert len(caught.value.changes) == 1


@pytest.mark.parametrize("changed", ["source", "target"])
@pytest.mark.parametrize(
    ("engine", "change", "texts"),
    [
        *((engine, "ADD COLUMN extra text", ["column agents.extra is not homeagent's"]) for engine in BOTH),
        ("postgresql", "DROP COLUMN config", ["column agents.config is missing"]),
        (
            "postgresql",
            "RENAME COLUMN name TO other",
            ["column agents.name is missing", "column agents.other is not homeagent's"],
        ),
        ("postgresql", "RENAME TO other", ["table agents is missing"]),
    ],
)
def test_other_columns_are_not_copied(
    engine: str, change: str, texts: list[str], changed: str, open_pair: OpenPair
) -> None:
    """If one of homeagent's tables has other columns on either side, the error names each column or the table."""
    other = "postgresql" if engine == "sqlite" else "sqlite"
    ours, theirs = open_pair(*((engine, other) if changed == "source" else (other, engine)))
    execute(ours if changed == "source" else theirs, f"ALTER TABLE agents {change}")
    with pytest.raises(errors.SchemaChangedError, match=f"the schema of the {changed} ") as caught:
        ours.copy_to(theirs)
    assert caught.value.changes == texts
    assert theirs.sessions.list() == []


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


@pytest.mark.parametrize("target", BOTH)
def test_ended_copy_leaves_no_rows(target: str, make_store: MakeStore, clock: FakeClock, children: Children) -> None:
    """After Ctrl-C or `kill -9` in either step, the target is empty, the source is as before, and a copy succeeds."""
    source, destination = make_store("sqlite"), make_store(target)
    with Database.open(source, clock=clock) as ours:
        fill(ours)
    before, empty = stored_in(source), stored_in(destination)
    for step in ("copying", "comparing"):
        child = children.start(KILLED, source, destination, step)
        assert child.stdout.readline() == "here\n"
        child.kill()
        child.wait(timeout=30)
        assert stored_in(destination) == empty
        assert stored_in(source) == before
    with Database.open(source) as ours, Database.open(destination) as theirs:
        for step in ("copying", "comparing"):

            def interrupt(progress: CopyProgress, step: str = step) -> None:
                if progress.step == step and progress.table == "nonces":
                    raise KeyboardInterrupt

            with refused(theirs, KeyboardInterrupt):
                ours.copy_to(theirs, progress=interrupt)
        ours.copy_to(theirs)
    assert stored_in(destination) == before


@pytest.mark.parametrize("side", ["source", "target"])
def test_lost_server_raises_an_error(side: str, open_pair: OpenPair) -> None:
    """If the connection to a server is lost during a copy, homeagent's error is raised, and the target is empty."""
    ours, theirs = open_pair("postgresql", "postgresql")
    urls = [make_url(database.status().location) for database in (ours, theirs)]
    lost, other = urls if side == "source" else urls[::-1]

    def end(progress: CopyProgress) -> None:
        if progress.step == "copying" and progress.table == "nonces":
            ended = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{lost.database}'"
            postgres_execute(other.set(drivername="postgresql").render_as_string(hide_password=False), ended)

    with refused(theirs, errors.ConnectionLostError):
        ours.copy_to(theirs, progress=end)
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
        for statement in (
            "CREATE FUNCTION own() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'",
            "CREATE TRIGGER own AFTER INSERT ON nonces EXECUTE FUNCTION own()",
        ):
            postgres_execute(names[1], statement)
        origin, destination = (make_url(name).set(username=role) for name in names)
        with (
            Database.open(origin, migrate=False) as ours,
            Database.open(destination, migrate=False, acknowledged=["own"]) as theirs,
        ):
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
    row = {"device_id": f"d{number % 500}", "created_at": number, "expires_at": number}
    if size == "small":
        return {**row, "nonce": f"{number:032x}"}
    return {**row, "method": "m", "key": str(number), "result": f'"{number % 10}"' + " " * 250_000}


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
