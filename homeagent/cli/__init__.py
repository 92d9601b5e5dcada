"""The command line: one module for each command or group of commands. `application` holds their common parts.

Exit status: 0; 1 for a refused operation, with one line on standard error; 2 for wrong usage.
"""

# Each import adds the commands of a module. The order of the imports is the order of the commands in the help.
from homeagent.cli import schema, status, doctor, sweep, backup, restore, epoch, copy, devices, keys  # isort: skip  # noqa: F401
from homeagent.cli.application import app, main

__all__ = ["app", "main"]
