"""Models that Pydantic builds when they are first used: by several threads at once, and before a fork."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from homeagent import AgentUpdate, Database
from tests.conftest import Children, add_agent

TOGETHER = """
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import homeagent
from pydantic import ValidationError

sys.setswitchinterval(1e-6)
given = {
    "id": "a", "name": "Ada", "workspace_path": "/srv", "role": "client", "shared_secret_hash": "h", "agent_id": "a",
    "approved": True, "status": "approved", "session_id": "s", "nonce": "n", "device_id": "d", "key": "k",
    "method": "m", "result": None,
} | {name: "2026-01-01T00:00:00Z" for name in ("created_at", "expires_at", "paired_at", "last_active_at")}
public = [getattr(homeagent, name) for name in homeagent.__all__]
models = [each for each in public if isinstance(each, type) and issubclass(each, homeagent.models.base.Model)]
threads = 8
for model in models:
    values = {name: given[name] for name in model.model_fields if name in given}
    barrier = Barrier(threads)

    def use(_: int) -> str:
        barrier.wait()
        try:
            model(**values, surplus=1)
        except ValidationError as error:
            (refused,) = error.errors()
            assert refused["loc"] == ("surplus",), refused
        return model(**values).model_dump_json()

    with ThreadPoolExecutor(threads) as pool:
        (dumped,) = set(pool.map(use, range(threads)))
    print(model.__name__, len(dumped) > 2)
"""


def test_threads_that_use_a_model_first_at_once(children: Children) -> None:
    """Each of them validates by that model, whichever builds it."""
    printed = dict(line.split() for line in children.run(TOGETHER).splitlines())
    assert {"Agent", "AgentUpdate", "Device", "DevicePair", "DevicePublic", "Nonce", "IdempotencyKey"} <= set(printed)


def test_an_adapter_of_a_model_is_built_where_it_is_made() -> None:
    """FastAPI makes one for each parameter when it starts: none is left for the first request, or for two at once."""
    assert TypeAdapter(AgentUpdate).pydantic_complete


LOADED = """
import sys
from typing import Any

from homeagent import Database
from pydantic import TypeAdapter

with Database.open(sys.argv[1]) as database, database.unit_of_work(read_only=True) as unit:
    agent = unit.agents.get("ada")
print(TypeAdapter(Any).dump_python({"agent": agent})["agent"]["name"])
"""


def test_an_instance_of_a_model_that_nothing_was_validated_by_is_serialised(tmp_path: Path, children: Children) -> None:
    """A store loads an instance without a validator, and what holds it may be the first that asks for a serialiser."""
    target = tmp_path / "homeagent.db"
    with Database.open(target) as database:
        add_agent(database)
    assert children.run(LOADED, target) == "Ada"


FORKED = """
import os

import homeagent

child = os.fork()
public = [getattr(homeagent, name) for name in homeagent.__all__]
models = [each for each in public if isinstance(each, type) and issubclass(each, homeagent.models.base.Model)]
if child == 0:
    os._exit(not all(model.__pydantic_complete__ for model in models))
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), len(models) > 10)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_forked_child_has_every_model_built(children: Children) -> None:
    """No child waits for the lock under which another thread was building a model at the fork."""
    assert children.run(FORKED) == "0 True"
