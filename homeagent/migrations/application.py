"""Find and run the application's own Alembic revisions, after homeagent's revisions.

homeagent parses the scripts, and imports Alembic only for an upgrade. An application's revision must not change
homeagent's tables. The revisions of homeagent rely on the tables' structure.
"""

from __future__ import annotations

import ast
import os
import re
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from sqlalchemy import event, text

from homeagent.engine.sqlite.table_guard import refuse_changes
from homeagent.errors import InvalidArgumentError, SchemaOutdatedError, SchemaTooNewError
from homeagent.migrations.revisions import (
    SPEAK_FOR_THEMSELVES,
    RevisionFailedError,
    loaded,
    place_of,
    reason_of,
    run_revisions,
    stored_revisions,
    tables,
)
from homeagent.models import APPLICATION_VERSION_TABLE, TABLES, VERSION_TABLE
from homeagent.models.base import RESERVED_PREFIX
from homeagent.models.types import check_names

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

    from sqlalchemy import Connection

ALEMBIC_TABLE = "alembic_version"
"""Alembic's version table in an application without homeagent (https://alembic.sqlalchemy.org)."""

_PACKAGE = re.compile(r"([^\W\d]\w*(?:\.[^\W\d]\w*)*):([^:]+)")

# Maximum length of a revision's identifier. On PostgreSQL, Alembic's version table can't store a longer identifier.
_LONGEST_REVISION = 32

_PROTECTED = (*TABLES, VERSION_TABLE)

_ENDS_TRANSACTION = re.compile(
    r"(?>[\s;]|--[^\n]*|/\*.*?\*/)*+(COMMIT|END|ABORT|ROLLBACK(?!.*\bTO\b))\b", re.IGNORECASE | re.DOTALL
)

_REMEDY = (
    "Delete the statement; for a statement that can't run in a transaction, use op.get_context().autocommit_block()"
)

Outside = Callable[[], AbstractContextManager[None]]
"""Function that returns a context manager: commit, run the block, and begin a new transaction."""


@dataclass(frozen=True)
class _Script:
    file: Traversable
    revision: str
    parents: tuple[str, ...]
    dependencies: tuple[str, ...]


@dataclass(frozen=True)
class Application:
    """The application's revisions. With `adopts=True`, the upgrade renames Alembic's own version table."""

    name: str = ""
    scripts: dict[str, _Script] = field(default_factory=dict)
    head: str | None = None
    acknowledged: frozenset[str] = frozenset()
    adopts: bool = False

    @classmethod
    def of(cls, given: str | os.PathLike[str] | Application | None, acknowledged: Collection[str] = ()) -> Application:
        """Find the application's revisions (see the argument `migrations=` of `Database.open()`)."""
        if isinstance(given, Application):
            return given
        triggers = check_names(acknowledged, "acknowledged", "audit_devices")
        if given is None:
            return cls(acknowledged=triggers)
        package, folder = named_folder(given)
        name, versions = package or os.fspath(given), folder / "versions"
        if not versions.is_dir():
            raise InvalidArgumentError(
                f"migrations={os.fspath(given)!r}: there is no folder {str(versions)!r}. Correct the name, or create "
                "the first revision with 'homeagent migrations new'"
            )
        scripts = _read_scripts(name, versions)
        followed = {parent for script in scripts.values() for parent in script.parents}
        needed = {other for script in scripts.values() for other in script.dependencies}
        unknown = sorted((followed | needed) - scripts.keys())
        heads = sorted(scripts.keys() - followed)
        if unknown:
            raise InvalidArgumentError(
                f"the revisions of {name} refer to the revision {unknown[0]!r}, which the folder does not contain: "
                "add its script, or correct down_revision and depends_on"
            )
        if len(heads) > 1 or (scripts and not heads):
            shown = ", ".join(heads) or "none, because the revisions form a circle"
            raise InvalidArgumentError(
                f"the revisions of {name} must have one head and have {len(heads)}: {shown}. Add a revision that "
                "merges the heads ('alembic merge heads'), or correct down_revision"
            )
        return cls(name, scripts, heads[0] if heads else None, triggers)

    def is_pending(self, connection: Connection) -> bool:
        """Return True if a revision is missing in the database."""
        if not self.name:
            return False
        return self._stored(connection, APPLICATION_VERSION_TABLE) != ({self.head} if self.head else set())

    def _stored(self, connection: Connection, table: str) -> set[str]:
        """Return the revisions in a version table. If a revision has no script, raise SchemaTooNewError."""
        stored = stored_revisions(connection, table)
        unknown = sorted(stored - self.scripts.keys())
        if unknown:
            raise SchemaTooNewError(unknown[0], known=str(self.head), application=self.name)
        return stored

    def adopted_revisions(self, connection: Connection) -> set[str]:
        """Return the revisions in Alembic's own version table. If the upgrade will not rename the table, return an
        empty set.
        """
        if not self.adopts or not self.scripts or APPLICATION_VERSION_TABLE in tables(connection):
            return set()
        return self._stored(connection, ALEMBIC_TABLE)

    def outdated(self, connection: Connection) -> SchemaOutdatedError:
        """Return the error for a database that lacks a revision."""
        stored = stored_revisions(connection, APPLICATION_VERSION_TABLE)
        return SchemaOutdatedError(
            ", ".join(sorted(stored)) or None, needed=str(self.head), application=self.name or None
        )

    def upgrade(self, connection: Connection, outside: Outside | None = None) -> None:
        """Run the missing revisions. The caller holds the lock for upgrades. On SQLite, the caller has switched off
        foreign keys.
        """
        if self.adopted_revisions(connection):
            connection.exec_driver_sql(f"ALTER TABLE {ALEMBIC_TABLE} RENAME TO {APPLICATION_VERSION_TABLE}")
        if not self.is_pending(connection):
            return
        with revision_guard(connection, self.acknowledged, outside) as guard:
            try:
                modules = [loaded(script.file) for script in self.scripts.values()]
                run_revisions(connection, modules, APPLICATION_VERSION_TABLE, str(self.head), guard)
            except SPEAK_FOR_THEMSELVES:
                raise
            except Exception as error:
                place = place_of(error, {str(script.file) for script in self.scripts.values()})
                reason = guard.refused or reason_of(error)
                # The import of a script can fail, and the stored revisions can be inconsistent.
                failed = "revisions" if guard.revision is None else f"revision {guard.revision!r}"
                shown = f"the {failed} of {self.name}{place}: {reason}{guard.committed}"
                raise RevisionFailedError(shown, is_undone=not guard.has_ended) from error


