"""The benchmark suite: every row runs, contenders agree, and wrong work is refused. No time is measured here."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests import fork_server
from tests.benchmarks import __main__ as command
from tests.benchmarks import callers, operations, postgresql, processes
from tests.benchmarks.contender import Filled, read_trace
from tests.benchmarks.contenders.by_hand import Sqlite3
from tests.benchmarks.goals import ROWS, Figure, judge
from tests.benchmarks.measuring import QUICK, ROOT, Bench, BenchmarkError, summarize
from tests.benchmarks.operations import BASELINE, CONTENDERS, WORKS, check_answers, installed, opened, replay
from tests.benchmarks.report import PAGE, merge, page
from tests.figures import FIGURES, load, save

TRACED = 160
FILLED = Filled(devices=5, agents=2, sessions=9, keys=5)
RUN = {"date": "2026-01-02", "command": "python", "revision": "abc", "machine": "one", "versions": "all"}

SAME = {
    # Other columns exist only in homeagent, which does not write a device's time again within a minute.
    "devices": "id, role, shared_secret_hash, approved",
    "agents": "id, name, workspace_path, created_at",
    "sessions": "session_id, agent_id, sender_id, channel_id, created_at, last_active_at",
    "nonces": "device_id, nonce, created_at, expires_at",
    "idempotency_keys": "device_id, method, key, json(result), created_at, expires_at",
}


def rows_of(path: Path) -> dict[str, list[Any]]:
    """Return the rows of a closed database, in the columns that all contenders have."""
    with closing(sqlite3.connect(path)) as connection:
        return {
            table: connection.execute(f"SELECT {columns} FROM {table} ORDER BY 1, 2, 3").fetchall()
            for table, columns in SAME.items()
        }


def work_of(name: str, folder: Path, durability: str) -> dict[str, Any]:
    """Let a contender run each operation and part of the trace, and return its answers and final rows."""
    with opened(name, folder, durability, FILLED) as (contender, clock, path):
        answers = {work.row: [work.told(work.call(contender, clock, FILLED, i)) for i in range(4)] for work in WORKS}
        absent = contender.device("nobody"), contender.find_key("d0", "absent"), contender.sessions("nobody", 5)
        answers["absent"] = [bool(each) for each in absent]
        answers["again"] = [contender.consume("d0", "n0-abcdefghijkl"), contender.insert_key("d0", "x0")]
        clock.set(clock.ms + 2 * 86_400_000)
        answers["expired"] = [contender.find_key("d0", "x0")]
        tally = replay(contender, clock, read_trace(TRACED))
    return {"answers": answers, "tally": tally, "rows": rows_of(path)}


@pytest.mark.slow
@pytest.mark.parametrize("durability", operations.DURABILITIES)
def test_contenders_give_the_same_answers(tmp_path: Path, durability: str) -> None:
    """Each contender gives the answers of the hand-written contender, and leaves the same rows."""
    done = {}
    for name in installed():
        folder = tmp_path / name
        folder.mkdir(mode=0o700)
        done[name] = work_of(name, folder, durability)

    assert set(done) >= set(CONTENDERS) - {"apsw"}
    expected = done[BASELINE]
    assert expected["answers"]["again"] == [False, False]
    assert expected["answers"]["absent"] == [False, False, False]
    assert expected["answers"]["expired"] == [None]
    assert expected["tally"]["retries"] > 0
    kept = expected["rows"]
    assert len(kept["nonces"]) == 4 + TRACED
    for name, found in done.items():
        for table, rows in found.pop("rows").items():
            assert rows == kept[table], (name, table)
        assert found == expected, name


def measured(tmp_path: Path, measure: Any, *only: str) -> Bench:
    """Measure with small sizes."""
    bench = Bench(tmp_path, QUICK, installed(), only)
    measure(bench)
    assert {figure.row for figure in bench.figures} <= {row.name for row in ROWS}
    assert all(figure.value > 0 for figure in bench.figures)
    return bench


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[Figure]:
    """The figures of a run with small sizes, without PostgreSQL."""
    figures = []
    for measure in (operations.measure, callers.measure, processes.measure):
        figures += measured(tmp_path_factory.mktemp("bench"), measure).figures
    return figures


@pytest.mark.slow
def test_every_row_is_measured(found: list[Figure]) -> None:
    """Each row has homeagent and a baseline; operations and the trace have all contenders."""
    rows = {row.name for row in ROWS if "PostgreSQL" not in row.name}
    assert {figure.row for figure in found} == rows
    for row in rows:
        contenders = [figure.contender for figure in found if figure.row == row]
        assert "homeagent" in contenders[1:]
    for row in [*(work.row for work in WORKS), operations.TRACE]:
        assert {figure.contender for figure in found if figure.row == row} == set(installed())
    writes = {figure.durability for figure in found if figure.row == "nonce consume"}
    assert writes == set(operations.DURABILITIES)


@pytest.mark.slow
def test_postgresql_rows_are_measured(tmp_path: Path, installation: Any) -> None:
    """The rows of PostgreSQL are measured on a separate server, against psycopg."""
    bench = measured(tmp_path, postgresql.measure)

    assert {figure.row for figure in bench.figures} == {row.name for row in ROWS if "PostgreSQL" in row.name}
    assert {figure.contender for figure in bench.figures} == {"psycopg", "homeagent"}


@pytest.mark.slow
def test_page_is_generated(found: list[Figure]) -> None:
    """The tables replace the text between the markers, and other text stays."""
    content: dict[str, Any] = {"benchmarks": [], "campaigns": {}}
    merge(content, RUN, found)
    before = PAGE.read_text(encoding="utf-8")

    after = page(before, content)

    assert after.partition("<!--")[0] == before.partition("<!--")[0]
    assert after.rpartition("<!--")[2] == before.rpartition("<!--")[2]
    assert "measured on 2026-01-02 at revision abc, by `python`" in after
    for figure in found:
        assert figure.ratio in after or figure.median == 1


def test_page_without_markers_is_refused() -> None:
    """If a page has lost its markers, an error is raised."""
    with pytest.raises(BenchmarkError, match="needs the line"):
        page("text", {"benchmarks": [], "campaigns": {}})


def test_page_shows_the_kept_figures() -> None:
    """The page docs/benchmarks.md equals the page made from docs/figures.json."""
    assert page(PAGE.read_text(encoding="utf-8"), load(FIGURES)) == PAGE.read_text(encoding="utf-8")


def test_figures_of_a_new_run_replace_earlier_ones(tmp_path: Path) -> None:
    """A run of some rows keeps the other rows of earlier runs. The file has the same content after a rewrite."""
    file = tmp_path / "figures.json"
    content = load(file)
    old, new = (Figure("last seen", "full", "homeagent", value, 1, 1, 1) for value in (1.0, 2.0))
    merge(content, RUN, [old, Figure("nonce consume", "full", "homeagent", 3.0, 1, 1, 1)])
    merge(content, {**RUN, "date": "2026-01-03"}, [new])
    save(file, content)

    assert [(run["date"], [each["value"] for each in run["figures"]]) for run in load(file)["benchmarks"]] == [
        ("2026-01-03", [2.0]),
        ("2026-01-02", [3.0]),
    ]
    merge(content, RUN, [old, Figure("nonce consume", "full", "homeagent", 3.0, 1, 1, 1)])
    assert len(content["benchmarks"]) == 1


def test_campaigns_write_their_counts(tmp_path: Path) -> None:
    """Passing tests write their figures to the file in HOMEAGENT_FIGURES: counts are added, times are a range."""
    file, module = tmp_path / "figures.json", tmp_path / "test_campaign.py"
    module.write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('number', [1, 2, 3])\n"
        "def test_it(number, record_property):\n"
        "    record_property('kills', 1000)\n"
        "    record_property('failover', 0.5 * number)\n"
        "    assert number < 3\n"
    )
    save(file, {"benchmarks": [], "campaigns": {"kills": {"result": "1"}, "cuts": {"result": "7"}}})

    fork_server.run_pytest(ROOT, "-p", "tests.conftest", module, HOMEAGENT_FIGURES=str(file))

    campaigns = load(file)["campaigns"]
    assert {name: each["result"] for name, each in campaigns.items()} == {
        "kills": "2,000",
        "failover": "0.5 s to 1 s",
        "cuts": "7",
    }
    assert campaigns["kills"]["command"].startswith("python -m pytest -q")


class Forgetful(Sqlite3):
    """Returns that a nonce was stored, without storing it."""

    def consume(self, device_id: str, nonce: str) -> bool:
        return True


class Idle(Sqlite3):
    """Stores no row, and returns False."""

    def consume(self, device_id: str, nonce: str) -> bool:
        return False


@pytest.mark.parametrize(("kind", "message"), [(Forgetful, "should hold"), (Idle, "did nothing")])
def test_missing_work_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type, message: str) -> None:
    """If a contender does not store its row, the run ends with an error."""
    monkeypatch.setattr("tests.benchmarks.contenders.by_hand.Apsw", kind)
    bench = Bench(tmp_path, QUICK, [BASELINE, "apsw"], ["nonce consume"])

    with pytest.raises(BenchmarkError, match=rf"apsw.*{message}"):
        operations.measure(bench)


@pytest.mark.parametrize("row", [work.row for work in WORKS if not work.writes])
def test_wrong_answer_ends_the_run(tmp_path: Path, row: str) -> None:
    """If a contender returns another row than the baseline, the run ends with an error."""
    work = next(work for work in WORKS if work.row == row)
    with opened(BASELINE, tmp_path, "normal", FILLED) as (contender, clock, _):

        def right(i: int) -> Any:
            return work.call(contender, clock, FILLED, i)

        check_answers(work, {"first": right, "second": right})
        with pytest.raises(BenchmarkError, match=r"second: .* answered"):
            check_answers(work, {"first": right, "second": lambda i: right(i + 1)})


def test_ratios_compare_samples_of_one_round() -> None:
    """Each sample is compared with the baseline's of the same round; median, least and greatest are kept."""
    (baseline, other) = summarize("last seen", "full", {"a": [1.0, 2.0, 4.0], "b": [2.0, 3.0, 16.0]})

    assert (baseline.median, baseline.least, baseline.greatest) == (1, 1, 1)
    assert (other.value, other.median, other.least, other.greatest) == (3, 2, 1.5, 4)


