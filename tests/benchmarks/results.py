"""The figures of all sections in one file, each with the run that it is of: a later run adds some, or replaces some."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.benchmarks.contestants import BenchmarkError

__all__ = [
    "SECTIONS",
    "failures",
    "finished",
    "join_results",
    "read_json",
    "read_results",
    "write_atomically",
    "write_results",
]

SECTIONS = ("operations", "layers", "callers", "sweeping", "scale", "startup", "postgresql")

Results = dict[str, Any]


def read_json(path: Path) -> Results | None:
    """Return what a file holds, None where it is absent.

    Raises:
        BenchmarkError: it holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise BenchmarkError(f"{path} holds no figures ({error}): move it away") from error
    if not isinstance(found, dict):
        raise BenchmarkError(f"{path} holds no figures: move it away")
    return found


def read_results(path: Path) -> Results | None:
    """Return what a file holds, None where it is absent.

    Raises:
        BenchmarkError: it holds something else.
    """
    found = read_json(path)
    if found and any("run" not in found[section] for section in SECTIONS if section in found):
        raise BenchmarkError(f"{path} holds figures of an older kind, which tell no run: move it away")
    return found


def join_results(earlier: Results | None, present: Results, path: Path) -> Results:
    """Return the earlier results with what the present run says of itself, or the present ones where there are none.

    Raises:
        BenchmarkError: they were measured on another machine, with other versions or in other sizes.
    """
    if earlier is None:
        return present
    for name in ("machine", "quick"):
        if earlier[name] != present[name]:
            raise BenchmarkError(
                f"{path} is of {name} {earlier[name]!r}, and this run of {present[name]!r}: "
                "name another --output, or move the file away"
            )
    for name in sorted(set(earlier["versions"]).intersection(present["versions"])):
        if earlier["versions"][name] != present["versions"][name]:
            raise BenchmarkError(
                f"{path} is of {name} {earlier['versions'][name]}, and this run of {present['versions'][name]}: "
                "name another --output, or move the file away"
            )
    return {**earlier, "versions": {**earlier["versions"], **present["versions"]}}


def finished(section: Mapping[str, Any] | None) -> bool:
    """Return whether a section was measured to its end."""
    return section is not None and bool(section["run"]["complete"])


def failures(results: Results) -> dict[str, str]:
    """Return every failure in some results: its kind by who failed at what."""
    found = {}
    for name in SECTIONS:
        section = results.get(name, {"run": {}})
        if "failed" in section["run"]:
            found[name] = section["run"]["failed"]
        if name in ("operations", "layers", "postgresql"):
            for durability, measured in section.get("measured", {}).items():
                for work, row in measured.items():
                    for contender, figures in row.items():
                        if "failed" in figures:
                            found[f"{contender} at {section['titles'][work]}, {durability}"] = figures["failed"]
    return found


def write_results(results: Results, path: Path) -> None:
    """Write a file that holds either what it held, or all of this."""
    write_atomically(path, json.dumps(results, indent=1) + "\n")


def write_atomically(path: Path, text: str) -> None:
    """Write a file that holds either what it held, or all of this text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.new")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)
