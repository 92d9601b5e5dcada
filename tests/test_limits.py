"""The scripts in `.ci/`: each script reports an excess, and the reference is current."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

from tests.conftest import ROOT

LIMITS = runpy.run_path(str(ROOT / ".ci" / "limits.py"))
PUBLISH_DOCS = runpy.run_path(str(ROOT / ".ci" / "publish_docs.py"))


def test_long_modules_and_functions_are_noticed(tmp_path: Path) -> None:
    """A module or a function with as many lines as the limit passes, and with a line more is reported."""
    (tmp_path / "module.py").write_text('class A:\n    async def f(self) -> None:\n        """F."""\n        return\n')
    assert list(LIMITS["long_modules"](tmp_path, 4)) == list(LIMITS["long_functions"](tmp_path, 3)) == []
    (module,) = LIMITS["long_modules"](tmp_path, 3)
    (function,) = LIMITS["long_functions"](tmp_path, 2)
    assert "module.py: the module has 4 lines (limit 3)" in module
    assert "module.py:2: f has 3 lines (limit 2)" in function


def test_the_reference_of_the_commands_is_current() -> None:
    """The page docs/command-line.md says what the help texts of the commands say."""
    reference = runpy.run_path(str(ROOT / ".ci" / "reference.py"))
    assert reference["page"]() == reference["PAGE"].read_text(encoding="utf-8"), "run python .ci/reference.py"


def test_documentation_of_releases(tmp_path: Path) -> None:
    """The list of releases has the newest first, and the first page leads to the newest release without a suffix."""
    site, folder = tmp_path / "site", tmp_path / "folder"
    site.mkdir()
    (site / "objects.inv").touch()
    for version in ("0.10.0rc1", "0.2.0", "0.9.1"):
        PUBLISH_DOCS["publish"](site, folder, version)

    found = json.loads((folder / "versions.json").read_text())
    assert [(each["version"], each["aliases"]) for each in found] == [
        ("0.10.0rc1", []),
        ("0.9.1", ["latest"]),
        ("0.2.0", []),
    ]
    assert 'href="0.9.1/"' in (folder / "index.html").read_text()
