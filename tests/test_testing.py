"""The pytest plugin `homeagent.testing`, in this run and in new runs of pytest."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest

from homeagent import AgentCreate
from homeagent.testing import START, DatabaseFactory, FakeClock
from tests.conftest import ROOT
from tests.migrations.own_revisions import write_revision


@pytest.fixture(params=[None, "postgresql"])
def homeagent_server(request: pytest.FixtureRequest) -> str | None:
    return str(request.getfixturevalue("postgres_url")) if request.param else None


def test_each_database_is_fresh(homeagent_factory: DatabaseFactory, homeagent_clock: FakeClock) -> None:
    """Each database of the factory is empty, has the test's clock, and takes further arguments of `Database.open`."""
    first, second = homeagent_factory(), homeagent_factory(busy_timeout=timedelta(seconds=1))
    first.agents.create(AgentCreate(id="ada", name="Ada", workspace_path="/srv"))
    assert (first.status().rows["agents"], second.status().rows["agents"]) == (1, 0)
    assert first.agents.get("ada").created_at == homeagent_clock()
    homeagent_clock.advance(timedelta(days=1))
    assert first.nonces.consume("lamp", "n", expires_at=homeagent_clock() + timedelta(minutes=1))
    assert not first.nonces.consume("lamp", "m", expires_at=homeagent_clock())


def test_advance_takes_one_kind_of_time(homeagent_clock: FakeClock) -> None:
    """A call with a duration and units, or with neither, raises and leaves the clock alone."""
    for duration, units in ((timedelta(days=1), {"minutes": 3}), (None, {})):
        with pytest.raises(TypeError, match="needs a duration, or units"):
            homeagent_clock.advance(duration, **units)
    assert homeagent_clock() == START


@pytest.mark.parametrize("revision", ["a1", "b1"])
def test_relative_path(
    homeagent_factory: DatabaseFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, revision: str
) -> None:
    """The same relative path in another working directory names other migrations."""
    write_revision(tmp_path / "migrations", revision, None, "pass")
    monkeypatch.chdir(tmp_path)
    assert homeagent_factory(migrations="migrations").status().application_revision == revision


def test_a_refused_connection_shows_no_password(tmp_path: Path) -> None:
    """If the server refuses the connection, pytest's report has the error of homeagent, and not the password."""
    (tmp_path / "test_application.py").write_text("def test_it(homeagent_database): ...\n")
    url = "postgresql://nobody:private-word@127.0.0.1:1/x"
    plugin = ["-p", "no:cacheprovider", "-p", "homeagent.testing", "--homeagent-postgresql", url]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-c", os.devnull, "--tb=long", "-l", *plugin, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "ConnectionLostError" in done.stdout, done.stdout + done.stderr
    assert "private-word" not in done.stdout + done.stderr


PAGE = (ROOT / "docs" / "how-to" / "test.md").read_text(encoding="utf-8")

TESTS = """
import sys
import homeagent.testing

import pytest

@pytest.fixture
def homeagent_options():
    return {"durability": "full"}

def test_no_module_is_imported():
    assert {name for name in sys.modules if name.startswith("homeagent")} == {"homeagent", "homeagent.testing"}

def test_the_database_is_empty_and_has_the_options(homeagent_database, homeagent_clock):
    assert homeagent_database.devices.list() == []
    assert homeagent_database.status().pragmas["synchronous"] in (2, "2", "full", "FULL")
"""


@pytest.mark.parametrize(
    ("named", "arguments", "passed"),
    [("", [], 4), ("pytest_plugins = ['homeagent.testing']", ["-p", "homeagent.testing", "-k", "no_module"], 1)],
)
def test_a_new_run_loads_the_plugin_once(tmp_path: Path, named: str, arguments: list[str], passed: int) -> None:
    """The plugin imports no other module of homeagent, and can be named by an entry point and by hand."""
    installed = tmp_path / "installed" / "homeagent-9.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: homeagent-plugin\nVersion: 9\n")
    (installed / "entry_points.txt").write_text("[pytest11]\nhomeagent.testing = homeagent.testing\n")
    (tmp_path / "test_application.py").write_text(TESTS)
    (tmp_path / "conftest.py").write_text(f"{named}\n")
    (block,) = re.findall("^```py\n(.*?)^```$", PAGE, re.M | re.S)
    (tmp_path / "test_page.py").write_text(block)
    path = os.pathsep.join([str(installed.parent), str(ROOT)])
    program = (
        "import sys, pytest; sys.path[:0] = sys.argv[1].split(':');"
        "sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', *sys.argv[2:]]))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, path, *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{passed} passed" in done.stdout
