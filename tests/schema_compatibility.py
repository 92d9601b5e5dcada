"""Check whether a revision may run while code of the previous version still uses the same database.

Administrators upgrade hosts one after the other: the first upgraded host changes the schema under the older hosts. So a
revision only expands: columns that old code reads stay, rows that old code writes are still accepted, and names that
old code uses stay. `SHOWN` lists each new CHECK on old columns and each new trigger on an old table, with the test that
runs the previous version. A later release drops unused columns, by a revision with a declared contraction:

    oldest_revision = "0007"

The line in the revision's module declares: code for revision 0007 and later works with the contracted schema. The
revision writes the same value to `store.oldest_revision`: older code reads the value and refuses the database instead
of failing later.

The comparison uses the schemas of the database before and after the revision, not the operations of the revision.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alembic.script import ScriptDirectory
from sqlalchemy import Connection, inspect, text

from alembic import command
from homeagent.migrations import alembic_config

__all__ = ["BASELINE", "problems_of"]

BASELINE = "0004"
"""Up to here no released version ever worked beside another one: 0002 and 0004 change keys and add constraints."""

SHOWN: dict[str, str] = {
    "ck_devices_approved": "tests/test_schema_compatibility.py::test_code_of_0005_writes_what_0006_accepts",
    **dict.fromkeys(
        (
            "homeagent_device_inserted",
            "homeagent_device_updated",
            "homeagent_device_deleted",
            "homeagent_store_inserted",
            "homeagent_store_updated",
            "homeagent_device_added_or_deleted",
            "homeagent_device_changed",
            "homeagent_devices_truncated",
            "homeagent_epoch_begun",
        ),
        "tests/test_schema_compatibility.py::test_changes_of_old_code_are_in_the_feed",
    ),
}
"""A new CHECK on old columns, or a new trigger on an old table: the test that runs the previous version's code.

