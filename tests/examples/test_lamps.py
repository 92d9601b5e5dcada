"""The application in `docs/examples/lamps`, which is complete in less than 200 lines."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.conftest import ROOT

EXAMPLE = ROOT / "docs" / "examples" / "lamps"


def test_the_tests_of_the_example() -> None:
    """The test of the example passes in a separate process, with the example's configuration."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "homeagent.testing"],
        check=False,
        capture_output=True,
        text=True,
        cwd=EXAMPLE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout


def test_size() -> None:
    """The application and its tests have less than 200 lines. The command `homeagent migrations new` wrote the rest."""
    written = [file for file in EXAMPLE.rglob("*.py") if file.parent.name != "versions"]
    assert sum(len(file.read_text(encoding="utf-8").splitlines()) for file in written) < 200
