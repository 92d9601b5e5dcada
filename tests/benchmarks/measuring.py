"""Samples, taken in turns: each contender's time beside the baseline's of the same moment."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from tests.benchmarks.contestants import BenchmarkError, Contestant, Process
from tests.benchmarks.data import Rows, count_rows
from tests.benchmarks.works import SLICES, Work

__all__ = ["Measured", "Plan", "Runner", "Say", "copy_database", "expect_rows", "measure_works"]

Say = Callable[[str], object]


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        rounds: how often each contender is started anew, on a fresh copy of the database.
        repeats: how many samples of each piece of work are taken in a round; of a peer, one.
        seconds: how long a sample should take.
    """

    rounds: int = 3
    repeats: int = 5
    seconds: float = 0.15

    def __post_init__(self) -> None:
        if not 1 <= self.repeats < SLICES - 1:
            raise BenchmarkError(f"1 to {SLICES - 2} repeats fit on one copy of the database")


@dataclass
class Measured:
    """What was measured of one contender at one piece of work.

    Attributes:
        seconds: per call, on the clock, of each sample.
        cpu: per call, of the process's processor time.
        ratios: of each sample's seconds to the baseline's sample beside it.
    """

    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """Return the figures that are reported, and the samples."""
        return {
            "seconds": median(self.seconds),
            "cpu": median(self.cpu),
            "ratio": median(self.ratios),
            "ratio_min": min(self.ratios),
            "ratio_max": max(self.ratios),
            "samples": {"seconds": self.seconds, "cpu": self.cpu, "ratios": self.ratios},
        }


def copy_database(template: Path, directory: Path) -> Path:
    """Return the path of a private copy of a database that nobody has open."""
    directory.mkdir(mode=0o700)
    path = directory / template.name
    shutil.copyfile(template, path)
    path.chmod(0o600)
    return path


Table = dict[str, dict[str, Measured]]
"""By piece of work and contender."""


def measure_works(
    plan: Plan,
    contestants: Sequence[Contestant],
    works: Sequence[Work],
    rows: Rows,
    durability: str,
    target_of: Callable[[Contestant], str],
    say: Say,
    count: Callable[[str], dict[str, int]] = lambda target: count_rows(Path(target)),
) -> Table:
    """Measure pieces of work, the contenders taking turns.

    Args:
        plan: how much.
        contestants: who; the first is the baseline.
        works: at what.
        rows: what the databases hold.
        durability: `full` or `normal`.
        target_of: makes a fresh database for a contender.
        say: is told what is being done.
        count: returns how many rows each table of a target has.

    Raises:
        BenchmarkError: a contender failed or answered wrongly.
    """
    table: Table = {
        work.name: {each.name: Measured() for each in contestants if each.takes_part(work.name)} for work in works
    }
    for number in range(plan.rounds):
        with ExitStack() as stack:
            runners = []
            for each in contestants:
                process = stack.enter_context(Process(each, target_of(each), durability))
                runners.append(Runner(process, rows))
            for work in works:
                say(f"{durability}, round {number + 1} of {plan.rounds}: {work.title}")
                taking_part = [each for each in runners if each.process.contestant.takes_part(work.name)]
                for runner in taking_part:
                    work.check(runner.process, rows)
                before = [count(runner.process.target) for runner in taking_part]
                for runner in taking_part:
                    runner.begin(work, plan, number)
                for repeat in range(plan.repeats):
                    peers = repeat == plan.repeats // 2
                    _take_turns(taking_part, work, repeat, number, table[work.name], peers=peers)
                for runner, held in zip(taking_part, before, strict=True):
                    expect_rows(runner, work.title, count(runner.process.target), held)
    return table


def _take_turns(
    runners: Sequence[Runner], work: Work, repeat: int, number: int, row: dict[str, Measured], *, peers: bool
) -> None:
    taken = [runner for runner in runners if peers or not runner.process.contestant.peer]
    # Nobody is always the one who comes after the same neighbour.
    shift = (number + repeat) % len(taken)
    times: dict[str, tuple[float, float]] = {}
    for runner in (*taken[shift:], *taken[:shift]):
        times[runner.process.contestant.name] = runner.sample(work, repeat, number)
    baseline = times[runners[0].process.contestant.name][0]
    for name, (seconds, cpu) in times.items():
        row[name].seconds.append(seconds)
        row[name].cpu.append(cpu)
        row[name].ratios.append(seconds / baseline)


def expect_rows(runner: Runner, what: str, found: dict[str, int], held: dict[str, int]) -> None:
    """Compare the rows that a database holds with what was written since it was begun with.

    Raises:
        BenchmarkError: they are others.
    """
    expected = {table: count + runner.written.get(table, 0) for table, count in held.items()}
    if found != expected:
        name = runner.process.contestant.name
        raise BenchmarkError(f"{name} at {what}: the database holds {found}, and not {expected}")


class Runner:
    """A contender's process, and how many calls make a sample of it.

    Attributes:
        written: how many rows each table must have grown by since `begin`.
    """

    def __init__(self, process: Process, rows: Rows) -> None:
        self.process = process
        self.rows = rows
        self.calls = 1
        self.written: dict[str, int] = {}

    def begin(self, work: Work, plan: Plan, number: int) -> None:
        """Warm up, and find out how many calls fill a sample."""
        self.written = {}
        if work.once:
            self.calls = 1
            return
        few = max(1, min(40, work.limit(self.rows) // 2))
        arguments = work.calls(self.rows, random.Random(f"{work.name} {number} warm"), 0, 2 * few)
        self._time(work, arguments[:few])
        per_call = self._time(work, arguments[few:])["seconds"] / few
        self.calls = max(1, min(work.limit(self.rows), int(plan.seconds / per_call)))

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