NO_APPLICATION = Application()


def named_folder(given: str | os.PathLike[str]) -> tuple[str, Traversable]:
    """Return the package's name and the folder from the argument `migrations=`. For a path, the package's name is an
    empty text.
    """
    if not isinstance(given, (str, os.PathLike)):
        raise InvalidArgumentError(f"migrations must be 'package:folder' or a path, not {type(given).__name__}")
    named = _PACKAGE.fullmatch(given) if isinstance(given, str) else None
    if named is None:
        return "", Path(given)
    try:
        return named[1], files(named[1]).joinpath(*named[2].split("/"))
    except Exception as error:
        name = named[1]
        problem = (
            f"the package {name!r} can't be imported ({type(error).__name__}). Install the package, correct its name"
        )
        if name in sys.modules and not hasattr(sys.modules[name], "__path__"):
            problem = f"{name!r} is a module and not a package. Make the module a package"
        raise InvalidArgumentError(f"migrations={given!r}: {problem}, or pass the path of the folder") from error


def _read_scripts(name: str, versions: Traversable) -> dict[str, _Script]:
    scripts: dict[str, _Script] = {}
    for file in sorted(versions.iterdir(), key=lambda file: file.name):
        if not file.name.endswith(".py") or file.name.startswith(("_", ".")):
            continue
        script = _read_script(name, file)
        other = scripts.setdefault(script.revision, script)
        if other is not script:
            raise InvalidArgumentError(
                f"two scripts of {name} have the revision {script.revision!r}: {other.file.name} and {file.name}. "
                "Give one of them another identifier"
            )
    return scripts


def _read_script(name: str, file: Traversable) -> _Script:
    try:
        values = dict(_constants(ast.parse(file.read_text(encoding="utf-8"))))
        revision, others = values["revision"], [values.get("down_revision"), values.get("depends_on")]
    except (SyntaxError, ValueError, KeyError) as error:
        raise InvalidArgumentError(
            f"{file.name} of {name} is not a revision ({type(error).__name__}): a revision is a Python script that "
            "sets 'revision' and 'down_revision' to constants"
        ) from error
    if not isinstance(revision, str) or not 1 <= len(revision) <= _LONGEST_REVISION:
        raise InvalidArgumentError(
            f"{file.name} of {name}: the identifier of a revision must be a text of 1 to {_LONGEST_REVISION} characters"
        )
    parents, dependencies = (tuple([other] if isinstance(other, str) else other or ()) for other in others)
    return _Script(file, revision, parents, dependencies)