def test_goals_are_judged_at_every_durability() -> None:
    """A goal is met if every median keeps to it; a rate must reach it; a row without figures is not measured."""

    def figure(row: str, durability: str, median: float) -> Figure:
        return Figure(row, durability, "homeagent", 1.0, median, median, median)

    figures = [
        figure("last seen", "full", 1.5),
        figure("last seen", "normal", 1.51),
        figure("nonce consume", "full", 1.2),
        figure("durable commits of 64 threads", "full", 1.79),
    ]
    met = {verdict.row.name: verdict.met for verdict in judge(figures)}

    assert met.pop("last seen") is False
    assert met.pop("nonce consume") is True
    assert met.pop("durable commits of 64 threads") is False
    assert set(met.values()) == {None}


def test_command_measures_and_prints(tmp_path: Path) -> None:
    """The command runs in a separate process, prints a line for each figure, and ends with status 0."""
    program = "import runpy; runpy.run_module('tests.benchmarks', run_name='__main__', alter_sys=True)"
    arguments = ["--quick", "--only", "find an idempotency key, in a unit"]
    done = fork_server.run(program, *arguments, environment={**os.environ, "TMPDIR": str(tmp_path)})

    assert done.returncode == 0, done.stderr
    assert [line.split()[7] for line in done.stdout.splitlines()][:2] == ["sqlite3", "homeagent"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("median", "status"), [(1.5, 0), (1.6, 1)])
def test_exit_status_shows_missed_goals(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], median: float, status: int
) -> None:
    """The command ends with the table of goals, and with status 1 if a goal is missed."""
    made = Figure("last seen", "full", "homeagent", 1.0, median, median, median)
    monkeypatch.setattr(command, "MEASURES", [lambda bench: bench.figures.append(made)])

    assert command.main([]) == status
    assert f"| last seen | `BEGIN IMMEDIATE` transaction | ≤ 1.5 | {median:.2f}" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--only", "no such row"], ["--quick", "--figures", "docs"]])
def test_wrong_usage_is_refused(arguments: list[str]) -> None:
    """If a row does not exist, or tiny sizes would be kept, the command ends with status 2 before a measurement."""
    with pytest.raises(SystemExit) as refused:
        command.main(arguments)
    assert refused.value.code == 2
