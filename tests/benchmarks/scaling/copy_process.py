"""One copy, in a process that has nothing else in its memory: prints rows, seconds and its peak of memory in bytes."""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

from homeagent import Database


def main(source: str, target: str) -> None:
    """Copy a store to another one."""
    with Database.open(source) as ours, Database.open(target) as theirs:
        start = time.perf_counter()
        rows = sum(ours.copy_to(theirs).rows.values())
        seconds = time.perf_counter() - start
    json.dump({"rows": rows, "seconds": round(seconds, 2), "peak_bytes": peak()}, sys.stdout)


def peak() -> int:
    """Return the most memory that this process ever had, in bytes."""
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux's ru_maxrss counts what the process that started this one took, where that was more.
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


if __name__ == "__main__":
    main(*sys.argv[1:])
