"""The application in `docs/examples/hub`: its own tests, and the application in a real server with 100 devices."""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from sqlalchemy import text

from homeagent import Database
from homeagent.handshake.client import authenticate
from tests import fork_server
from tests.conftest import ROOT, pair

EXAMPLE = ROOT / "docs" / "examples" / "hub"
MESSAGES = 5


def test_the_tests_of_the_example(engine_name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """The tests of the example and of docs/how-to/migrate-own-tables.md pass on each engine, in a separate process."""
    page = (ROOT / "docs" / "how-to" / "migrate-own-tables.md").read_text(encoding="utf-8")
    test, environment_of_alembic = re.findall(r"^```py\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "test_page.py").write_text(test)
    assert environment_of_alembic in (EXAMPLE / "hub" / "migrations" / "env.py").read_text(encoding="utf-8")
    arguments = ["-p", "homeagent.testing", "-c", "pyproject.toml", "tests", tmp_path / "test_page.py"]
    if engine_name == "postgresql":
        arguments += ["--homeagent-postgresql", request.getfixturevalue("postgres_url")]
    done = fork_server.run_pytest(EXAMPLE, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 passed" in done.stdout


# With the implementation of WebSockets that uvicorn chooses, websockets warns that the implementation is old.
SERVE = """
import os, sys, warnings
import uvicorn
warnings.simplefilter("default")
os.chdir(sys.argv[1])
uvicorn.main(["--factory", "hub.app:create_app", f"--fd={sys.argv[2]}"])
"""


@pytest.fixture
def port(target: str) -> Iterator[int]:
    """The port of the example, which runs under uvicorn in a separate process."""
    # A client can connect before the server is ready, because the socket listens already.
    with socket.create_server(("127.0.0.1", 0), backlog=200) as listening:
        environment = {**os.environ, "HOMEAGENT_DATABASE": target}
        process = fork_server.Child(SERVE, EXAMPLE, environment=environment, inherited=[listening.fileno()])
        try:
            yield int(listening.getsockname()[1])
            process.terminate()
            output = process.communicate(timeout=30)[1]
            assert "Traceback" not in output, output
            assert "Application shutdown complete" in output, output
        finally:
            process.kill()
            process.communicate()


async def send_messages(connection: Any) -> list[Any]:
    """Send the messages of a device and then the last message again. Return the replies."""
    replies = []
    for number in [*range(MESSAGES), MESSAGES - 1]:
        await connection.send(json.dumps({"key": f"k-{number}", "text": f"message {number}"}))
        replies.append(json.loads(await connection.recv()))
    return replies


async def use(port: int, database: Database, secrets: dict[str, SecretStr]) -> list[list[Any]]:
    """Connect all devices, let them send at the same time, and revoke a device. Return the replies of each device."""
    from websockets.asyncio.client import connect

    async with AsyncExitStack() as stack:

        async def enter(device_id: str) -> Any:
            address = f"ws://127.0.0.1:{port}/ws"
            connection = await stack.enter_async_context(connect(address, proxy=None, open_timeout=60))
            await authenticate(device_id, secrets[device_id], send=connection.send, receive=connection.recv)
            return connection

        connections = await asyncio.gather(*map(enter, secrets))
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
def test_devices_of_a_server(port: int, target: str, devices: int) -> None:
    """The messages of many devices are stored once each. A revocation closes only the connection of its device."""
    pytest.importorskip("websockets")
    with Database.open(target) as database:
        secrets = {name: pair(database, name) for name in (f"device-{number}" for number in range(devices))}
        replies = asyncio.run(asyncio.wait_for(use(port, database, secrets), 100))
        assert all(each[-1] == each[-2] for each in replies)
        ids = {reply["id"] for each in replies for reply in each}
        assert len(ids) == MESSAGES * devices
        with database.read_connection() as connection:
            assert connection.execute(text("SELECT count(*) FROM messages")).scalar() == len(ids) + 1
