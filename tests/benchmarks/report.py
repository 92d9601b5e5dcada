"""What was measured, as tables for the terminal."""

from __future__ import annotations

from typing import Any

from rich.table import Table

__all__ = ["operation_tables", "readable_time"]


def readable_time(seconds: float) -> str:
    """Return a duration with three figures and its unit."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def operation_tables(results: dict[str, Any]) -> list[Table]:
    """Return a table for each durability: time per call, ratio to the baseline, and the ratio of processor time."""
    tables = []
    for durability, measured in results["measured"].items():
        table = Table("work", "contender", title=f"At {durability}")
        for column in ("a call", "ratio", "min", "max", "ratio of CPU"):
            table.add_column(column, justify="right")
        for work, row in measured.items():
            baseline = next(iter(row.values()))
            title = results["titles"][work]
            for name, figures in row.items():
                table.add_row(
                    title,
                    name,
                    readable_time(figures["seconds"]),
                    f"{figures['ratio']:.2f}",
                    f"{figures['ratio_min']:.2f}",
                    f"{figures['ratio_max']:.2f}",
                    f"{figures['cpu'] / baseline['cpu']:.2f}" if baseline["cpu"] else "",
                )
                title = ""
            table.add_section()
        tables.append(table)
    return tables
