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
from pathlib import Path

from sqlalchemy import Connection, inspect, text

from homeagent.migrations import VERSION_TABLE
from homeagent.migrations.expansion import breaks, structure
from homeagent.migrations.revisions import loaded, run_revisions

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


def problems_of(revision: str, connection: Connection, *, scripts: Path) -> list[str]:
    """Return, as sentences, the changes of a revision that break the previous version.

    Args:
        revision: the revision to check; applied to the database after all earlier revisions.
        connection: to an empty database of either engine.
        scripts: the directory of `env.py` and the revisions.
    """
    modules = {str(module.revision): module for module in map(loaded, sorted((scripts / "versions").glob("*.py")))}
    script = modules[revision]
    before = str(script.down_revision)
    with connection.begin():
        run_revisions(connection, list(modules.values()), VERSION_TABLE, before)
    old, old_oldest = structure(connection), _oldest(connection)
    with connection.begin():
        run_revisions(connection, list(modules.values()), VERSION_TABLE, revision)
    new, new_oldest = structure(connection), _oldest(connection)
    declared: str | None = getattr(script, "oldest_revision", None)
    if declared is None:
        triggers = {*getattr(script, "SQLITE_TRIGGERS", ()), *getattr(script, "POSTGRESQL_TRIGGERS", ())}
        accepted = {name for name in SHOWN if _is_shown(name) and (name in triggers or name.startswith("ck_"))}
        problems = list(breaks(old, new, accepted))
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


def _is_shown(name: str) -> bool:
    file, _, test = SHOWN.get(name, "").partition("::")
    source = (Path(__file__).parents[1] / file).read_text(encoding="utf-8") if test else ""
    return re.search(rf"^def {test}\(", source, re.MULTILINE) is not None
