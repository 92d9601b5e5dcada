"""`homeagent doctor`: what it prints, how it ends, and that monitoring can rely on it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from homeagent import Database, DevicePair, Role
from homeagent.cli import app
from homeagent.maintenance import Diagnosis
from homeagent.maintenance.doctor import CHECKS, files

runner = CliRunner()


@pytest.fixture
def path(sqlite_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh, migrated file, on what is taken for a disk."""
    monkeypatch.setattr(files, "filesystem_kind", lambda path: "ext4")
    return sqlite_path


def test_a_process_ends_with_what_it_found(path: Path) -> None:
    """0 where all is well, 1 for warnings, 2 for what must not go on; the JSON on standard output is the model."""
    statuses = []
    for mode in (0o600, 0o640, 0o666):
        path.chmod(mode)
        done = subprocess.run(
            [sys.executable, "-m", "homeagent", "--database", path, "doctor", "--json"],
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        found = Diagnosis.model_validate_json(done.stdout)
        assert (done.returncode, done.stderr) == (found.exit_status, "")
        # Where the temporary directory is in memory, that is one more warning.
        modes = found.finding("files")
        assert modes is not None
        statuses.append(modes.severity.exit_status)
    assert statuses == [0, 1, 2]


def test_the_text_says_what_to_do(path: Path) -> None:
    """Each bad finding is told with its meaning, its remedy and its command, and the end counts them."""
    with Database.open(path) as database:
        database.pair(DevicePair(id="lamp", role=Role.NODE))
    done = runner.invoke(app, ["doctor", "--database", str(path)], env={"COLUMNS": "200"})
    assert done.exit_code == 1
    assert "There are devices and no approved admin." in done.stdout
    assert "It means: nobody can approve" in done.stdout
    assert "What to do: pair a device with the role admin" in done.stdout
    assert "homeagent devices list --role admin" in done.stdout
    assert f"{path}: 1 of " in done.stdout
    assert "lamp" not in done.stdout


def test_fix_says_what_it_did(path: Path) -> None:
    """--fix mends, says so, and ends with what is left."""
    path.chmod(0o644)
    done = runner.invoke(app, ["doctor", "--fix", "--database", str(path)], env={"COLUMNS": "200"})
    assert done.exit_code == 0
    assert "Repaired, files: gave 'homeagent.db' mode 0600; it had 0644." in done.stdout
    assert "All is well" in done.stdout


def test_a_missing_database_is_a_finding(tmp_path: Path) -> None:
    """Nothing is made, and the JSON says what is wrong."""
    done = runner.invoke(app, ["--database", str(tmp_path / "store" / "h.db"), "doctor", "--json", "--fix"])
    assert done.exit_code == 2
    findings = {finding["check"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert findings["database"]["severity"] == "critical"
    assert findings["database"]["command"].startswith("homeagent init ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", [":memory:", "mysql://me:geheim@127.0.0.1/db", ""])
def test_a_target_of_no_use_ends_with_2(target: str) -> None:
    """What can't be looked at is wrong usage, and no flaw of a database; no password is shown."""
    done = runner.invoke(app, ["--database", target, "doctor"], env={"HOMEAGENT_DATABASE": ":memory:"})
    assert done.exit_code == 2
    assert done.stdout == ""
    assert "geheim" not in done.output


def test_every_check_is_documented() -> None:
    """The tables of the documentation name every check, in the order in which the doctor tells them."""
    page = (Path(__file__).parents[1] / "docs" / "operations.md").read_text(encoding="utf-8")
    section = page.partition("## Doctor")[2].partition("\n## ")[0]
    assert tuple(re.findall(r"^\| `(\w+)` \|", section, flags=re.MULTILINE)) == CHECKS
