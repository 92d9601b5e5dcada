"""The benchmarks themselves: that the command works, and that wrong answers are found out. Nothing is measured here."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from tests.benchmarks import __main__ as command
from tests.benchmarks.callers import RUN, compared
from tests.benchmarks.contestants import BASELINE, BenchmarkError, choose
from tests.benchmarks.goals import judge
from tests.benchmarks.layers import COLD, COLD_BASELINE, DURABILITY, LAYERS, LINK, UNIT, WORKS
from tests.benchmarks.machine import told_command
from tests.benchmarks.measuring import Plan
from tests.benchmarks.operations import NAMES, measure_operations
from tests.benchmarks.page import write_page
from tests.benchmarks.progress import Progress
from tests.benchmarks.report import grids
from tests.benchmarks.results import failures, join_results, read_results
from tests.benchmarks.trace import TraceContest
from tests.benchmarks.workshop import Workshop
from tests.benchmarks.wrong import WRONG, NothingWritten

ROOT = Path(__file__).parents[2]

Measure = Any
"""What `MEASURES` holds."""


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
    plan = Plan(rounds=1, repeats=1, pairs=1, seconds=0.002, peer_seconds=0.002)
    directory = tmp_path_factory.mktemp("workshop")
    return Workshop(directory, plan, (), 400, (), frozenset(), True, lambda text: None, lambda text: None)


def measure(workshop: Workshop, work: str, contender: type) -> dict[str, Any]:
    """Measure a contender of `wrong` at one piece of work, and return its row and the baseline's, at `full`."""
    contestants, _ = choose([f"tests.benchmarks.wrong:{contender.__name__}"])
    results = measure_operations(replace(workshop, contestants=contestants, only=frozenset([work])))
    row: dict[str, Any] = results["measured"]["full"][work]
    return row


def page_of(directory: Path) -> str:
    """Return the page that a run wrote."""
    return (directory / "benchmarks.md").read_text(encoding="utf-8")


def figures_of(directory: Path) -> dict[str, Any]:
    """Return the figures that a run wrote."""
    found = read_results(command.figures_in(directory))
    assert found is not None
    return found


def test_one_command(tmp_path: Path) -> None:
    """The command measures those who are always there at every piece of work, and writes what it found."""
    ran = run("--quick", "--only", "operations", "--contenders", "homeagent", "--output", str(tmp_path))

    assert ran.returncode == 0, ran.stderr
    results = figures_of(tmp_path)
    for durability in ("full", "normal"):
        measured = results["operations"]["measured"][durability]
        assert set(measured) == set(NAMES)
        for row in measured.values():
            assert set(row) == {BASELINE, "homeagent"}
            assert row[BASELINE]["ratio"] == 1
            assert 0 < row["homeagent"]["seconds"] < 10
    page = page_of(tmp_path)
    assert "## Goals" in page
    told = f"python -m tests.benchmarks --quick --only operations --contenders homeagent --output {tmp_path.name}"
    assert page.replace("\n", " ").count(f"`{told}`") == 2
    assert str(tmp_path) not in page + json.dumps(results)
    for picture in re.findall(r"!\[.+?\]\((.+?)\)", page):
        assert ElementTree.parse(tmp_path / picture).getroot().tag.endswith("svg")  # noqa: S314  it was just drawn
    assert "operations (1 of 1; then nothing): filling" in ran.stderr


def test_layers(tmp_path: Path) -> None:
    """Each layer answers as the whole does, and the page has a line for each piece of work."""
    ran = run("--quick", "--only", "layers", "--output", str(tmp_path))

    assert ran.returncode == 0, ran.stderr
    (measured,) = figures_of(tmp_path)["layers"]["measured"].values()
    assert set(measured) == set(WORKS)
    assert all(figures["seconds"] > 0 for row in measured.values() for figures in row.values())
    assert all(set(row) == {layer.name for layer in LAYERS} for row in measured.values())
    titles = figures_of(tmp_path)["layers"]["titles"].values()
    assert all(f"| {title} |" in page_of(tmp_path) for title in titles)


def test_a_layer_is_the_difference_of_neighbours() -> None:
    """What a layer adds is told as the median difference of the samples that were taken side by side."""
    samples = {
        BASELINE: [10e-6, 20e-6, 30e-6],
        LINK: [11e-6, 22e-6, 31e-6],
        UNIT: [14e-6, 25e-6, 34e-6],
        "homeagent": [14e-6, 29.5e-6, 34.5e-6],
        COLD_BASELINE: [50e-6, 60e-6, 70e-6],
        COLD: [57e-6, 69e-6, 78e-6],
    }
    row = {name: {"seconds": seconds[1], "samples": {"seconds": seconds}} for name, seconds in samples.items()}
    failed = {**row, LINK: {"failed": "WrongAnswer"}}
    measured = {DURABILITY: {"device": row, "seen": failed}}

    (_, grid) = grids({"layers": {"titles": {"device": "one", "seen": "two"}, "measured": measured}})

    assert grid.rows == [["one", "20.0", "1.0", "3.0", "0.5", "4.5", "8.0"]]


