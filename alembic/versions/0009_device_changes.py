"""Add the table `device_changes`, and triggers that add a row for each change of a device.

The triggers also record the changes of other programs and of older versions of homeagent. The feed begins with one row
of the kind `reset` and the number 0. Existing devices get no rows.

Numbers become visible in ascending order. SQLite has one writer at a time. On PostgreSQL the trigger of a device runs
at COMMIT, takes an advisory lock that lasts until the commit is visible, and only then takes a number.

A new epoch, or a copy of the store, restarts the feed. The row `reset` then has the current time in milliseconds as its
number, because no earlier feed has reached this number.

Revision ID: 0009
Revises: 0008
"""

import sqlalchemy as sa

from alembic import op

revision: str = "0009"
down_revision: str | None = "0008"
branch_labels: str | None = None
depends_on: str | None = None

TEXT = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
BIG = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
KINDS = ("paired", "approved", "revoked", "rotated", "updated", "deleted", "reset")

# A unit that only records the last contact of a device changes no other column, and is not a change of the feed. The
# list has all other columns. On SQLite a trigger with a list costs nothing if an UPDATE sets no column of the list. A
# trigger without a list doubled the time of `update_last_seen`.
COLUMNS = (
    "id",
    "role",
    "approved",
    "shared_secret_hash",
    "proof_verifier",
    "metadata",
    "approved_at",
    "revoked_at",
    "revoked_reason",
    "previous_secret_hash",
    "previous_secret_expires_at",
    "paired_at",
)


def _conditions(differs: str) -> dict[str, str]:
    """Return the SQL condition of each kind for an UPDATE that belongs into the feed."""
    found = {
        "deleted": f"NEW.id {differs} OLD.id",
        "paired": f"NEW.id {differs} OLD.id",
        "approved": f"NEW.approved = 1 AND (OLD.approved {differs} 1 OR NEW.id {differs} OLD.id)",
        "revoked": f"NEW.approved {differs} 1"
        " AND (OLD.approved = 1 OR (OLD.revoked_at IS NULL AND NEW.revoked_at IS NOT NULL))",
        "rotated": f"NEW.shared_secret_hash {differs} OLD.shared_secret_hash"
        f" OR NEW.proof_verifier {differs} OLD.proof_verifier",
    }
    found["updated"] = " AND ".join(f"({condition}) IS NOT TRUE" for condition in dict.fromkeys(found.values()))
    return found


# SQLite. Do not use operators or functions that SQLite 3.22 lacks, because other programs with an old library could no
# longer read the schema.

_NOW = "CAST((julianday('now') - 2440587.5) * 86400000.0 AS INTEGER)"


def _time(column: str) -> str:
    # A trigger must not copy a text or a BLOB into `at`, because every reader of the feed would fail.
    return f"CASE typeof({column}) WHEN 'integer' THEN {column} ELSE {_NOW} END"


def _row(device_id: str, kind: str, at: str, condition: str | None = None) -> str:
    where = "" if condition is None else f" WHERE {condition}"
    return f"INSERT INTO device_changes (device_id, kind, at) SELECT {device_id}, '{kind}', {at}{where};"


def _sqlite_update() -> str:
    times = {"approved": _time("NEW.approved_at"), "revoked": _time("NEW.revoked_at")}
    return " ".join(
        _row("OLD.id" if kind == "deleted" else "NEW.id", kind, times.get(kind, _NOW), condition)
        for kind, condition in _conditions("IS NOT").items()
    ).replace("IS NOT TRUE", "IS NOT 1")


