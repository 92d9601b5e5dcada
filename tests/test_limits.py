"""The scripts in `.ci/`: each script reports an excess, and the reference is current."""

from __future__ import annotations

import json
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT

LIMITS = runpy.run_path(str(ROOT / ".ci" / "limits.py"))
PROSE = runpy.run_path(str(ROOT / ".ci" / "prose.py"))
PUBLISH_DOCS = runpy.run_path(str(ROOT / ".ci" / "publish_docs.py"))


def test_long_modules_and_functions_are_noticed(tmp_path: Path) -> None:
    """A module or a function with as many lines as the limit passes, and with a line more is reported."""
    (tmp_path / "module.py").write_text('class A:\n    async def f(self) -> None:\n        """F."""\n        return\n')
    assert list(LIMITS["long_modules"](tmp_path, 4)) == list(LIMITS["long_functions"](tmp_path, 3)) == []
    (module,) = LIMITS["long_modules"](tmp_path, 3)
    (function,) = LIMITS["long_functions"](tmp_path, 2)
    assert "module.py: the module has 4 lines (limit 3)" in module
    assert "module.py:2: f has 3 lines (limit 2)" in function


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_long_subjects_are_noticed_after_the_introduction(tmp_path: Path) -> None:
    """If a commit follows the introduction of the script, a subject over the limit is reported; older commits pass."""

    def commit(subject: str) -> None:
        identity = ["-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
        git = ["git", *identity, "commit", "--quiet", "--allow-empty", "--no-verify", "--message", subject]
        subprocess.run(git, cwd=tmp_path, check=True)

    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    commit("old " * 20)
    (tmp_path / ".ci").mkdir()
    (tmp_path / ".ci" / "limits.py").touch()
    subprocess.run(["git", "add", ".ci"], cwd=tmp_path, check=True)
    commit("introduction " * 10)
    commit("x" * 72)
    assert list(LIMITS["long_subjects"](tmp_path, 72)) == []
    commit("y" * 73)
    (complaint,) = LIMITS["long_subjects"](tmp_path, 72)
    assert "the subject has 73 characters (limit 72): yyy" in complaint


def test_prose_is_measured() -> None:
    """Each measure counts sentences of Markdown, docstrings and comments, but neither code nor fragments."""
    page = """# What is here

    What is damaged is refused. Nobody knows that it was.

    - [Where](it.md) the file is, one looks.

    | it | SQLite locks the file |

    ```sh
    What is code is no prose here.
    ```
    """
    found = list(PROSE["of_markdown"](page.replace("\n    ", "\n")))
    sentences = ["What is damaged is refused.", "Nobody knows that it was."]
    assert found == [*sentences, "Where the file is, one looks.", "SQLite locks the file"]
    assert PROSE["measure"](found) == {"clauses": 50.0, "pronouns": 3000 / 20, "negatives": 1000 / 20}
    source = '''def f():
    """Return what it is.

    Args:
        path: the file of the database, as
            `open` takes it.
    """
    # A comment of two
    # lines is one paragraph.
    return "It is no comment at all"  # noqa: RET
'''
    sentences = ["Return what it is.", "the file of the database, as open takes it."]
    assert list(PROSE["of_python"](source)) == [*sentences, "A comment of two lines is one paragraph."]


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
