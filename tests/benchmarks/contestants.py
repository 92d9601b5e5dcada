"""Who takes part, what each needs, and the process that each runs in."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.benchmarks import node

__all__ = [
    "BASELINE",
    "CONTESTANTS",
    "PATIENCE",
    "BenchmarkError",
    "ContenderError",
    "Contestant",
    "Process",
    "choose",
]

ROOT = Path(__file__).resolve().parents[2]

BASELINE = "sqlite3"

READS = ("device", "find_key", "agent_sessions")


PATIENCE = 600.0
"""The seconds after which a request is given up: nothing that is measured takes a tenth of that."""

WRONG = "WrongAnswer"
"""The kind of failure of a contender that does something else than it should."""


class BenchmarkError(Exception):
    """Something can't be measured."""


class ContenderError(BenchmarkError):
    """A contender failed or answered wrongly; the others go on without it.

    Args:
        contender: its name.
        message: what it did, for who runs this.
        kind: the class of its error, or how its process ended. Unlike the message it names nothing of this machine.
    """

    def __init__(self, contender: str, message: str, kind: str = WRONG) -> None:
        super().__init__(f"{contender} {message}")
        self.contender = contender
        self.kind = kind


@dataclass(frozen=True)
class Contestant:
    """A contender as the command line knows it.

    Attributes:
        name: what it is called.
        command: what runs it, before target, durability and options.
        requires: the module without which it is skipped.
        shared: whether it is given homeagent's SQLite library; the others bring or pick their own.
        peer: whether it is another library, which is measured less often.
        works: the only pieces of work that it takes part in; empty for all.
    """

    name: str
    command: tuple[str, ...]
    requires: str | None = None
    shared: bool = False
    peer: bool = True
    works: tuple[str, ...] = ()

    @classmethod
    def python(cls, name: str, module: str, **options: Any) -> Self:
        """Return one that is a class of a module in `contenders`."""
        path = f"tests.benchmarks.contenders.{module}"
        return cls(name, (sys.executable, "-m", "tests.benchmarks.worker", path), **options)

    def takes_part(self, work: str) -> bool:
        """Return whether it is measured at a piece of work."""
        return not self.works or work in self.works

    def missing(self) -> str | None:
        """Return why it can't take part here, None where it can."""
        if self.command[0] == "node":
            return node.why_missing()
        if self.requires is not None and importlib.util.find_spec(self.requires) is None:
            return f"{self.requires} is not installed: install homeagent[bench]"
        return None

    def version(self) -> str:
        """Return the versions of what is measured, as the contender tells them.

        Raises:
            ContenderError: it can't even be imported.
        """
        told = subprocess.run(
            [*self.command, "describe", *self.options()],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            env=_environment(),
        )
        if told.returncode:
            kind = f"exit status {told.returncode}"
            raise ContenderError(self.name, f"can't be imported: {kind}, see above", kind)
        return told.stdout.strip()

    def options(self) -> list[str]:
        """Return what its process is told beyond target and durability."""
        return ["shared"] if self.shared else []


CONTESTANTS: dict[str, Contestant] = {
    each.name: each
    for each in (
        Contestant.python(BASELINE, "handwritten:Handwritten", peer=False),
        Contestant.python("homeagent", "homeagent_:HomeAgent", peer=False),
        Contestant.python("sqlite3, autocommit", "handwritten:Autocommit", works=READS),
        Contestant.python("sqlite3, objects", "handwritten:Objects", works=READS),
        Contestant.python("apsw", "apsw_:Apsw", requires="apsw"),
        Contestant("better-sqlite3", node.command()),
        Contestant.python("SQLAlchemy Core", "sqlalchemy_core:SQLAlchemyCore", shared=True),
        Contestant.python("SQLAlchemy ORM", "sqlalchemy_orm:SQLAlchemyORM", shared=True),
        Contestant.python("SQLModel", "sqlmodel_:SQLModelTutorial", shared=True),
        Contestant.python("peewee", "peewee_:Peewee", requires="peewee", shared=True),
        Contestant.python("Django", "django_:Django", requires="django", shared=True),
        Contestant.python("Pony", "pony_:Pony", requires="pony", shared=True),
        Contestant.python("Tortoise", "tortoise_:TortoiseModels", requires="tortoise", shared=True),
        Contestant.python("Piccolo", "piccolo_:PiccoloTables", requires="piccolo", shared=True),
        Contestant.python("sqlite-utils", "sqlite_utils_:SqliteUtils", requires="sqlite_utils", shared=True),
    )
}


def choose(names: Sequence[str] | None) -> tuple[list[Contestant], dict[str, str]]:
    """Return who takes part, the baseline first, and why the others don't.

    Args:
        names: of contenders, or `path.to.module:Class` for one of your own; None for all.

    Raises:
        BenchmarkError: a name is unknown.
    """
    chosen = [CONTESTANTS[BASELINE]]
    for name in CONTESTANTS if names is None else names:
        if ":" in name:
            chosen.append(Contestant(name, (sys.executable, "-m", "tests.benchmarks.worker", name)))
        elif name not in CONTESTANTS:
            raise BenchmarkError(f"no contender is called {name!r}: there are {', '.join(CONTESTANTS)}")
        elif name != BASELINE:
            chosen.append(CONTESTANTS[name])
    skipped = {each.name: reason for each in chosen if (reason := each.missing()) is not None}
    return [each for each in chosen if each.name not in skipped], skipped


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "0"}


class Process:
    """A contender's process, which waits for requests; a context manager that ends it.

    Args:
        contestant: whose.
        target: the file, or the URL of a server.
        durability: `full` or `normal`.
        traced: whether its clock follows the trace.
    """

    def __init__(self, contestant: Contestant, target: str, durability: str, *, traced: bool = False) -> None:
        self.contestant = contestant
        self.target = target
        traces = ["traced"] if traced else []
        self._process = subprocess.Popen(
            [*contestant.command, target, durability, *contestant.options(), *traces],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=_environment(),
        )

    def request(self, act: str, **parameters: Any) -> dict[str, Any]:
        """Have something done, and return the reply.

        Raises:
            ContenderError: it could not be done, or not in ten minutes.
        """
        process = self._process
        doing = parameters.get("work", act)
        assert process.stdin is not None
        assert process.stdout is not None
        # Ends a process that hangs, so that its pipe does.
        patience = threading.Timer(PATIENCE, process.kill)
        patience.start()
        try:
            process.stdin.write(json.dumps({"do": act, **parameters}) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            given_up = patience.finished.is_set()
            patience.cancel()
        if not line:
            kind = "no answer" if given_up else f"exit status {process.wait()}"
            raise ContenderError(self.contestant.name, f"failed at {doing}: {kind}, see above", kind)
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            message = f"failed at {doing}: {reply['error']}: {reply['message']}"
            raise ContenderError(self.contestant.name, message, reply["error"])
        return reply

    def kill(self) -> None:
        """End it now."""
        self._process.kill()
        self._process.communicate()

    def close(self) -> None:
        """Let it end by itself, so that it closes its database.

        Raises:
            ContenderError: it did not.
        """
        try:
            if self._process.poll() is None:
                self.request("end")
                self._process.wait(timeout=60)
        except subprocess.TimeoutExpired as error:
            raise ContenderError(self.contestant.name, "does not end", "no end") from error
        finally:
            self.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            self.kill()
        else:
            self.close()
