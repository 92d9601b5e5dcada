"""`homeagent.alembic`: Alembic's commands on the tables of an application."""

from __future__ import annotations

import importlib
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from alembic.config import Config
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import DefaultClause, text

import homeagent.alembic
from alembic import command
from homeagent import Database
from homeagent.alembic import TABLES
from homeagent.errors import DatabaseBusyError, SchemaOutdatedError
from homeagent.migrations import postgresql
from homeagent.migrations.application import Application
from homeagent.migrations.autogenerate import render_revision
from homeagent.models import SCHEMA, metadata
from tests.conftest import add_agent
from tests.migrations.old_databases import change, fetch, is_sound, old_database, plain_engine
from tests.migrations.own_revisions import write_revision, write_revisions

MODELS = """
from enum import StrEnum
from typing import Any
from homeagent import Table, Timestamp
from sqlmodel import Field

class Mood(StrEnum):
    CALM = "calm"

class Message(Table, table=True):
    __tablename__ = "{prefix}_messages"
    id: int | None = Field(default=None, primary_key=True)
    session_id: str = Field(foreign_key="sessions.session_id", ondelete="CASCADE", index=True)
    text: str
    sent_at: Timestamp
    mood: Mood = Mood.CALM
    details: dict[str, Any] = Field(default_factory=dict)
"""
REBUILD = """
with op.batch_alter_table("{name}_messages", recreate="always") as batch:
    batch.add_column(sa.Column("stars", sa.Integer, server_default="0", nullable=False))

def downgrade():
    op.drop_column("{name}_messages", "stars")
"""
ENVIRONMENT = (
    "from alembic import context\nfrom homeagent.alembic import run_environment\n"
    "run_environment(context, package={!r})\n"
)
OWN_ENVIRONMENT = """
from alembic import context
from homeagent.alembic import include_name, include_object, render_item
from homeagent.models import metadata

context.configure(
    connection=context.config.attributes["connection"], target_metadata=metadata, version_table="own_version",
    include_name=include_name, include_object=include_object, render_item=render_item,
)
context.run_migrations()
"""


class Hub:
    """A package with a model and an Alembic environment."""

    def __init__(self, directory: Path, name: str, target: str | None) -> None:
        self.package = directory / name
        self.name = name
        self.config = Config()
        (self.package / "migrations" / "versions").mkdir(parents=True)
        (self.package / "__init__.py").touch()
        (self.package / "tables.py").write_text(MODELS.format(prefix=name))
        (self.package / "migrations" / "env.py").write_text(ENVIRONMENT.format(name))
        template = Path(command.__file__).parent / "templates" / "generic" / "script.py.mako"
        (self.package / "migrations" / "script.py.mako").write_text(template.read_text())
        self.config.set_main_option("script_location", str(self.package / "migrations"))
        if target is not None:
            self.config.set_main_option("database", target.replace("%", "%%"))

    def revise(self, message: str) -> str:
        """Create a revision by autogenerate, and return its text."""
        script: Any = command.revision(self.config, message, autogenerate=True)
        return Path(script.path).read_text()

    def head(self) -> str:
        """Return the newest revision."""
        return str(ScriptDirectory.from_config(self.config).get_current_head())


@pytest.fixture
def make_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Any:
    """Creates packages that can be imported."""
    monkeypatch.syspath_prepend(tmp_path)
    number = abs(hash(request.node.name))
    return lambda target=None, name="hub": Hub(tmp_path, f"{name}_{number}", target)


def test_life_of_an_application(target: str, make_hub: Any) -> None:
    """Alembic creates a revision, `Database.open` runs it, and `alembic check` finds no difference."""
    hub, other = make_hub(target), make_hub(target, "other")
    importlib.import_module(f"{other.name}.tables")
    first = hub.revise("messages")
    assert 'sa.BigInteger().with_variant(sa.Integer(), "sqlite")' in first
    assert '["sessions.session_id"]' in first.replace("'", '"')
    assert "devices" not in first
    assert other.name not in first
    with Database.open(target, migrations=f"{hub.name}:migrations") as database:
        command.check(hub.config)  # in a running application
        add_agent(database)
        message = sys.modules[f"{hub.name}.tables"].Message
        with database.unit_of_work() as unit:
            session = unit.sessions.resolve(agent_id="ada")
            unit.session.add(message(session_id=session.session_id, text="kept", sent_at=unit.now()))
    write_revision(hub.package / "migrations", "b2", hub.head(), REBUILD.format(name=hub.name))
    with pytest.raises(CommandError, match="not up to date"):
        command.check(hub.config)
    with pytest.raises(SchemaOutdatedError, match=f"of the application {hub.name}, needed"):
        Database.open(target, migrations=f"{hub.name}:migrations", migrate=False)
    command.upgrade(hub.config, "head")
    with Database.open(target, migrations=f"{hub.name}:migrations", migrate=False) as database:
        with database.read_connection() as connection:
            assert connection.execute(text(f"SELECT text, stars FROM {hub.name}_messages")).all() == [("kept", 0)]
        command.downgrade(hub.config, "-1")


