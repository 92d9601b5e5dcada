"""Find the constraint that refused a change. SQLite's message often lacks the constraint's name. If the name is
missing, read the name from the schema.
"""

from __future__ import annotations

import re
from typing import Any

import apsw

from homeagent.engine.driver_errors import constraint_conflict, sqlite_code_name
from homeagent.errors import ConflictError

_KINDS = {
    apsw.SQLITE_CONSTRAINT_UNIQUE: "unique",
    apsw.SQLITE_CONSTRAINT_PRIMARYKEY: "unique",
    apsw.SQLITE_CONSTRAINT_ROWID: "unique",
    apsw.SQLITE_CONSTRAINT_NOTNULL: "not_null",
    apsw.SQLITE_CONSTRAINT_CHECK: "check",
    apsw.SQLITE_CONSTRAINT_FOREIGNKEY: "foreign_key",
    apsw.SQLITE_CONSTRAINT_DATATYPE: "datatype",
}

_NAME = r"""(?:"(?:[^"]|"")+"|`[^`]+`|\[[^\]]+\]|\w+)"""
_TARGET = re.compile(rf"\s*(?:WITH\b.*?\)\s*)?(INSERT|REPLACE|UPDATE|DELETE)\b.*?({_NAME})(?=\s|\()", re.I | re.S)
_IGNORED = re.compile(r"/\*.*?\*/|\b(OR\s+\w+|INTO|FROM)\b\s*", re.I | re.S)


# For a refused COMMIT, the SQL parameter `:target` is an empty text. Only a deferred foreign key can refuse a COMMIT.
# The last column names the key's columns in the written table, separated by "|". A change of a row can change or delete
# rows of other tables by CASCADE.
_FOREIGN_KEYS = """
    WITH RECURSIVE key AS (
        SELECT child.name AS child, list.*, CASE :verb WHEN 'UPDATE' THEN on_update ELSE on_delete END AS act
        FROM sqlite_master AS child, pragma_foreign_key_list(child.name) AS list WHERE child.type = 'table'),
    reached(name) AS (
        SELECT :target UNION SELECT 'idempotency_keys' WHERE :target = 'devices' COLLATE NOCASE  -- by a trigger
        UNION SELECT child FROM key JOIN reached ON key."table" = name COLLATE NOCASE
        WHERE act = 'CASCADE')
    SELECT child, group_concat("from", ', ' ORDER BY seq), child <> :target COLLATE NOCASE,
        group_concat(CASE :target COLLATE NOCASE WHEN child THEN "from" WHEN "table" THEN "to" END, '|')
    FROM key
    WHERE CASE WHEN :target = ''
        THEN (child, id) IN (
            SELECT broken.name, fkid FROM sqlite_master AS broken, pragma_foreign_key_check(broken.name)
            WHERE broken.type = 'table' AND broken.sql LIKE '%DEFERR%')
        ELSE :verb <> 'DELETE' AND child = :target COLLATE NOCASE
            OR :verb <> 'INSERT' AND "table" COLLATE NOCASE IN (SELECT name FROM reached)
                AND act NOT IN ('CASCADE', 'SET NULL')
        END
    GROUP BY child, id
"""
_UNIQUE_INDEXES = """
    SELECT name FROM pragma_index_list(:table) AS listed WHERE "unique" AND origin = 'c' AND :columns =
        (SELECT group_concat(ifnull(name, ''), ', ' ORDER BY seqno) FROM pragma_index_info(listed.name))
"""


def named_conflict(raw: Any, error: BaseException, statement: str | None) -> ConflictError | None:
    """Return a ConflictError if a constraint refused the change, otherwise None. The argument `statement=` is the
    refused SQL text, or None for COMMIT.
    """
    code = getattr(error, "extendedresult", 0)
    # For a foreign key with RESTRICT, SQLite reports the code of a trigger.
    is_restrict = code == apsw.SQLITE_CONSTRAINT_TRIGGER and str(error) == "FOREIGN KEY constraint failed"
    kind = "foreign_key" if is_restrict else _KINDS.get(code)
    if kind is None:
        return None
    table: str | None = None
    constraint: str | None = None
    message = str(error).partition(": ")[2]
    try:
        if kind == "foreign_key":
            table, constraint = _foreign_key(raw, statement)
        elif kind == "check":
            table, constraint = _table_of_check(raw, message, statement), message
        elif kind == "datatype":
            table, _, constraint = str(error).rpartition(" ")[2].partition(".")
        elif message.startswith("index '"):
            constraint = message.removeprefix("index '").removesuffix("'")
            found = _rows(
                raw, "SELECT tbl_name FROM sqlite_master WHERE type = 'index' AND name = :name", name=constraint
            )
            table = str(found[0][0]) if found else None
        else:
            table = message.partition(".")[0]
            columns = ", ".join(part.removeprefix(f"{table}.") for part in message.split(", "))
            constraint = (_unique_name(raw, table, columns) if kind == "unique" else None) or columns
    except (apsw.Error, UnicodeError):
        pass  # the schema can't be read, so the error contains fewer names
    return constraint_conflict(kind, table, constraint, sqlite_code_name(error))


