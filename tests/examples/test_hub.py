"""The application in `docs/examples/hub`: its own tests, and the application under load in a real server."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

EXAMPLE = ROOT / "docs" / "examples" / "hub"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def test_the_tests_of_the_example(engine_name: str, request: pytest.FixtureRequest) -> None:
    """The tests of the example pass on each engine, in a separate process and with the example's configuration."""
    arguments = ["-q", "-p", "no:cacheprovider", "-p", "homeagent.testing"]
    if engine_name == "postgresql":
        arguments += ["--homeagent-postgresql", request.getfixturevalue("postgres_url")]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "pytest", *arguments],
        check=False,
        capture_output=True,
        text=True,
        cwd=EXAMPLE,
        env=ENVIRONMENT,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 passed" in done.stdout
