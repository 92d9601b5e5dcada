"""The command `homeagent migrations new`, and the option --migrations of other commands."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from homeagent import Database
from tests import fork_server
from tests.migrations.own_revisions import write_revision

TABLES = """
from uuid import UUID
from homeagent import Table
from sqlmodel import Field

class Message(Table, table=True):
    __tablename__ = "messages"
    id: UUID = Field(primary_key=True)
    session_id: str = Field(foreign_key="sessions.session_id", ondelete="CASCADE", index=True)
    text: str
"""
PINNED = "    pinned: bool = False\n"
STARS = '    stars: int = Field(default=0, sa_column_kwargs={"server_default": "0"})\n'


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The working directory of an application with one table."""
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "__init__.py").touch()
    (tmp_path / "hub" / "tables.py").write_text(TABLES)
    return tmp_path


# The entry '' of the search path is the working directory, which the command itself has to add
IN_DIRECTORY = f"import os, sys\nos.chdir(sys.argv.pop(1))\nsys.path.remove('')\n{fork_server.COMMAND}"


def run(project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in the application's directory."""
    return fork_server.run(IN_DIRECTORY, project, *arguments)


def test_application_without_alembic(project: Path) -> None:
    """The command writes the first revision and the next one, and the other commands run and name the revisions."""
    new = ("migrations", "new", "--migrations", "hub:migrations", "-m")
    first = run(project, *new, 'Add "messages"')
    assert first.returncode == 0, first.stderr
    assert "Wrote " in first.stdout
    (script,) = (project / "hub" / "migrations" / "versions").iterdir()
    assert "devices" not in script.read_text()
    assert "no revision was written" in run(project, *new, "again").stdout
    database = ("--database", str(project / "data" / "hub.db"))
    made = run(project, *database, "init", "--migrations", "hub:migrations")
    assert made.returncode == 0, made.stderr
    (project / "hub" / "tables.py").write_text(TABLES + PINNED)
    refused = run(project, *new, "pinned")
    assert refused.returncode == 1
    assert "column 'pinned' of table 'messages' is NOT NULL without a server default" in refused.stderr
    assert list(script.parent.iterdir()) == [script]
    pinned = PINNED.replace("False", 'Field(default=False, sa_column_kwargs={"server_default": sa.false()})')
    (project / "hub" / "tables.py").write_text(f"import sqlalchemy as sa{TABLES}{STARS}{pinned}")
    assert run(project, *new, "stars").returncode == 0
    (second,) = {*script.parent.iterdir()} - {script}
    assert "server_default=sa.false()" in second.read_text()  # PostgreSQL refuses the number 0
    assert "no revision was written" in run(project, *new, "again").stdout
    upgraded = run(project, *database, "migrate", "--migrations", "hub:migrations")
    assert "of the application. A copy from before" in upgraded.stdout, upgraded.stderr
    status = json.loads(run(project, *database, "status", "--json").stdout)
    assert status["rows"]["messages"] == 0
    assert status["application_revision"] in upgraded.stdout
    refused = run(project, "copy", database[1], str(project / "one" / "copy.db"))
    assert refused.returncode == 1
    assert "the target does not have: messages" in refused.stderr
    copied = run(project, "copy", database[1], str(project / "two" / "copy.db"), "--migrations", "hub:migrations")
    assert copied.returncode == 0, copied.stderr


SERVER_TYPES = """
from uuid import UUID
import sqlalchemy as sa
from homeagent import Table
from sqlalchemy.dialects import postgresql as pg
from sqlmodel import Field

class Message(Table, table=True):
    __tablename__ = "messages"
    id: int | None = Field(default=None, primary_key=True)
    one: dict = Field(sa_type=sa.JSON().with_variant(pg.JSONB(), "postgresql"))
    two: dict = Field(sa_type=pg.JSONB().with_variant(sa.Text(), "sqlite"))
    three: list = Field(sa_type=sa.Text().with_variant(pg.ARRAY(sa.Text()), "postgresql"))
    four: UUID = Field(sa_type=sa.UUID)
"""


def test_types_of_postgresql(project: Path, empty_postgres_url: str) -> None:
    """A new revision with types of PostgreSQL names each type by its module, and runs on both engines."""
    (project / "hub" / "tables.py").write_text(SERVER_TYPES)
    new = ("migrations", "new", "--migrations", "hub:migrations", "-m", "x")
    assert run(project, *new).returncode == 0
    assert "no revision was written" in run(project, *new).stdout
    for target in (str(project / "data" / "hub.db"), empty_postgres_url):
        with Database.open(target, migrations=project / "hub" / "migrations") as database:
            assert database.status().rows["messages"] == 0


TRIGGER = 'op.execute("CREATE TRIGGER audit AFTER INSERT ON devices BEGIN SELECT 1; END")'


def test_acknowledged_trigger(project: Path) -> None:
    """With --acknowledge, each command accepts a revision that creates a trigger on a table of homeagent."""
    write_revision(project / "hub" / "migrations", "a1", None, TRIGGER)
    names = ("--migrations", "hub:migrations", "--acknowledge", "audit")
    source, target = str(project / "data" / "hub.db"), str(project / "new" / "hub.db")
    for command in (["init", "--database", source], ["migrations", "new", "-m", "messages"], ["copy", source, target]):
        if command[0] == "copy":
            assert run(project, "migrate", "--database", source, *names).returncode == 0
        refused = run(project, *command, *names[:2])
        assert (refused.returncode, "acknowledge" in refused.stderr) == (1, True)
        done = run(project, *command, *names)
        assert done.returncode == 0, done.stderr


def test_mistakes(project: Path) -> None:
    """A package that can't be imported is refused in one line, and a missing option is wrong usage."""
    unknown = run(project, "migrations", "new", "-m", "x", "--migrations", "nowhere:migrations")
    assert unknown.returncode == 1
    assert "the package 'nowhere' can't be imported" in unknown.stderr
    assert run(project, "migrations", "new", "-m", "x").returncode == 2
    (project / "hub" / "broken.py").write_text("import nothing_like_this")
    broken = run(project, "migrations", "new", "-m", "x", "--migrations", "hub:migrations")
    assert broken.returncode == 1
    assert f"{project / 'hub' / 'broken.py'}, line 1: ModuleNotFoundError: No module named" in broken.stderr
    (project / "hub" / "broken.py").unlink()
    (project / "hub" / "tables.py").write_text(TABLES.partition("class")[0])
    without = run(project, "migrations", "new", "-m", "x", "--migrations", "hub:migrations")
    assert "no tables that derive from homeagent.Table: derive a class from Table, or write" in without.stderr
    empty = run(project, "migrations", "new", "--empty", "-m", "x", "--migrations", "plain", "--package", "hub")
    assert empty.returncode == 0, empty.stderr
    (script,) = (project / "plain" / "versions").iterdir()
    assert "    pass" in script.read_text()


@pytest.mark.parametrize("part", ["the folder", "the script"])
def test_unwritable_folder(project: Path, part: str) -> None:
    """If the folder or the script can't be created, the command prints one line with the remedy, and exits with 1."""
    (project / "plain").mkdir()
    if part == "the folder":
        (project / "plain" / "versions").touch()
    elif Path("/proc/self").exists():
        (project / "plain" / "versions").symlink_to("/proc")  # a directory in which root can't create a file either
    else:
        pytest.skip("needs a directory in which no user can create a file")
    refused = run(project, "migrations", "new", "--empty", "-m", "x", "--migrations", "plain", "--package", "hub")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert re.fullmatch(r"homeagent: [^\n]*'plain/versions[^\n]*\n", refused.stderr), refused.stderr
