"""The steps of CONTRIBUTING.md for a schema change, executed in a copy of the checkout."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from homeagent.migrations import REVISION
from tests.migrations.old_databases import CHECKOUT

NEXT = f"{int(REVISION) + 1:04}"
FIELD = '    room: Name | None = Field(default=None, description="Room of the device.")\n'


def commands() -> list[str]:
    """Return the shell commands of the section, for the next revision."""
    guide = (CHECKOUT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = guide.partition("## Change the schema\n")[2].partition("\n### ")[0]
    blocks = re.findall(r"^ *```sh\n(.*?)^ *```$", section, flags=re.MULTILINE | re.DOTALL)
    number = re.search(r"--rev-id (\d{4})", section)
    assert number is not None
    return [line.strip().replace(number[1], NEXT) for block in blocks for line in block.splitlines()]


def edit(path: Path, old: str, new: str) -> None:
    """Replace a text that occurs once in a file."""
    source = path.read_text(encoding="utf-8")
    assert source.count(old) == 1
    path.write_text(source.replace(old, new), encoding="utf-8")


@pytest.mark.slow
def test_steps_for_a_new_column_pass(tmp_path: Path) -> None:
    """A nullable column in the middle of a model needs only the commands of the section and two edits."""
    ignored = shutil.ignore_patterns(".*_cache", ".git", ".hypothesis", ".venv", "__pycache__")
    copy = shutil.copytree(CHECKOUT, tmp_path / "checkout", ignore=ignored)
    (copy / ".venv").symlink_to(sys.prefix)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HOMEAGENT_", "PYTEST_"))}
    # Only the fields of one model begin like this line.
    before = "    last_seen_at: Timestamp | None = Field(\n"
    edit(copy / "homeagent" / "models" / "device.py", before, FIELD + before)
    edit(copy / "homeagent" / "migrations" / "revisions.py", f'REVISION = "{REVISION}"', f'REVISION = "{NEXT}"')
    for command in commands():
        if ".venv/bin/ruff" in command and not (copy / ".venv/bin/ruff").exists():
            continue  # the tests do not need the tools of the lint extra; a draft is also correct unformatted
        done = subprocess.run(
            ["sh", "-c", command],
            cwd=copy,
            env={**environment, "PYTHONPATH": str(copy)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    assert (copy / "tests" / "fixtures" / "revisions" / f"{NEXT}.db").is_file()
