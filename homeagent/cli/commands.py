"""All commands. The imports below add the commands, and the help lists the commands in the order of the imports."""

import io
import logging
import sys
from typing import Any

import typer

from homeagent.cli import schema, status, doctor, backup  # isort: skip  # noqa: F401
from homeagent.cli import devices, agents, sessions, keys  # isort: skip  # noqa: F401
from homeagent.cli.application import app

command: Any = typer.main.get_command(app)
"""The command `homeagent`, which Typer builds from the functions in 0.1 s."""


def run() -> None:
    """Run the command in `sys.argv`, and exit with the status of the command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Print characters outside the terminal's encoding as escapes instead of raising UnicodeEncodeError.
            stream.reconfigure(errors="backslashreplace")
    # Without a handler, Python would print SQLAlchemy's log records on standard error, for example after Ctrl-C.
    logging.getLogger("sqlalchemy").addHandler(logging.NullHandler())
    command(prog_name="homeagent")
