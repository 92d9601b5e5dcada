"""Batches on purpose: units that wait for the write lock until all units are queued."""

from __future__ import annotations

import asyncio
import functools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest

from homeagent import AgentCreate, Database, UnitOfWork, group_commit
from homeagent.engine.connection import StoreConnection
from homeagent.group_commit import GroupCommit

Work = Callable[[UnitOfWork], Any]


class Odd(BaseException):
    """An exception that is neither an Exception nor raised by Python itself."""


def create(unit: UnitOfWork, agent_id: str) -> str:
    return unit.agents.create(AgentCreate(id=agent_id, name=agent_id, workspace_path="/srv")).id


def creating(agent_id: str) -> Work:
    return functools.partial(create, agent_id=agent_id)


def agents_of(database: Database) -> list[str]:
    with database.unit_of_work(read_only=True) as unit:
        return [agent.id for agent in unit.agents.list()]


def group_commit_of(database: Database) -> GroupCommit:
    group_commit = database._runner._group_commit
    assert group_commit is not None
    return group_commit


def wait_for_calls(database: Database, number: int) -> None:
    """Wait until `count` calls are queued and the first call waits for the write lock."""
    group_commit = group_commit_of(database)
    while group_commit._queue.qsize() + len(database._engine.writers._waiters) < number:
        time.sleep(0.0005)


def outcome_of(act: Callable[[], Any]) -> Any:
    """Return the value of a function, or the error."""
    try:
        return act()
    except BaseException as error:  # noqa: BLE001  for the comparison of outcomes
        return error


def run_together(
    database: Database, works: Sequence[Work], *, coroutines: bool = False, seconds: float = 60
) -> list[Any]:
    """Run functions as the units of a single batch, in order, and return the value or the error of each.

    With the normal limit of time, a batch on a busy machine could end before its last unit.
    """
    outcomes: dict[int, Any] = {}

    async def main() -> None:
        calls = [asyncio.ensure_future(database.arun(work)) for work in works]
        await asyncio.wait(calls)
        outcomes.update((number, outcome_of(call.result)) for number, call in enumerate(calls))

    def call(number: int) -> None:
        outcomes[number] = outcome_of(functools.partial(database.run, works[number]))

    if coroutines:
        threads = [threading.Thread(target=asyncio.run, args=(main(),))]
    else:
        threads = [
            threading.Thread(target=call, args=(number,), name=f"caller {number}") for number in range(len(works))
        ]
    with mock.patch.object(group_commit, "_MAX_BATCH_SECONDS", seconds):
        with database.unit_of_work() as unit:
            unit.rollback()  # so that the block rolls back instead of committing
            for number, thread in enumerate(threads):
                thread.start()
                wait_for_calls(database, len(works) if coroutines else number + 1)
        for thread in threads:
            thread.join(60)
    return [outcomes[number] for number in range(len(works))]


@contextmanager
def counted_commits(monkeypatch: pytest.MonkeyPatch, *faults: BaseException | None) -> Iterator[list[int]]:
    """Count the commits of write units; the first commits fail with the given errors, if any."""
    count = [0]
    coming = iter(faults)
    commit = StoreConnection.commit

    def counting(link: StoreConnection) -> None:
        if not link.read_only:
            count[0] += 1
            fault = next(coming, None)
            if fault is not None:
                raise fault
        commit(link)

    with monkeypatch.context() as patch:
        patch.setattr(StoreConnection, "commit", counting)
        yield count


@contextmanager
def held(database: Database) -> Iterator[None]:
    """Hold the write lock in another thread."""
    entered, done = threading.Event(), threading.Event()

    def hold() -> None:
        with database.unit_of_work():
            entered.set()
            done.wait(60)

    holder = threading.Thread(target=hold, name="the slow one")
    holder.start()
    try:
        assert entered.wait(30)
        yield
    finally:
        done.set()
        holder.join()
