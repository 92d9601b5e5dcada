"""Samples, taken in turns: each contender's time beside the baseline's of the same moment."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from tests.benchmarks.contestants import BenchmarkError, ContenderError, Contestant, Process
from tests.benchmarks.data import Rows, count_rows
from tests.benchmarks.works import SLICES, Work

__all__ = ["Contest", "Measured", "Plan", "Runner", "Say", "copy_database", "expect_rows", "spread"]

Say = Callable[[str], object]


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        rounds: how often each contender is started anew, on a fresh copy of the database.
        repeats: how many samples of each piece of work are taken in a round; of a peer, one.
        pairs: how many samples are taken side by side where a round takes only one, and a goal rests on their ratio.
        seconds: how long a sample should take: a quick contender makes more calls than a slow one.
        peer_seconds: the same of a peer.
    """

    rounds: int = 3
    repeats: int = 5
    pairs: int = 5
    seconds: float = 0.15
    peer_seconds: float = 0.1

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise BenchmarkError("a run has 1 round or more")
        if not 1 <= self.repeats < SLICES - 1:
            raise BenchmarkError(f"1 to {SLICES - 2} repeats fit on one copy of the database")


def spread(ratios: Sequence[float]) -> dict[str, float]:
    """Return the median of some samples, the least and the greatest."""
    return {"ratio": median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios)}


@dataclass
class Measured:
    """What was measured of one contender at one piece of work.

    Attributes:
        seconds: per call, on the clock, of each sample.
        cpu: per call, of the process's processor time.
        ratios: of each sample's seconds to the baseline's sample beside it.
        cpu_ratios: the same of the processor time, where the baseline used any that was noticed.
    """

    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    cpu_ratios: list[float] = field(default_factory=list)

    def add(self, time: tuple[float, float], baseline: tuple[float, float]) -> None:
        """Add a sample beside the baseline's: of each its seconds on the clock and on the CPU."""
        self.seconds.append(time[0])
        self.cpu.append(time[1])
        self.ratios.append(time[0] / baseline[0])
        if baseline[1]:
            self.cpu_ratios.append(time[1] / baseline[1])

    def summary(self) -> dict[str, Any]:
        """Return the figures that are reported, and the samples."""
        return {
            "seconds": median(self.seconds),
            "cpu": median(self.cpu),
            **spread(self.ratios),
            "ratio_cpu": median(self.cpu_ratios) if self.cpu_ratios else None,
            "samples": {"seconds": self.seconds, "cpu": self.cpu, "ratios": self.ratios},
        }


def copy_database(template: Path, directory: Path) -> Path:
    """Return the path of a private copy of a database that nobody has open."""
    directory.mkdir(mode=0o700)
    path = directory / template.name
    shutil.copyfile(template, path)
    path.chmod(0o600)
    # Or the first checkpoint syncs the whole copy, and whoever commits at that moment waits 60 ms and more for it.
    with path.open("rb+") as copy:
        os.fsync(copy.fileno())
    return path


