"""The benchmarks themselves: that the command works, and that wrong answers are found out. Nothing is measured here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks.contestants import BASELINE, BenchmarkError, choose
from tests.benchmarks.measuring import Plan
from tests.benchmarks.operations import NAMES, measure_operations
from tests.benchmarks.workshop import Workshop
from tests.benchmarks.wrong import WRONG, NothingWritten

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command as a user does."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.benchmarks", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


def measure(directory: Path, work: str, contender: type) -> None:
    """Measure a contender of `wrong` at one piece of work."""
    contestants, _ = choose([f"tests.benchmarks.wrong:{contender.__name__}"])
    plan = Plan(rounds=1, repeats=1, seconds=0.002)
    workshop = Workshop(directory, plan, contestants, 400, (), frozenset([work]), True, lambda text: None)
    measure_operations(workshop)


def test_one_command(tmp_path: Path) -> None:
    """The command measures those who are always there at every piece of work, and writes what it found."""
    ran = run("--quick", "--only", "operations", "--contenders", "homeagent", "--output", str(tmp_path))

    assert ran.returncode == 0, ran.stderr
    results = json.loads((tmp_path / "benchmarks" / "benchmarks.json").read_text(encoding="utf-8"))
    for durability in ("full", "normal"):
        measured = results["operations"]["measured"][durability]
        assert set(measured) == set(NAMES)
        for row in measured.values():
            assert set(row) == {BASELINE, "homeagent"}
            assert row[BASELINE]["ratio"] == 1
            assert 0 < row["homeagent"]["seconds"] < 10


@pytest.mark.parametrize("work", NAMES)
def test_wrong_answers_are_found_out(tmp_path: Path, work: str) -> None:
    """A contender that answers wrongly at a piece of work ends the run, and is named."""
    with pytest.raises(BenchmarkError, match=WRONG[work].__name__):
        measure(tmp_path, work, WRONG[work])


def test_what_was_not_written_is_found_out(tmp_path: Path) -> None:
    """A contender that is right while it is checked, and writes nothing while it is timed, ends the run."""
    with pytest.raises(BenchmarkError, match=NothingWritten.__name__):
        measure(tmp_path, "consume", NothingWritten)


def test_unknown_names() -> None:
    """A work or contender that does not exist is refused in one line."""
    for option in ("--only", "--contenders"):
        ran = run("--quick", option, "nothing")
        assert ran.returncode == 1
        assert ran.stderr.count("\n") == 1
        assert "nothing" in ran.stderr
