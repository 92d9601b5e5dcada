"""Rows that need separate processes: competing writers, the start after a kill, and the start of a program."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

from homeagent import AgentCreate, Database
from tests.benchmarks.contender import Filled
from tests.benchmarks.contenders import by_hand, homeagent_
from tests.benchmarks.measuring import ROOT, Bench, BenchmarkError, percentile
from tests.benchmarks.operations import BASELINE

EIGHT = "p99 of a write among 8 writing processes"
KILLED = "open a database with a WAL of 16 MB, after kill -9"
START = "import homeagent and open"

EMPTY = Filled(devices=0, agents=0, sessions=0, keys=0)
OPEN = (
    "import sys; from homeagent import Database; Database.open(sys.argv[1]).close();"
    " sys.exit('alembic' in sys.modules and 'Alembic was imported')"
)


def measure(bench: Bench) -> None:
    """Measure each row of the report."""
    for row, measured in ((EIGHT, _eight), (KILLED, _killed), (START, _start)):
        if bench.wants(row):
            measured(bench)


def _write_by_hand(path: str, number: int, seconds: float) -> list[float]:
    """Write for some seconds as one of several processes, and return the duration of each write."""
    waits: list[float] = []
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA synchronous = full")
        connection.execute("PRAGMA busy_timeout = 0")
        end = time.perf_counter() + seconds
        while (start := time.perf_counter()) < end:
            while True:
                try:
                    connection.execute("BEGIN IMMEDIATE")
                    break
                except sqlite3.OperationalError:
                    time.sleep(random.uniform(0.001, 0.005))
            connection.execute(by_hand.CONSUME, (f"d{number}", f"{number}-{len(waits)}", 1, 2))
            connection.execute("COMMIT")
            waits.append(time.perf_counter() - start)
    return waits


def _write_with_homeagent(path: str, number: int, seconds: float) -> list[float]:
    """Write as `_write_by_hand` does, but with homeagent."""
    waits: list[float] = []
    until = datetime.now(UTC) + timedelta(hours=1)
    with Database.open(path) as database:
        end = time.perf_counter() + seconds
        while (start := time.perf_counter()) < end:
            device_id = f"d{number}-{len(waits) // 4_000}"
            with database.unit_of_work() as uow:
                uow.nonces.consume(device_id, f"{number}-{len(waits)}", expires_at=until)
            waits.append(time.perf_counter() - start)
    return waits


def _leave_a_wal(path: str, number: int, size: float) -> list[float]:
    """Write until the WAL has this many bytes, and end without a close."""
    database = Database.open(path)
    # While a snapshot is read, no checkpoint starts the WAL again from its beginning.
    with database.unit_of_work(read_only=True) as reader:
        reader.agents.list()
        while Path(f"{path}-wal").stat().st_size < size:
            with database.unit_of_work() as uow:
                for _ in range(200):
                    number += 1
                    uow.agents.create(AgentCreate(id=f"a{number}", name="x" * 200, workspace_path="/srv/agent"))
        os.kill(os.getpid(), signal.SIGKILL)
    return []


CHILDREN = {each.__name__: each for each in (_write_by_hand, _write_with_homeagent, _leave_a_wal)}


def _child(kind: str, path: Path, number: int, size: float) -> subprocess.Popen[str]:
    """Start a process that runs one of `CHILDREN` and prints its result."""
    command = [sys.executable, "-m", "tests.benchmarks.processes", kind, str(path), str(number), str(size)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def _eight(bench: Bench) -> None:
    sizes = bench.sizes
    kinds = {BASELINE: (by_hand.fill, "_write_by_hand"), "homeagent": (homeagent_.fill, "_write_with_homeagent")}
    times: dict[str, list[float]] = {name: [] for name in kinds}
    paths = {}
    for name, (fill, _) in kinds.items():
        paths[name] = bench.folder() / "gateway.db"
        fill(paths[name], EMPTY)
    for _ in range(sizes.few_rounds):
        for name, (_, kind) in kinds.items():
            children = [_child(kind, paths[name], number, sizes.writing) for number in range(sizes.processes)]
            printed = [child.communicate()[0] for child in children]
            if any(child.returncode for child in children):
                raise BenchmarkError(f"{name}: {EIGHT}: a writer failed, see above")
            times[name].append(percentile([wait for text in printed for wait in json.loads(text)], 0.99))
        for path in paths.values():
            # Delete the nonces, because the next round uses the same nonces again.
            with closing(sqlite3.connect(path)) as connection, connection:
                connection.execute("DELETE FROM nonces")
    bench.add(EIGHT, "full", times)


def _killed(bench: Bench) -> None:
    source = bench.folder()
    homeagent_.fill(source / "gateway.db", EMPTY)
    child = _child("_leave_a_wal", source / "gateway.db", 0, bench.sizes.wal)
    child.communicate()
    if child.returncode != -signal.SIGKILL:
        raise BenchmarkError(f"{KILLED}: the process was not killed, but ended with {child.returncode}")

    def with_sqlite3(path: Path) -> None:
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("SELECT count(*) FROM agents").fetchone()

    def with_homeagent(path: Path) -> None:
        Database.open(path).close()

    times: dict[str, list[float]] = {BASELINE: [], "homeagent": []}
    ways = (with_sqlite3, with_homeagent)
    for _ in range(bench.sizes.rounds):
        for name, way in zip(times, ways, strict=True):
            folder = bench.folder()
            for file in source.glob("gateway.db*"):
                shutil.copy2(file, folder / file.name)
            start = time.perf_counter()
            way(folder / "gateway.db")
            times[name].append(time.perf_counter() - start)
            shutil.rmtree(folder)
    bench.add(KILLED, "", times)


def _start(bench: Bench) -> None:
    path = bench.folder() / "gateway.db"
    homeagent_.fill(path, EMPTY)
    # An installed package has bytecode files. A checkout must be allowed to write them.
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(bench.folder())}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    programs = {"import sqlmodel": "import sqlmodel", "homeagent": OPEN}
    times: dict[str, list[float]] = {name: [] for name in programs}
    for turn in range(bench.sizes.rounds + 1):
        for name, program in programs.items():
            start = time.perf_counter()
            command = [sys.executable, "-c", program, str(path)]
            if subprocess.run(command, cwd=ROOT, env=environment).returncode:
                raise BenchmarkError(f"{name}: {START}: the program failed, see above")
            # Leave out the first turn, in which Python writes the bytecode.
            if turn:
                times[name].append(time.perf_counter() - start)
    bench.add(START, "", times)


if __name__ == "__main__":
    kind, path, number, size = sys.argv[1:]
    sys.stdout.write(json.dumps(CHILDREN[kind](path, int(number), float(size))))
