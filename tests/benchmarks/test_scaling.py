"""The measurements behind docs/scaling.md, in a size that shows that they work."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from homeagent import Database
from tests.benchmarks.contestants import BenchmarkError
from tests.benchmarks.progress import Progress
from tests.benchmarks.scaling import __main__ as command
from tests.benchmarks.scaling import moving
from tests.benchmarks.scaling.tables import TABLES, tell

ROOT = Path(__file__).parents[2]

RUN = {
    "command": "python",
    "version": "0.1.0",
    "date": "2026-01-02 03:04 UTC",
    "seconds": 5,
    "revision": "abc1234",
    "changed": False,
}
MACHINE = {
    "system": "Linux",
    "processors": 2,
    "python": "3.11",
    "sqlite": "3.53",
    "postgresql": "18",
    "synchronous_commit": "on",
    "shared_buffers": "128MB",
}
HOST = {
    "connections": 20,
    "server_bytes_per_connection": 2**20,
    "client_resident_bytes": 2**20,
    "wal_bytes_per_message": 2000,
    "disk_bytes_per_row": {"nonces": 1, "idempotency_keys": 2},
    "sqlite_file_bytes_per_message": 3,
}


def options(output: Path | None) -> argparse.Namespace:
    """Return what the command is told."""
    return command.parse(["--quick", *(["--output", str(output)] if output else [])])


@pytest.mark.parametrize(("busy", "warned"), [([0.01, 0.02], False), ([0.01, 0.5], True), ([None, None], False)])
def test_a_busy_machine_is_told_where_it_was_busy(busy: list[float | None], warned: bool) -> None:
    """The page warns where others used the processors, and only there; each table has its run."""
    results = {"machine": MACHINE, "runs": {"host": {**RUN, "busy": busy}}, "host": HOST}

    told = tell(results)

    assert set(told) == {"machine", "host"}
    assert ("busy with other work at host" in told["machine"]) == warned
    assert "| host | 2026-01-02 03:04 UTC | `0.1.0, abc1234` | 5 s |" in told["machine"]
    assert "not recorded: operations, writers, copies, partitions, outgrown." in told["machine"]


def test_a_part_that_fails_leaves_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A failed part is told by the status, and neither an earlier figure of it nor that of another part is lost."""
    results: dict[str, Any] = {"machine": MACHINE, "quick": True, "runs": {"host": {**RUN, "busy": []}}, "host": HOST}

    def failing(place: object) -> dict[str, Any]:
        raise OSError("no room")

    progress = Progress(["host", "copies"])
    assert not command._measure("host", failing, None, results, {"command": "python"}, progress)
    assert command._measure("copies", lambda place: {"rows": 1}, None, results, {"command": "python"}, progress)
    assert (results["host"], results["copies"]) == (HOST, {"rows": 1})
    assert results["runs"]["host"]["seconds"] == 5
    assert "host failed: no room" in capsys.readouterr().err

    output = tmp_path / "scaling.json"
    output.write_text(json.dumps(results), encoding="utf-8")
    assert command._begin(options(output), MACHINE) == results
    with pytest.raises(BenchmarkError, match="another machine"):
        command._begin(options(output), {**MACHINE, "processors": 4})


@pytest.mark.slow
@pytest.mark.postgresql
def test_every_section_is_measured_and_told(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    """One command measures all and prints a table for each; and what the page says of replays is what was seen."""
    output, page = tmp_path / "scaling.json", tmp_path / "scaling.md"
    shutil.copy(ROOT / "docs" / "scaling.md", page)
    arguments = [sys.executable, "-W", "error", "-m", "tests.benchmarks.scaling", "--quick"]
    arguments += ["--output", str(output), "--page", str(page)]
    programs = pytestconfig.getoption("--postgresql-bin")
    if programs is not None:
        arguments += ["--postgresql-bin", programs]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text(encoding="utf-8"))
    assert set(found) == {*TABLES, "machine", "quick", "runs"}
    assert set(found["runs"]) == set(TABLES)
    assert done.stdout.count("\n| --- |") == len(TABLES) + 1
    tables = re.findall(
        r"<!-- measured: (\w+) -->\n(.*?)\n<!-- end -->", page.read_text(encoding="utf-8"), flags=re.DOTALL
    )
    assert {name for name, _ in tables} == {*TABLES, "machine"}
    assert all(table in done.stdout for _, table in tables)
    assert found["host"]["connections"] == 20
    assert all(figure["rows"] > 2000 for by_size in found["copies"].values() for figure in by_size.values())
    for title, scheme in found["partitions"].items():
        assert not scheme["same_message_let_in"], title
        # Parted by time, the key holds the time: only the same message is recognised, not the same nonce.
        assert scheme["same_nonce_in_another_message_let_in"] == ("by time" in title), title
        assert scheme["expiry"]["rows"] == 1000
        assert (scheme["expiry"]["bytes_given_back"] > 0) == ("by time" in title), title


def test_the_memory_of_a_copy_is_its_own(tmp_path: Path) -> None:
    """What the process that starts a copy has in its memory is not told as the copy's."""
    source, target = tmp_path / "source.db", tmp_path / "target.db"
    Database.open(source).close()
    Database.open(target).close()
    kept = bytes(range(256)) * 2**20

    figures = moving._copy(str(source), str(target))

    assert 16 * 2**20 < figures["peak_bytes"] < len(kept)
