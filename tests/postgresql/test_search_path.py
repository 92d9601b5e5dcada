"""The schema of the tables, and schemas that are searched earlier. PostgreSQL only: SQLite has no such schemas."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from sqlalchemy import make_url, text

from homeagent import Database, DevicePair, DeviceStatus, Role, UnitOfWork, diagnose
from homeagent.errors import InvalidArgumentError
from tests.conftest import add_device, postgres_execute

pytestmark = pytest.mark.usefixtures("postgres_url")


def in_schema(url: str, path: str) -> str:
    changed = make_url(url).update_query_dict({"options": f"-csearch_path={path}"})
    return changed.render_as_string(hide_password=False)


def shadow(url: str) -> None:
    """Create a schema with the role's name, searched before `public`, with a device that is approved."""
    postgres_execute(url, "CREATE SCHEMA postgres")
    with Database.open(in_schema(url, "postgres")) as other:
        add_device(other, "intruder", approved=True)


IDS = text("SELECT id FROM devices")


def ids_of_session(database: Database) -> list[str]:
    return database.run(lambda unit: list(unit.session.connection().execute(IDS).scalars()))


def ids_of_read_connection(database: Database) -> list[str]:
    with database.read_connection() as connection:
        return list(connection.execute(IDS).scalars())


def listed(unit: UnitOfWork) -> list[str]:
    return [device.id for device in unit.devices.list()]


WAYS: dict[str, Callable[[Database], list[str]]] = {
    "run": lambda database: database.run(listed),
    "read-only unit": lambda database: database.run(listed, read_only=True),
    "one call": lambda database: [device.id for device in database.devices.list()],
    "session": ids_of_session,
    "read connection": ids_of_read_connection,
}


@pytest.mark.parametrize("fresh", [False, True], ids=["open connections", "new connections"])
def test_running_gateway_keeps_its_schema(target: str, database: Database, *, fresh: bool) -> None:
    """If a schema that would be searched first is created later, its tables are not read."""
    database.pair(DevicePair(id="lamp", role=Role.NODE))
    for ids in WAYS.values():
        assert ids(database) == ["lamp"]
    shadow(target)
    if fresh:
        database._engine.discard_free()
    for name, ids in WAYS.items():
        assert ids(database) == ["lamp"], name
    assert database.run(lambda unit: unit.devices.list(status=DeviceStatus.APPROVED)) == []


def test_second_store_is_refused(target: str) -> None:
    """If the role's own schema has a store too, the next start raises an error, unless the path names the schema."""
    shadow(target)
    for act in (Database.open, Database.begin_epoch):
        with pytest.raises(InvalidArgumentError, match=r"the schema public holds .*search_path"):
            act(target)
    found = diagnose(target).finding("database")
    assert found is not None
    assert "two stores" in found.summary
    with Database.open(in_schema(target, "public")) as database:
        assert database.run(listed) == []


@pytest.mark.parametrize("by", ["options", "role"])
def test_first_schema_is_used(target: str, by: str) -> None:
    """The first schema of the path is used, even if a later schema has a store, which does not change."""
    name = make_url(target).database
    postgres_execute(target, 'CREATE SCHEMA "Own, %s"')
    postgres_execute(target, "CREATE TABLE public.things (id integer)")
    path = '"Own, %s", public'
    if by == "role":
        postgres_execute(target, f"ALTER ROLE postgres IN DATABASE {name} SET search_path = {path}")
    url = target if by == "role" else in_schema(target, path.replace(" ", r"\ "))
    for _ in range(2):
        with Database.open(url) as database:
            if not database.run(listed):
                add_device(database, "lamp")
            assert ids_of_session(database) == ["lamp"]
            with database.unit_of_work() as unit:
                assert unit.session.connection().execute(text("SELECT count(*) FROM things")).scalar() == 0
    rows = diagnose(url).finding("rows")
    assert rows is not None
    assert rows.facts["rows"] == 4  # the device, the row of the table `store`, and two rows of the change feed
    with Database.open(in_schema(target, "public")) as public:
        assert public.run(listed) == []


def test_doctor_checks_the_schema_of_the_store(target: str) -> None:
    """If a table is missing, the doctor reports it, even if a later schema of the path has a table of that name."""
    postgres_execute(target, "CREATE SCHEMA own")
    url = in_schema(target, "own,public")
    Database.open(url).close()
    postgres_execute(target, "DROP TABLE own.nonces")
    schema = diagnose(url).finding("schema")
    assert schema is not None
    assert "nonces" in str(schema)
