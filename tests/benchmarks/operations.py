"""The rows with every contender: single operations, and the recorded trace."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tests.benchmarks.contender import START, Clock, Contender, Event, Filled, read_trace
from tests.benchmarks.contenders import by_hand, homeagent_
from tests.benchmarks.contenders.by_hand import COLUMNS
from tests.benchmarks.measuring import Bench, BenchmarkError, Call

DURABILITIES = ("full", "normal")
BASELINE = "sqlite3"
MINUTE = 60_000

CONTENDERS = {
    BASELINE: "by_hand:Sqlite3",
    "homeagent": "homeagent_:HomeAgent",
    "apsw": "by_hand:Apsw",
    "SQLAlchemy Core": "sqlalchemy_core:SQLAlchemyCore",
    "SQLAlchemy ORM": "mapped:SQLAlchemyORM",
    "SQLModel": "mapped:SQLModelTutorial",
}


def installed() -> list[str]:
    """Return the names of the contenders whose libraries are installed."""
    return [name for name in CONTENDERS if name != "apsw" or find_spec("apsw") is not None]


@contextmanager
def opened(name: str, folder: Path, durability: str, filled: Filled) -> Iterator[tuple[Contender, Clock, Path]]:
    """Fill a new database for a contender, and open it a minute later on the contender's clock."""
    module, _, kind = CONTENDERS[name].partition(":")
    path, clock = folder / "gateway.db", Clock(START + MINUTE)
    (homeagent_ if module == "homeagent_" else by_hand).fill(path, filled)
    contender = getattr(import_module(f"tests.benchmarks.contenders.{module}"), kind)(path, durability, clock)
    try:
        yield contender, clock, path
    finally:
        contender.close()


def field(kind: str, row: Any, name: str) -> Any:
    """Return a column of a contender's row, with JSON decoded."""
    value = row[COLUMNS[kind].index(name)] if isinstance(row, tuple) else getattr(row, name, None)
    return json.loads(value) if name == "result" and isinstance(value, str) else value


@dataclass(frozen=True)
class Work:
    """One operation.

    Attributes:
        row: the row's name.
        call: function that runs the operation, with a new number in each call.
        told: function that converts an answer into a form that is the same for all contenders.
        writes: whether the operation is measured at both durabilities.
        table: the table to which each call adds a row; empty if no row is added.
    """

    row: str
    call: Callable[[Contender, Clock, Filled, int], Any]
    told: Callable[[Any], Any] = bool
    writes: bool = False
    table: str = ""


def _seen(contender: Contender, clock: Clock, filled: Filled, i: int) -> bool:
    device = i % filled.devices
    if not device:
        # Move the clock, because homeagent does not write `last_seen_at` again within a minute.
        clock.set(clock.ms + 2 * MINUTE)
    return contender.seen(f"d{device}")


def _key(filled: Filled, i: int) -> tuple[str, str]:
    number = i % filled.keys
    return f"d{number % filled.devices}", f"k{number}"


WORKS = (
    Work(
        "find a device by id, in a unit",
        lambda contender, clock, filled, i: contender.device(f"d{i % filled.devices}"),
        lambda row: field("device", row, "id"),
    ),
    Work(
        "find an idempotency key, in a unit",
        lambda contender, clock, filled, i: contender.find_key(*_key(filled, i)),
        lambda row: (field("key", row, "key"), field("key", row, "result")),
    ),
    Work(
        "list 50 sessions of an agent, in a unit",
        lambda contender, clock, filled, i: contender.sessions(f"a{i % filled.agents}", 50),
        lambda rows: [field("session", row, "session_id") for row in rows],
    ),
    Work(
        "nonce consume",
        lambda contender, clock, filled, i: contender.consume(f"d{i % filled.devices}", f"n{i}-abcdefghijkl"),
        writes=True,
        table="nonces",
    ),
    Work(
        "idempotency insert",
        lambda contender, clock, filled, i: contender.insert_key(f"d{i % filled.devices}", f"x{i}"),
        writes=True,
        table="idempotency_keys",
    ),
    Work("last seen", _seen, writes=True),
)


def count_rows(path: Path) -> dict[str, int]:
    """Return how many nonces and idempotency keys a closed database holds."""
    with closing(sqlite3.connect(path)) as connection:
        return {
            table: connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
            for table in ("nonces", "idempotency_keys")
        }


