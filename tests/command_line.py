"""Run the command `homeagent` in the process of a test, which takes a few milliseconds instead of a second."""

from __future__ import annotations

import io
import sys
from collections.abc import Mapping
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest

from homeagent import AgentCreate, AgentSessionCreate, Database, DevicePair, IdempotencyScope, Role
from homeagent.cli.commands import command
from tests.conftest import ROOT, START, FakeClock


class Result(NamedTuple):
    """What a command printed, and its exit status."""

    exit_code: int
    stdout: str
    stderr: str

    @property
    def output(self) -> str:
        """The text of both streams."""
        return self.stdout + self.stderr


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def invoke(
    *arguments: object, input: str | None = "", env: Mapping[str, str] | None = None, terminal: bool = False
) -> Result:
    """Run a command. An unexpected exception reaches the test.

    Args:
        arguments: arguments of the command, which are converted to text.
        input: text on the standard input. With None the process has no standard input.
        env: variables that are added to the environment.
        terminal: whether the standard input and the standard error are a terminal.
    """
    kind = _Terminal if terminal else io.StringIO
    output, errors = io.StringIO(), kind()
    stdin = None if input is None else kind(input)
    with ExitStack() as stack:
        for context in (
            redirect_stdout(output),
            redirect_stderr(errors),
            mock.patch.object(sys, "stdin", stdin),
            mock.patch.dict("os.environ", env or {}),
        ):
            stack.enter_context(context)
        with pytest.raises(SystemExit) as ended:
            command(list(map(str, arguments)), prog_name="homeagent")
    assert isinstance(ended.value.code, int)
    return Result(ended.value.code, output.getvalue(), errors.getvalue())


def create_rows(path: Path | str) -> None:
    """Open a store, and create a row in each table at `START`. The attempt of the idempotency key is abandoned."""
    with Database.open(path, clock=FakeClock()) as database:
        database.pair(DevicePair(id="lamp", role=Role.NODE))
        database.agents.create(AgentCreate(id="butler", name="Butler", workspace_path="/srv"))
        database.sessions.create(AgentSessionCreate(session_id="talk", agent_id="butler"))
        database.nonces.consume("lamp", "n1", expires_at=START + timedelta(minutes=5))
        scope = IdempotencyScope("lamp", "play", "k1")
        database.idempotency_keys.claim(scope, fingerprint="f", lease=timedelta(0), ttl=timedelta(days=300))


def old_store(directory: Path) -> Path:
    """Return the path of a private store at revision 0002, in a new directory."""
    path = directory / "h.db"
    directory.mkdir(mode=0o700)
    path.write_bytes((ROOT / "tests" / "fixtures" / "revisions" / "0002.db").read_bytes())
    path.chmod(0o600)
    return path