@pytest.mark.parametrize("work", NAMES)
def test_wrong_answers_are_found_out(workshop: Workshop, work: str) -> None:
    """A contender that answers wrongly at a piece of work has no figure there, and the baseline keeps its own."""
    row = measure(workshop, work, WRONG[work])

    assert row.pop(BASELINE)["seconds"] > 0
    assert row == {f"tests.benchmarks.wrong:{WRONG[work].__name__}": {"failed": "WrongAnswer"}}


def test_what_was_not_written_is_found_out(workshop: Workshop) -> None:
    """A contender that is right while it is checked, and writes nothing while it is timed, has no figure."""
    row = measure(workshop, "consume", NothingWritten)

    assert row["tests.benchmarks.wrong:NothingWritten"] == {"failed": "WrongAnswer"}


def test_a_failing_contender_stops_nobody(tmp_path: Path) -> None:
    """One that raises and one that dies are told with what they did, all others are measured, and the status is 1."""
    broken, dying = "tests.benchmarks.wrong:Broken", "tests.benchmarks.wrong:Dying"
    works = "find_key,agent_sessions"
    ran = run("--quick", "--only", works, "--contenders", f"{broken},{dying}", "--output", str(tmp_path))

    assert ran.returncode == 1
    assert "ZeroDivisionError: integer division" in ran.stderr
    for measured in figures_of(tmp_path)["operations"]["measured"].values():
        assert measured["find_key"].pop(broken) == {"failed": "ZeroDivisionError"}
        assert measured["agent_sessions"].pop(dying) == {"failed": "exit status 3"}
        assert all(figures["seconds"] > 0 for row in measured.values() for figures in row.values())
        assert [list(row) for row in measured.values()] == [[BASELINE, dying], [BASELINE, broken]]
    page = page_of(tmp_path)
    assert f"- {broken} at idempotency find, full: ZeroDivisionError" in page
    assert f"|  | {dying} | failed: exit status 3 |" in page


def test_a_slow_contender_lives_the_first_part_of_the_trace(workshop: Workshop) -> None:
    """A peer that would take too long is compared with the baseline's time for the events that it came to."""
    contestants, _ = choose(["homeagent", "SQLAlchemy Core"])
    contest = TraceContest(
        contestants, "normal", lambda each: str(workshop.fresh(0)), print, print, events=50, seconds=0.0
    )

    contest.measure_round(0)

    summary = contest.summary()
    assert (summary["SQLAlchemy Core"]["events"], summary["SQLAlchemy Core"]["of_events"]) == (1, 50)
    assert (summary["homeagent"]["events"], summary[BASELINE]["events"], summary[BASELINE]["ratio"]) == (50, 50, 1)


