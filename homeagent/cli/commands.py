"""All commands. The imports add the commands. The order of the imports is the order in the help."""

import io
import logging
import sys
from typing import Any

import typer

from homeagent.cli import schema, status, doctor, backup  # isort: skip  # noqa: F401
from homeagent.cli import devices, agents, sessions, keys  # isort: skip  # noqa: F401
from homeagent.cli.application import app

command: Any = typer.main.get_command(app)
"""The command `homeagent`, which Typer builds from the functions."""


def run() -> None:
    """Run the command in `sys.argv`, and exit with its status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Print characters outside the terminal's encoding as escapes instead of raising UnicodeEncodeError.
            stream.reconfigure(errors="backslashreplace")
    # Without a handler, Python would print SQLAlchemy's log records on standard error.
    logging.getLogger("sqlalchemy").addHandler(logging.NullHandler())
    command(prog_name="homeagent")
