"""The schema's versions: find the revisions, lock, back up, upgrade, verify. One module for each engine."""

from homeagent.migrations.revisions import REVISION, VERSION_TABLE, alembic_config, revision_of

__all__ = ["REVISION", "VERSION_TABLE", "alembic_config", "revision_of"]
