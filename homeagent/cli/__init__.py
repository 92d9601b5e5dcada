"""The command line: one module for each command or group of commands, on the frame in `application`.

The exit status is 0; 1 for a refused operation, with one line on standard error; 2 for wrong usage.
"""

# Importing a module is what adds its commands, and their order here is their order in the help.
from homeagent.cli import schema, status, doctor, sweep, backup, restore, epoch, copy, devices, keys  # isort: skip  # noqa: F401
from homeagent.cli.application import app, main

__all__ = ["app", "main"]
