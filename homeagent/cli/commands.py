"""All commands. Importing a module adds its commands, and the order of the imports is their order in the help."""

from homeagent.cli import schema, migrations, status, doctor, sweep, backup, restore, epoch, copy  # isort: skip  # noqa: F401
from homeagent.cli import devices, device_secrets, agents, sessions, keys, nonces, config  # isort: skip  # noqa: F401
from homeagent.cli.application import app, run

__all__ = ["app", "run"]
