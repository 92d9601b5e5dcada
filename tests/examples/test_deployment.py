"""The examples `api.py` and `hub` of docs/examples in uvicorn, gunicorn, a systemd unit and podman."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import psutil
import pytest
from pydantic import SecretStr
from sqlalchemy import text

from homeagent import Database
from homeagent.handshake.client import authenticate
from tests import fork_server
from tests.conftest import ROOT, add_agent, pair

EXAMPLES = ROOT / "docs" / "examples"
CONTAINER = (EXAMPLES / "Containerfile").read_text(encoding="utf-8")
UVICORN = ["-m", "uvicorn", "--factory", "api:create_app", "--workers", "2"]
GUNICORN = ["-m", "gunicorn", "--preload", "--workers", "2", "--worker-class", "uvicorn_worker.UvicornWorker"]

needs_gunicorn = pytest.mark.skipif(find_spec("uvicorn_worker") is None, reason="gunicorn is not installed")

Serve = Callable[..., "Server"]
MESSAGES = 5


class Server(NamedTuple):
    """A running server: the process that starts the workers, and the port on 127.0.0.1."""

    process: subprocess.Popen[str]
    port: int

    def wait(self) -> None:
        """Wait until the health route answers, or raise an error with the output of a server that has ended."""
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=30) as reply:
                    assert json.load(reply) == {"status": "ok"}
                    return
            except OSError:
                assert self.process.poll() is None, self.process.communicate()[0]

    async def connect(self, stack: AsyncExitStack, device_id: str, secret: SecretStr) -> Any:
        """Open a WebSocket as a device, and return the connection."""
        from websockets.asyncio.client import connect

        address = f"ws://127.0.0.1:{self.port}/ws"
        connection = await stack.enter_async_context(connect(address, proxy=None, open_timeout=60))
        await authenticate(device_id, secret, send=connection.send, receive=connection.recv)
        return connection

    def workers(self) -> dict[int, int]:
        """Return the number of accepted connections of each worker process."""
        counts = {}
        for child in psutil.Process(self.process.pid).children():
            connections = [each for each in child.net_connections("tcp") if each.status == psutil.CONN_ESTABLISHED]
            counts[child.pid] = sum(each.laddr.port == self.port for each in connections)
        return counts


@pytest.fixture
def path(sqlite_path: Path) -> Path:
    """A store with the agent of the example API."""
    with Database.open(sqlite_path) as database:
        add_agent(database, "butler")
    return sqlite_path


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Start a server in a directory. The server inherits the listening socket, so a client can connect at once."""
    started: list[tuple[subprocess.Popen[str], socket.socket]] = []

    def start(arguments: list[str], database: Path | str, directory: Path = EXAMPLES) -> Server:
        listening = socket.create_server(("127.0.0.1", 0), backlog=200)
        number = str(listening.fileno())
        bind = ["--bind", f"fd://{number}"] if "gunicorn" in arguments else ["--fd", number]
        search = f"{ROOT}{os.pathsep}{directory}"
        variables = {"HOME": str(tmp_path), "HOMEAGENT_DATABASE": str(database), "PYTHONPATH": search}
        process = subprocess.Popen(
            [sys.executable, *arguments, *bind],
            cwd=directory,
            env={**os.environ, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            pass_fds=[listening.fileno()],
        )
        started.append((process, listening))
        return Server(process, listening.getsockname()[1])

    yield start
    for process, listening in started:
        listening.close()
        process.terminate()
        try:
            process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            raise


async def hold(server: Server, stack: AsyncExitStack, device_id: str, secret: SecretStr) -> list[Any]:
    """Open WebSockets as a device until each of two workers has at least one, and return the connections."""
    connections: list[Any] = []
    before = server.workers()
    while sum(count > before.get(pid, 0) for pid, count in server.workers().items()) < 2:
        connection = await server.connect(stack, device_id, secret)
        connections.append(connection)
        await connection.send("butler")
        assert json.loads(await connection.recv())["sender_id"] == device_id
        assert len(connections) < 100
    return connections


async def revoke_one(server: Server, path: Path, device_id: str) -> float:
    """Revoke a connected device by the command line, and return the seconds until the last connection was closed."""
    with Database.open(path) as database:
        secret = pair(database, device_id)
    async with AsyncExitStack() as stack:
        connections = await hold(server, stack, device_id, secret)

        async def closed(connection: Any) -> float:
            await connection.wait_closed()
            assert connection.close_code == 4403
            return time.time()

        command = ["devices", "revoke", device_id, "--database", str(path)]
        waiting = asyncio.gather(*map(closed, connections))
        done = await asyncio.to_thread(fork_server.run, fork_server.COMMAND, *command)
        assert done.returncode == 0, done.stderr
        times = await asyncio.wait_for(waiting, 30)
    with Database.open(path) as database:
        revoked_at = database.devices.get(device_id).revoked_at
    assert revoked_at is not None
    return max(times) - revoked_at.timestamp()


def test_uvicorn_with_two_workers(serve: Serve, path: Path) -> None:
    """`homeagent devices revoke` closes a device's WebSockets in both workers of uvicorn within 0.5 s.

    The server is that of the container file, whose health check succeeds while the server runs.
    """
    pytest.importorskip("websockets")
    check, command = (json.loads(found) for found in re.findall(r"^(?:.* )?CMD (\[.*\])$", CONTAINER, re.M))
    assert command[: len(UVICORN) + 1] == ["python", *UVICORN]
    server = serve(UVICORN, path)
    server.wait()
    # The best of three attempts, because other processes of the machine can delay each attempt.
    delays: list[float] = []
    while len(delays) < 3 and not any(delay < 0.5 for delay in delays):
        delays.append(asyncio.run(revoke_one(server, path, f"phone-{len(delays)}")))
    assert min(delays) < 0.5, delays
    program = check[2].replace("127.0.0.1:8000", f"127.0.0.1:{server.port}")
    assert program != check[2]
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
    server.process.terminate()
    server.process.communicate(timeout=60)
    assert subprocess.run([sys.executable, "-c", program], capture_output=True).returncode != 0


@pytest.mark.slow
@needs_gunicorn
def test_gunicorn_with_preload(serve: Serve, path: Path) -> None:
    """With `--preload` the application is imported before the fork, and each worker opens the database."""
    server = serve([*GUNICORN, "api:create_app()"], path)
    server.wait()
    with Database.open(path) as database:
        secret = pair(database)

    async def connect_to_both() -> None:
        async with AsyncExitStack() as stack:
            await hold(server, stack, "phone", secret)

    asyncio.run(connect_to_both())


@pytest.mark.slow
@needs_gunicorn
def test_a_database_that_was_opened_before_the_fork(serve: Serve, tmp_path: Path) -> None:
    """If the application opens the database at its import, the workers of gunicorn do not start, and say why."""
    (tmp_path / "early.py").write_text(
        "from fastapi import FastAPI\n"
        "from homeagent import Database\n"
        "from homeagent.fastapi import lifespan\n"
        "app = FastAPI(lifespan=lifespan(Database.open()))\n"
    )
    output, _ = serve([*GUNICORN, "early:app"], tmp_path / "h.db", tmp_path).process.communicate(timeout=60)
    assert "homeagent.errors.DatabaseClosedError" in output
    assert "Worker failed to boot" in output


async def send_messages(connection: Any) -> list[Any]:
    """Send the messages of a device and then the last message again. Return the replies."""
    replies = []
    for number in [*range(MESSAGES), MESSAGES - 1]:
        await connection.send(json.dumps({"key": f"k-{number}", "text": f"message {number}"}))
        replies.append(json.loads(await connection.recv()))
    return replies


async def use_hub(server: Server, database: Database, secrets: dict[str, SecretStr]) -> list[list[Any]]:
    """Connect all devices, let them send at the same time, and revoke a device. Return the replies of each device."""
    async with AsyncExitStack() as stack:
        connections = await asyncio.gather(*(server.connect(stack, *device) for device in secrets.items()))
        replies = await asyncio.gather(*map(send_messages, connections))
        await asyncio.to_thread(database.devices.revoke, "device-0")
        await asyncio.wait_for(connections[0].wait_closed(), 10)
        assert connections[0].close_code == 4403
        await connections[1].send(json.dumps({"key": "later", "text": "still connected"}))
        assert "id" in json.loads(await connections[1].recv())
    return replies


@pytest.mark.parametrize(
    ("engine_name", "devices"),
    [("sqlite", 10), *(pytest.param(engine, 100, marks=pytest.mark.slow) for engine in ("sqlite", "postgresql"))],
)
def test_devices_of_the_hub(serve: Serve, target: str, devices: int) -> None:
    """The messages of many devices are stored once each. A revocation closes only the connection of its device."""
    pytest.importorskip("websockets")
    server = serve(["-m", "uvicorn", "--factory", "hub.app:create_app"], target, EXAMPLES / "hub")
    with Database.open(target) as database:
        secrets = {name: pair(database, name) for name in (f"device-{number}" for number in range(devices))}
        replies = asyncio.run(asyncio.wait_for(use_hub(server, database, secrets), 100))
        assert all(each[-1] == each[-2] for each in replies)
        ids = {reply["id"] for each in replies for reply in each}
        assert len(ids) == MESSAGES * devices
        with database.read_connection() as connection:
            assert connection.execute(text("SELECT count(*) FROM messages")).scalar() == len(ids) + 1
    server.process.terminate()
    output = server.process.communicate(timeout=60)[0]
    assert "Traceback" not in output, output
    assert "Application shutdown complete" in output, output


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_the_systemd_unit(tmp_path: Path) -> None:
    """The command systemd-analyze accepts the unit without a warning, and rates its exposure as low."""
    unit = tmp_path / "homeagent-gateway.service"
    content = (EXAMPLES / unit.name).read_text(encoding="utf-8")
    assert " ".join(UVICORN) in content
    unit.write_text(content.replace("/opt/gateway/.venv/bin/python", sys.executable), encoding="utf-8")
    for options in (["verify"], ["security", "--offline=true", "--threshold=20"]):
        done = subprocess.run(["systemd-analyze", *options, str(unit)], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr


# The image, built and run by podman with the commands in the Containerfile


def run(*command: str, status: int = 0, directory: Path = ROOT) -> str:
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=600)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def container(tmp_path: Path) -> Iterator[str]:
    """The name of a running container. Its image and its volume have the same name."""
    base = re.findall(r"^FROM (\S+)$", CONTAINER, re.MULTILINE)[0]
    if subprocess.run(["podman", "image", "exists", base]).returncode:
        pulled = subprocess.run(["podman", "pull", "--quiet", base], capture_output=True, text=True)
        if pulled.returncode:
            pytest.skip(f"podman can't pull {base}: {pulled.stderr.strip().splitlines()[-1]}")
    name = f"homeagent-test-{uuid4().hex[:8]}"
    run("git", "clone", "--quiet", str(ROOT), str(tmp_path / "checkout"))  # keep the directory `dist` of this checkout
    commands = [shlex.split(line) for line in re.findall(r"^#     (.+)$", CONTAINER, re.MULTILINE)]
    renamed = {"gateway": name, "gateway:/var/lib/gateway/.homeagent": f"{name}:/var/lib/gateway/.homeagent"}
    try:
        for command in commands:
            words = [renamed.get(word, word).replace("127.0.0.1:8000:", "127.0.0.1::") for word in command]
            pip = [sys.executable, "-m"] if words[0] == "pip" else []
            run(*pip, *words, directory=tmp_path / "checkout")
        yield name
    finally:
        for command in (["rm", "--force"], ["volume", "rm", "--force"], ["rmi", "--force"]):
            subprocess.run(["podman", *command, name], capture_output=True)


def wait_until_healthy(container: str) -> None:
    """Run the health check of the image until the check succeeds, at most 300 times."""
    check = ["podman", "healthcheck", "run", container]
    assert any(subprocess.run(check, capture_output=True).returncode == 0 for _ in range(300))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("podman") is None, reason="podman is not installed")
def test_container(container: str) -> None:
    """A kill keeps the devices in a private volume, the process is not root, and a stop ends the server with 0."""
    inside = ("podman", "exec", container)
    wait_until_healthy(container)
    run(*inside, "homeagent", "devices", "pair", "phone", "--role", "node", "--approve")
    run("podman", "kill", "--signal", "KILL", container)
    run("podman", "start", container)
    wait_until_healthy(container)
    (device,) = json.loads(run(*inside, "homeagent", "devices", "list", "--json"))
    assert (device["id"], device["status"]) == ("phone", "approved")
    run(*inside, "homeagent", "backup", "/var/lib/gateway/.homeagent/backups")
    files = run(*inside, "find", "/var/lib/gateway/.homeagent", "-type", "f", "-printf", "%m %U %f\n").splitlines()
    assert {line.rsplit(" ", 1)[0] for line in files} == {"600 1000"}
    assert run(*inside, "id", "-u") == "1000\n"
    run(*inside, "touch", "/srv/gateway/api.py", status=1)
    run("podman", "stop", "--time", "60", container)
    assert run("podman", "inspect", "--format", "{{.State.ExitCode}}", container) == "0\n"
