"""The application in `docs/examples/lamps`, which is complete in less than 200 lines."""

from __future__ import annotations

from tests import fork_server
from tests.conftest import ROOT

EXAMPLE = ROOT / "docs" / "examples" / "lamps"


def test_the_tests_of_the_example() -> None:
    """The test of the example passes in a separate process, with the example's configuration."""
    done = fork_server.run_pytest(EXAMPLE, "-p", "homeagent.testing", "-c", "pyproject.toml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout


def test_size() -> None:
    """The application and its tests have less than 200 lines. The command `homeagent migrations new` wrote the rest."""
    written = [file for file in EXAMPLE.rglob("*.py") if file.parent.name != "versions"]
    assert sum(len(file.read_text(encoding="utf-8").splitlines()) for file in written) < 200
