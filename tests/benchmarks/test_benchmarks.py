"""The benchmarks themselves: that the command works, and that wrong answers are found out. Nothing is measured here."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from tests.benchmarks.callers import RUN, UNITS
from tests.benchmarks.contestants import BASELINE, BenchmarkError, choose
from tests.benchmarks.goals import judge
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


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """Room for the smallest of measurements, whose databases are filled once."""
    plan = Plan(rounds=1, repeats=1, seconds=0.002)
    return Workshop(tmp_path_factory.mktemp("workshop"), plan, (), 400, (), frozenset(), True, lambda text: None)


def measure(workshop: Workshop, work: str, contender: type) -> None:
    """Measure a contender of `wrong` at one piece of work."""
    contestants, _ = choose([f"tests.benchmarks.wrong:{contender.__name__}"])
    measure_operations(replace(workshop, contestants=contestants, only=frozenset([work])))


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
    page = (tmp_path / "benchmarks.md").read_text(encoding="utf-8")
    assert "## Goals" in page
    for picture in re.findall(r"!\[.+?\]\((.+?)\)", page):
        assert ElementTree.parse(tmp_path / picture).getroot().tag.endswith("svg")  # noqa: S314  it was just drawn


@pytest.mark.parametrize("work", NAMES)
def test_wrong_answers_are_found_out(workshop: Workshop, work: str) -> None:
    """A contender that answers wrongly at a piece of work ends the run, and is named."""
    with pytest.raises(BenchmarkError, match=WRONG[work].__name__):
        measure(workshop, work, WRONG[work])


def test_what_was_not_written_is_found_out(workshop: Workshop) -> None:
    """A contender that is right while it is checked, and writes nothing while it is timed, ends the run."""
    with pytest.raises(BenchmarkError, match=NothingWritten.__name__):
        measure(workshop, "consume", NothingWritten)


def test_a_goal_is_missed_where_one_value_is() -> None:
    """A goal is met where every value keeps to it, missed where one doesn't, and neither where nothing was measured."""
    measured = {work: {"homeagent": {"ratio": 1.0}} for work in ("device", "find_key", "seen")}
    results: dict[str, Any] = {"operations": {"measured": {"full": measured, "normal": deepcopy(measured)}}}
    results["operations"]["measured"]["normal"]["seen"]["homeagent"]["ratio"] = 1.16
    results["callers"] = {"measured": {way: {"64": {"rate": rate}} for way, rate in ((RUN, 249), (UNITS, 100))}}

    verdicts = {verdict.goal.work: verdict.verdict() for verdict in judge(results)}

    assert verdicts["device by id, a model instance against bare rows"] == "met"
    assert verdicts["last-seen write, one unit"] == "not met"
    assert verdicts["durable commits a second, 64 threads through `run`, against one commit per caller"] == "not met"
    assert verdicts["nonce consume, one unit"] == "not measured"


def test_unknown_names() -> None:
    """A work or contender that does not exist is refused in one line."""
    for option in ("--only", "--contenders"):
        ran = run("--quick", option, "nothing")
        assert ran.returncode == 1
        assert ran.stderr.count("\n") == 1
        assert "nothing" in ran.stderr
