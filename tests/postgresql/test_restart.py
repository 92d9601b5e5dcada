"""A server that is restarted under load. PostgreSQL only: for SQLite see the tests of killed processes."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Children
from tests.postgresql.server import Installation, Server, free_port

pytestmark = pytest.mark.usefixtures("postgres_url")

RESTARTS = 10
BUSY = 20.0
"""The load's busy_timeout, in seconds: a restart is much shorter."""

# Each unit writes two rows that belong together. At the end the process prints the acknowledged and the unknown units.
LOAD = """
import json, sys, threading, time
from datetime import timedelta
from homeagent import AgentCreate, Database, IdempotencyScope, errors

database = Database.open(sys.argv[1], busy_timeout=timedelta(seconds=float(sys.argv[3])))
stop = threading.Event()
report = {"acknowledged": [], "unknown": [], "effects": [], "lost": 0, "longest": 0.0, "errors": []}

def pair(unit, name):
    for half in "ab":
        unit.agents.create(AgentCreate(id=name + half, name="n", workspace_path="/p"))

def timed(work):
    began = time.monotonic()
    try:
        work()
    finally:
        report["longest"] = max(report["longest"], time.monotonic() - began)

def load(thread):
    number = 0
    while not stop.is_set():
        number += 1
        name = f"{sys.argv[2]}-{thread}-{number}-"
        try:
            if thread == 0:
                timed(lambda: database.run(lambda unit: pair(unit, name)))
                report["acknowledged"].append(name)
            elif thread == 1:
                def block():
                    with database.unit_of_work() as unit:
                        pair(unit, name)
                timed(block)
                report["acknowledged"].append(name)
            else:
                effects = []
                timed(lambda: database.run_once(IdempotencyScope("lamp", "on", name), effects.append))
                assert effects, name
                report["effects"].append(name)
        except errors.CommitUnknownError:
            report["unknown"].append(name)
        except (errors.ConnectionLostError, errors.DatabaseBusyError) as error:
            # A block is not done again by itself.
            if thread != 1:
                report["errors"].append(repr(error))
            report["lost"] += 1
            time.sleep(0.01)
        except Exception as error:
            report["errors"].append(repr(error))

threads = [threading.Thread(target=load, args=(number,)) for number in range(3)]
for thread in threads:
    thread.start()
print("ready", flush=True)
sys.stdin.readline()
stop.set()
for thread in threads:
    thread.join()
print(json.dumps(report))
"""


@pytest.fixture
def own_server(installation: Installation, public_directory: Path) -> Iterator[Server]:
    """A separate server, which the test can restart."""
    server = Server(installation, public_directory / "server", port=free_port())
    server.create({"fsync": "off", "shared_buffers": "16MB"})
    server.start()
    yield server
    if server.is_running:
        server.stop("immediate")


@pytest.mark.slow
def test_server_restarts_under_load(own_server: Server, children: Children) -> None:
    """After ten restarts, half of them without a shutdown, no caller hangs, and no unit is lost or incomplete."""
    processes = [children.start(LOAD, own_server.url(), name, BUSY) for name in "pqrs"]
    for process in processes:
        assert process.stdout.readline() == "ready\n", process.communicate()[1]
    for number in range(RESTARTS):
        time.sleep(0.7)  # wait for the load
        own_server.restart("fast" if number % 2 else "immediate")
    time.sleep(0.5)
    reports = []
    for process in processes:
        process.stdin.write("stop\n")
        process.stdin.flush()
        reports.append(json.loads(children.finish(process)))
    ids = {row[0] for row in own_server.execute("SELECT id FROM agents")}
    pairs = {name[:-1] for name in ids}
    assert [error for report in reports for error in report["errors"]] == []
    assert len(ids) == 2 * len(pairs), "a unit is half there"
    acknowledged = {name for report in reports for name in report["acknowledged"]}
    unknown = {name for report in reports for name in report["unknown"]}
    assert acknowledged <= pairs
    # A stored pair without an acknowledgement is one of the unknown commits.
    assert pairs - acknowledged <= unknown
    effects = {name for report in reports for name in report["effects"]}
    states = own_server.execute("SELECT key, state, attempt FROM idempotency_keys")
    assert {key for key, state, _ in states if state == "completed"} >= effects
    assert {attempt for _, _, attempt in states} == {1}
    assert max(report["longest"] for report in reports) < BUSY
    assert sum(report["lost"] for report in reports) > 0, "the restarts met no load"
