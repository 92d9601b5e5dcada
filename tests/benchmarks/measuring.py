"""Take samples of the contenders in turns. The class `Sizes` sets the sizes of a run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from tests.benchmarks.contender import Filled
from tests.benchmarks.goals import Figure

ROOT = Path(__file__).parents[2]

Call = Callable[[int], object]
"""One call of one contender. The call gets a new number each time and returns a true value."""


class BenchmarkError(Exception):
    """A contender gave a wrong result, or a requirement of a row is absent."""


@dataclass(frozen=True)
class Sizes:
    """The amount of measurement."""

    rounds: int = 7
    few_rounds: int = 3
    """Rounds of the rows that take seconds."""
    seconds: float = 0.05
    """Approximate time of one sample of a contender."""
    filled: Filled = field(default_factory=Filled)
    crowd: int = 5_000
    """Nonces of the device with the most nonces."""
    commits: int = 5_120
    """Commits of many callers in one sample."""
    processes: int = 8
    """Processes that write at the same time."""
    writing: float = 3.0
    """Seconds for which each of these processes, and the writer during a sweep, writes."""
    dead: int = 60_000
    """Expired nonces that a sweep finds."""
    wal: int = 16_000_000
    """Bytes of the WAL that a killed process leaves."""
    events: int = 1_000
    """Events of the trace."""


QUICK = Sizes(
    rounds=1,
    few_rounds=1,
    seconds=0.0,
    filled=Filled(devices=20, agents=2, sessions=120, keys=20),
    crowd=20,
    commits=256,
    processes=2,
    writing=0.1,
    dead=200,
    wal=200_000,
    events=10,
)
"""Small sizes, which show that every row works, but not how fast."""


def percentile(values: Sequence[float], share: float) -> float:
    """Return a percentile of the values, for a share such as 0.99."""
    return sorted(values)[int((len(values) - 1) * share)]


def summarize(row: str, durability: str, samples: Mapping[str, Sequence[float]]) -> list[Figure]:
    """Return the figures of a row. The first contender is the baseline. The samples with index i are from round i."""
    baseline = next(iter(samples.values()))
    figures = []
    for name, values in samples.items():
        ratios = [value / base for value, base in zip(values, baseline, strict=True)]
        numbers = (median(values), median(ratios), min(ratios), max(ratios))
        # Round here, so that the tables and the file of figures never differ.
        figures.append(Figure(row, durability, name, *(float(f"{number:.4g}") for number in numbers)))
    return figures


@dataclass
class Bench:
    """One run of the suite.

    Args:
        directory: an empty directory for databases.
        sizes: the amount of measurement.
        contenders: the names of the contenders besides `sqlite3`.
        only: measure the rows whose names contain one of these texts; empty for all.
        report: a function that gets each figure.

    Attributes:
        figures: the figures so far.
    """

    directory: Path
    sizes: Sizes
    contenders: Sequence[str]
    only: Sequence[str] = ()
    report: Callable[[Figure], object] = lambda figure: None
    figures: list[Figure] = field(default_factory=list)
    _folders: int = 0

    def wants(self, *rows: str) -> bool:
        """Return whether one of the rows is to be measured."""
        return not self.only or any(text in row for text in self.only for row in rows)

    def folder(self) -> Path:
        """Return a new private directory."""
        self._folders += 1
        folder = self.directory / str(self._folders)
        folder.mkdir(mode=0o700)
        return folder

    def add(self, row: str, durability: str, samples: Mapping[str, Sequence[float]]) -> None:
        """Keep the samples of a row. The keys are names of contenders, and the first key is the baseline."""
        for figure in summarize(row, durability, samples):
            self.figures.append(figure)
            self.report(figure)

    def compare(self, row: str, durability: str, calls: Mapping[str, Call], *, share: float = 1.0) -> dict[str, int]:
        """Measure calls in turns. The first call is the baseline. In each round the second call runs next to it.

        Args:
            row: the row's name.
            durability: the durability of the calls; empty if they commit no change.
            calls: the call of each contender.
            share: the time of a sample, as a share of the usual time.

        Returns:
            The number of calls of each contender. The calls got the numbers below that number.

        Raises:
            BenchmarkError: if a call returned a false value.
        """
        if not self.wants(row):
            return dict.fromkeys(calls, 0)
        done, size = dict.fromkeys(calls, 0), {}
        samples: dict[str, list[float]] = {name: [] for name in calls}

        def sample(name: str, count: int) -> float:
            numbers = range(done[name], done[name] + count)
            done[name] += count
            return _timed(f"{name}: {row}, {durability}", calls[name], numbers)

        for name in calls:
            sample(name, 5)
            size[name] = max(1, int(share * self.sizes.seconds / sample(name, 10)))
        for turn in range(self.sizes.rounds):
            for name in calls if turn % 2 else reversed(calls):
                samples[name].append(sample(name, size[name]))
        self.add(row, durability, samples)
        return done


def _timed(what: str, call: Call, numbers: range) -> float:
    """Return the seconds of one call."""
    start = time.perf_counter()
    for number in numbers:
        if not call(number):
            raise BenchmarkError(f"{what}: call {number} did nothing")
    return (time.perf_counter() - start) / len(numbers)
