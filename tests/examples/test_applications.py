"""The applications `hub` and `lamps` in docs/examples pass their own tests, each in a separate process."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests import fork_server
from tests.conftest import ROOT

HUB = ROOT / "docs" / "examples" / "hub"
LAMPS = ROOT / "docs" / "examples" / "lamps"


def test_hub(engine_name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """The tests of the hub and of docs/how-to/migrate-own-tables.md pass on each engine."""
    page = (ROOT / "docs" / "how-to" / "migrate-own-tables.md").read_text(encoding="utf-8")
    test, environment_of_alembic = re.findall(r"^```py\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "test_page.py").write_text(test)
    assert environment_of_alembic in (HUB / "hub" / "migrations" / "env.py").read_text(encoding="utf-8")
    arguments = ["-p", "homeagent.testing", "-c", "pyproject.toml", "tests", tmp_path / "test_page.py"]
    if engine_name == "postgresql":
        arguments += ["--homeagent-postgresql", request.getfixturevalue("postgres_url")]
    done = fork_server.run_pytest(HUB, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 passed" in done.stdout


def test_lamps() -> None:
    """The test of the lamps passes. The application and its tests have less than 200 lines, without the revisions."""
    done = fork_server.run_pytest(LAMPS, "-p", "homeagent.testing", "-c", "pyproject.toml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout
    written = [file for file in LAMPS.rglob("*.py") if file.parent.name != "versions"]
    assert sum(len(file.read_text(encoding="utf-8").splitlines()) for file in written) < 200
