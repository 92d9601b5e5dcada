"""What one host costs a PostgreSQL server: connections, their memory, and the log that its messages write."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any
from uuid import uuid4

import psutil
from sqlalchemy import make_url

from homeagent import Database
from tests.benchmarks.scaling.stores import Place

__all__ = ["measure_host"]

_EXAMPLE = Path(__file__).parents[3] / "docs" / "examples" / "gateway.py"
_AGENTS, _SENDERS = 7, 500


def measure_host(place: Place, *, messages: int) -> dict[str, Any]:
    """Return the cost of a host whose pool is full, and of its messages.

    A message is what `docs/examples/gateway.py` makes of one: a nonce consumed, then in a second commit the device's
    last-seen time, the session and the stored answer.
    """
    target = place.new_store("postgresql")
    clock = _example.TraceClock()
    with Database.open(target, clock=clock) as database:
        _handle(database, clock, messages // 10)
        connections = _measure_connections(place, target)
        log = _handle_measured(place, target, database, clock, messages)
    file = place.new_store("sqlite")
    with Database.open(file, clock=clock, durability="normal") as database:
        _handle(database, clock, messages)
        assert database.status().rows["nonces"] == messages
    return {
        **connections,
        **log,
        "sqlite_file_bytes_per_message": round(Path(file).stat().st_size / messages, 1),
    }


def _measure_connections(place: Place, target: str) -> dict[str, Any]:
    """Look at a host of its own whose pool is full, and at the server's side of it."""
    before = _clients(place)
    with subprocess.Popen(
        [sys.executable, "-m", "tests.benchmarks.scaling.host_process", target],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as host:
        assert host.stdout is not None
        host.stdout.readline()
        resident = psutil.Process(host.pid).memory_info().rss
        found = _clients(place) - before
        private = [psutil.Process(pid).memory_full_info().uss for pid in found]
        host.communicate()
    return {
        "connections": len(found),
        "server_bytes_per_connection": round(sum(private) / len(private)),
        "client_resident_bytes": resident,
    }


def _clients(place: Place) -> set[int]:
    found = place.server.execute(
        "SELECT pid FROM pg_stat_activity WHERE application_name = 'homeagent' AND backend_type = 'client backend'"
    )
    return {pid for (pid,) in found}


def _handle_measured(place: Place, target: str, database: Database, clock: Any, messages: int) -> dict[str, Any]:
    name = str(make_url(target).database)
    place.server.execute("CHECKPOINT")
    before = _log_position(place)
    sizes = _sizes(place, name)
    rows = database.status().rows
    _handle(database, clock, messages)
    after = _log_position(place)
    grown = {table: (size - sizes[table]) for table, size in _sizes(place, name).items()}
    more = {table: count - rows[table] for table, count in database.status().rows.items()}
    return {
        "messages": messages,
        "wal_bytes_per_message": round((after["bytes"] - before["bytes"]) / messages, 1),
        "wal_full_pages_per_message": round((after["full_pages"] - before["full_pages"]) / messages, 3),
        "disk_bytes_per_row": {table: round(grown[table] / more[table], 1) for table in ("nonces", "idempotency_keys")},
    }


def _log_position(place: Place) -> dict[str, int]:
    place.server.execute("SELECT pg_stat_force_next_flush()")
    ((position,),) = place.server.execute("SELECT pg_current_wal_insert_lsn() - '0/0'::pg_lsn")
    ((pages,),) = place.server.execute("SELECT wal_fpi FROM pg_stat_wal")
    return {"bytes": int(position), "full_pages": int(pages)}


def _sizes(place: Place, name: str) -> dict[str, int]:
    tables = ("nonces", "idempotency_keys", "sessions", "devices")
    (sizes,) = place.server.execute(
        "SELECT " + ", ".join(f"pg_total_relation_size('{table}')" for table in tables), database=name
    )
    return dict(zip(tables, map(int, sizes), strict=True))


# Messages


def _load_example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gateway_example", _EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gateway_example"] = module
    spec.loader.exec_module(module)
    return module


_example = _load_example()


def _handle(database: Database, clock: Any, messages: int) -> None:
    gateway = _example.Gateway(database, clock)
    for event in _events(messages):
        gateway.handle(event)
    assert gateway.tally.replays_refused == 0


def _events(messages: int) -> Iterator[dict[str, object]]:
    # All within a day, so that nothing is swept: this is about what a message writes.
    step = timedelta(hours=20) / messages
    start = 1_767_225_600_000
    for number in range(messages):
        sender = f"sender-{number * 7919 % _SENDERS}"
        yield {
            "at": start + round(number * step / timedelta(milliseconds=1)),
            "device": f"device-{number * 7919 % _SENDERS}",
            "sender": sender,
            "channel": "main",
            "agent": f"agent-{number % _AGENTS}",
            "session": f"{sender}.agent-{number % _AGENTS}",
            "nonce": uuid4().hex,
            "key": uuid4().hex,
        }
