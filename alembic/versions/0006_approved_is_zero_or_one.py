"""Add a CHECK that a device's approval is 0 or 1.

Before this revision SQLite accepted any value in the column, and PostgreSQL accepted any integer. Values
other than 0 and 1 become 0 (not approved), and a warning names these devices. The backup before the upgrade
keeps the old values.

Revision ID: 0006
Revises: 0005
"""

import logging

import sqlalchemy as sa

from alembic import op

revision: str = "0006"
down_revision: str | None = "0005"
branch_labels: str | None = None
depends_on: str | None = None

CONDITION = "approved IN (0, 1)"

logger = logging.getLogger("homeagent")


def _withdraw_odd_approvals(connection: sa.Connection) -> None:
    devices = sa.table("devices", sa.column("id"), sa.column("approved"))
    is_odd = sa.text(f"({CONDITION}) IS NOT TRUE")
    odd = connection.execute(sa.select(devices.c.id).where(is_odd).order_by(devices.c.id)).scalars().all()
    if not odd:
        return
    connection.execute(sa.update(devices).where(is_odd).values(approved=0))
    logger.warning(
        "schema revision 0006 counts devices as not approved, since their stored approval is neither 0 nor 1: %s. "
        "Look at each, then approve or revoke it",
        ", ".join(map(repr, odd)),
        extra={"event": "approvals_withdrawn", "revision": revision, "devices": list(odd)},
    )


def _add_check_on_sqlite(connection: sa.Connection) -> None:
    # Create the table again from its SQL text. Alembic's batch mode would lose additions of the host application, such
    # as triggers, indexes on expressions and collations. Batch mode also renames a table, which fails if a view reads
    # the table.
    (create,) = connection.exec_driver_sql(
        "SELECT sql FROM sqlite_master WHERE type = 'table' AND name = 'devices'"
    ).one()
    others = connection.exec_driver_sql(
        "SELECT sql FROM sqlite_master WHERE type IN ('index', 'trigger') AND lower(tbl_name) = 'devices'"
        " AND sql IS NOT NULL ORDER BY rowid"
    ).all()
    # PRAGMA table_info omits generated columns. SQLite computes these columns again.
    columns = ", ".join(f'"{row[1]}"' for row in connection.exec_driver_sql("PRAGMA table_info(devices)"))
    body, _, options = create.rpartition(")")
    for statement in (
        f"CREATE TABLE _alembic_tmp_devices AS SELECT {columns} FROM devices",  # noqa: S608  names of columns
        "DROP TABLE devices",
        f"{body.rstrip()}, \n\tCONSTRAINT ck_devices_approved CHECK ({CONDITION})\n){options}",
        f"INSERT INTO devices ({columns}) SELECT {columns} FROM _alembic_tmp_devices",  # noqa: S608  as above
        "DROP TABLE _alembic_tmp_devices",
        *(statement for (statement,) in others),
    ):
        connection.exec_driver_sql(statement)


def upgrade() -> None:
    """Bring the schema to this revision."""
    connection = op.get_bind()
    if connection.dialect.name == "sqlite":
        _withdraw_odd_approvals(connection)
        _add_check_on_sqlite(connection)
        return
    # Lock the table before its rows. Otherwise this revision and a unit that locks two rows could deadlock.
    op.execute("LOCK TABLE devices IN ACCESS EXCLUSIVE MODE")
    _withdraw_odd_approvals(connection)
    op.create_check_constraint(op.f("ck_devices_approved"), "devices", CONDITION)