class Contest:
    """Some contenders at some pieces of work, measured a round at a time; who fails at one is out of that one.

    Args:
        plan: how much is measured.
        contestants: who; the first is the baseline.
        works: at what.
        rows: what the databases hold.
        durability: `full` or `normal`.
        target_of: makes a fresh database for a contender.
        say: is told what is being done.
        warn: is told of failures.
        count: returns how many rows each table of a target has.

    Attributes:
        failed: by piece of work and contender, what kind of failure it was.
    """

    def __init__(
        self,
        plan: Plan,
        contestants: Sequence[Contestant],
        works: Sequence[Work],
        rows: Rows,
        durability: str,
        target_of: Callable[[Contestant], str],
        say: Say,
        warn: Say,
        count: Callable[[str], dict[str, int]] = lambda target: count_rows(Path(target)),
    ) -> None:
        self.plan = plan
        self.contestants = contestants
        self.works = works
        self.rows = rows
        self.durability = durability
        self.target_of = target_of
        self.say = say
        self.warn = warn
        self.count = count
        self.measured = {
            work.name: {each.name: Measured() for each in contestants if each.takes_part(work.name)} for work in works
        }
        self.failed: dict[str, dict[str, str]] = {work.name: {} for work in works}

    def measure_round(self, number: int) -> None:
        """Start every contender anew, and take its samples of every piece of work.

        Raises:
            ContenderError: the baseline failed, and there is nothing to compare with.
        """
        runners: list[Runner] = []
        try:
            # All at once: while the first is asked for the first time, the others import their libraries.
            for each in self.contestants:
                runners.append(Runner(each, self._start(each), self.rows))
            for work in self.works:
                self.say(f"{self.durability}, round {number + 1} of {self.plan.rounds}: {work.title}")
                self._measure(work, number, [each for each in runners if each.contestant.takes_part(work.name)])
        finally:
            for runner in runners:
                runner.process.kill()

    def _start(self, contestant: Contestant) -> Process:
        return Process(contestant, self.target_of(contestant), self.durability)

    def _measure(self, work: Work, number: int, runners: Sequence[Runner]) -> None:
        held: dict[str, dict[str, int]] = {}

        def begin(runner: Runner) -> None:
            work.check(runner.process, self.rows)
            held[runner.contestant.name] = self.count(runner.process.target)
            runner.begin(work, self.plan, number)

        def end(runner: Runner) -> None:
            expect_rows(runner, work.title, self.count(runner.process.target), held[runner.contestant.name])

        self._have(work, runners, begin)
        for repeat in range(self.plan.repeats):
            peers = repeat == self.plan.repeats // 2
            taken = [each for each in runners if peers or not each.contestant.peer]
            # Nobody is always the one who comes after the same neighbour.
            shift = (number + repeat) % len(taken)
            times: dict[str, tuple[float, float]] = {}

            def sample(runner: Runner, repeat: int = repeat, times: dict[str, Any] = times) -> None:
                times[runner.contestant.name] = runner.sample(work, repeat, number)

            self._have(work, (*taken[shift:], *taken[:shift]), sample)
            for name, time in times.items():
                self.measured[work.name][name].add(time, times[self.contestants[0].name])
        self._have(work, runners, end)

    def _have(self, work: Work, runners: Iterable[Runner], act: Callable[[Runner], object]) -> None:
        """Have everybody do something who is not out of this piece of work."""
        for runner in runners:
            name = runner.contestant.name
            if name in self.failed[work.name]:
                continue
            try:
                act(runner)
            except ContenderError as error:
                if runner.contestant is self.contestants[0]:
                    raise
                self.failed[work.name][name] = error.kind
                self.warn(f"{error} (the others go on)")
                # The next piece of work is begun as if nothing had been.
                runner.process.kill()
                runner.process = self._start(runner.contestant)

    def summary(self) -> dict[str, dict[str, Any]]:
        """Return by piece of work and contender what was measured so far, or how it failed."""
        return {
            work: {
                name: {"failed": self.failed[work][name]} if name in self.failed[work] else each.summary()
                for name, each in row.items()
                if name in self.failed[work] or each.seconds
            }
            for work, row in self.measured.items()
            if any(each.seconds for each in row.values())
        }


class Runner:
    """A contender, its process, and how many calls make a sample of it.

    Attributes:
        written: how many rows each table must have grown by since `begin`.
    """

    def __init__(self, contestant: Contestant, process: Process, rows: Rows) -> None:
        self.contestant = contestant
        self.process = process
        self.rows = rows
        self.calls = 1
        self.written: dict[str, int] = {}

    def begin(self, work: Work, plan: Plan, number: int) -> None:
        """Warm up, and find out how many calls fill a sample."""
        self.written = {}
        self.calls = 1
        if work.once:
            return
        seconds = plan.peer_seconds if self.contestant.peer else plan.seconds
        limit = work.limit(self.rows)
        # The first calls compile and cache; a third of a sample after them tells how long a call takes.
        few = max(1, min(3, limit // 2))
        more = limit - few
        arguments = work.calls(self.rows, random.Random(f"{work.name} {number} warm"), 0, limit)
        first = self._time(work, arguments[:few])["seconds"] / few
        some = max(1, min(more, int(seconds / 3 / first)))
        per_call = self._time(work, arguments[few : few + some])["seconds"] / some
        self.calls = max(1, min(limit, int(seconds / per_call)))

    def sample(self, work: Work, repeat: int, number: int) -> tuple[float, float]:
        """Return the seconds of a call, on the clock and on the CPU."""
        chance = random.Random(f"{work.name} {number} {repeat}")
        arguments = work.calls(self.rows, chance, repeat + 1, self.calls)
        reply = self._time(work, arguments)
        return reply["seconds"] / self.calls, reply["cpu"] / self.calls

    def _time(self, work: Work, arguments: list[Any]) -> dict[str, float]:
        if work.growth is not None:
            table, each = work.growth
            self.written[table] = self.written.get(table, 0) + each * len(arguments)
        return self.process.request("time", work=work.name, arguments=arguments)


def expect_rows(runner: Runner, what: str, found: dict[str, int], held: dict[str, int]) -> None:
    """Compare the rows that a database holds with what was written since it was begun with.

    Raises:
        ContenderError: they are others.
    """
    expected = {table: count + runner.written.get(table, 0) for table, count in held.items()}
    if found != expected:
        raise ContenderError(
            runner.contestant.name, f"is wrong at {what}: the database holds {found}, and not {expected}"
        )
