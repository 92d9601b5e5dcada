"""A load of several writers on a store whose primary fails, and checks of the store afterwards."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from sqlalchemy import text

from homeagent import Database
from tests.conftest import Children, RecordProperty
from tests.fork_server import Process
from tests.postgresql.writer import PATIENCE, WRITER

WRITERS = 8


def wait_for(what: str, condition: Callable[[], object], *, seconds: float = 60) -> None:
    """Poll until a condition outside of this process is true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.02)


class Load:
    """Writers in separate processes on a store that exists, with their ledgers in an empty directory."""

    def __init__(self, children: Children, url: str, directory: Path) -> None:
        self._children = children
        self._url = url
        self._directory = directory
        self._processes: list[Process] = []
        self._kills: list[float] = []
        self._lines: list[list[dict[str, Any]]] = [[] for _ in range(WRITERS)]
        self._read = [0] * WRITERS
        self.acknowledged = 0
        """Number of units that returned."""
        self.outages: list[tuple[float, float]] = []
        """Seconds without an acknowledgement at each failover, of the first and the last writer to continue."""

    def start(self) -> None:
        """Start the writers, and return when each writer has written."""
        self._processes = [self._children.start(WRITER, self._url, self._directory, n) for n in range(WRITERS)]
        self.wait_for_turns(1, since=0)

    def lines(self, writer: int) -> list[dict[str, Any]]:
        """Return the lines of a writer's ledger, without an incomplete last line."""
        path = self._directory / f"w{writer}.ledger"
        if path.exists():
            with path.open() as file:
                file.seek(self._read[writer])
                for line in file:
                    if line.endswith("\n"):
                        self._lines[writer].append(json.loads(line))
                        self._read[writer] += len(line)
        return self._lines[writer]

    def wait_for_turns(self, turns: int, *, since: float | None = None) -> None:
        """Wait until each writer has done this many turns since a time; None means now."""
        instant = time.monotonic() if since is None else since

        def done() -> bool:
            for process in self._processes:
                assert process.poll() is None, process.communicate()[1]
            # The first of the last `count` units began after that time, and so did the later units.
            ledgers = [self.lines(writer) for writer in range(WRITERS)]
            count = 4 * turns
            return all(
                len(ledger) >= count and ledger[-count]["at"] - ledger[-count]["took"] >= instant for ledger in ledgers
            )

        wait_for(f"{turns} turns of each writer", done, seconds=PATIENCE.total_seconds() + 20)

    def killing(self) -> None:
        """Record that the primary is killed now."""
        self._kills.append(time.monotonic())

    def stop(self) -> None:
        """Let the writers end normally, and measure their outages."""
        (self._directory / "stop").touch()
        for process in self._processes:
            self._children.finish(process)
        ledgers = [self.lines(writer) for writer in range(WRITERS)]
        self.acknowledged = sum(map(len, ledgers))
        for kill, until in zip(self._kills, [*self._kills[1:], time.monotonic()], strict=True):
            # The longest time between two acknowledgements of a writer, with the later acknowledgement after the kill.
            gaps = sorted(
                max(later["at"] - line["at"] for line, later in pairwise(ledger) if kill < later["at"] <= until)
                for ledger in ledgers
            )
            self.outages.append((gaps[0], gaps[-1]))

    def record(self, record_property: RecordProperty, lost: Sequence[str]) -> None:
        """Report the figures. The lost parts take turns."""
        for number, outage in enumerate(self.outages):
            for seconds in outage:
                record_property(f"{lost[number % len(lost)]}: time until a writer continues", seconds)
        record_property("units acknowledged during failovers, each stored exactly once", self.acknowledged)

    def check(self, database: Database) -> None:
        """Check that every acknowledged unit is stored, and is stored once."""
        with database.unit_of_work(read_only=True) as unit:
            agents = {str(row[0]) for row in unit.session.connection().execute(text("SELECT id FROM agents"))}
            nonces = {str(row[0]) for row in unit.session.connection().execute(text("SELECT nonce FROM nonces"))}
            keys = unit.session.connection().execute(text("SELECT method, result FROM idempotency_keys")).all()
        effects = Counter((self._directory / "effects").read_text().split())
        created: set[str] = set()
        answers: dict[int, list[bool | None]] = {}
        acted: set[str] = set()
        for writer in range(WRITERS):
            name = f"w{writer}"
            ledger = self.lines(writer)
            numbers = [line["number"] for line in ledger if line["kind"] == "count"]
            assert numbers == list(range(len(numbers)))
            with database.unit_of_work(read_only=True) as unit:
                assert unit.agents.get(f"count-{name}").config == [len(numbers), len(numbers) - 1]
            for line in ledger:
                number, value = line["number"], line["value"]
                if line["kind"] == "create":
                    assert value.startswith(f"{name}-{number}-")
                    created.add(value)
                elif line["kind"] == "nonce":
                    answers.setdefault(number, []).append(value)
                elif line["kind"] == "effect":
                    assert value == f"{name}-{number}"
                    acted.add(value)
        # All writers ended normally: the stored and the acknowledged units are the same.
        assert agents == created | {f"count-w{writer}" for writer in range(WRITERS)}
        assert effects == Counter(acted)
        assert Counter(keys) == Counter(
            [("create", json.dumps(agent_id)) for agent_id in created]
            + [("effect", json.dumps(name)) for name in acted]
        )
        assert nonces <= {str(number) for number in answers}
        assert nonces >= {str(number) for number, told in answers.items() if True in told}
        for number, told in answers.items():
            assert told.count(True) <= 1, f"nonce {number} let {told.count(True)} in"
            assert True in told or None in told, f"nonce {number} let nobody in"