def section(run: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return a section of a file, measured to its end."""
    told = {
        "date": "2026-01-02 03:04 UTC",
        "version": "0.1.0",
        "command": "python",
        "rounds": 1,
        "seconds": 60,
        "busy": [0.02, 0.5],
    }
    return {"run": {**told, "skipped": {}, "complete": True, **(run or {})}, "alembic_imported": False}


def kept(monkeypatch: pytest.MonkeyPatch, workshop: Workshop, output: Path, measure: Measure) -> command.Run:
    """Return a run that has measured one section so, into a file that may hold sections already."""
    monkeypatch.setitem(command.MEASURES, "startup", measure)
    present = {"machine": {"system": "one"}, "quick": True, "versions": {BASELINE: "1"}}
    results = join_results(read_results(command.figures_in(output)), present, output)
    ran = command.Run(results, "python anew", output, {})
    ran.measure("startup", workshop, Progress(["startup"]))
    return ran


def test_what_was_measured_outlives_the_run(
    monkeypatch: pytest.MonkeyPatch, workshop: Workshop, tmp_path: Path
) -> None:
    """A run that is ended leaves what it kept, said to be a part; a later one adds to it, and replaces the part."""

    def interrupted(workshop: Workshop) -> dict[str, Any]:
        workshop.keep({"alembic_imported": True})
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kept(monkeypatch, workshop, tmp_path, interrupted)
    left = figures_of(tmp_path)
    assert left["startup"]["alembic_imported"]
    assert not left["startup"]["run"]["complete"]
    write_page(left, tmp_path)
    assert "It was ended before its end" in page_of(tmp_path)

    kept(monkeypatch, workshop, tmp_path, lambda workshop: {"alembic_imported": False})
    left = figures_of(tmp_path)
    assert not left["startup"]["alembic_imported"]
    assert left["startup"]["run"]["complete"]

    with pytest.raises(KeyboardInterrupt):
        kept(monkeypatch, workshop, tmp_path, interrupted)
    assert figures_of(tmp_path) == left


def test_a_run_that_is_ended_leaves_a_page(tmp_path: Path) -> None:
    """A signal that ends a run ends it with what was measured on the page, and nothing left behind."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    arguments = ["--quick", "--only", "sweeping,startup", "--contenders", "homeagent", "--output", str(tmp_path)]
    with subprocess.Popen(
        [sys.executable, "-m", "tests.benchmarks", *arguments],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(scratch)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        # The second section begins: the first one is whole.
        begun = next(line for line in process.stderr if "startup (2 of 2; then nothing)" in line)
        process.terminate()
        _, errors = process.communicate(timeout=60)

    assert begun
    assert process.returncode == 1
    assert "--missing goes on" in errors
    assert set(figures_of(tmp_path)) >= {"sweeping"}
    assert "## A writer beside a sweep" in page_of(tmp_path)
    assert list(scratch.iterdir()) == []


def test_a_section_that_fails_stops_no_other(
    monkeypatch: pytest.MonkeyPatch, workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its error's class is told on the page and its text on standard error, and what was whole before stays."""

    def failing(workshop: Workshop) -> dict[str, Any]:
        raise BenchmarkError("no server in /somewhere")

    ran = kept(monkeypatch, workshop, tmp_path, failing)
    assert ran.failed
    assert "no server in /somewhere" in capsys.readouterr().err
    assert failures(figures_of(tmp_path)) == {"startup": "BenchmarkError"}
    write_page(figures_of(tmp_path), tmp_path)
    assert "It failed before its end: BenchmarkError" in page_of(tmp_path)
    assert "somewhere" not in page_of(tmp_path)

    kept(monkeypatch, workshop, tmp_path, lambda workshop: {"alembic_imported": False})
    assert kept(monkeypatch, workshop, tmp_path, failing).failed
    assert failures(figures_of(tmp_path)) == {}


def test_each_section_tells_its_own_run(tmp_path: Path) -> None:
    """Figures of several runs stand on one page, each under its command, date, revision and load."""
    runs = {
        "startup": section({"command": "python one", "revision": "abc1234", "changed": False}),
        "scale": section({"command": "python two", "revision": "def5678", "changed": True, "busy": [None]}),
    }
    write_page({"machine": {}, "quick": False, "versions": {}, **runs}, tmp_path)

    page = page_of(tmp_path)
    assert "- `python two`\n- `python one`\n" in page
    assert "not all of the same state" in page
    assert "homeagent 0.1.0, at revision abc1234, in 1 round and 1.0 minutes, by `python one`" in page.replace(
        "\n", " "
    )
    assert "others used before and after it: 2% and 50%." in page.replace("\n", " ")
    assert "That is not quiet" in page
    assert "at revision def5678 with changes that are not committed" in page.replace("\n", " ")


@pytest.mark.parametrize("other", [{"machine": {"system": "two"}}, {"quick": False}, {"versions": {BASELINE: "2"}}])
def test_runs_of_another_kind_are_not_joined(other: dict[str, Any]) -> None:
    """Figures of another machine, other sizes or another version of a contender are refused before any is measured."""
    present = {"machine": {"system": "one"}, "quick": True, "versions": {BASELINE: "1"}}
    earlier = {**present, "startup": section()}

    assert join_results(earlier, present, Path("figures"))["startup"] == section()
    with pytest.raises(BenchmarkError, match="name another --output"):
        join_results(earlier, {**present, **other}, Path("figures"))


def test_a_command_names_no_place_of_this_machine() -> None:
    """Absolute paths are told by their last part; all else is told as it was given."""
    told = told_command("tests.benchmarks", ["--output=/srv/a/docs", "--only", "a b", "/srv/x", "--rounds", "5"])

    assert told == "python -m tests.benchmarks --output=docs --only 'a b' x --rounds 5"


def ratio(value: float) -> dict[str, float]:
    """Return a ratio with samples on both sides of it."""
    return {"ratio": value, "ratio_min": value - 0.5, "ratio_max": value + 0.5}


def test_a_goal_is_missed_where_one_median_is() -> None:
    """A goal is met where every median keeps to it, missed where one doesn't, and neither where none was measured."""
    measured = {
        durability: {work: {"homeagent": ratio(1.0)} for work in ("device", "find_key", "seen")}
        for durability in ("full", "normal")
    }
    measured["normal"]["seen"]["homeagent"] = ratio(1.16)
    results = {
        "operations": {"measured": measured},
        "callers": {"compared": {compared(64, RUN): ratio(2.49)}},
    }

    verdicts = {verdict.goal.work: verdict for verdict in judge(results)}

    device = verdicts["device by id, a model instance against bare rows"]
    assert device.verdict() == "met"
    assert device.measured() == "1.00 [0.50–1.50] (full), 1.00 [0.50–1.50] (normal)"
    assert verdicts["last-seen write, one unit"].verdict() == "not met"
    threads = "durable commits a second, 64 threads through `run`, against one commit per caller"
    assert verdicts[threads].verdict() == "not met"
    assert verdicts["nonce consume, one unit"].verdict() == "not measured"


def test_unknown_names() -> None:
    """A work or contender that does not exist is refused in one line."""
    for option in ("--only", "--contenders"):
        ran = run("--quick", option, "nothing")
        assert ran.returncode == 1
        assert ran.stderr.count("\n") == 1
        assert "nothing" in ran.stderr
