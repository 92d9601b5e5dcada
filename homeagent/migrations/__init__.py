"""Schema migrations: find the revisions, lock, back up, upgrade and verify. Each engine has a module."""

from homeagent.migrations.revisions import REVISION, VERSION_TABLE, alembic_config, revision_of

__all__ = ["REVISION", "VERSION_TABLE", "alembic_config", "revision_of"]