DEFAULTS = """
from homeagent import Table
from sqlalchemy import Computed, Identity
from sqlmodel import Field

class Message(Table, table=True):
    __tablename__ = "{prefix}_messages"
    id: int | None = Field(default=None, primary_key=True)
    doubled: int | None = Field(default=None, sa_column_args=[Computed("id * 2", persisted=True)])
    stars: int = Field(default=0, sa_column_kwargs={{"server_default": "0"}})
"""
IDENTITY = "    number: int = Field(default=0, sa_column_args=[Identity()])\n"
DEFAULT = '    text_{}: str = Field(default="", sa_column_kwargs={{"server_default": {!r}}})\n'


def test_text_defaults(target: str, make_hub: Any) -> None:
    """After the upgrade, `alembic check` finds no difference of a text default, and then finds a changed default."""
    hub = make_hub(target)
    texts = ("", "it's", "(a)", "'x'", "0", "two\nlines", "back\\slash")
    fields = [DEFAULT.format(number, default) for number, default in enumerate(texts)]
    # Alembic does not support an identity column on SQLite.
    fields += [IDENTITY] if target.startswith("postgresql") else []
    (hub.package / "tables.py").write_text(DEFAULTS.format(prefix=hub.name) + "".join(fields))
    hub.revise("messages")
    command.upgrade(hub.config, "head")
    command.check(hub.config)
    name = f"{hub.name}_messages"
    with plain_engine(target).connect() as connection:
        connection.execute(text(f"INSERT INTO {name} (id) VALUES (1)"))
        row = connection.execute(text(f"SELECT * FROM {name}")).mappings().one()
    assert [row[f"text_{number}"] for number in range(len(texts))] == ["x" if each == "'x'" else each for each in texts]
    column = metadata.tables[name].columns["text_0"]
    for other in ("it's", "('')", "''::text"):
        column.server_default = DefaultClause(other)
        with pytest.raises(CommandError, match="modify_default"):
            command.check(hub.config)


def test_no_revision_for_an_unchanged_text(make_hub: Any) -> None:
    """A second call of `homeagent migrations new` writes no revision for the default '' and an added text default."""
    hub = make_hub()
    (hub.package / "tables.py").write_text(DEFAULTS.format(prefix=hub.name) + DEFAULT.format(0, ""))
    hub.revise("messages")
    revisions, tables = Application.of(hub.package / "migrations"), {f"{hub.name}_messages"}
    assert render_revision(revisions, tables) is None
    metadata.tables[f"{hub.name}_messages"].columns["text_0"].server_default = DefaultClause("it's")
    changed = render_revision(revisions, tables)
    assert changed is not None
    assert """server_default="it's",""" in changed["upgrade"]


def test_new_and_old_databases(make_hub: Any, tmp_path: Path) -> None:
    """`alembic upgrade` also creates or upgrades homeagent's tables; without a database, a revision can be made."""
    hub = make_hub()
    hub.revise("messages")
    with pytest.raises(CommandError, match=r"name the database: .* or \$HOMEAGENT_DATABASE"):
        command.upgrade(hub.config, "head")
    command.check(hub.config)
    for path in (tmp_path / "new" / "homeagent.db", old_database(tmp_path, "0001")):
        hub.config.set_main_option("database", str(path))
        command.upgrade(hub.config, "head")
        assert is_sound(path)
        assert fetch(path, "SELECT version_num FROM application_schema_version") == [(hub.head(),)]
        Database.open(path, migrations=hub.package / "migrations", migrate=False).close()


def test_refused_commands(sqlite_path: Path, make_hub: Any) -> None:
    """A command undoes a revision that changes homeagent's tables, and refuses a connection in a transaction."""
    hub = make_hub(str(sqlite_path))
    write_revision(hub.package / "migrations", "b1", None, 'op.add_column("agents", sa.Column("extra", sa.Text))')
    with pytest.raises(CommandError, match="undone: it changes homeagent's table agents"):
        command.upgrade(hub.config, "head")
    with Database.open(sqlite_path) as database, database.unit_of_work() as unit:
        assert unit.agents.list() == []
        hub.config.attributes["connection"] = unit.session.connection()
        # A rebuilt table would lose the rows that refer to it.
        with pytest.raises(CommandError, match="is in a transaction with foreign keys"):
            command.upgrade(hub.config, "head")


