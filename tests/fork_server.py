"""A fork server for the child processes of tests, because a fresh interpreter takes a second to import the package.

The server is a process that has imported the package, has opened no database and has a single thread. Each process of
pytest starts one server at the first request. For each request the server forks a child, and the child runs a program
as `python -W error -c` does: with its own arguments, environment, standard streams and session, and with the ordinary
end of an interpreter. The server is the parent of the child, so the server reports the exit status.

A test of start-up, imports or interpreter options needs a fresh interpreter.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parent.parent

# Read at import, because the test of the first request may have changed the environment
_ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
# What most children import; the package imports some of these modules only when it needs them
_MODULES = (
    "alembic.context",
    "homeagent.cli.commands",
    "homeagent.credentials.hashing",
    "homeagent.fastapi",
    "homeagent.file_names",
    "psycopg",
)
# The child's program runs in the module `__main__` of the server, which defines no names
_SERVE = "exec(__import__('tests.fork_server', fromlist=['serve']).serve())"
COMMAND = "from homeagent.cli import main\nmain()"
"""The program of the command `homeagent`."""

_NUMBER = struct.Struct("i")

# The servers of this process, by the library that is preloaded into the children
_servers: dict[str, tuple[subprocess.Popen[bytes], socket.socket]] = {}


def serve() -> str:
    """Fork a child for each request on descriptor 0. Return in the child, with the child's program."""
    for name in _MODULES:
        importlib.import_module(name)
    gc.freeze()  # else a collection in a child copies the memory of all modules: 0.4 s instead of 0.08 s per child
    statuses: dict[int, int] = {}
    ended, wake_up = socket.socketpair()
    wake_up.setblocking(False)
    with ended, wake_up, socket.socket(fileno=os.dup(0)) as requests:
        signal.set_wakeup_fd(wake_up.fileno())
        signal.signal(signal.SIGCHLD, lambda *_: None)  # without a Python function, no signal writes to `wake_up`
        while True:
            if ended in select.select([ended, requests], [], [])[0]:
                ended.recv(4096)
                _reap(statuses)
                continue
            message, descriptors, *_ = socket.recv_fds(requests, 1, 6)
            if not message:
                return ""  # the process of pytest has ended
            status, request, *streams = descriptors
            pid = os.fork()
            if not pid:
                break
            statuses[pid] = status
            os.write(status, _NUMBER.pack(pid))
            for descriptor in (request, *streams):
                os.close(descriptor)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.set_wakeup_fd(-1)
    with os.fdopen(request) as file:
        program, arguments, environment = json.load(file)
    streams, inherited = streams[:3], streams[3:]
    sys.argv[1:] = [*arguments, *map(str, inherited)]
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    for descriptor in (*streams, status, *statuses.values()):
        os.close(descriptor)
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    return str(program)


def _reap(statuses: dict[int, int]) -> None:
    """Report the status of each child that has ended, by the descriptor of the child."""
    while statuses:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        with os.fdopen(statuses.pop(pid), "wb") as report:
            report.write(_NUMBER.pack(os.waitstatus_to_exitcode(status)))


def _server(preload: str) -> socket.socket:
    """Return the socket of the server that preloads this library, and start the server if necessary."""
    if preload not in _servers:
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-W", "error", "-c", _SERVE]
        environment = _ENVIRONMENT | ({"LD_PRELOAD": preload} if preload else {})
        with theirs:
            # Not the streams of this process: a stream of Python remembers whether its file is seekable or a terminal.
            stream = theirs.fileno()
            server = subprocess.Popen(
                command, stdin=stream, stdout=stream, stderr=stream, cwd=ROOT, env=environment, start_new_session=True
            )
        _servers[preload] = server, ours
    return _servers[preload][1]


def stop() -> None:
    """End the servers of this process. Children that still run are not affected."""
    for server, requests in _servers.values():
        requests.close()
        server.wait()


