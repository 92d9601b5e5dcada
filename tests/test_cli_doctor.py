"""`homeagent doctor`: its output and its exit status, on which monitoring can rely."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from homeagent import Database, DevicePair, Role
from homeagent.maintenance import Diagnosis
from homeagent.maintenance.doctor import CHECKS
from tests.command_line import invoke


@pytest.fixture
def path(sqlite_path: Path, on_a_disk: None) -> Path:
    """A fresh, migrated file on a file system that the doctor treats as a disk."""
    return sqlite_path


def test_the_status_shows_the_worst_finding(path: Path) -> None:
    """The status is 0 without findings, 1 for warnings and 2 for critical findings; the JSON is the model."""
    statuses = []
    for mode in (0o600, 0o640, 0o666):
        path.chmod(mode)
        done = invoke("--database", path, "doctor", "--json")
        found = Diagnosis.model_validate_json(done.stdout)
        assert (done.exit_code, done.stderr) == (found.exit_status, "")
        # If the temporary directory is in memory, the doctor gives a further warning.
        modes = found.finding("files")
        assert modes is not None
        statuses.append(modes.severity.exit_status)
    assert statuses == [0, 1, 2]


def test_the_text_names_remedies(path: Path) -> None:
    """The text shows each bad finding with its meaning, remedy and command, and ends with their number."""
    with Database.open(path) as database:
        database.pair(DevicePair(id="lamp", role=Role.NODE))
    done = invoke("doctor", "--database", path, env={"COLUMNS": "200"})
    assert done.exit_code == 1
    assert "There are devices and no approved admin." in done.stdout
    assert "It means: devices can be approved or revoked only by a shell" in done.stdout
    assert "What to do: pair a device with the role admin" in done.stdout
    assert "homeagent devices list --role admin" in done.stdout
    assert f"{path}: 1 of " in done.stdout
    assert "lamp" not in done.stdout


def test_fix_reports_repairs(path: Path) -> None:
    """`--fix` repairs, reports each repair, and ends with the remaining findings."""
    path.chmod(0o644)
    done = invoke("doctor", "--fix", "--database", path, env={"COLUMNS": "200"})
    assert done.exit_code == 0
    assert "Repaired, files: gave 'homeagent.db' mode 0600; it had 0644." in done.stdout
    assert "All is well" in done.stdout


@pytest.mark.parametrize("target", [":memory:", "mysql://me:geheim@127.0.0.1/db", ""])
def test_an_invalid_target_ends_with_2(target: str) -> None:
    """If the doctor can't inspect a target, the status is 2 for wrong usage, and no password is shown."""
    done = invoke("--database", target, "doctor", env={"HOMEAGENT_DATABASE": ":memory:"})
    assert done.exit_code == 2
    assert done.stdout == ""
    assert "geheim" not in done.output


def test_every_check_is_documented() -> None:
    """The tables of the documentation list every check, in the order of the doctor's report."""
    page = (Path(__file__).parents[1] / "docs" / "operations.md").read_text(encoding="utf-8")
    section = page.partition("## Doctor")[2].partition("\n## ")[0]
    assert tuple(re.findall(r"^\| `(\w+)` \|", section, flags=re.MULTILINE)) == CHECKS