A CHECK or trigger passes if that test exists, and the schema before has no CHECK or trigger of this name. A trigger
must also be declared: the revision has its definition in `SQLITE_TRIGGERS` or `POSTGRESQL_TRIGGERS`, from which the
doctor knows the trigger's text.
"""

_WIDER = {("INTEGER", "BIGINT"), ("SMALLINT", "INTEGER"), ("SMALLINT", "BIGINT"), ("VARCHAR", "TEXT")}


@dataclass(frozen=True)
class _Table:
    columns: Mapping[str, Mapping[str, Any]]
    checks: Mapping[str, str]
    uniques: frozenset[tuple[str, ...]]
    references: frozenset[tuple[Any, ...]]
    primary_key: tuple[str, ...]
    triggers: frozenset[str]


def problems_of(revision: str, connection: Connection, *, scripts: Path) -> list[str]:
    """Return, as sentences, the changes of a revision that break the previous version.

    Args:
        revision: the revision to check; applied to the database after all earlier revisions.
        connection: to an empty database of either engine.
        scripts: the directory of `env.py` and the revisions.
    """
    config = alembic_config(connection)
    config.set_main_option("script_location", str(scripts).replace("%", "%%"))
    script = ScriptDirectory.from_config(config).get_revision(revision)
    before = str(script.down_revision)
    with connection.begin():
        command.upgrade(config, before)
    old, old_oldest = _structure(connection), _oldest(connection)
    with connection.begin():
        command.upgrade(config, revision)
    new, new_oldest = _structure(connection), _oldest(connection)
    declared: str | None = getattr(script.module, "oldest_revision", None)
    if declared is None:
        triggers = {*getattr(script.module, "SQLITE_TRIGGERS", ()), *getattr(script.module, "POSTGRESQL_TRIGGERS", ())}
        problems = list(_breaks(old, new, triggers))
        if old_oldest is not None and new_oldest != old_oldest:
            problems.append("store.oldest_revision changes, and the revision doesn't declare itself a contraction")
        return problems
    problems = []
    if declared > before:
        problems.append(f"it declares that code of {before} can't work with it: drop only what {before} does not use")
    if new_oldest != declared:
        problems.append(f"it declares oldest_revision {declared!r}, and store.oldest_revision is {new_oldest!r}")
    return problems


def _oldest(connection: Connection) -> str | None:
    with connection.begin():
        if not inspect(connection).has_table("store"):
            return None
        return str(connection.execute(text("SELECT oldest_revision FROM store")).scalar_one())


def _structure(connection: Connection) -> dict[str, _Table]:
    with connection.begin():
        inspector = inspect(connection)
        triggers = _triggers(connection)
        return {
            name: _Table(
                columns={str(column["name"]): dict(column) for column in inspector.get_columns(name)},
                checks={
                    str(check["name"]): " ".join(str(check["sqltext"]).split())
                    for check in inspector.get_check_constraints(name)
                },
                uniques=frozenset(
                    tuple(str(column) for column in index["column_names"])
                    for index in [
                        *inspector.get_unique_constraints(name),
                        *(index for index in inspector.get_indexes(name) if index["unique"]),
                    ]
                ),
                references=frozenset(
                    (tuple(key["constrained_columns"]), key["referred_table"], tuple(key["referred_columns"]))
                    for key in inspector.get_foreign_keys(name)
                ),
                primary_key=tuple(inspector.get_pk_constraint(name)["constrained_columns"]),
                triggers=frozenset(trigger for table, trigger in triggers if table == name),
            )
            for name in inspector.get_table_names()
        }


def _triggers(connection: Connection) -> set[tuple[str, str]]:
    if connection.dialect.name == "sqlite":
        query = "SELECT tbl_name, name FROM sqlite_master WHERE type = 'trigger'"
    else:
        query = "SELECT tgrelid::regclass::text, tgname FROM pg_trigger WHERE NOT tgisinternal"
    return {(str(table), str(trigger)) for table, trigger in connection.execute(text(query))}


def _breaks(old: Mapping[str, _Table], new: Mapping[str, _Table], declared: Set[str]) -> Iterator[str]:
    for name, before in old.items():
        if name not in new:
            yield f"table {name} is dropped or renamed"
        else:
            yield from _breaks_of_table(name, before, new[name], declared)


def _breaks_of_table(name: str, old: _Table, new: _Table, declared: Set[str]) -> Iterator[str]:
    for column, before in old.columns.items():
        if column not in new.columns:
            yield f"{name}.{column} is dropped or renamed"
        else:
            yield from _breaks_of_column(f"{name}.{column}", before, new.columns[column])
    added = new.columns.keys() - old.columns.keys()
    for column in sorted(added):
        if not new.columns[column]["nullable"] and new.columns[column]["default"] is None:
            yield f"{name}.{column} is NOT NULL without a server default: old code inserts no value"
    if new.primary_key != old.primary_key:
        yield f"the primary key of {name} changes: old code's upserts name the old one"
    yield from _breaks_of_checks(name, old, new, added)
    for columns in new.uniques - old.uniques:
        # If old code inserts a row, one of these columns is null, and nulls are distinct.
        free = any(
            new.columns[column]["nullable"] and not new.columns[column]["default"] for column in added & {*columns}
        )
        if not free:
            yield f"{name} gets unique {columns}: old code may write a duplicate"
    for columns in old.uniques - new.uniques:
        yield f"{name} loses unique {columns}: old code's upserts need it"
    for reference in new.references - old.references:
        if not added & {*reference[0]}:
            yield f"{name} gets a foreign key on {reference[0]}: old code may write what it refuses"
    for trigger in sorted(new.triggers - old.triggers):
        if trigger not in declared or not _is_shown(trigger):
            yield f"{name} gets trigger {trigger}: what it does to old code's writes can't be judged"


def _breaks_of_checks(name: str, old: _Table, new: _Table, added: Set[str]) -> Iterator[str]:
    for check, condition in new.checks.items():
        if check not in old.checks and _is_shown(check):
            continue
        if old.checks.get(check) != condition and not _mentions_only(condition, added, old.columns.keys()):
            yield f"CHECK {check} of {name} is new or changed: old code may write what it refuses"
    for check in old.checks.keys() - new.checks.keys():
        yield f"CHECK {check} of {name} is dropped: old code may read what it doesn't know"


def _breaks_of_column(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    if old["nullable"] and not new["nullable"]:
        yield f"{name} becomes NOT NULL: old code may write null"
    if new["nullable"] and not old["nullable"]:
        yield f"{name} becomes nullable: old code reads no null there"
    if old["default"] is not None and new["default"] is None:
        yield f"{name} loses its server default: old code inserts no value"
    before, after = old["type"], new["type"]
    if str(before) == str(after):
        return
    kinds = (re.sub(r"\(.*", "", str(before)), re.sub(r"\(.*", "", str(after)))
    lengths = (getattr(before, "length", None), getattr(after, "length", None))
    wider = kinds[0] == kinds[1] and lengths[0] is not None and (lengths[1] is None or lengths[1] >= lengths[0])
    if not wider and kinds not in _WIDER:
        yield f"{name} changes its type from {before} to {after}"


def _is_shown(name: str) -> bool:
    file, _, test = SHOWN.get(name, "").partition("::")
    source = (Path(__file__).parents[1] / file).read_text(encoding="utf-8") if test else ""
    return re.search(rf"^def {test}\(", source, re.MULTILINE) is not None


def _mentions_only(condition: str, added: Any, old: Any) -> bool:
    words = set(re.findall(r"\w+", re.sub(r"'[^']*'", "", condition)))
    return bool(words & set(added)) and not words & set(old)
