"""The sessions and commands in the README and the pages of `docs` run, and the links lead to existing targets."""

import doctest
import os
import re
import shlex
from pathlib import Path

import pytest

from homeagent import Database, DevicePair, Role
from tests import fork_server

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
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


def test_commands_run(tmp_path: Path) -> None:
    """Every command line of the README succeeds on a database with the named device."""
    lines = [line for block in blocks(ROOT / "README.md", "sh") for line in block.splitlines()]
    commands = [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("homeagent ")]
    assert ["init"] in commands
    file = tmp_path / "data" / "homeagent.db"
    with Database.open(file) as database:
        database.pair(DevicePair(id="hall-lamp", role=Role.NODE))
    for command in commands:
        done = fork_server.run(
            fork_server.COMMAND, *command, input="y\n", environment={**os.environ, "HOMEAGENT_DATABASE": str(file)}
        )
        assert done.returncode == 0, (command, done.stderr)
    with Database.open(file) as database, database.unit_of_work(read_only=True) as unit:
        assert unit.devices.get("hall-lamp").approved_at is not None
        assert unit.devices.get("hall-lamp").revoked_at is not None


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
