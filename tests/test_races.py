"""Races among real threads and real processes: no row is lost, and exactly a single caller wins."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest

from homeagent import AgentCreate, AgentSessionCreate, Database, DeviceStatus, Role
from homeagent.errors import AgentNotFoundError, ApprovalChangedError, DeviceNotApprovedError, LastAdminError
from homeagent.models.session import route_key
from tests.conftest import Children, add_agent, add_device, dump

READY = """
import sys
from datetime import UTC, datetime, timedelta
from homeagent import AgentCreate, AgentUpdate, Database
database = Database.open(sys.argv[1])
with database.unit_of_work(read_only=True) as unit:
    unit.agents.list()
print("ready", flush=True)
sys.stdin.readline()
"""

COUNT = (
    READY
    + """
for _ in range(int(sys.argv[2])):
    def add(unit):
        count = unit.agents.get("ada").config
        unit.agents.update("ada", AgentUpdate(config=count + 1))
    database.run(add)
database.close()
"""
)

# Starting a process takes a second, so the same processes run all races.
ONE_WINNER = (
    READY
    + """
from homeagent import errors
until = datetime.now(UTC) + timedelta(hours=1)
me = sys.argv[2]
print(database.run(lambda unit: unit.nonces.consume("lamp", "n", expires_at=until)))
print(database.run(lambda unit: unit.sessions.resolve(agent_id="ada", sender_id="s").session_id))
try:
    database.run(lambda unit: unit.devices.revoke(f"admin{me}"))
    print("revoked")
except errors.LastAdminError:
    print("last")
database.close()
"""
)


PROCESSES = pytest.mark.parametrize("processes", [4, pytest.param(8, marks=pytest.mark.slow)])


@PROCESSES
def test_read_then_write_from_processes_loses_nothing(target: str, children: Children, processes: int) -> None:
    """If processes each increment a row 100 times, the total is exactly 100 times their number."""
    with Database.open(target) as database:
        database.agents.create(AgentCreate(id="ada", name="Ada", workspace_path="/srv", config=0))
    children.together(COUNT, [(target, 100)] * processes)
    with Database.open(target) as database:
        assert database.agents.get("ada").config == 100 * processes


@PROCESSES
def test_processes_have_one_winner(target: str, children: Children, processes: int) -> None:
    """If several processes race, each nonce and session has a single winner, and an admin stays."""
    with Database.open(target) as database:
        add_agent(database)
        for number in range(processes):
            add_device(database, f"admin{number}", role=Role.ADMIN, approved=True)
    answers = [answer.splitlines() for answer in children.together(ONE_WINNER, [(target, n) for n in range(processes)])]
    consumed, sessions, admins = zip(*answers, strict=True)
    assert sorted(consumed) == ["False"] * (processes - 1) + ["True"]
    assert len(set(sessions)) == 1
    assert sorted(admins) == ["last"] + ["revoked"] * (processes - 1)
    with Database.open(target) as database:
        assert len(dump(database)["sessions"]) == 1
        assert len(database.devices.list(approved=True)) == 1


def at_once(count: int, work: Callable[[int], object]) -> list[object]:
    """Run `work` in so many threads that start together, and return the results and errors."""
    barrier = threading.Barrier(count)

    def run(number: int) -> object:
        barrier.wait(30)
        try:
            return work(number)
        except (AgentNotFoundError, ApprovalChangedError, DeviceNotApprovedError, LastAdminError) as error:
            return type(error)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


@pytest.mark.parametrize("act", ["revoke", "delete"])
def test_two_admins_who_remove_each_other(database: Database, act: str) -> None:
    """If two admins are removed at the same moment, one admin stays, in every round."""
    for attempt in range(5):
        pair = [f"{attempt}-x", f"{attempt}-y"]
        for device_id in pair:
            add_device(database, device_id, role=Role.ADMIN, approved=True)

        def remove(number: int, pair: list[str] = pair) -> object:
            with database.unit_of_work() as unit:
                return getattr(unit.devices, act)(pair[number])

        assert sorted(map(str, at_once(2, remove))) == sorted([str(LastAdminError), "True"])
        (left,) = database.devices.list(role=Role.ADMIN, approved=True)
        assert left.id in pair
        database.devices.delete(left.id, force=True)


@pytest.mark.parametrize("approved", [False, True], ids=["pending", "approved"])
def test_a_revocation_outlasts_concurrent_approvals_and_rotations(database: Database, approved: bool) -> None:
    """After a revocation among concurrent approvals and rotations, the device is revoked and has a single secret."""
    for attempt in range(5):
        device_id = f"lamp-{attempt}"
        add_device(database, device_id, approved=approved)

        def act(number: int, device_id: str = device_id) -> object:
            if number == 0:
                return database.run(lambda unit: unit.devices.revoke(device_id, reason="stolen"))
            if number % 2:
                return database.run(lambda unit: unit.devices.approve(device_id, expected_role=Role.CLIENT))
            return bool(database.rotate_secret(device_id, overlap=timedelta(minutes=1)))

        assert at_once(7, act)[0] is True
        device = database.devices.get(device_id)
        assert (device.status, device.previous_secret_hash) == (DeviceStatus.REVOKED, None)


def test_a_session_of_an_agent_that_is_being_deleted(database: Database) -> None:
    """If a session is made while its agent is deleted, the session is deleted or refused."""
    for number in range(5):
        agent_id = f"agent-{number}"
        add_agent(database, agent_id)

        def act(number: int, agent_id: str = agent_id) -> object:
            if number == 0:
                return database.agents.delete(agent_id, delete_sessions=True)
            for _ in range(3):
                database.sessions.create(AgentSessionCreate(agent_id=agent_id))
            return None

        deleted, *created = at_once(5, act)
        assert deleted is True
        assert set(created) <= {None, AgentNotFoundError}
        assert database.agents.find_by_id(agent_id) is None
        assert database.sessions.list(agent_id=agent_id) == []


CONVERSATIONS = (
    READY
    + """
