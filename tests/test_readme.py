"""The Python sessions of the pages run, and the links lead to existing targets."""

import doctest
import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]


def blocks(page: Path, language: str) -> list[str]:
    """Return the fenced blocks of a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.skipif(os.name != "posix", reason="the README shows the modes of files")
@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_sessions_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every Python session of a page prints the documented output, from its first block to its last."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("HOMEAGENT_DATABASE", raising=False)
    text = "".join(blocks(page, "python"))
    session = doctest.DocTestParser().get_doctest(text, {}, page.name, str(page), 0)
    assert len(session.examples) == text.count("\n>>> ") + text.startswith(">>> ")
    said: list[str] = []
    result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(session, out=said.append)
    assert result.failed == 0, "".join(said)


def test_there_is_a_session() -> None:
    """The README shows a session, so that the test above has a session to run."""
    assert "Database.open" in "".join(blocks(ROOT / "README.md", "python"))


def anchors(page: Path) -> set[str]:
    """Return the valid names after `#`: headings in small letters, no punctuation, hyphens for blanks."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_link_targets_exist(page: Path) -> None:
    """Each link to a file of this tree leads to an existing file, and each section link leads to a heading."""
    found = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)", page.read_text(encoding="utf-8"))
    assert [target for target, _ in found if not (page.parent / target).exists()] == []
    sections = [(page.parent / target if target else page, anchor) for target, anchor in found if anchor]
    assert [anchor for target, anchor in sections if anchor not in anchors(target)] == []
