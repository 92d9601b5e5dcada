"""The generated pages are current, and the reference lists every public name."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import homeagent
import homeagent.fastapi
import homeagent.maintenance

ROOT = Path(__file__).parents[1]


def test_schema_page() -> None:
    """`docs/schema.md` has the tables, columns and indexes of the models."""
    done = subprocess.run([sys.executable, ROOT / ".ci" / "schema_page.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", [homeagent, homeagent.fastapi, homeagent.maintenance], ids=lambda m: m.__name__)
def test_reference_lists_each_name(module: object) -> None:
    """Each public name of a package is in the reference."""
    pages = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "reference").glob("*.md"))
    listed = {name.rpartition(".")[2] for name in re.findall(r"^::: (\S+)$", pages, flags=re.MULTILINE)}
    assert set(module.__all__) - {"__version__"} <= listed  # type: ignore[attr-defined]  # the modules have `__all__`
