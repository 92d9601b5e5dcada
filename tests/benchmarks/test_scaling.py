"""The measurements behind docs/scaling.md, in a size that shows that they work."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks.scaling.tables import TABLES

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.slow, pytest.mark.postgresql]


def test_every_section_is_measured_and_told(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    """One command measures all and prints a table for each; and what the page says of replays is what was seen."""
    output, page = tmp_path / "scaling.json", tmp_path / "scaling.md"
    shutil.copy(ROOT / "docs" / "scaling.md", page)
    command = [sys.executable, "-W", "error", "-m", "tests.benchmarks.scaling", "--quick"]
    command += ["--output", str(output), "--page", str(page)]
    programs = pytestconfig.getoption("--postgresql-bin")
    if programs is not None:
        command += ["--postgresql-bin", programs]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text(encoding="utf-8"))
    assert set(found) == set(TABLES)
    assert done.stdout.count("\n| --- |") == len(TABLES) - 1
    tables = re.findall(
        r"<!-- measured: (\w+) -->\n(.*?)\n<!-- end -->", page.read_text(encoding="utf-8"), flags=re.DOTALL
    )
    assert {name for name, _ in tables} == set(TABLES)
    assert all(table in done.stdout for _, table in tables)
    assert found["host"]["connections"] == 20
    assert all(figure["rows"] > 2000 for by_size in found["copies"].values() for figure in by_size.values())
    for title, scheme in found["partitions"].items():
        assert not scheme["same_message_let_in"], title
        # Parted by time, the key holds the time: only the same message is recognised, not the same nonce.
        assert scheme["same_nonce_in_another_message_let_in"] == ("by time" in title), title
        assert scheme["expiry"]["rows"] == 1000
        assert (scheme["expiry"]["bytes_given_back"] > 0) == ("by time" in title), title
