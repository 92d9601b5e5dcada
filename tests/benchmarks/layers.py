"""Where the time of a call goes: homeagent from below, a layer more each time, beside the statements by hand."""

from __future__ import annotations

from typing import Any

from tests.benchmarks.contestants import BASELINE, CONTESTANTS, Contestant
from tests.benchmarks.measuring import Contest
from tests.benchmarks.works import works
from tests.benchmarks.workshop import Workshop

__all__ = ["COLD", "COLD_BASELINE", "DURABILITY", "LAYERS", "LINK", "UNIT", "WORKS", "measure_layers"]

DURABILITY = "normal"
"""Where no commit waits for the disk: what it takes differs by more than a layer costs."""

LINK = "statement and link"
UNIT = "unit of work"
COLD_BASELINE = "sqlite3, cold"
COLD = "homeagent, cold"

WORKS = ("device", "find_key", "agent_sessions", "seen", "consume", "insert_key")

LAYERS = (
    CONTESTANTS[BASELINE],
    Contestant.python(LINK, "layers:OnLink", peer=False),
    Contestant.python(UNIT, "layers:OnUnit", peer=False),
    CONTESTANTS["homeagent"],
    Contestant.python(COLD_BASELINE, "layers:ColdHandwritten", peer=False),
    Contestant.python(COLD, "layers:ColdHomeAgent", peer=False),
)


def measure_layers(workshop: Workshop) -> dict[str, Any]:
    """Return what was measured by durability, piece of work and layer, and the titles of the works.

    Raises:
        ContenderError: the baseline failed.
    """
    every = works()
    contest = Contest(
        workshop.plan,
        LAYERS,
        [every[name] for name in WORKS],
        workshop.template(workshop.rows)[1],
        DURABILITY,
        lambda each: str(workshop.fresh(workshop.rows)),
        workshop.say,
        workshop.warn,
    )

    def results() -> dict[str, Any]:
        return {"titles": {name: every[name].title for name in WORKS}, "measured": {DURABILITY: contest.summary()}}

    for number in range(workshop.plan.rounds):
        contest.measure_round(number)
        workshop.keep(results())
        workshop.clear()
    return results()
