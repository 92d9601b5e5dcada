"""The command line. Each command or group of commands has a module. The module `application` holds common parts.

The exit status is 0 for success, 1 for a refused operation, and 2 for wrong usage. A refused operation prints one line
on standard error.
"""

# Each import adds the commands of a module. The order of the imports is the order of the commands in the help.
from homeagent.cli import schema, migrations, status, doctor, sweep, backup, restore, epoch, copy, devices, keys  # isort: skip  # noqa: F401
from homeagent.cli.application import app, main

__all__ = ["app", "main"]
