"""Which charts the page shows, and of what."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.benchmarks.charts import Bar, Panel
from tests.benchmarks.contestants import BASELINE
from tests.benchmarks.report import readable_time
from tests.benchmarks.sweeping import ALONE

__all__ = ["pictures"]

Results = Mapping[str, Any]
Picture = tuple[str, str, list[Panel], int]
"""Name, title, panels and columns of a chart."""


def _kind(name: str) -> str:
    return {"homeagent": "ours", BASELINE: "baseline", "psycopg": "baseline"}.get(name, "other")


def pictures(results: Results) -> list[Picture]:
    """Return the charts that these results can fill, in the order of the page."""
    charts: list[Picture] = []
    for section, engine in (("operations", "hand-written sqlite3"), ("postgresql", "hand-written psycopg")):
        for durability, measured in results.get(section, {}).get("measured", {}).items():
            titles = results[section]["titles"]
            panels = [
                Panel(
                    titles[work],
                    [
                        Bar(
                            name,
                            each["ratio"],
                            f"{each['ratio']:.2f} · {readable_time(each['seconds'])}",
                            _kind(name),
                        )
                        for name, each in sorted(
                            ((name, each) for name, each in row.items() if "failed" not in each),
                            key=lambda item: item[1]["ratio"],
                        )
                    ],
                )
                for work, row in measured.items()
            ]
            charts.append(
                (
                    f"{section}-{durability}",
                    f"Time as a ratio to {engine}, at {durability}: shorter is better",
                    panels,
                    2,
                )
            )
    if "measured" in results.get("callers", {}):
        measured = results["callers"]["measured"]
        counts = next(iter(measured.values()))
        panels = [
            Panel(
                f"{count} caller{'' if count == '1' else 's'}: commits a second",
                [
                    Bar(way, row[count]["rate"], f"{row[count]['rate']:,.0f}", _way(way))
                    for way, row in measured.items()
                ],
            )
            for count in counts
        ]
        charts.append(("callers", "Durable commits a second: longer is better", panels, 2))
    if "measured" in results.get("sweeping", {}):
        measured = results["sweeping"]["measured"]
        panels = [
            Panel(
                f"a writer's {share}",
                [
                    Bar(mode, found[share], readable_time(found[share]), "baseline" if mode == ALONE else "ours")
                    for mode, found in measured.items()
                ],
            )
            for share in ("p50", "p99", "max")
        ]
        charts.append(("sweeping", "What a writer waits while dead rows are swept: shorter is better", panels, 1))
    if "measured" in results.get("scale", {}):
        section = results["scale"]
        largest = str(section["sizes"][-1])
        panels = [
            Panel(
                title,
                [
                    Bar(name, row[work][largest]["ratio"], f"{row[work][largest]['ratio']:.2f}", _kind(name))
                    for name, row in section["measured"].items()
                ],
            )
            for work, title in section["titles"].items()
        ]
        title = f"Cost with {int(largest):,} rows as a ratio to {section['sizes'][0]:,}: shorter is better"
        charts.append(("scale", title, panels, 2))
    return charts


def _way(way: str) -> str:
    return "ours" if way.startswith(("run", "arun")) else "other"
