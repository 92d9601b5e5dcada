"""Find the view or the trigger of an application that an upgrade of a SQLite file would break.

When a revision renames a rebuilt table, SQLite checks all views and triggers, and a broken view or trigger makes the
upgrade fail (https://sqlite.org/lang_altertable.html). Therefore the revisions first run on a scratch database in
memory with the schema of the file, but without rows. The rehearsal does not change the file.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from homeagent.engine.sqlite.inspection import scratch_sqlite
from homeagent.errors import MigrationError
from homeagent.migrations.revisions import upgrade

if TYPE_CHECKING:
    from sqlalchemy import Connection

__all__ = ["refuse_broken_objects"]

_CULPRIT = re.compile(r"error in (view|trigger) (.+?)(?: after \w+)?:")


def refuse_broken_objects(connection: Connection, revision: str, location: str) -> None:
    """Raise MigrationError if the upgrade would break a view or a trigger.

    Args:
        connection: connection to the file, in a transaction.
        revision: schema revision of the file.
        location: name of the file, for the error message.
    """
    query = "SELECT sql FROM sqlite_master WHERE sql IS NOT NULL AND name NOT LIKE 'sqlite~_%' ESCAPE '~' ORDER BY "
    # Create the tables first and the triggers last, because a view can refer to a later view, and a trigger needs its
    # table.
    order = "CASE type WHEN 'table' THEN 1 WHEN 'view' THEN 2 ELSE 3 END, rowid"
    statements = [str(row[0]) for row in connection.exec_driver_sql(query + order)]
    if not any(re.match(r"\s*CREATE\s+(TEMP\w*\s+)?(VIEW|TRIGGER)\b", sql, re.IGNORECASE) for sql in statements):
        return
    found = None
    with scratch_sqlite() as scratch:
        try:
            with scratch.begin():
                for sql in statements:
                    scratch.exec_driver_sql(sql)
                versions = connection.exec_driver_sql("SELECT version_num FROM homeagent_schema_version").all()
                for (version,) in versions:
                    scratch.exec_driver_sql("INSERT INTO homeagent_schema_version VALUES (?)", (version,))
                upgrade(scratch)
        except Exception as error:  # noqa: BLE001  the upgrade of the file raises any other error
            found = _CULPRIT.search(str(getattr(error, "orig", error)))
    if found is not None:
        kind, name = found[1], found[2]
        raise MigrationError(
            f"upgrading {location} from {revision!r} would break the application's {kind} {name}, which uses "
            f"homeagent's tables: drop the {kind}, open the database again, and then create the {kind} again. Nothing "
            "was changed"
        )
