"""The Python sessions of the pages run, and the links lead to existing targets."""

import doctest
import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


SESSIONS = {page.relative_to(ROOT).as_posix(): page for page in PAGES if ">>> " in "".join(blocks(page, "python"))}


@pytest.mark.skipif(os.name != "posix", reason="the README shows the modes of files")
@pytest.mark.parametrize("name", ["README.md", *sorted(SESSIONS.keys() - {"README.md"})])
def test_sessions_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every Python session of a page, the README included, prints the documented output from first to last block."""
    page = SESSIONS[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("HOMEAGENT_DATABASE", raising=False)
    text = "".join(blocks(page, "python"))
    assert "Database.open" in text or name != "README.md"
    session = doctest.DocTestParser().get_doctest(text, {}, page.name, str(page), 0)
    assert len(session.examples) == text.count("\n>>> ") + text.startswith(">>> ") > 0
    said: list[str] = []
    result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(session, out=said.append)
    assert result.failed == 0, "".join(said)


def anchors(page: Path) -> set[str]:
    """Return the valid names after `#`: headings in small letters, no punctuation, hyphens for blanks."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_link_targets_exist() -> None:
    """Each link to a file of this tree leads to an existing file, and each section link leads to a heading."""
    for page in PAGES:
        found = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)", page.read_text(encoding="utf-8"))
        assert [target for target, _ in found if not (page.parent / target).exists()] == [], page
        sections = [(page.parent / target if target else page, anchor) for target, anchor in found if anchor]
        assert [anchor for target, anchor in sections if anchor not in anchors(target)] == [], page
