"""`homeagent.testing.check_revisions`: an application's revisions must only expand the schema."""

from __future__ import annotations

from pathlib import Path

import pytest

from homeagent.errors import IncompatibleRevisionError, InvalidArgumentError, MigrationError
from homeagent.testing import check_revisions
from tests.migrations.own_revisions import CREATE, write_revision, write_revisions


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of an application's three revisions, which only expand the schema."""
    return write_revisions(tmp_path / "hub" / "migrations")


@pytest.fixture
def server(engine_name: str, request: pytest.FixtureRequest) -> str | None:
    """The URL of the PostgreSQL server, or None for SQLite."""
    return str(request.getfixturevalue("postgres_url")) if engine_name == "postgresql" else None


def batch(*lines: str) -> str:
    """Return the body of a revision that changes the table of the first revision."""
    return "\n    ".join(('with op.batch_alter_table("notes") as batch:', *lines))


def test_expansions_pass(folder: Path, server: str | None) -> None:
    """Revisions that only add tables, columns, indexes and branches pass on either engine."""
    write_revision(folder, "b3", "a2", 'op.create_table("labels", sa.Column("id", sa.Integer, primary_key=True))')
    write_revision(folder, "a4", ("a3", "b3"), 'op.execute("CREATE VIEW texts AS SELECT text FROM notes")')
    check_revisions(folder, server=server)


BREAKING = {
    "notes is dropped or renamed: keep it until": 'op.drop_table("notes")',
    "notes.text is dropped or renamed: keep it until": batch('batch.alter_column("text", new_column_name="body")'),
    "notes.kind is NOT NULL without a server default: add server_default": batch(
        'batch.add_column(sa.Column("kind", sa.Text, nullable=False))'
    ),
    "notes.text becomes NOT NULL, .*: add another column": batch('batch.alter_column("text", nullable=False)'),
    "notes.text changes its type from TEXT to VARCHAR.10.: add another": batch(
        'batch.alter_column("text", type_=sa.String(10))'
    ),
    r"notes gets unique \('text',\), .* check the rows in the application": (
        'op.create_index("idx_notes_once", "notes", ["text"], unique=True)'
    ),
    "ck_notes_short of notes is new or changed": batch('batch.create_check_constraint("ck_notes_short", "text > 1")'),
}


@pytest.mark.parametrize(
    ("engine_name", "problem"),
    [
        *(("sqlite", problem) for problem in BREAKING),
        ("postgresql", "notes is dropped or renamed: keep it until"),
        *(pytest.param("postgresql", problem, marks=pytest.mark.slow) for problem in [*BREAKING][1:]),
    ],
)
def test_breaking_revisions_are_named(folder: Path, server: str | None, problem: str) -> None:
    """The error names the revision, the change and the remedy, on either engine."""
    body = BREAKING[problem].replace("text > 1", "text <> 'x'")
    write_revision(folder, "a4", "a3", body)
    with pytest.raises(
        IncompatibleRevisionError, match=rf"the revision 'a4' of .*migrations breaks .*{problem}"
    ) as error:
        check_revisions(folder, server=server)
    assert (error.value.revision, len(error.value.problems)) == ("a4", 1)


def test_declared_and_accepted_changes(folder: Path) -> None:
    """A revision can declare a contraction, and a test can accept a CHECK or a trigger by name."""
    script = write_revision(folder, "a4", "a3", 'op.drop_table("notes")')
    source = script.read_text()
    script.write_text(f"{source}\noldest_revision = 'a4'\n")
    with pytest.raises(IncompatibleRevisionError, match="oldest_revision is 'a4': name an earlier revision"):
        check_revisions(folder)
    script.write_text(f"{source}\noldest_revision = 'a3'\n")
    check_revisions(folder)
    trigger = "CREATE TRIGGER audit AFTER INSERT ON notes BEGIN DELETE FROM notes; END"
    write_revision(folder, "a4", "a3", f'op.execute("{trigger}")')
    with pytest.raises(IncompatibleRevisionError, match="gets trigger audit, which also runs for old code"):
        check_revisions(folder)
    check_revisions(folder, accepted=["audit"])


def test_unusable_revisions(folder: Path) -> None:
    """A revision that changes homeagent's tables and several heads are refused by name."""
    write_revision(folder, "a4", "a3", 'op.add_column("devices", sa.Column("room", sa.Text))')
    with pytest.raises(MigrationError, match=r"revision 'a4' of .*it changes homeagent's table devices.*Put the"):
        check_revisions(folder)
    write_revision(folder, "b1", None, CREATE)
    with pytest.raises(InvalidArgumentError, match="must have one head and have 2: a4, b1"):
        check_revisions(folder)