def test_broken_references(sqlite_path: Path, make_hub: Any) -> None:
    """A command accepts the broken references of earlier rows, but undoes a revision that adds a broken reference."""
    hub = make_hub(str(sqlite_path))
    hub.revise("messages")
    command.upgrade(hub.config, "head")
    orphan = f"INSERT INTO {hub.name}_messages VALUES (NULL, 'nobody', '', 1, 'calm', '{{}}')"
    change(sqlite_path, orphan)
    command.stamp(hub.config, "head")
    write_revision(hub.package / "migrations", "b2", hub.head(), f'op.execute("{orphan}")')
    with pytest.raises(CommandError, match=f"the revision left 1 broken references from {hub.name}_messages"):
        command.upgrade(hub.config, "head")
    assert fetch(sqlite_path, f"SELECT count(*) FROM {hub.name}_messages") == [(1,)]


def test_url_of_the_configuration(target: str, make_hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alembic's option sqlalchemy.url names the database last. The value of Alembic's template names none."""
    monkeypatch.delenv("HOMEAGENT_DATABASE", raising=False)
    hub = make_hub()
    write_revision(hub.package / "migrations", "b1", None, 'op.create_table("given", sa.Column("a", sa.Integer))')
    hub.config.set_main_option("sqlalchemy.url", "driver://user:pass@localhost/dbname")
    with pytest.raises(CommandError, match="name the database"):
        command.upgrade(hub.config, "head")
    url = target if target.startswith("postgresql") else f"sqlite:///{target}"
    hub.config.set_main_option("sqlalchemy.url", url.replace("%", "%%"))
    command.upgrade(hub.config, "head")
    with Database.open(target) as database:
        assert database.status().application_revision == "b1"
    hub.config.file_config._sections["alembic"]["sqlalchemy.url"] = "sqlite:///a%b"
    with pytest.raises(CommandError, match="write %% for each"):
        command.upgrade(hub.config, "head")
    hub.config.set_main_option("database", target)
    command.upgrade(hub.config, "head")


AUDIT = """
how = "BEGIN SELECT 1; END"
if op.get_bind().dialect.name == "postgresql":
    how = "FOR EACH ROW EXECUTE FUNCTION suppress_redundant_updates_trigger()"
op.execute(f"CREATE TRIGGER audit BEFORE UPDATE ON devices {how}")

def downgrade():
    op.execute("DROP TRIGGER audit" + (" ON devices" if op.get_bind().dialect.name == "postgresql" else ""))
"""


def test_acknowledged_trigger(target: str, make_hub: Any) -> None:
    """Alembic's commands run a revision with a trigger on a table of homeagent if the trigger is acknowledged."""
    hub = make_hub(target)
    hub.revise("messages")
    write_revision(hub.package / "migrations", "b2", hub.head(), AUDIT)
    with pytest.raises(CommandError, match=r"undone: it changes homeagent's table devices.*acknowledge"):
        command.upgrade(hub.config, "head")
    environment = hub.package / "migrations" / "env.py"
    environment.write_text(environment.read_text().replace("package=", "acknowledged=['audit'], package="))
    command.upgrade(hub.config, "head")
    command.downgrade(hub.config, "-1")
    hub.config.set_main_option("database", "")
    command.check(hub.config)


def test_autocommit_block(target: str, make_hub: Any) -> None:
    """A command of Alembic runs a revision that leaves its transaction, and undoes a later revision that fails."""
    hub = make_hub(target)
    write_revisions(hub.package / "migrations")
    command.upgrade(hub.config, "head")
    write_revision(hub.package / "migrations", "a4", "a3", 'op.drop_table("notes")\nraise KeyError')
    with pytest.raises(KeyError):
        command.upgrade(hub.config, "head")
    with Database.open(target) as database:
        assert (database.status().application_revision, database.status().rows["notes"]) == ("a3", 0)


def test_lock_of_postgresql(empty_postgres_url: str, make_hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On PostgreSQL a command of Alembic waits for an upgrade by another host, and makes another host wait."""
    hub = make_hub(empty_postgres_url)
    Database.open(empty_postgres_url).close()
    monkeypatch.setattr(homeagent.alembic, "BUSY_TIMEOUT", timedelta(milliseconds=100))
    take = f"SELECT pg_try_advisory_lock({postgresql._OUTSIDE_LOCK})"
    write_revision(
        hub.package / "migrations", "b1", None, f'assert not op.get_bind().exec_driver_sql("{take}").scalar()'
    )
    with plain_engine(empty_postgres_url).connect() as other:
        assert other.exec_driver_sql(take).scalar_one()
        with pytest.raises(DatabaseBusyError, match="another host or command upgrades it"):
            command.upgrade(hub.config, "head")
    command.upgrade(hub.config, "head")


@pytest.mark.parametrize("target", ["homeagent.db", "postgresql://localhost/hub"])
def test_offline(make_hub: Any, capsys: pytest.CaptureFixture[str], target: str) -> None:
    """With --sql, Alembic prints the statements of the engine that the name of the database has."""
    hub = make_hub()
    hub.revise("messages")
    hub.config.set_main_option("database", target)
    capsys.readouterr()
    command.upgrade(hub.config, "head", sql=True)
    printed = capsys.readouterr().out
    assert f"CREATE TABLE {hub.name}_messages" in printed
    assert "INSERT INTO application_schema_version" in printed
    assert ("SERIAL" in printed) == target.startswith("postgresql")


def test_a_given_connection(target: str, make_hub: Any) -> None:
    """Alembic's commands run on a connection that the caller gives, also of an ordinary engine."""
    hub = make_hub(target)
    Database.open(target).close()
    write_revision(hub.package / "migrations", "b1", None, 'op.create_table("given", sa.Column("a", sa.Integer))')
    with plain_engine(target).connect() as connection:
        hub.config.attributes["connection"] = connection
        command.upgrade(hub.config, "head")
        connection.commit()
        assert connection.execute(text("SELECT count(*) FROM given")).scalar_one() == 0


@pytest.mark.parametrize(
    "end",
    [
        'op.execute("SELECT 1; ROLLBACK")',
        'op.execute("SELECT 1; COMMIT")',
        "op.get_bind().connection.driver_connection.rollback()",
        "op.get_bind().connection.driver_connection.commit()",
    ],
)
def test_ended_transaction_of_a_given_connection(empty_postgres_url: str, make_hub: Any, end: str) -> None:
    """If a revision ends the transaction of a given connection, the command fails, and the revision is not recorded.

    PostgreSQL only: on SQLite, a statement can't end the transaction of a revision.
    """
    hub = make_hub(empty_postgres_url)
    Database.open(empty_postgres_url).close()
    write_revisions(hub.package / "migrations")
    write_revision(
        hub.package / "migrations", "a4", "a3", f'op.create_table("given", sa.Column("a", sa.Integer))\n{end}'
    )
    with plain_engine(empty_postgres_url).connect() as connection:
        hub.config.attributes["connection"] = connection
        command.upgrade(hub.config, "a3")
        connection.commit()
        with pytest.raises(CommandError, match="it has ended its transaction"):
            command.upgrade(hub.config, "a4")
        assert connection.execute(text("SELECT version_num FROM application_schema_version")).scalar_one() == "a3"


def test_given_connection_in_autocommit_mode(empty_postgres_url: str, make_hub: Any) -> None:
    """A given connection without transactions is refused."""
    hub = make_hub(empty_postgres_url)
    Database.open(empty_postgres_url).close()
    with plain_engine(empty_postgres_url).connect() as connection:
        hub.config.attributes["connection"] = connection.execution_options(isolation_level="AUTOCOMMIT")
        with pytest.raises(CommandError, match="autocommit mode"):
            command.check(hub.config)


def test_environment_of_the_application(target: str, make_hub: Any) -> None:
    """An own env.py writes SQLAlchemy's types into a revision, and neither compares nor drops homeagent's tables."""
    hub = make_hub(target)
    importlib.import_module(f"{hub.name}.tables")
    (hub.package / "migrations" / "env.py").write_text(OWN_ENVIRONMENT)
    assert {table.name for table in SCHEMA} < TABLES
    with plain_engine(target).connect() as connection:
        hub.config.attributes["connection"] = connection
        script = hub.revise("messages")
    assert f"create_table('{hub.name}_messages'" in script
    assert not [table for table in TABLES if f"_table('{table}'" in script or f"table_name='{table}'" in script]
    for column in ("'sent_at', sa.BigInteger().with_variant", "'mood', sa.Text()", "'details', sa.Text()"):
        assert column in script
