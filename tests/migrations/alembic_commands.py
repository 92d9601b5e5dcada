"""The configuration with which tests run Alembic's commands on homeagent's revisions."""

from __future__ import annotations

from alembic.config import Config
from sqlalchemy import Connection

from homeagent.migrations.revisions import script_directory


def alembic_config(connection: Connection | None = None) -> Config:
    """Return the configuration of homeagent's revisions for a connection."""
    config = Config()
    config.set_main_option("script_location", str(script_directory()).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config
