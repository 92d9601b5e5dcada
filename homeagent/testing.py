"""pytest plugin with fixtures for fresh databases and a movable clock.

If homeagent is installed, pytest loads the plugin automatically. The plugin imports the rest of homeagent only if a
test uses a fixture.

| fixture | value | override the fixture to |
|---|---|---|
| `homeagent_clock` | `FakeClock`, which stands still until the test calls `advance` | begin at another time |
| `homeagent_database` | open database that is empty | add devices and agents |
| `homeagent_factory` | `DatabaseFactory`, which opens more databases | |
| `homeagent_options` | arguments of `Database.open` for all these databases | name the unit and the migrations |
| `homeagent_server` | URL of a PostgreSQL server, or None for SQLite | choose the engine for a part of the tests |

The option `--homeagent-postgresql` sets the URL of the PostgreSQL server. The role in the URL needs the right to create
databases.
"""

from __future__ import annotations

import shutil
import tempfile
import uuid
from collections.abc import Collection, Iterator
from contextlib import ExitStack, closing, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import os

    from sqlalchemy import URL

    from homeagent.database import Database
    from homeagent.engine.target import Given

__all__ = ["START", "DatabaseFactory", "FakeClock", "check_revisions"]

START = datetime(2026, 1, 2, 3, 4, 5, 678000, tzinfo=UTC)
"""Time at which a `FakeClock` begins."""


class FakeClock:
    """Clock that stands still until a test moves the clock."""

    def __init__(self, now: datetime = START) -> None:
        self.now: datetime = now

    def __call__(self) -> datetime:
        """Return the time of the clock."""
        return self.now

    def advance(self, duration: timedelta | None = None, **units: float) -> datetime:
        """Move the clock, and return the new time. A negative duration moves the clock back.

        Args:
            duration: time to add.
            units: time to add, as arguments of `timedelta()`, such as `minutes=5`. Do not pass a duration too.

        Raises:
            TypeError: if the call has both a duration and units, or none of them.
        """
        if (duration is None) == (not units):
            raise TypeError("advance() needs a duration, or units such as minutes=5, but not both")
        self.now += timedelta(**units) if duration is None else duration
        return self.now


class _Templates:
    """Closed template databases with a schema and no rows. Copying a template takes less time than a migration."""

    def __init__(self, directory: Path, closing: ExitStack) -> None:
        self._directory = directory
        self._closing = closing
        self._made: dict[tuple[Given, Path | None], Any] = {}

    def copy(self, server: Given, options: dict[str, Any], closing: ExitStack) -> Path | URL:
        from homeagent.database import Database
        from homeagent.migrations.application import named_folder

        schema = {name: options[name] for name in ("migrations", "metadata", "acknowledged") if name in options}
        given = schema.get("migrations")
        # A test can change the working directory, so do not use a relative path as the key.
        key = (server, given and Path(str(named_folder(given)[1])).resolve())
        made: Any = self._made.get(key)
        if made is None:
            if server is None:
                made = self._new_directory() / "homeagent.db"
            else:
                made = self._closing.enter_context(_server_database(server))
            Database.open(made, **schema).close()
            self._made[key] = made
        if server is not None:
            return closing.enter_context(_server_database(server, template=made.database))
        copied = self._new_directory()
        # Copy the lock file too, because creating a lock file takes longer.
        for name in ("homeagent.db", "homeagent.db.lock"):
            shutil.copy(made.with_name(name), copied)
        return copied / "homeagent.db"

    def _new_directory(self) -> Path:
        # Do not use pytest's mktemp(), which reads the whole directory.
        return Path(tempfile.mkdtemp(dir=self._directory))


class DatabaseFactory:
    """Open fresh databases, and close the databases at the end of the test."""

    def __init__(self, templates: _Templates, options: dict[str, Any], server: Given) -> None:
        self._templates = templates
        self._options = options
        self._server = server
        self._closing = ExitStack()

    def __call__(self, **options: Any) -> Database:
        """Return a new, empty database.

        Args:
            options: arguments of `Database.open()`, such as `unit=` and `migrations=`. Each argument overrides the same
                argument in `homeagent_options`. The default clock is the fixture `homeagent_clock`. The default
                durability is `"normal"`.
        """
        from homeagent.database import Database

        options = {**self._options, **options}
        target = self._templates.copy(self._server, options, self._closing)
        return self._closing.enter_context(Database.open(target, **options))

    def close(self) -> None:
        """Close all databases, and drop the databases on servers."""
        self._closing.close()


