"""The recorded trace from end to end: two months of a gateway on an empty database."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks.contestants import PATIENCE, ContenderError, Contestant, Process
from tests.benchmarks.data import DAY, count_rows, read_trace
from tests.benchmarks.measuring import Measured, Say

__all__ = ["TraceContest"]

RECENT = 20.0
"""The seconds for which a time of the baseline is one of the same moment."""


def expected(events: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Return what the trace itself says: how many messages are refused, and how many are retries.

    A key that comes again within a day of the message that was answered is a retry of it.
    """
    answered: dict[tuple[str, str], int] = {}
    consumed: dict[tuple[str, str], int] = {}
    tally = {"refused": 0, "retries": 0}
    for event in events:
        nonce, key = (event["device"], event["nonce"]), (event["device"], event["key"])
        if event["at"] < consumed.get(nonce, 0) + DAY:
            tally["refused"] += 1
            continue
        consumed[nonce] = event["at"]
        if event["at"] < answered.get(key, 0) + DAY:
            tally["retries"] += 1
        else:
            answered[key] = event["at"]
    return tally


class TraceContest:
    """Some contenders at the trace; who fails is out, and a peer that is slow lives its first part alone.

    Args:
        contestants: who; the first is the baseline.
        durability: `full` or `normal`.
        target_of: makes an empty database for a contender.
        say: is told what is being done.
        warn: is told of failures.
        events: how many of the events; None for all.
        seconds: how long a peer may take; it is compared with the baseline's time for the events it came to.

    Attributes:
        failed: by contender, what kind of failure it was.
        lived: by contender, how many events it came to.
    """

    def __init__(
        self,
        contestants: Sequence[Contestant],
        durability: str,
        target_of: Callable[[Contestant], str],
        say: Say,
        warn: Say,
        events: int | None = None,
        seconds: float = 10.0,
    ) -> None:
        self.contestants = contestants
        self.durability = durability
        self.target_of = target_of
        self.say = say
        self.warn = warn
        self.seconds = seconds
        self.events = read_trace(events)
        self.measured = {each.name: Measured() for each in contestants}
        self.failed: dict[str, str] = {}
        self.lived: dict[str, int] = {}
        self._baseline: _Lived | None = None

    def measure_round(self, number: int) -> None:
        """Have each contender live through the trace; peers take part in the first round alone.

        Raises:
            ContenderError: the baseline failed, and there is nothing to compare with.
        """
        baseline, *others = self.contestants
        # Its own samples: at least one a round, whoever else takes part.
        self._baseline = None
        self._compared_with(len(self.events))
        for each in others:
            if each.name in self.failed or (each.peer and number):
                continue
            self.say(f"{self.durability}, round {number + 1}: trace, {each.name}")
            try:
                lived = self._live(each, len(self.events), self.seconds if each.peer else PATIENCE)
                beside = self._compared_with(lived.events)
                self._judge(each, lived, beside)
            except ContenderError as error:
                if error.contender == baseline.name:
                    raise
                self.failed[each.name] = error.kind
                self.warn(f"{error} (the others go on)")
                continue
            self.lived[each.name] = lived.events
            self.measured[each.name].add(lived.per_event(), beside.per_event())

    def _compared_with(self, events: int) -> _Lived:
        """Return what the baseline took for so many events, a moment ago or now."""
        found = self._baseline
        if found is None or found.events != events or time.monotonic() - found.at > RECENT:
            baseline = self.contestants[0]
            found = self._live(baseline, events, PATIENCE)
            self._judge(baseline, found, found)
            if events == len(self.events):
                self._baseline = found
                self.lived[baseline.name] = events
                self.measured[baseline.name].add(found.per_event(), found.per_event())
        return found

    def _live(self, contestant: Contestant, events: int, seconds: float) -> _Lived:
        target = self.target_of(contestant)
        with Process(contestant, target, self.durability, traced=True) as process:
            reply = process.request("replay", events=events, seconds=seconds)
        rows = count_rows(Path(target))
        return _Lived(reply["events"], reply["seconds"], reply["cpu"], reply["tally"], rows, time.monotonic())

    def _judge(self, contestant: Contestant, lived: _Lived, beside: _Lived) -> None:
        said = expected(self.events[: lived.events])
        told = {name: lived.tally[name] for name in said}
        if told != said or (lived.tally, lived.rows) != (beside.tally, beside.rows):
            raise ContenderError(
                contestant.name,
                f"made of the trace {lived.tally} and {lived.rows}; it says {said}, and "
                f"{self.contestants[0].name} made {beside.tally} and {beside.rows}",
            )

    def summary(self) -> dict[str, dict[str, Any]]:
        """Return by contender what was measured so far, or how it failed."""
        return {
            name: {"failed": self.failed[name]}
            if name in self.failed
            else {**each.summary(), "events": self.lived[name], "of_events": len(self.events)}
            for name, each in self.measured.items()
            if name in self.failed or each.seconds
        }


@dataclass(frozen=True)
class _Lived:
    """How far a contender came, in how many seconds, what it made of it, and when that was."""

    events: int
    seconds: float
    cpu: float
    tally: dict[str, int]
    rows: dict[str, int]
    at: float

    def per_event(self) -> tuple[float, float]:
        return self.seconds / self.events, self.cpu / self.events
