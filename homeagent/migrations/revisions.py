"""Read the revision of a schema, and run the missing revisions.

Import Alembic only for an upgrade, because the import takes 80 ms. Do not run `env.py` or change the
objects `alembic.context` and `alembic.op`. An Alembic command in another thread could use the same objects.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import cache
from importlib.resources import files
from inspect import iscoroutinefunction
from pathlib import Path
from traceback import walk_tb
from types import CodeType, ModuleType
from typing import TYPE_CHECKING, Any

from sqlalchemy import text

from homeagent import errors
from homeagent.models import APPLICATION_VERSION_TABLE, TABLES, VERSION_TABLE, metadata

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

    from alembic.runtime.migration import MigrationContext, MigrationStep
    from sqlalchemy import Connection

    from homeagent.migrations.application import RevisionGuard


REVISION = "0010"
"""Revision that this version needs: the newest revision in `alembic/versions`."""

logger: logging.Logger = logging.getLogger("homeagent")

SPEAK_FOR_THEMSELVES = (
    errors.ConnectionLostError,
    errors.CorruptDatabaseError,
    errors.DatabaseBusyError,
    errors.DiskFullError,
    errors.ForeignDatabaseError,
    errors.InvalidArgumentError,
    errors.MigrationError,
    errors.ReadOnlyError,
    errors.SchemaChangedError,
    errors.SchemaTooNewError,
)
"""Errors that explain why an upgrade failed. Other errors become a MigrationError."""


class RevisionFailedError(Exception):
    """A revision of the application failed. Callers of `Application.upgrade()` convert the error to MigrationError."""

    def __init__(self, reason: str, *, is_undone: bool = True) -> None:
        super().__init__(reason)
        self.outcome = "failed and was undone" if is_undone else "failed"


def script_directory() -> Traversable:
    """Return the directory of `env.py` and the revisions. In a checkout the directory is `alembic/`."""
    candidates: list[Traversable] = [files("homeagent") / "_migrations", Path(__file__).parents[2] / "alembic"]
    for candidate in candidates:
        # In site-packages, `alembic` is the library Alembic, without `env.py`.
        if (candidate / "env.py").is_file():
            return candidate
    raise errors.MigrationError("this installation has no migrations: install homeagent anew")


def _scripts() -> list[ModuleType]:
    """Load homeagent's revision scripts as new modules, sorted by file name."""
    found = sorted((script_directory() / "versions").iterdir(), key=lambda file: file.name)
    return [loaded(file) for file in found if file.name.endswith(".py")]


def loaded(file: Traversable) -> ModuleType:
    """Run a script as a new module, and return the module."""
    script = ModuleType(file.name.removesuffix(".py"))
    script.__file__ = str(file)
    exec(_compiled(file.read_text(encoding="utf-8"), script.__file__), vars(script))  # noqa: S102  a revision
    return script


@cache
def _compiled(source: str, name: str) -> CodeType:
    return compile(source, name, "exec", dont_inherit=True)


def tables(connection: Connection) -> set[str]:
    """Return the names of all tables, including the application's tables."""
    if connection.dialect.name == "sqlite":
        query = "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite~_%' ESCAPE '~'"
    else:
        query = "SELECT tablename FROM pg_catalog.pg_tables WHERE schemaname = current_schema()"
    return {row[0] for row in connection.exec_driver_sql(query)}


def broken_references(connection: Connection) -> Counter[tuple[str, str]]:
    """Count the broken references in a SQLite file. The counter's keys are tuples (referring table, referenced
    table). On PostgreSQL, which enforces foreign keys, return an empty counter.
    """
    if connection.dialect.name != "sqlite":
        return Counter()
    rows = connection.exec_driver_sql("PRAGMA foreign_key_check").fetchall()
    return Counter((str(child), str(parent)) for child, _, parent, _ in rows)


def count_rows(connection: Connection, names: Iterable[str]) -> dict[str, int]:
    """Return the number of rows of each table."""
    quote = connection.dialect.identifier_preparer.quote
    queries = {name: text(f"SELECT count(*) FROM {quote(name)}") for name in names}  # noqa: S608  quoted
    return {name: int(connection.execute(query).scalar_one()) for name, query in queries.items()}


def own_tables(connection: Connection) -> list[str]:
    """Return the sorted names of the application's tables, without the version table."""
    others = tables(connection) - {*TABLES, VERSION_TABLE, APPLICATION_VERSION_TABLE}
    # Litestream creates its tables in each database that it replicates.
    return sorted(name for name in others if not name.startswith("_litestream_"))


def revision_of(connection: Connection) -> str | None:
    """Return the revision of the schema. If the version table does not exist, return None."""
    if VERSION_TABLE not in tables(connection):
        return None
    rows = connection.exec_driver_sql(f"SELECT version_num FROM {VERSION_TABLE}").fetchall()  # noqa: S608  a constant
    if len(rows) != 1:
        raise errors.CorruptDatabaseError(
            f"{VERSION_TABLE} holds {len(rows)} rows where one belongs: restore the newest good backup"
        )
    return str(rows[0][0])