import random
from homeagent import errors
chance = random.Random(sys.argv[2])
routes = [dict(agent_id=agent, sender_id=sender) for agent in ("ada", "bob") for sender in ("ann", None)]
taken = 0
for _ in range(int(sys.argv[3])):
    route = chance.choice(routes)
    act = chance.choice(["resolve", "start", "move"])
    if act == "move":
        pages = database.sessions.list(limit=20)
        try:
            moved = database.sessions.move(chance.choice(pages).session_id, **route)
            assert (moved.agent_id, moved.sender_id) == tuple(route.values()) and moved.route_key
        except errors.RouteTakenError as error:
            assert database.sessions.find_by_id(error.session_id)
            taken += 1
    else:
        found = getattr(database.sessions, act)(**route)
        assert (found.agent_id, found.sender_id) == tuple(route.values()) and found.route_key
print(taken)
database.close()
"""
)


@pytest.mark.parametrize(("processes", "calls"), [(4, 25), pytest.param(8, 200, marks=pytest.mark.slow)])
def test_a_route_has_one_holder(target: str, children: Children, processes: int, calls: int) -> None:
    """If processes resolve, start and move sessions at once, each snapshot shows at most one holder of each route."""
    with Database.open(target) as database:
        for agent_id in ("ada", "bob"):
            add_agent(database, agent_id)
            database.sessions.resolve(agent_id=agent_id)
        ended = threading.Event()
        seen: list[int] = []

        def watch() -> None:
            while not ended.wait(0.01):
                holders = [row for row in database.sessions.list(limit=100_000) if row.route_key]
                assert len({(row.agent_id, row.sender_id) for row in holders}) == len(holders)
                assert all(row.route_key == route_key(row.agent_id, row.sender_id, None) for row in holders)
                seen.append(len(holders))

        with ThreadPoolExecutor(1) as pool:
            watcher = pool.submit(watch)
            try:
                taken = children.together(CONVERSATIONS, [(target, number, calls) for number in range(processes)])
            finally:
                ended.set()
            watcher.result()
        assert seen
        assert sum(map(int, taken)) > 0
        for agent_id in ("ada", "bob"):
            assert database.sessions.resolve(agent_id=agent_id).agent_id == agent_id
        findings = {finding.check: finding.severity for finding in database.doctor().findings}
        assert findings["routes"] == "ok"