SQLITE_TRIGGERS = {
    "homeagent_device_inserted": "AFTER INSERT ON devices BEGIN "
    + _row("NEW.id", "paired", _time("NEW.paired_at"))
    + " "
    + _row("NEW.id", "approved", _time("NEW.approved_at"), "NEW.approved = 1")
    + " END",
    "homeagent_device_updated": f"AFTER UPDATE OF {', '.join(COLUMNS)} ON devices"
    f" WHEN {' OR '.join(f'NEW.{name} IS NOT OLD.{name}' for name in COLUMNS)} BEGIN {_sqlite_update()} END",
    "homeagent_device_deleted": f"AFTER DELETE ON devices BEGIN {_row('OLD.id', 'deleted', _NOW)} END",
    **{
        f"homeagent_store_{when}": f"AFTER {event} ON store BEGIN "  # noqa: S608  constants
        "INSERT INTO device_changes (number, kind, at)"
        f" SELECT max({_NOW}, coalesce(NEW.restored_at, 0), coalesce(max(number), 0) + 1), 'reset',"
        f" coalesce(NEW.restored_at, {_NOW}) FROM device_changes;"
        " DELETE FROM device_changes WHERE number < (SELECT max(number) FROM device_changes); END"
        for when, event in (("inserted", "INSERT"), ("updated", "UPDATE OF epoch"))
    },
}

# PostgreSQL. The functions run with the rights of the owner of the table, because a role that may change devices need
# not have rights on the feed or on its sequence. Each name of a table has its schema, and `search_path` is fixed:
# https://www.postgresql.org/docs/current/sql-createfunction.html#SQL-CREATEFUNCTION-SECURITY

_LOCK = "PERFORM pg_advisory_xact_lock(1751346785, hashtext(TG_TABLE_SCHEMA));"  # 1751346785: bytes of "hcha"
_NOTIFY = "PERFORM pg_notify('homeagent_device_changes', TG_TABLE_SCHEMA);"
_PRESENT = "present CONSTANT bigint := floor(extract(epoch FROM clock_timestamp()) * 1000);"


def _postgresql_kinds() -> str:
    return "\n".join(
        f"    IF {condition} THEN kinds := kinds || '{kind}'::text; END IF;"
        for kind, condition in _conditions("IS DISTINCT FROM").items()
    )


# In a trigger for INSERT, the record OLD is null. In a trigger for DELETE, the record NEW is null.
POSTGRESQL_FUNCTIONS = {
    "homeagent_record_device_change": f"""
DECLARE
    {_PRESENT}
    numbers CONSTANT regclass := format('%I.device_changes_numbers', TG_TABLE_SCHEMA);
    kinds text[] := ARRAY[]::text[];
    kind text;
BEGIN
    IF TG_OP = 'INSERT' THEN
        kinds := CASE WHEN NEW.approved = 1 THEN ARRAY['paired', 'approved'] ELSE ARRAY['paired'] END;
    ELSIF TG_OP = 'DELETE' THEN
        kinds := ARRAY['deleted'];
    ELSE
{_postgresql_kinds()}
    END IF;
    IF cardinality(kinds) = 0 THEN
        RETURN NULL;
    END IF;
    {_LOCK}
    FOREACH kind IN ARRAY kinds LOOP
        EXECUTE format('INSERT INTO %I.device_changes VALUES ($1, $2, $3, $4)', TG_TABLE_SCHEMA)
        USING nextval(numbers), CASE kind WHEN 'deleted' THEN OLD.id ELSE NEW.id END, kind, coalesce(
            CASE kind
            WHEN 'paired' THEN NEW.paired_at WHEN 'approved' THEN NEW.approved_at WHEN 'revoked' THEN NEW.revoked_at
            END,
            present
        );
    END LOOP;
    {_NOTIFY}
    RETURN NULL;
END
""",  # noqa: S608  constants
    "homeagent_restart_device_changes": f"""
DECLARE
    {_PRESENT}
    restored_at CONSTANT bigint := (to_jsonb(NEW) ->> 'restored_at')::bigint;
    first bigint;
BEGIN
    {_LOCK}
    EXECUTE format('SELECT greatest($1, $2, max(number) + 1) FROM %I.device_changes', TG_TABLE_SCHEMA)
    INTO first USING present, restored_at;
    EXECUTE format('DELETE FROM %I.device_changes', TG_TABLE_SCHEMA);
    PERFORM setval(format('%I.device_changes_numbers', TG_TABLE_SCHEMA)::regclass, first);
    EXECUTE format('INSERT INTO %I.device_changes (number, kind, at) VALUES ($1, ''reset'', $2)', TG_TABLE_SCHEMA)
    USING first, coalesce(restored_at, present);
    {_NOTIFY}
    RETURN NULL;
END
""",  # noqa: S608  constants
}


