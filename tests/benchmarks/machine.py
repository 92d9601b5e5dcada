"""What it was measured on, how busy that was, and which state of the code it was."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.benchmarks.contestants import ROOT

__all__ = ["busy_share", "describe_code", "describe_machine", "is_busy", "told_command", "told_load"]

QUIET = 0.1
"""The share of the processors that others may use on a machine that is called quiet."""

MEASURED = ("homeagent", "alembic", "tests", "pyproject.toml")
"""What decides a figure: a change of the pages alone does not."""


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def describe_machine() -> dict[str, str]:
    """Return what kind of machine this is."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": f"{_processor()}, {os.cpu_count()} cores",
        "Python": f"{platform.python_implementation()} {platform.python_version()}",
    }


def busy_share(seconds: float) -> float | None:
    """Return which share of the processors is in use while this process waits; None where nobody knows.

    What a hypervisor gave to others counts as in use.
    """
    before = _ticks()
    time.sleep(seconds)
    after = _ticks()
    if before is None or after is None or after[1] == before[1]:
        return None
    return 1 - (after[0] - before[0]) / (after[1] - before[1])


def _ticks() -> tuple[int, int] | None:
    """Return the idle ticks of all processors, and all their ticks."""
    try:
        first, _, _ = Path("/proc/stat").read_text(encoding="ascii").partition("\n")
    except OSError:
        return None
    # user nice system idle iowait irq softirq steal; guests are counted among the users already (proc_stat(5)).
    ticks = [int(field) for field in first.split()[1:9]]
    return ticks[3] + ticks[4], sum(ticks)


def is_busy(shares: Sequence[float | None]) -> bool:
    """Return whether others are known to have used more than a tenth of the processors."""
    return any(share is not None and share > QUIET for share in shares)


def told_load(shares: Sequence[float | None]) -> str:
    """Return the shares of the processors that others used, as they are told."""
    return " and ".join(f"{share:.0%}" for share in shares if share is not None) or "not known"


def describe_code() -> dict[str, Any]:
    """Return the package's version; in a checkout the revision, and whether what is measured is changed since."""
    told = {"version": version("homeagent")}
    try:
        revision = _git("rev-parse", "--short", "HEAD")
        return {**told, "revision": revision, "changed": bool(_git("status", "--porcelain", "--", *MEASURED))}
    except (OSError, subprocess.CalledProcessError):
        return told


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=ROOT, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ).stdout.strip()


def told_command(module: str, arguments: Sequence[str]) -> str:
    """Return a command as it was given, but for where on this machine its files are."""
    told = []
    for argument in arguments:
        option, equals, value = argument.partition("=")
        if Path(argument).is_absolute():
            argument = Path(argument).name
        elif equals and Path(value).is_absolute():
            argument = f"{option}={Path(value).name}"
        told.append(argument)
    return shlex.join(["python", "-m", module, *told])
