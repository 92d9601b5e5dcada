"""A web service that places orders, with kills and restarts, and clients that retry after every failure."""

from __future__ import annotations

import http.client
import json
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest

from tests.conftest import START, Children, RecordProperty
from tests.fork_server import Process

# Each start sets the service's clock an hour ahead of the previous start, so that old leases have expired.
SERVICE = """
import json, os, socket, sys
from datetime import datetime, timedelta
from pathlib import Path
import uvicorn
from anyio.lowlevel import checkpoint
from homeagent import Database, IdempotencyScope
from homeagent.errors import EffectNotStartedError, IdempotencyInProgressError

path, ledger, now = sys.argv[1:]
now = datetime.fromisoformat(now)
database = Database.open(path, clock=lambda: now)
descriptor = os.open(ledger, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

async def call(order):
    async def place(attempt):
        await checkpoint()
        os.write(descriptor, f"{attempt.downstream_key} {order}\\n".encode())
        await checkpoint()
        return {"order": order}

    async def find_out(attempt):
        if any(line.startswith(attempt.downstream_key) for line in Path(ledger).read_text().splitlines()):
            return {"order": order}
        raise EffectNotStartedError

    scope = IdempotencyScope("till", "orders.create", f"order-{order}")
    outcome = await database.arun_once(
        scope, place, params={"order": order}, ttl=timedelta(days=365), on_abandoned=find_out
    )
    return outcome.value

async def app(scope, receive, send):
    message = await receive()
    try:
        status, body = 200, await call(json.loads(message["body"])["order"])
    except IdempotencyInProgressError:
        status, body = 409, None
    except EffectNotStartedError:
        status, body = 503, None
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": json.dumps(body).encode()})

listener = socket.socket()
listener.bind(("127.0.0.1", 0))
listener.listen(256)
print(listener.getsockname()[1], flush=True)
config = uvicorn.Config(app, http="h11", ws="none", lifespan="off", log_level="critical")
uvicorn.Server(config).run(sockets=[listener])
"""


class Service:
    """The service, which a test can kill and restart on another port."""

    def __init__(self, children: Children, path: str, ledger: Path) -> None:
        self._children = children
        self._paths = (path, ledger)
        self._life = 0
        self._process: Process | None = None
        self.port = 0
        self.up = threading.Event()

    def restart(self) -> None:
        """Kill the running process, and start the next process."""
        self.up.clear()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        now = START + timedelta(hours=self._life)
        self._process = self._children.start(SERVICE, *self._paths, now.isoformat())
        self._life += 1
        line = self._process.stdout.readline()
        assert line, self._process.communicate()[1]
        self.port = int(line)
        self.up.set()

    def place(self, order: int) -> Counter[int]:
        """Place an order, retry until an answer arrives, and return the number of each status, with 0 for no answer."""
        statuses: Counter[int] = Counter()
        while True:
            assert self.up.wait(60)
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
            try:
                connection.request("POST", "/", json.dumps({"order": order}))
                response = connection.getresponse()
                body = response.read()
                statuses[response.status] += 1
            except (OSError, http.client.HTTPException):
                statuses[0] += 1
                continue
            finally:
                connection.close()
            if response.status == 200:
                assert json.loads(body) == {"order": order}
                return statuses
            assert response.status in {409, 503}, body


@pytest.mark.parametrize(
    ("clients", "kills"), [(16, 1), pytest.param(64, 20, marks=pytest.mark.slow)], ids=["16 clients", "64 clients"]
)
def test_orders(
    clients: int, kills: int, target: str, tmp_path: Path, children: Children, record_property: RecordProperty
) -> None:
    """If two clients send each order and the service is killed meanwhile, the service places each order once."""
    ledger = tmp_path / "ledger"
    service = Service(children, target, ledger)
    service.restart()
    each = 10 * (kills + 1) // 2
    answered = threading.Semaphore(0)
    statuses: Counter[int] = Counter()

    def client(number: int) -> Counter[int]:
        seen: Counter[int] = Counter()
        for turn in range(each):
            seen += service.place(number // 2 * each + turn)
            answered.release()
        return seen

    with ThreadPoolExecutor(clients) as pool:
        running = [pool.submit(client, number) for number in range(clients)]
        for _ in range(kills):
            for _ in range(clients * each // (kills + 1)):
                assert answered.acquire(timeout=60)
            service.restart()
        for one in running:
            statuses += one.result()
    orders = [int(line.split()[1]) for line in ledger.read_text().splitlines()]
    assert sorted(orders) == list(range(clients // 2 * each))
    assert statuses[200] == clients * each
    # Some kills must interrupt requests, or the test would prove too little.
    assert statuses[0] > 0
    record_property("orders sent twice to a service that was killed", clients // 2 * each)