def _rows(raw: Any, query: str, **parameters: object) -> list[Any]:
    """Run a query with named parameters, and return all rows."""
    rows: list[Any] = raw.execute(query, parameters).fetchall()
    return rows


def _target(statement: str | None) -> tuple[str, str]:
    """Return a write statement's verb and table, or two empty texts."""
    found = _TARGET.match(_IGNORED.sub("", statement or ""))
    return ("", "") if found is None else (found[1].upper(), _unquoted(found[2]))


def _unquoted(name: str) -> str:
    """Return an SQL name without its quotes, backticks or brackets. The name must not be empty."""
    return name[1:-1].replace('""', '"') if name[0] in '"`[' else name


def _table_of_check(raw: Any, check: str, statement: str | None) -> str | None:
    holders = _rows(raw, "SELECT name FROM sqlite_master WHERE type = 'table' AND instr(sql, :check)", check=check)
    _, target = _target(statement)
    found = [name for (name,) in holders if name.lower() == target.lower()] or [name for (name,) in holders]
    return found[0] if len(found) == 1 else None


def _unique_name(raw: Any, table: str, columns: str) -> str | None:
    """Return the name of the unique index or constraint, or None."""
    for (index,) in _rows(raw, _UNIQUE_INDEXES, table=table, columns=columns):
        return str(index)
    return _constraint_name(raw, table, r"(?:UNIQUE|PRIMARY\s+KEY)", columns)


def _constraint_name(raw: Any, table: str, kind: str, columns: str) -> str | None:
    """Return the name of a constraint in CREATE TABLE, or None. The argument `kind=` is a regex for the constraint's
    keywords.
    """
    query = "SELECT sql FROM sqlite_master WHERE type = 'table' AND name = :table COLLATE NOCASE"
    for (sql,) in _rows(raw, query, table=table):
        for name, listed in re.findall(rf"CONSTRAINT\s+({_NAME})\s+{kind}\s*\(([^)]*)\)", sql, re.I):
            if ", ".join(_unquoted(column.strip()) for column in listed.split(",")) == columns:
                return _unquoted(name)
    return None


def _has_references(raw: Any, table: str, columns: str) -> bool:
    """Return True if a row of the referring table has a value in the key's columns."""
    names = ['"{}"'.format(name.replace('"', '""')) for name in (table, *columns.split(", "))]
    conditions = " AND ".join(f"{name} IS NOT NULL" for name in names[1:])
    return bool(_rows(raw, f"SELECT 1 FROM {names[0]} WHERE {conditions} LIMIT 1"))  # noqa: S608  quoted


def _foreign_key(raw: Any, statement: str | None) -> tuple[str | None, str | None]:
    """Return the failed foreign key's table and name, each None if unknown."""
    verb, target = _target(statement)
    candidates = _rows(raw, _FOREIGN_KEYS, target=target, verb=verb)
    sql = (statement or "").lower()
    if verb == "UPDATE" and "select" not in sql:
        # The statement changes only the columns before WHERE.
        changed = re.split(r"\bwhere\b", sql, maxsplit=1)[0]
        candidates = [each for each in candidates if any(map(changed.__contains__, (each[3] or "").lower().split("|")))]
    if len(candidates) > 1:
        candidates = [each for each in candidates if not each[2] or _has_references(raw, each[0], each[1])]
    if len({child for child, *_ in candidates}) != 1:
        return None, None
    table, columns = candidates[0][:2]
    if len(candidates) != 1:
        return table, None
    return table, _constraint_name(raw, table, r"FOREIGN\s+KEY", columns) or columns