def _is_change() -> str:
    """Return PostgreSQL's condition of an UPDATE that belongs into the feed, as `pg_get_triggerdef` prints it."""
    # PostgreSQL refuses to change the type of a column that a condition names, so leave out `paired_at`, which no
    # method of the stores changes.
    others = " OR ".join(f"new.{name} IS DISTINCT FROM old.{name}" for name in COLUMNS if name != "paired_at")
    return f"NOT new.last_seen_at IS DISTINCT FROM old.last_seen_at OR {others}"


# The texts are those of pg_get_triggerdef.
POSTGRESQL_TRIGGERS = {
    "homeagent_device_added_or_deleted": "CREATE CONSTRAINT TRIGGER homeagent_device_added_or_deleted"
    " AFTER INSERT OR DELETE ON devices DEFERRABLE INITIALLY DEFERRED"
    " FOR EACH ROW EXECUTE FUNCTION homeagent_record_device_change()",
    "homeagent_device_changed": "CREATE CONSTRAINT TRIGGER homeagent_device_changed"
    " AFTER UPDATE ON devices DEFERRABLE INITIALLY DEFERRED"
    f" FOR EACH ROW WHEN ({_is_change()})"
    " EXECUTE FUNCTION homeagent_record_device_change()",
    "homeagent_devices_truncated": "CREATE TRIGGER homeagent_devices_truncated AFTER TRUNCATE ON devices"
    " FOR EACH STATEMENT EXECUTE FUNCTION homeagent_restart_device_changes()",
    "homeagent_epoch_begun": "CREATE CONSTRAINT TRIGGER homeagent_epoch_begun"
    " AFTER INSERT OR UPDATE OF epoch ON store DEFERRABLE INITIALLY DEFERRED"
    " FOR EACH ROW EXECUTE FUNCTION homeagent_restart_device_changes()",
}


def upgrade() -> None:
    """Bring the schema to this revision."""
    connection = op.get_bind()
    op.create_table(
        "device_changes",
        sa.Column("number", BIG, autoincrement=False, nullable=False),
        sa.Column("device_id", TEXT, nullable=True),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("at", BIG, nullable=False),
        sa.CheckConstraint(f"kind IN ({', '.join(map(repr, KINDS))})", name=op.f("ck_device_changes_kind")),
        sa.PrimaryKeyConstraint("number", name=op.f("pk_device_changes")),
        sqlite_autoincrement=True,
    )
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql(
            f"INSERT INTO device_changes (number, kind, at) VALUES (0, 'reset', {_NOW})"  # noqa: S608  constants
        )
        for name, definition in SQLITE_TRIGGERS.items():
            connection.exec_driver_sql(f"CREATE TRIGGER {name} {definition}")
        return
    connection.exec_driver_sql(
        "INSERT INTO device_changes (number, kind, at)"
        " VALUES (0, 'reset', floor(extract(epoch FROM clock_timestamp()) * 1000))"
    )
    op.execute("CREATE SEQUENCE device_changes_numbers OWNED BY device_changes.number")
    for name, body in POSTGRESQL_FUNCTIONS.items():
        op.execute(
            f"CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER"
            f" SET search_path = pg_catalog, pg_temp AS $${body}$$"
        )
    for definition in POSTGRESQL_TRIGGERS.values():
        connection.exec_driver_sql(definition)