def _constants(module: ast.Module) -> Iterator[tuple[str, Any]]:
    for statement in module.body:
        targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        value = getattr(statement, "value", None)
        for target in targets:
            names = target.elts if isinstance(target, ast.Tuple) else [target]
            values = value.elts if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) else [value]
            for one, its_value in zip(names, values, strict=True):
                if isinstance(one, ast.Name) and one.id in ("revision", "down_revision", "depends_on"):
                    assert its_value is not None  # noqa: S101  an annotation without value is no identifier
                    yield one.id, ast.literal_eval(its_value)


class RevisionGuard:
    """State of one run of the application's revisions."""

    def __init__(self, connection: Connection, acknowledged: frozenset[str], outside: Outside | None) -> None:
        self._connection = connection
        self.raw: Any = connection.connection.driver_connection
        self._outside = outside
        self._left_transaction = False
        self._may_end = False
        self._begun = False
        self._acknowledged = acknowledged
        self._before: dict[str, tuple[str, int]] = {}
        self._statements = 0
        self._tables: set[str] = set()
        self.refused: str | None = None
        self.revision: str | None = None
        self.committed: str = ""

    def count(self, _connection: object, _cursor: object, statement: str, *_: object) -> None:
        """Count a statement that the current revision runs. Refuse a statement that would end the transaction."""
        self._statements += 1
        self.require_transaction()
        if _ENDS_TRANSACTION.match(statement):
            self.refuse_end(None)
        self._begun = True

    @property
    def has_ended(self) -> bool:
        """True if the revision has ended its transaction on PostgreSQL. On SQLite, the authorizer prevents the end."""
        if self._may_end or self._connection.dialect.driver != "psycopg":
            return False
        # On a connection without autocommit, psycopg begins the transaction with the first statement.
        return (self.raw.autocommit or self._begun) and self.raw.info.transaction_status == 0

    def require_transaction(self, *_: object) -> None:
        """Raise an error if the revision has ended its transaction."""
        if self.has_ended:
            self.fail(f"it has ended its transaction, so its statements can stay. {_REMEDY}")

    def refuse_end(self, action: object) -> None:
        """Raise an error before the revision ends its transaction, except for an `autocommit_block()` of Alembic."""
        # After a refused end, SQLAlchemy sends ROLLBACK to a connection that the revision closes.
        if not self._may_end and (action != "ROLLBACK" or self.refused is None):
            self.fail(
                f"it sends COMMIT or ROLLBACK, or closes the connection, which would end its transaction. {_REMEDY}"
            )

    @contextmanager
    def may_end(self, block: AbstractContextManager[None]) -> Iterator[None]:
        """Run the caller's block in a context manager that commits and begins another transaction."""
        self._may_end = True
        try:
            with block:
                yield
        finally:
            self._may_end = self._begun = False

    def fail(self, reason: str) -> NoReturn:
        """Raise an error with the reason. Also store the reason, because SQLAlchemy can replace the raised error."""
        self.refused = reason
        raise RevisionFailedError(reason)

    def refuse(self, table: str) -> None:
        """Store the error message for a change of one of homeagent's tables."""
        self.refused = (
            f"it changes homeagent's table {table}, which only homeagent's own revisions may change. Put the "
            "application's data into a table of the application; change rows by homeagent's stores; acknowledge a "
            "trigger by its name (acknowledged=…, or --acknowledge)"
        )

    def begin(self, revision: str) -> None:
        """Before a revision, record its id and the database's state for `check()`."""
        self.revision = revision
        self._tables = tables(self._connection)
        self._before = _server_state(self._connection, self._acknowledged)
        self._statements = 0

    def check(self) -> None:
        """Raise an error for a changed homeagent table, or a reserved table name."""
        if self.refused is None:
            after = _server_state(self._connection, self._acknowledged)
            changed = sorted(name for name in self._before if self._before[name] != after.get(name))
            if changed:
                self.refuse(changed[0])
        if self.refused is not None:
            self.fail(self.refused)
        created = tables(self._connection) - self._tables
        reserved = sorted(name for name in created if name.lower().startswith(RESERVED_PREFIX))
        if reserved:
            self.fail(
                f"it creates the table {reserved[0]!r}, but names that begin with {RESERVED_PREFIX!r} are reserved for "
                "homeagent's tables. Give the table another name"
            )
        if self._outside is not None and self._left_transaction:
            # Commit now: a rollback could not undo statements outside the transaction.
            with self._outside():
                self._left_transaction = False

    @contextmanager
    def autocommit(self) -> Iterator[None]:
        """Replace Alembic's context manager `autocommit_block()`."""
        if self._outside is None:
            yield
            return
        if self._statements:
            self.fail(
                "it runs statements before its autocommit_block, and a failure in the block could not undo these "
                "statements. Move the statements to an earlier revision"
            )
        self.committed = " (the earlier revisions, and statements outside a transaction, stay)"
        self._left_transaction = True
        with self.may_end(self._outside()):
            yield
        # After COMMIT, compare only the structure of the tables. PostgreSQL resets the counts of written rows at
        # COMMIT. Compare now, because the revision can undo its change later.
        before, self._before = self._before, _server_state(self._connection, self._acknowledged)
        changed = sorted(name for name in before if before[name][0] != self._before.get(name, ("", 0))[0])
        if changed:
            self.refuse(changed[0])
            self.check()