def check_revisions(
    migrations: str | os.PathLike[str],
    *,
    server: str | None = None,
    acknowledged: Collection[str] = (),
    accepted: Collection[str] = (),
) -> None:
    """Raise an error if a revision makes a change that breaks code of the application's previous version.

    During an upgrade of several hosts, old code uses the new schema. Therefore a revision must only expand the schema.
    The function compares the tables, columns and constraints before and after each revision in an empty database. A
    revision can declare the oldest revision whose code still runs: `oldest_revision = "…"`. Such a revision can make
    any change, for example drop a column.

    Args:
        migrations: revisions of the application (see `Database.open`).
        server: URL of a PostgreSQL server, on which the function creates a database. Without a URL, the function
            creates a SQLite file.
        acknowledged: names of the application's triggers on homeagent's tables (see `Database.open`).
        accepted: names of CHECK constraints and triggers that a revision may add. Accept a name only if old code works
            with the constraint or trigger.

    Raises:
        IncompatibleRevisionError: if a revision breaks old code. The error names the revision, the changes and the
            remedies.
        InvalidArgumentError: if the revisions do not form a sequence, for example with several heads.
        MigrationError: if a revision fails, or changes homeagent's tables.
    """
    from homeagent.engine.target import conceal
    from homeagent.migrations.application import Application
    from homeagent.migrations.expansion import check_expansion
    from homeagent.opening import open_engine

    given = conceal(server)
    del server  # a traceback must not show the password
    with ExitStack() as closing:
        if given is None:
            directory = closing.enter_context(tempfile.TemporaryDirectory(prefix="homeagent-"))
            target: Path | URL = Path(directory) / "scratch.db"
        else:
            target = closing.enter_context(_server_database(given))
        check_expansion(
            Application.of(migrations, acknowledged),
            lambda step: open_engine(target, durability="normal", migrations=step),
            accepted,
        )


@contextmanager
def _server_database(server: Given, *, template: str | None = None) -> Iterator[URL]:
    """Create a database on a server, and yield its URL. Drop the database after the block."""
    from sqlalchemy import text

    from homeagent.engine.postgresql.engine import PostgreSQLEngine
    from homeagent.engine.target import resolve_target
    from homeagent.environment import BUSY_TIMEOUT
    from homeagent.errors import InvalidArgumentError

    given = resolve_target(server).url
    if given is None:
        raise InvalidArgumentError("the URL of the PostgreSQL server must begin with postgresql://")
    url = given.set(database=f"homeagent_test_{uuid.uuid4().hex}")
    with closing(PostgreSQLEngine(given, busy_timeout=BUSY_TIMEOUT)) as engine:

        def execute(statement: str) -> None:
            # PostgreSQL can't create a database inside a transaction.
            with engine.connect() as connection:
                connection.execution_options(isolation_level="AUTOCOMMIT").execute(text(statement))

        execute(f"CREATE DATABASE {url.database}" + (f" TEMPLATE {template}" if template else ""))
        try:
            yield url
        finally:
            execute(f"DROP DATABASE IF EXISTS {url.database} WITH (FORCE)")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that sets the PostgreSQL server for the test run."""
    parser.getgroup("homeagent").addoption(
        "--homeagent-postgresql",
        metavar="URL",
        help="PostgreSQL server on which homeagent's fixtures create databases; without the option, SQLite files",
    )


@pytest.fixture
def homeagent_clock() -> FakeClock:
    """Clock that begins at `START`, and stands still until the test calls `advance()`."""
    return FakeClock()


@pytest.fixture
def homeagent_options() -> dict[str, Any]:
    """Arguments for each call of `Database.open()`. By default, the fixture returns an empty dictionary."""
    return {}


@pytest.fixture
def homeagent_server(pytestconfig: pytest.Config) -> str | None:
    """URL of the PostgreSQL server, or None for SQLite."""
    server: str | None = pytestconfig.getoption("--homeagent-postgresql")
    return server


@pytest.fixture(scope="session")
def _homeagent_templates(tmp_path_factory: pytest.TempPathFactory) -> Iterator[_Templates]:
    with ExitStack() as closing:
        yield _Templates(tmp_path_factory.mktemp("homeagent"), closing)


@pytest.fixture
def homeagent_factory(
    _homeagent_templates: _Templates,
    homeagent_clock: FakeClock,
    homeagent_options: dict[str, Any],
    homeagent_server: str | None,
) -> Iterator[DatabaseFactory]:
    """Factory that opens further databases. A test can pass arguments of `Database.open`."""
    from homeagent.engine.target import conceal

    options = {"clock": homeagent_clock, "durability": "normal", **homeagent_options}
    factory = DatabaseFactory(_homeagent_templates, options, conceal(homeagent_server))
    yield factory
    factory.close()


@pytest.fixture
def homeagent_database(homeagent_factory: DatabaseFactory) -> Database:
    """Open, empty database with the clock `homeagent_clock`. The plugin closes the database at the end of the test."""
    return homeagent_factory()
