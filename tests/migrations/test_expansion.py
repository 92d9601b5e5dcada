"""`homeagent.testing.check_revisions`: an application's revisions must only expand the schema."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from homeagent.errors import IncompatibleRevisionError, MigrationError
from homeagent.migrations.expansion import breaks, structure
from homeagent.testing import check_revisions
from tests.migrations.old_databases import plain_engine
from tests.migrations.own_revisions import CREATE, write_revision, write_revisions


@pytest.fixture
def first(tmp_path: Path) -> Path:
    """The folder of an application's first revision."""
    return write_revision(tmp_path / "hub" / "migrations", "a1", None, CREATE).parents[1]


@pytest.fixture
def server(engine_name: str, request: pytest.FixtureRequest) -> str | None:
    """The URL of the PostgreSQL server, or None for SQLite."""
    return str(request.getfixturevalue("postgres_url")) if engine_name == "postgresql" else None


def test_expansions_pass(tmp_path: Path, server: str | None) -> None:
    """Revisions that only add tables, columns, indexes and branches pass on either engine."""
    folder = write_revisions(tmp_path / "hub" / "migrations")
    write_revision(folder, "b3", "a2", 'op.create_table("labels", sa.Column("id", sa.Integer, primary_key=True))')
    write_revision(folder, "a4", ("a3", "b3"), 'op.execute("CREATE VIEW texts AS SELECT text FROM notes")')
    check_revisions(folder, server=server)


BREAKING = {
    "sqlite": (
        "notes.text changes its type from TEXT to VARCHAR.10.: add another",
        'with op.batch_alter_table("notes") as batch:\n    batch.alter_column("text", type_=sa.String(10))',
    ),
    "postgresql": ("notes is dropped or renamed: keep it until", 'op.drop_table("notes")'),
}


def test_breaking_revision_is_named(first: Path, engine_name: str, server: str | None) -> None:
    """The error names the revision, the change and the remedy, on either engine."""
    problem, body = BREAKING[engine_name]
    write_revision(first, "a2", "a1", body)
    with pytest.raises(
        IncompatibleRevisionError, match=rf"the revision 'a2' of .*migrations breaks .*{problem}"
    ) as error:
        check_revisions(first, server=server)
    assert (error.value.revision, len(error.value.problems)) == ("a2", 1)


BEFORE = (
    "CREATE TABLE t (id TEXT, other TEXT NOT NULL, kind TEXT NOT NULL, name TEXT, size INTEGER DEFAULT 0 NOT NULL,"
    " ref TEXT, label TEXT, CONSTRAINT fk_t FOREIGN KEY (ref) REFERENCES w (id) ON DELETE CASCADE,"
    " CONSTRAINT pk_t PRIMARY KEY (id, other), CONSTRAINT ck_t CHECK (kind <> 'x'));"
    " CREATE UNIQUE INDEX uq_t ON t (kind); CREATE INDEX idx_t ON t (name); CREATE TABLE u (id TEXT PRIMARY KEY)"
)
# A change of these statements, and the problem, if the change breaks old code.
CHANGES: list[tuple[str, str, str | None]] = [
    ("CREATE TABLE u", "CREATE TABLE v (id TEXT PRIMARY KEY); CREATE TABLE u", None),
    ("name TEXT,", "name TEXT, more TEXT,", None),
    ("name TEXT,", "name TEXT, more TEXT DEFAULT 'x' NOT NULL,", None),
    ("name TEXT,", "name TEXT, more INTEGER CONSTRAINT ck_more CHECK (more > 0),", None),
    ("name TEXT,", "name TEXT, more INTEGER UNIQUE,", None),
    ("(name)", "(size)", None),
    ("CREATE INDEX idx_t ON t (name);", "", None),
    ("size INTEGER", "size BIGINT", None),
    ("TABLE u", "TABLE v", "u is dropped or renamed"),
    ("size INTEGER DEFAULT 0 NOT NULL,", "", "t.size is dropped or renamed"),
    ("name TEXT,", "name TEXT, more TEXT NOT NULL,", "t.more is NOT NULL without a server default"),
    ("name TEXT,", "name TEXT NOT NULL,", "t.name becomes NOT NULL"),
    ("kind TEXT NOT NULL", "kind TEXT", "t.kind becomes nullable"),
    ("DEFAULT 0", "", "t.size loses its server default"),
    ("name TEXT,", "name VARCHAR(10),", "t.name changes its type from TEXT to VARCHAR"),
    ("CONSTRAINT ck_t", "CONSTRAINT ck_new CHECK (name <> 'x'), CONSTRAINT ck_t", "CHECK ck_new of t is new"),
    ("<> 'x'", "<> 'y'", "CHECK ck_t of t is new or changed"),
    (", CONSTRAINT ck_t CHECK (kind <> 'x')", "", "CHECK ck_t of t is dropped"),
    ("INDEX idx_t", "UNIQUE INDEX idx_t", "t gets unique ('name',)"),
    ("UNIQUE INDEX", "INDEX", "t loses unique ('kind',)"),
    ("(id, other)", "(other, id)", "the primary key of t"),
    ("name TEXT,", "name TEXT REFERENCES w (id),", "t gets a foreign key on ('name',)"),
    ("ON DELETE CASCADE", "", "the foreign key on ('ref',) of t loses ON DELETE CASCADE"),
    ("label TEXT", "label TEXT GENERATED ALWAYS AS ('x') STORED", "t.label becomes a generated column"),
]


def test_each_change_is_judged(engine_name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """A change that old code can notice is named, on either engine, and a change that only adds is not."""
    url = request.getfixturevalue("empty_postgres_url") if engine_name == "postgresql" else tmp_path / "empty.db"
    with plain_engine(url).connect() as connection:

        def made(statements: str) -> Any:
            for statement in ("CREATE TABLE w (id TEXT PRIMARY KEY)", *statements.split(";")):
                connection.exec_driver_sql(statement)
            connection.commit()
            found = structure(connection)
            for name in "tuvw":
                cascade = "CASCADE" if engine_name == "postgresql" else ""
                connection.exec_driver_sql(f"DROP TABLE IF EXISTS {name} {cascade}")
            connection.commit()
            return found

        before = made(BEFORE)
        for there, instead, problem in CHANGES:
            assert there in BEFORE
            found = list(breaks(before, made(BEFORE.replace(there, instead, 1))))
            if problem is None:
                assert found == [], (there, instead)
            else:
                (only,) = found
                assert problem in only


def test_declared_and_accepted_changes(first: Path) -> None:
    """A revision can declare a contraction, and a test can accept a trigger, but not a change of homeagent's tables."""
    script = write_revision(first, "a2", "a1", 'op.drop_table("notes")')
    source = script.read_text()
    script.write_text(f"{source}\noldest_revision = 'a2'\n")
    with pytest.raises(IncompatibleRevisionError, match="oldest_revision is 'a2': name an earlier revision"):
        check_revisions(first)
    script.write_text(f"{source}\noldest_revision = 'a1'\n")
    check_revisions(first)
    trigger = "CREATE TRIGGER audit AFTER INSERT ON notes BEGIN DELETE FROM notes; END"
    write_revision(first, "a2", "a1", f'op.execute("{trigger}")')
    with pytest.raises(IncompatibleRevisionError, match="gets trigger audit, which also runs for old code"):
        check_revisions(first)
    check_revisions(first, accepted=["audit"])
    write_revision(first, "a2", "a1", 'op.add_column("devices", sa.Column("room", sa.Text))')
    with pytest.raises(MigrationError, match=r"revision 'a2' of .*it changes homeagent's table devices.*Put the"):
        check_revisions(first)