def measure(bench: Bench) -> None:
    """Measure the operations and the trace at both durabilities; measure reads once."""
    for durability in DURABILITIES:
        works = [work for work in WORKS if work.writes or durability == "full"]
        if bench.wants(*(work.row for work in works), *ONE_CALL):
            _operations(bench, durability, works)
        if bench.wants(TRACE):
            _trace(bench, durability)


def _operations(bench: Bench, durability: str, works: list[Work]) -> None:
    filled = bench.sizes.filled
    wrote = {name: {"nonces": 0, "idempotency_keys": filled.keys} for name in bench.contenders}
    paths = {}
    with ExitStack() as stack:
        contenders: dict[str, tuple[Contender, Clock]] = {}
        for name in bench.contenders:
            contender, clock, paths[name] = stack.enter_context(opened(name, bench.folder(), durability, filled))
            contenders[name] = contender, clock
        for work in works:
            calls = {name: _call(work, *found, filled) for name, found in contenders.items()}
            if not work.writes and bench.wants(work.row):
                check_answers(work, calls)
            done = bench.compare(work.row, durability if work.writes else "", calls)
            for name, count in done.items() if work.table else ():
                wrote[name][work.table] += count
        if durability == "full":
            _one_call(bench, contenders)
    for name, path in paths.items():
        if (found := count_rows(path)) != wrote[name]:
            raise BenchmarkError(f"{name}, {durability}: holds {found}, and should hold {wrote[name]}")


def _call(work: Work, contender: Contender, clock: Clock, filled: Filled) -> Call:
    call = work.call
    return lambda i: call(contender, clock, filled, i)


def check_answers(work: Work, calls: Mapping[str, Call]) -> None:
    """Raise BenchmarkError unless all contenders give the same answer as the first contender."""
    answers = {name: [work.told(call(i)) for i in range(3)] for name, call in calls.items()}
    expected = next(iter(answers.values()))
    for name, answer in answers.items():
        if answer != expected:
            raise BenchmarkError(f"{name}: {work.row}: answered {answer}, and should answer {expected}")


ONE_CALL = ("find a device by id, one call", "find an idempotency key, one call")


def _one_call(bench: Bench, contenders: Mapping[str, tuple[Contender, Clock]]) -> None:
    """Measure homeagent's calls without a unit."""
    if "homeagent" not in contenders:
        return
    database: Any = getattr(contenders["homeagent"][0], "database", None)
    filled, (first, _) = bench.sizes.filled, contenders[BASELINE]
    calls: tuple[Mapping[str, Call], ...] = (
        {
            BASELINE: lambda i: first.device(f"d{i % filled.devices}"),
            "homeagent": lambda i: database.devices.find_by_id(f"d{i % filled.devices}"),
        },
        {
            BASELINE: lambda i: first.find_key(*_key(filled, i)),
            "homeagent": lambda i: database.idempotency_keys.find(homeagent_.scope(*_key(filled, i))),
        },
    )
    for row, each in zip(ONE_CALL, calls, strict=True):
        bench.compare(row, "", each)


TRACE = "events of the trace per second"


def replay(contender: Contender, clock: Clock, events: list[Event]) -> dict[str, int]:
    """Process the events at their own times, and return the numbers of replays and of retries."""
    tally = {"replays": 0, "retries": 0}
    for event in events:
        clock.set(event["at"])
        if not contender.consume(event["device"], event["nonce"]):
            tally["replays"] += 1
        elif contender.answer(event):
            tally["retries"] += 1
    return tally


def _trace(bench: Bench, durability: str) -> None:
    events = read_trace(bench.sizes.events)
    empty = Filled(devices=0, agents=0, sessions=0, keys=0)
    rates: dict[str, list[float]] = {name: [] for name in bench.contenders}
    made: dict[str, Any] = {}
    for _ in range(bench.sizes.few_rounds):
        for name in bench.contenders:
            with opened(name, bench.folder(), durability, empty) as (contender, clock, path):
                start = time.perf_counter()
                tally = replay(contender, clock, events)
                rates[name].append(len(events) / (time.perf_counter() - start))
            made[name] = tally, count_rows(path)
            if made[name] != made[BASELINE]:
                raise BenchmarkError(f"{name}, {durability}: {TRACE}: made {made[name]}, not {made[BASELINE]}")
    bench.add(TRACE, durability, rates)
