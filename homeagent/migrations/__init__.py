"""Schema migrations: find the revisions, lock, back up, upgrade and verify. There is a module for each engine."""

from homeagent.migrations.revisions import REVISION, VERSION_TABLE, alembic_config, revision_of

__all__ = ["REVISION", "VERSION_TABLE", "alembic_config", "revision_of"]
