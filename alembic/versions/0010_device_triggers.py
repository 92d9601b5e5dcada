"""Delete the idempotency keys of a deleted device by triggers. Let a unit set the time of its device changes.

The triggers also run if SQL, the ORM, a sweep or an older version deletes the device. A device with a new id counts as
deleted. The device's nonces stay. TRUNCATE on PostgreSQL keeps the keys. Existing rows do not change.

On PostgreSQL, the trigger of a device adds the changes at COMMIT. A unit sets `homeagent.now`, and another trigger
stores this time in the changes. On SQLite, the unit updates its changes.

Revision ID: 0010
Revises: 0009
"""

from alembic import op

revision: str = "0010"
down_revision: str | None = "0009"
branch_labels: str | None = None
depends_on: str | None = None

_DELETE = "DELETE FROM idempotency_keys WHERE device_id = OLD.id"

SQLITE_TRIGGERS = {
    "homeagent_device_keys_deleted": f"AFTER DELETE ON devices BEGIN {_DELETE}; END",
    "homeagent_device_keys_left": f"AFTER UPDATE OF id ON devices WHEN NEW.id IS NOT OLD.id BEGIN {_DELETE}; END",
}

# The comments of revision 0009 explain the rights, the `search_path` and the names with a schema.
POSTGRESQL_FUNCTIONS = {
    # In a trigger for DELETE, the record NEW is null.
    "homeagent_delete_idempotency_keys": """
BEGIN
    IF NEW.id IS DISTINCT FROM OLD.id THEN
        EXECUTE format('DELETE FROM %I.idempotency_keys WHERE device_id = $1', TG_TABLE_SCHEMA) USING OLD.id;
    END IF;
    RETURN NULL;
END
""",
    # A setting that an earlier transaction of the session made is empty.
    "homeagent_time_device_change": """
BEGIN
    NEW.at := coalesce(nullif(current_setting('homeagent.now', true), '')::bigint, NEW.at);
    RETURN NEW;
END
""",
}

# The texts are those of pg_get_triggerdef. Do not defer the first trigger. At COMMIT, the trigger would also delete the
# keys of a new device with the same id (`test_each_deletion_removes_results`).
POSTGRESQL_TRIGGERS = {
    "homeagent_device_keys_deleted": "CREATE TRIGGER homeagent_device_keys_deleted"
    " AFTER DELETE OR UPDATE OF id ON devices FOR EACH ROW EXECUTE FUNCTION homeagent_delete_idempotency_keys()",
    "homeagent_device_change_timed": "CREATE TRIGGER homeagent_device_change_timed BEFORE INSERT ON device_changes"
    " FOR EACH ROW WHEN (new.kind = ANY (ARRAY['rotated'::text, 'updated'::text, 'deleted'::text]))"
    " EXECUTE FUNCTION homeagent_time_device_change()",
}


def upgrade() -> None:
    """Bring the schema to this revision."""
    connection = op.get_bind()
    if connection.dialect.name == "sqlite":
        for name, definition in SQLITE_TRIGGERS.items():
            connection.exec_driver_sql(f"CREATE TRIGGER {name} {definition}")
        return
    for name, body in POSTGRESQL_FUNCTIONS.items():
        op.execute(
            f"CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER"
            f" SET search_path = pg_catalog, pg_temp AS $${body}$$"
        )
    for definition in POSTGRESQL_TRIGGERS.values():
        connection.exec_driver_sql(definition)
