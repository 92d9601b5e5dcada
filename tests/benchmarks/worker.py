"""One contender in a process of its own: does what it is told on standard input, a line of JSON at a time.

python -m tests.benchmarks.worker MODULE:CLASS TARGET DURABILITY [traced] [shared]
python -m tests.benchmarks.worker MODULE:CLASS describe [shared]
"""

from __future__ import annotations

import asyncio
import gc
import inspect
import json
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import asdict
from importlib import import_module
from typing import Any

from tests.benchmarks.contender import AsyncContender, Contender, plain
from tests.benchmarks.data import read_trace

__all__ = ["main"]


class WrongAnswerError(Exception):
    """A call that must find or write something did not."""


class Worker:
    """A contender and, where its methods are coroutines, the event loop that they run in."""

    def __init__(self, contender: Contender, loop: asyncio.AbstractEventLoop) -> None:
        self.contender = contender
        self.loop = loop

    def finish(self, value: Any) -> Any:
        """Return the value, awaited where it has to be."""
        return self.loop.run_until_complete(value) if inspect.isawaitable(value) else value

    def time(self, work: str, arguments: list[Any]) -> dict[str, float]:
        """Do a piece of work once for each set of arguments, and return the seconds on the clock and on the CPU."""
        arguments = self.contender.prepare(work, arguments)
        operation: Callable[..., Any] = getattr(self.contender, work)
        gc.collect()
        cpu, wall = time.process_time(), time.perf_counter()
        if inspect.iscoroutinefunction(operation):
            self.loop.run_until_complete(_each_awaited(operation, arguments))
        else:
            _each(operation, arguments)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        return {"seconds": wall, "cpu": cpu}

    def ask(self, work: str, arguments: list[Any]) -> dict[str, Any]:
        """Do the same without a clock, and return the answers."""
        arguments = self.contender.prepare(work, arguments)
        operation: Callable[..., Any] = getattr(self.contender, work)
        return {"answers": [plain(work, self.finish(operation(*each))) for each in arguments]}

    def replay(self, events: int | None, seconds: float) -> dict[str, Any]:
        """Live through the trace for so long at most; return how far and how long that was, and what came of it."""
        trace = _Stretch(read_trace(events), seconds)
        gc.collect()
        cpu, wall = time.process_time(), time.perf_counter()
        tally = self.finish(self.contender.replay(trace))
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        return {"seconds": wall, "cpu": cpu, "events": trace.lived, "tally": asdict(tally)}


class _Stretch:
    """Events, until the time is up that counts from the first of them; that one comes in any case.

    Attributes:
        lived: how many there were.
    """

    def __init__(self, events: Sequence[dict[str, Any]], seconds: float) -> None:
        self.events = events
        self.seconds = seconds
        self.lived = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        deadline = time.perf_counter() + self.seconds
        for number, event in enumerate(self.events, 1):
            if number > 1 and time.perf_counter() > deadline:
                return
            self.lived = number
            yield event


def _each(operation: Callable[..., Any], arguments: Sequence[Sequence[Any]]) -> None:
    for each in arguments:
        if not operation(*each):
            raise WrongAnswerError("it found or wrote nothing")


async def _each_awaited(operation: Callable[..., Awaitable[Any]], arguments: Sequence[Sequence[Any]]) -> None:
    for each in arguments:
        if not await operation(*each):
            raise WrongAnswerError("it found or wrote nothing")


def load(name: str) -> type[Contender]:
    """Return the class that `module:Class` names."""
    module_name, _, class_name = name.partition(":")
    contender: type[Contender] = getattr(import_module(module_name), class_name)
    return contender


def share_sqlite() -> None:
    """Make what a library imports as `sqlite3` the one that homeagent uses: no SQLite is compared with another one."""
    from homeagent.engine.sqlite.driver import choose_driver

    driver = choose_driver()
    if driver.name != "sqlite3":
        sys.modules["sqlite3"] = import_module(driver.name)
        sys.modules["sqlite3.dbapi2"] = driver.module


def main(arguments: Sequence[str]) -> None:
    """Serve until standard input ends."""
    name, target, *options = arguments
    if "shared" in options:
        share_sqlite()
    if target == "describe":
        sys.stdout.write(load(name).describe() + "\n")
        return
    replies = sys.stdout
    # A library that prints must not end up among the replies.
    sys.stdout = sys.stderr
    loop = asyncio.new_event_loop()
    contender = load(name)(target, options[0], traced="traced" in options)
    worker = Worker(contender, loop)
    if isinstance(contender, AsyncContender):
        worker.finish(contender.open())
    for line in sys.stdin:
        request = json.loads(line)
        act = request.pop("do")
        try:
            if act == "end":
                worker.finish(contender.close())
                reply: dict[str, Any] = {}
            else:
                reply = getattr(worker, act)(**request)
        except Exception as error:  # noqa: BLE001  the parent decides what becomes of it
            reply = {"error": type(error).__name__, "message": str(error)}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()
        if act == "end":
            return


if __name__ == "__main__":
    main(sys.argv[1:])
