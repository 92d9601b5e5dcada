"""The file docs/figures.json, which holds every measured figure of the documentation.

The benchmarks write the list `benchmarks`: each run, with its figures. The test campaigns write the mapping
`campaigns`: a test calls pytest's fixture `record_property` with a description and a number. A whole number is a count,
and counts of the same description are added. A float is a time in seconds, and the shortest and longest time are kept.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FIGURES = ROOT / "docs" / "figures.json"


def describe_run(command: str) -> dict[str, str]:
    revision = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    busy = f". Other programs also ran (load average {load:.1f}), so the figures are rough" if load > 1 else ""
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "command": command,
        "revision": revision.strip() or "unknown",
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors{busy}",
    }


def load(path: Path) -> dict[str, Any]:
    """Return the content of the file. A file that does not exist counts as a file without figures."""
    empty: dict[str, Any] = {"benchmarks": [], "campaigns": {}}
    return empty | json.loads(path.read_text(encoding="utf-8")) if path.exists() else empty


def save(path: Path, content: dict[str, Any]) -> None:
    """Write the file, with one line for each figure of a benchmark."""
    runs = []
    for run in content["benchmarks"]:
        lines = ",\n    ".join(json.dumps(figure, ensure_ascii=False) for figure in run["figures"])
        head = json.dumps({key: run[key] for key in run if key != "figures"}, indent=3, ensure_ascii=False)
        runs.append(f'{head.removesuffix("}").rstrip()},\n   "figures": [\n    {lines}\n   ]\n  }}')
    benchmarks = ",\n  ".join(runs)
    campaigns = json.dumps(dict(sorted(content["campaigns"].items())), indent=2, ensure_ascii=False)
    path.write_text(f'{{\n "benchmarks": [\n  {benchmarks}\n ],\n "campaigns": {campaigns}\n}}\n', encoding="utf-8")


def save_campaigns(path: Path, command: str, properties: Iterable[tuple[str, object]]) -> None:
    """Update the campaigns that passing tests reported as properties. Other campaigns keep their figures."""
    numbers: dict[str, list[Any]] = {}
    for name, number in properties:
        numbers.setdefault(name, []).append(number)
    content = load(path)
    run = describe_run(command)
    for name, found in numbers.items():
        if isinstance(found[0], float):
            result = f"{min(found):.2g} s to {max(found):.2g} s"
        else:
            result = f"{sum(found):,}"
        content["campaigns"][name] = {"result": result, **run}
    save(path, content)