class Process(subprocess.Popen[str]):
    """A process whose standard streams are pipes."""

    stdin: IO[str]
    stdout: IO[str]
    stderr: IO[str]


class Child(Process):
    """A child of the server, with the methods of `subprocess.Popen`."""

    def __init__(
        self,
        program: str,
        *arguments: object,
        environment: Mapping[str, str] | None = None,
        preload: str = "",
        inherited: Sequence[int] = (),
    ) -> None:
        """Start the child in the root of the checkout, by default with the environment of this process.

        The child inherits at most one descriptor more, whose number in the child is the last argument of the program.
        """
        self.args = program
        self.returncode: Any = None
        self._readers: list[_Reader] = []
        (stdin, input), (output, stdout), (errors, stderr), (self._status, status) = (os.pipe() for _ in range(4))
        with tempfile.TemporaryFile("w+") as request:
            json.dump([program, list(map(str, arguments)), dict(environment or os.environ)], request)
            request.seek(0)
            socket.send_fds(_server(preload), [b"x"], [status, request.fileno(), stdin, stdout, stderr, *inherited])
        for descriptor in (stdin, stdout, stderr, status):
            os.close(descriptor)
        self.stdin, self.stdout, self.stderr = os.fdopen(input, "w"), os.fdopen(output), os.fdopen(errors)
        self.pid = self._number()

    def _number(self) -> int:
        """Return the next number that the server reports."""
        number = os.read(self._status, _NUMBER.size)
        assert number, "the fork server has ended"
        return int(_NUMBER.unpack(number)[0])

    def poll(self) -> int | None:
        """Return the exit status, or None while the child runs."""
        with suppress(subprocess.TimeoutExpired):
            return self.wait(0)
        return None

    def wait(self, timeout: float | None = None) -> int:
        """Wait until the child has ended, and return its exit status."""
        if self.returncode is None:
            ended = select.poll()
            ended.register(self._status)
            if not ended.poll(None if timeout is None else timeout * 1000):
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self.returncode = self._number()
            os.close(self._status)
        return int(self.returncode)

    def communicate(self, input: str | None = None, timeout: float | None = None) -> tuple[str, str]:
        """Write the input, read the output and wait until the child has ended."""
        if not self._readers:
            self._readers = [_Reader(self.stdout), _Reader(self.stderr)]
            with suppress(BrokenPipeError), self.stdin as stdin:
                stdin.write(input or "")
        for reader in self._readers:
            reader.join(timeout)
            if reader.is_alive():
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
        self.wait(timeout)
        return self._readers[0].text, self._readers[1].text


class _Reader(threading.Thread):
    """Reads one stream to its end."""

    def __init__(self, stream: IO[str]) -> None:
        super().__init__(daemon=True)
        self._stream = stream
        self.start()

    def run(self) -> None:
        with self._stream as stream:
            self.text = stream.read()


def run(
    program: str, *arguments: object, input: str | None = None, timeout: float = 120, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run a program in a child to its end, or kill the child after the timeout in seconds."""
    with Child(program, *arguments, **options) as child:
        try:
            output, errors = child.communicate(input, timeout)
        except BaseException:
            child.kill()
            raise
    return subprocess.CompletedProcess(program, child.returncode, output, errors)


_PYTEST = """
import os, sys
import pytest
os.chdir(sys.argv[1])
sys.exit(pytest.main(sys.argv[2:]))
"""


def run_pytest(directory: Path, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run pytest with these arguments in a directory, in a child with further environment variables."""
    # The fork server makes an error of each warning, also of the advice to install httpx2 instead of httpx. The plugins
    # of this environment would take a second of each run.
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", **variables}
    options = ("-q", "-p", "no:cacheprovider", "-W", "default")
    return run(_PYTEST, directory, *options, *arguments, environment=environment)


def run_command(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the command `homeagent` with these arguments in a child."""
    return run(COMMAND, *arguments, **options)