def stored_revisions(connection: Connection, table: str) -> set[str]:
    """Return the revisions in a version table. If the version table does not exist, return an empty set."""
    if table not in tables(connection):
        return set()
    return {str(row[0]) for row in connection.exec_driver_sql(f"SELECT version_num FROM {table}")}  # noqa: S608  a constant


def known_revisions() -> set[str]:
    """Return the revisions whose scripts this version of homeagent contains."""
    return {script.revision for script in _scripts()}


def is_newer(revision: str) -> bool:
    """Return True if the revision can be that of a later version: four digits, and a greater number."""
    return re.fullmatch("[0-9]{4}", revision) is not None and revision > REVISION


def server_triggers(revision: str) -> dict[str, str]:
    """Return a text for each PostgreSQL trigger in a revision's schema. The text is the trigger's definition, followed
    by the function's body.
    """
    found: dict[str, str] = {}
    for script in _scripts():
        if script.revision <= revision:
            bodies: dict[str, str] = getattr(script, "POSTGRESQL_FUNCTIONS", {})
            for name, definition in getattr(script, "POSTGRESQL_TRIGGERS", {}).items():
                function = definition.rpartition(" ")[2].removesuffix("()")
                found[name] = definition + bodies[function]
    return found


def suits(connection: Connection, revision: str | None) -> bool:
    """Return True if this version works with the schema. Return False if the schema must be created or upgraded."""
    if revision is None or revision == REVISION:
        return revision is not None
    known = known_revisions()
    if revision in known:
        return False
    # The column `store.oldest_revision` contains a revision. A version that knows the revision can use the schema.
    query = text("SELECT oldest_revision FROM store")
    can_suit = is_newer(revision) and "store" in tables(connection)
    if not can_suit or connection.execute(query).scalar() not in known:
        raise errors.SchemaTooNewError(revision, known=REVISION)
    logger.info(
        "the schema is at revision %s, which this version, made for %s, may work with",
        revision,
        REVISION,
        extra={"event": "newer_schema_opened", "revision": revision, "known": REVISION},
    )
    return True


def reason_of(error: Exception) -> str:
    """Return the cause of a failure. Leave out messages of other libraries, which can contain row values."""
    if isinstance(error, RevisionFailedError):
        return str(error)
    name = type(error).__name__
    # Alembic's errors about the order of the revisions contain only identifiers of revisions.
    is_shown = isinstance(error, errors.HomeAgentError) or type(error).__module__ == "alembic.script.revision"
    return f"{name}: {error}" if is_shown else name


def place_of(error: Exception, files: Collection[str]) -> str:
    """Return the line and file of the error in a revision's script. The text begins with a comma. If no line of a
    script failed, return an empty text.
    """
    lines = [(line, Path(frame.f_code.co_filename)) for frame, line in walk_tb(error.__traceback__)]
    shown = [f", line {line} of {file.name}" for line, file in lines if str(file) in files]
    return shown[-1] if shown else ""


def upgrade(connection: Connection, to: str = "head") -> None:
    """Run homeagent's missing revisions up to the given revision. The caller holds the lock for upgrades."""
    run_revisions(connection, _scripts(), VERSION_TABLE, to)


def run_revisions(
    connection: Connection,
    modules: Sequence[ModuleType],
    version_table: str,
    to: str,
    guard: RevisionGuard | None = None,
) -> None:
    """Run the missing revisions in the current transaction. Let the guard check each revision."""
    from alembic.operations import Operations
    from alembic.runtime.migration import MigrationContext, MigrationStep
    from alembic.script import Script
    from alembic.script.revision import RevisionMap

    scripts = {module.revision: Script(module, module.revision, str(module.__file__)) for module in modules}
    known = RevisionMap(scripts.values)

    def missing(current: Any, context: MigrationContext) -> Iterator[MigrationStep]:
        for revision in reversed(list(known.iterate_revisions(to, current, implicit_base=True))):
            script = scripts[revision.revision]
            vars(script.module)["op"] = Operations(context)
            if guard is not None:
                guard.begin(revision.revision)
                if iscoroutinefunction(getattr(script.module, "upgrade", None)):
                    guard.fail("its function upgrade() is a coroutine, which Alembic never runs. Write 'def upgrade()'")
            yield MigrationStep.upgrade_from_script(known, script)
            if guard is not None:
                guard.check()

    options = {"fn": missing, "target_metadata": metadata, "transactional_ddl": True, "version_table": version_table}
    # Replace the method `autocommit_block()`, because the caller began the transaction.
    context = MigrationContext.configure(connection, opts=options)
    context.autocommit_block = nullcontext if guard is None else guard.autocommit  # type: ignore[assignment, method-assign]
    context.run_migrations()