@contextmanager
def revision_guard(
    connection: Connection, acknowledged: frozenset[str], outside: Outside | None = None
) -> Iterator[RevisionGuard]:
    """During the block, prevent the application's revisions from changing homeagent's tables."""
    guard = RevisionGuard(connection, acknowledged, outside)
    listeners: dict[str, Any] = {
        "before_cursor_execute": guard.count,
        "after_cursor_execute": guard.require_transaction,
        "commit": guard.refuse_end,
        "rollback": guard.refuse_end,
    }
    for name, listener in listeners.items():
        event.listen(connection, name, listener)
    try:
        is_sqlite = connection.dialect.name == "sqlite"
        with (
            refuse_changes(guard.raw, _PROTECTED, acknowledged, guard.refuse, guard.refuse_end)
            if is_sqlite
            else nullcontext()
        ):
            yield guard
    finally:
        for name, listener in listeners.items():
            event.remove(connection, name, listener)
        if guard.refused is not None and not connection.closed:
            connection.connection.rollback()  # SQLAlchemy sends no ROLLBACK after `refuse_end()`
            connection.rollback()


# Select each table's structure as text, and the number of written rows. TRUNCATE changes relfilenode.
_STATE = text(
    "SELECT c.relname, concat_ws(' ', c.oid, c.relfilenode, c.relowner, c.relrowsecurity,"
    " (SELECT string_agg(concat_ws(' ', attname, atttypid, atttypmod, attnotnull, attisdropped,"
    "   pg_get_expr(d.adbin, d.adrelid)), ',' ORDER BY attnum)"
    "  FROM pg_attribute a LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum"
    "  WHERE attrelid = c.oid AND attnum > 0),"
    " (SELECT string_agg(concat_ws(' ', conname, pg_get_constraintdef(oid)), ',' ORDER BY oid)"
    "  FROM pg_constraint WHERE conrelid = c.oid),"
    " (SELECT string_agg(pg_get_indexdef(indexrelid), ',' ORDER BY indexrelid) FROM pg_index WHERE indrelid = c.oid),"
    " (SELECT string_agg(concat_ws(' ', tgname, tgenabled), ',' ORDER BY tgname) FROM pg_trigger WHERE tgrelid = c.oid"
    "  AND CASE WHEN tgisinternal THEN tgenabled <> 'O' ELSE tgname <> ALL (CAST(:acknowledged AS text[])) END),"
    " (SELECT string_agg(pg_get_functiondef(p.oid), ',' ORDER BY p.oid) FROM pg_trigger"
    "  JOIN pg_proc p ON p.oid = tgfoid WHERE tgrelid = c.oid AND proname LIKE 'homeagent%'),"
    " (SELECT string_agg(concat_ws(' ', inhparent, inhrelid), ',' ORDER BY inhrelid) FROM pg_inherits"
    "  WHERE c.oid IN (inhparent, inhrelid)),"
    " (SELECT string_agg(concat_ws(' ', s.oid, s.relfilenode), ',' ORDER BY s.oid) FROM pg_depend"
    "  JOIN pg_class s ON s.oid = objid WHERE refobjid = c.oid AND classid = refclassid AND s.relkind = 'S'),"
    " (SELECT string_agg(rulename, ',' ORDER BY rulename) FROM pg_rewrite WHERE ev_class = c.oid)),"
    " coalesce((SELECT n_tup_ins + n_tup_upd + n_tup_del FROM pg_stat_xact_all_tables WHERE relid = c.oid), 0)"
    " FROM unnest(CAST(:names AS text[])) AS names(name) JOIN pg_class c ON c.oid = to_regclass(name)"
)


def _server_state(connection: Connection, acknowledged: frozenset[str]) -> dict[str, tuple[str, int]]:
    """Return the structure and the number of written rows of homeagent's tables. On SQLite, return an empty dict."""
    if connection.dialect.name == "sqlite":
        return {}
    parameters = {"names": list(_PROTECTED), "acknowledged": list(acknowledged)}
    return {name: (structure, written) for name, structure, written in connection.execute(_STATE, parameters)}
