"""Writing and watching processes that are killed while a feed of device changes grows, and checks of what arrived."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from homeagent import Database
from tests.conftest import Children
from tests.fork_server import Process
from tests.postgresql.load import wait_for

__all__ = ["FeedLoad"]

# A commit is acknowledged by a line with the device and the times before and after the commit.
WRITER = """
import select, sys, time
from homeagent import Database, DeviceCreate, Role
from homeagent.errors import CommitUnknownError, ConnectionLostError

def pair(unit):
    unit.devices.create(DeviceCreate(id=device, role=Role.NODE, shared_secret_hash="h"))
    unit.devices.approve(device)

with Database.open(sys.argv[1]) as database:
    for number in range(1_000_000):
        if select.select([sys.stdin], [], [], 0.01)[0]:
            break
        device, began = f"{sys.argv[2]}-{number}", time.monotonic()
        try:
            database.run(pair)
        except (CommitUnknownError, ConnectionLostError):
            continue
        print(device, began, time.monotonic(), flush=True)
"""

WATCHER = """
import asyncio, sys, time
from homeagent import Database
from homeagent.errors import DatabaseError

async def main(after):
    with Database.open(sys.argv[1]) as database:
        while True:
            try:
                async for change in database.watch_devices(after=after):
                    print(change.number, change.device_id, change.kind.value, time.monotonic(), flush=True)
                    after = change.number
            except DatabaseError as error:
                print(f"the iterator ended: {error}", file=sys.stderr, flush=True)
                await asyncio.sleep(0.1)

asyncio.run(main(int(sys.argv[2])))
"""


@dataclass
class _Process:
    """A process and the whole lines that it has printed. A thread reads the lines, so that the pipe is never full."""

    process: Process
    lines: list[list[str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        self.lines.extend(line.split() for line in self.process.stdout if line.endswith("\n"))

    def kill(self) -> None:
        """End the process with SIGKILL, and read its last lines."""
        self.process.kill()
        self.process.wait(30)
        self._reader.join(30)

    def stop(self) -> None:
        """Let a writer end normally, and read its last lines."""
        self.process.stdin.write("stop\n")
        self.process.stdin.flush()
        assert self.process.wait(60) == 0, self.process.stderr and self.process.stderr.read()
        self._reader.join(30)


class FeedLoad:
    """Writers, watchers that are killed, and a watcher that lives as long as the load.

    Args:
        children: the fixture that starts the processes.
        target: path or URL of an empty store.
        writers: number of writers.
    """

    def __init__(self, children: Children, target: str, *, writers: int) -> None:
        self._children = children
        self._target = target
        self._chance = random.Random(7)
        self._names = iter(range(1_000_000))
        self._writers = [self._start_writer() for _ in range(writers)]
        self._ended_writers: list[_Process] = []
        # The first watcher is never killed. Each watcher has the lines of its earlier processes.
        self._watchers = [self._start_watcher([]) for _ in range(3)]
        self._before: list[list[list[str]]] = [[] for _ in self._watchers]
        self.counts = {"kills of writers": 0, "kills of watchers": 0, "other disturbances": 0}

    def _start_writer(self) -> _Process:
        return _Process(self._children.start(WRITER, self._target, f"w{next(self._names)}"))

    def _start_watcher(self, lines: Sequence[Sequence[str]]) -> _Process:
        return _Process(self._children.start(WATCHER, self._target, lines[-1][0] if lines else 0))

    def wait_for_changes(self, count: int) -> None:
        """Wait until so many further changes have arrived."""
        lines = self._watchers[0].lines
        wanted = len(lines) + count
        wait_for(f"{count} changes", lambda: len(lines) >= wanted)

    def kill_a_writer(self) -> None:
        """End a writer with SIGKILL, and start another writer."""
        number = self._chance.randrange(len(self._writers))
        self._writers[number].kill()
        self._ended_writers.append(self._writers[number])
        self._writers[number] = self._start_writer()
        self.counts["kills of writers"] += 1

    def kill_a_watcher(self) -> None:
        """End a watcher with SIGKILL. Start another watcher, which continues after the last number of the first."""
        number = self._chance.randrange(1, len(self._watchers))
        self._watchers[number].kill()
        self._before[number] += self._watchers[number].lines
        self._watchers[number] = self._start_watcher(self._before[number])
        self.counts["kills of watchers"] += 1

    def run(self, rounds: int, *, changes: int, disturb: Callable[[int], object] | None = None) -> None:
        """Kill processes in each round, and call `disturb()` with the number of the round."""
        for number in range(rounds):
            self.wait_for_changes(changes)
            # A process that begins while a server restarts could not open the store.
            wait_for("all processes", lambda: all(each.lines for each in (*self._writers, *self._watchers)))
            if disturb is not None:
                disturb(number)
                self.counts["other disturbances"] += 1
            self.kill_a_writer()
            self.kill_a_watcher()
        self.wait_for_changes(changes)

    def stop_and_check(self) -> float:
        """Stop the writers, check what the watchers got, print the figures, and return p99 of the delay in seconds."""
        for writer in self._writers:
            writer.stop()
        with Database.open(self._target) as database:
            feed = database.devices.changes(after=0, limit=1_000_000)
            devices = {device.id for device in database.devices.list(limit=1_000_000)}
        wait_for(
            "the last change",
            lambda: all(
                watcher.lines[-1:] and watcher.lines[-1][0] == str(feed[-1].number) for watcher in self._watchers
            ),
        )
        for watcher, before in zip(self._watchers, self._before, strict=True):
            watcher.kill()
            assert [line[:3] for line in before + watcher.lines] == [
                [str(row.number), row.device_id, row.kind.value] for row in feed
            ]
        assert {row.device_id for row in feed} == devices
        return self._check_commits()

    def _check_commits(self) -> float:
        """Check that each acknowledged commit has arrived, after each commit that had ended before it began."""
        arrived = {line[1]: (int(line[0]), float(line[3])) for line in self._watchers[0].lines if line[2] == "approved"}
        latencies = []
        ends: list[tuple[float, int]] = []
        begins: list[tuple[float, int]] = []
        for writer in (*self._ended_writers, *self._writers):
            for device, began, ended in writer.lines:
                number, at = arrived[device]
                latencies.append(at - float(ended))
                begins.append((float(began), number))
                ends.append((float(ended), number))
        ends.sort()
        newest = position = 0
        for begin, number in sorted(begins):
            while ends[position][0] < begin:
                newest = max(newest, ends[position][1])
                position += 1
            assert number > newest, "a later commit has a smaller number"
        latencies.sort()
        p99 = latencies[len(latencies) * 99 // 100]
        print(  # noqa: T201  the result
            f"{len(latencies)} commits, {2 * len(arrived)} changes, {self.counts}; latency: "
            f"p50 {latencies[len(latencies) // 2]:.3f} s, p99 {p99:.3f} s, longest {latencies[-1]:.3f} s"
        )
        return p99
