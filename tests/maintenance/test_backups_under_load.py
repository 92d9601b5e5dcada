"""Backups while four processes write: each backup is a committed state, and each backup ends.

SQLite only, as backups are.
"""

from __future__ import annotations

import threading
from datetime import timedelta
from pathlib import Path
from typing import IO

import pytest

from homeagent import Database
from tests.conftest import Children, RecordProperty
from tests.maintenance import load

ROUNDS = 50


def last_line(stream: IO[str], told: dict[int, int], writer: int) -> None:
    """Remember the last count that a writer printed."""
    for line in stream:
        if line.strip().isdigit():
            told[writer] = int(line)


@pytest.mark.slow
def test_backups_under_load(
    sqlite_path: Path, tmp_path: Path, children: Children, record_property: RecordProperty
) -> None:
    """Fifty backups while four processes write: each is valid, complete and newer than the previous one."""
    with Database.open(sqlite_path, busy_timeout=timedelta(seconds=60)) as database:
        load.begin(database)
        told: dict[int, int] = {}
        writers = [children.start(load.SCRIPT, sqlite_path, number) for number in range(load.WRITERS)]
        threads = []
        for number, writer in enumerate(writers):
            assert writer.stdout.readline() == "ready\n"
            threads.append(threading.Thread(target=last_line, args=(writer.stdout, told, number), daemon=True))
            threads[-1].start()
        ledgers = []
        for number in range(ROUNDS):
            durable = dict(told)
            backup = database.backup(tmp_path / f"{number}.db")
            ledger, counts = load.look(backup)
            # A backup contains each commit that a writer reported before the backup began.
            assert all(counts[writer] >= count for writer, count in durable.items())
            ledgers.append(ledger)
        for writer in writers:
            writer.stdin.write("\n")
            writer.stdin.flush()
        for writer in writers:
            writer.wait(60)
            assert writer.returncode == 0, writer.stderr.read() if writer.stderr else ""
        for thread in threads:
            thread.join(60)
        assert ledgers == sorted(ledgers)
        # The writers never stopped: between most backups the state has changed.
        assert len(set(ledgers)) > ROUNDS // 2
        database.backup(tmp_path / "last.db")
    assert load.look(tmp_path / "last.db")[1] == told
    record_property("backups under load, each of which was valid and complete", ROUNDS)
