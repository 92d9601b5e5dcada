"""Revisions: which one a database is at, whether this version works with it, and the scripts that bring it here.

An up-to-date database is told by one SELECT, and Alembic is not even imported: that saves 80 ms at every start.

`upgrade` sets none of the globals through which Alembic's commands reach `env.py` and the revisions, `alembic.context`
and `alembic.op`: the application may be in the middle of a command of its own. So a command does not run `env.py` here,
and each script gets an `op` of its own. Scripts are read as resources, which may lie in a zip file.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import CodeType, ModuleType
from typing import TYPE_CHECKING, Any

from sqlalchemy import text

from homeagent.errors import (
    ConnectionLostError,
    CorruptDatabaseError,
    DatabaseBusyError,
    DiskFullError,
    ForeignDatabaseError,
    HomeAgentError,
    InvalidArgumentError,
    MigrationError,
    ReadOnlyError,
    SchemaChangedError,
    SchemaTooNewError,
)
from homeagent.models import metadata

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

    from alembic.config import Config
    from alembic.runtime.migration import MigrationContext, MigrationStep
    from sqlalchemy import Connection


__all__ = [
    "REVISION",
    "SPEAK_FOR_THEMSELVES",
    "VERSION_TABLE",
    "alembic_config",
    "known_revisions",
    "reason_of",
    "revision_of",
    "suits",
    "tables",
    "upgrade",
]

REVISION = "0007"
"""The revision that this version of the package works with: the newest in `alembic/versions`."""

VERSION_TABLE = "homeagent_schema_version"

logger = logging.getLogger("homeagent")

SPEAK_FOR_THEMSELVES = (
    ConnectionLostError,
    CorruptDatabaseError,
    DatabaseBusyError,
    DiskFullError,
    ForeignDatabaseError,
    InvalidArgumentError,
    MigrationError,
    ReadOnlyError,
    SchemaChangedError,
    SchemaTooNewError,
)
"""Errors that say by themselves why an upgrade failed; any other becomes a MigrationError."""


def script_directory() -> Traversable:
    """Return the directory of `env.py` and the revisions: the wheel's own, or the checkout's `alembic/`.

    Raises:
        MigrationError: neither is there.
    """
    from importlib.resources import files  # takes a while to import, and is rarely needed

    candidates: list[Traversable] = [files("homeagent") / "_migrations", Path(__file__).parents[2] / "alembic"]
    for candidate in candidates:
        # Beside an installed package, `alembic` is the library of that name: it has no env.py at its top.
        if (candidate / "env.py").is_file():
            return candidate
    raise MigrationError("this installation has no migrations: install homeagent anew")


def alembic_config(connection: Connection | None = None) -> Config:
    """Return Alembic's configuration for a command on this package's revisions, which must lie in a directory.

    Args:
        connection: the database; None for the one that `env.py` chooses.
    """
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(script_directory()).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


def _scripts() -> list[ModuleType]:
    """Load the revisions anew, oldest first."""
    found = sorted((script_directory() / "versions").iterdir(), key=lambda file: file.name)
    return [_loaded(file) for file in found if file.name.endswith(".py")]


def _loaded(file: Traversable) -> ModuleType:
    script = ModuleType(file.name.removesuffix(".py"))
    script.__file__ = str(file)
    exec(_compiled(file.read_text(encoding="utf-8"), script.__file__), vars(script))  # noqa: S102  homeagent's own text
    return script


@cache
def _compiled(source: str, name: str) -> CodeType:
    return compile(source, name, "exec")


def tables(connection: Connection) -> set[str]:
    """Return the names of all tables, the application's and any other."""
    if connection.dialect.name == "sqlite":
        query = "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite~_%' ESCAPE '~'"
    else:
        query = "SELECT tablename FROM pg_catalog.pg_tables WHERE schemaname = current_schema()"
    return {row[0] for row in connection.execute(text(query))}


def revision_of(connection: Connection) -> str | None:
    """Return the revision of the schema, None where there is no schema of ours yet.

    Raises:
        CorruptDatabaseError: the version table does not hold exactly one row.
    """
    if VERSION_TABLE not in tables(connection):
        return None
    rows = connection.execute(text(f"SELECT version_num FROM {VERSION_TABLE}")).fetchall()  # noqa: S608  a constant
    if len(rows) != 1:
        raise CorruptDatabaseError(
            f"{VERSION_TABLE} holds {len(rows)} rows where one belongs: restore the newest good backup"
        )
    return str(rows[0][0])


def known_revisions() -> set[str]:
    """Return the revisions that this version has the scripts of."""
    return {script.revision for script in _scripts()}


def suits(connection: Connection, revision: str | None) -> bool:
    """Tell whether this version works with the schema as it is: at its own revision, or at a newer one that allows it.

    A newer version says in `store.oldest_revision` how old the code may be that works beside it.

    Args:
        connection: on the database, for that row.
        revision: of the schema, as `revision_of` returned it.

    Returns:
        False where it is to be made or upgraded.

    Raises:
        SchemaTooNewError: it is newer, and this version is too old for it.
    """
    if revision is None or revision == REVISION:
        return revision is not None
    known = known_revisions()
    if revision in known:
        return False
    if "store" not in tables(connection):
        raise SchemaTooNewError(revision, known=REVISION)
    oldest = connection.execute(text("SELECT oldest_revision FROM store")).scalar()
    # This version's own revision is the newest that it knows.
    if oldest not in known:
        raise SchemaTooNewError(revision, known=REVISION)
    logger.info(
        "the schema is at revision %s, which this version, made for %s, may work with",
        revision,
        REVISION,
        extra={"event": "newer_schema_opened", "revision": revision, "known": REVISION},
    )
    return True


def reason_of(error: Exception) -> str:
    """Return what a MigrationError says of its cause: an error of homeagent holds no value of a row."""
    name = type(error).__name__
    return f"{name}: {error}" if isinstance(error, HomeAgentError) else name


def upgrade(connection: Connection, to: str = "head") -> None:
    """Run the revisions that are missing, on a connection that holds the lock under which one process does that.

    Args:
        connection: on the database.
        to: the last revision to run; "head" for the newest.
    """
    from alembic.operations import Operations
    from alembic.runtime.migration import MigrationContext, MigrationStep
    from alembic.script import Script
    from alembic.script.revision import RevisionMap

    scripts = {script.revision: Script(script, script.revision, str(script.__file__)) for script in _scripts()}
    known = RevisionMap(scripts.values)

    def missing(current: Any, context: MigrationContext) -> Iterator[MigrationStep]:
        for revision in reversed(list(known.iterate_revisions(to, current, implicit_base=True))):
            script = scripts[revision.revision]
            vars(script.module)["op"] = Operations(context)
            yield MigrationStep.upgrade_from_script(known, script)

    options = {
        "fn": missing,
        "target_metadata": metadata,
        "transactional_ddl": True,
        "version_table": VERSION_TABLE,
    }
    MigrationContext.configure(connection, opts=options).run_migrations()
