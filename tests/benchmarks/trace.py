"""The recorded trace from end to end: two months of a gateway on an empty database."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests.benchmarks.contestants import BenchmarkError, Contestant, Process
from tests.benchmarks.data import DAY, count_rows, read_trace
from tests.benchmarks.measuring import Measured, Say

__all__ = ["measure_trace"]


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


def measure_trace(
    rounds: int,
    contestants: Sequence[Contestant],
    durability: str,
    target_of: Callable[[Contestant], str],
    say: Say,
    events: int | None = None,
) -> dict[str, Measured]:
    """Measure the trace; peers take part in the first round alone.

    Args:
        rounds: how often.
        contestants: who; the first is the baseline.
        durability: `full` or `normal`.
        target_of: makes an empty database for a contender.
        say: is told what is being done.
        events: how many of the events; None for all.

    Raises:
        BenchmarkError: what came of it is not what the trace says, or not what it was for the baseline.
    """
    trace = read_trace(events)
    said = expected(trace)
    measured = {each.name: Measured() for each in contestants}
    for number in range(rounds):
        baseline: tuple[float, dict[str, int], dict[str, int]] | None = None
        for each in contestants:
            if each.peer and number:
                continue
            say(f"{durability}, round {number + 1} of {rounds}: trace, {each.name}")
            with ExitStack() as stack:
                target = target_of(each)
                process = stack.enter_context(Process(each, target, durability, traced=True))
                reply = process.request("replay", events=events)
            rows = count_rows(Path(target))
            if baseline is None:
                baseline = reply["seconds"], reply["tally"], rows
            if {name: reply["tally"][name] for name in said} != said or (reply["tally"], rows) != baseline[1:]:
                raise BenchmarkError(
                    f"{each.name} made of the trace {reply['tally']} and {rows}; it says {said}, and "
                    f"{contestants[0].name} made {baseline[1:]}"
                )
            measured[each.name].seconds.append(reply["seconds"] / len(trace))
            measured[each.name].cpu.append(reply["cpu"] / len(trace))
            measured[each.name].ratios.append(reply["seconds"] / baseline[0])
    return measured
