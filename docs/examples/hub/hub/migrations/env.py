"""Alembic's environment, for commands such as `alembic check`."""

from alembic import context
from homeagent.alembic import run_environment

run_environment(context, package="hub")
