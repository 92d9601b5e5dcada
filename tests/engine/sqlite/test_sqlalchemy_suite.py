"""SQLAlchemy's own tests for dialects, on homeagent's dialect and on the `sqlite3` module's dialect."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.conftest import ROOT

SUITE = Path(__file__).parent / "sqlalchemy_suite"


def start(driver: str, directory: Path) -> subprocess.Popen[str]:
    """Start the suite on an in-memory database, as SQLAlchemy's documentation describes; it writes `report.xml`."""
    directory.mkdir()
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", "-p", "no:xdist"),
            *("-p", "plugin", "-c", SUITE / "setup.cfg", "--rootdir", SUITE, "--junitxml", directory / "report.xml"),
            *("--dburi", f"{driver}:///:memory:", SUITE / "suite.py"),
        ],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(SUITE), str(ROOT))), "PYTHONDONTWRITEBYTECODE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def passed(process: subprocess.Popen[str], directory: Path) -> set[str]:
    """Wait for the end of the suite, and return the names of the tests that passed."""
    output = process.communicate(timeout=900)[0]
    assert process.returncode in (0, 1), output[-4000:]  # 1: some tests failed
    names = set()
    for case in ElementTree.parse(directory / "report.xml").iter("testcase"):  # noqa: S314  written by pytest
        if not any(child.tag in ("failure", "error", "skipped") for child in case):
            # SQLAlchemy adds the driver's name and version to the name of the class.
            of_class = re.sub(r"_sqlite\+\w+$", "", case.attrib["classname"].rpartition(".")[2])
            names.add(f"{of_class}::{case.attrib['name']}")
    return names


@pytest.mark.slow
def test_homeagents_dialect_passes_the_tests_of_pysqlite(tmp_path: Path) -> None:
    """Tests that pass on SQLAlchemy's own dialect for the `sqlite3` module pass on homeagent's dialect."""
    drivers = ("sqlite+pysqlite", "sqlite+homeagent")
    processes = [start(driver, tmp_path / driver) for driver in drivers]
    try:
        theirs, ours = (passed(process, tmp_path / driver) for process, driver in zip(processes, drivers, strict=True))
    finally:
        for process in processes:
            process.kill()
    assert len(theirs) > 600
    assert theirs - ours == set()
