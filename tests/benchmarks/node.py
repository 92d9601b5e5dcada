"""better-sqlite3's contender: a program for Node that is given the statements of the hand-written one."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

from tests.benchmarks import contender, data
from tests.benchmarks.contenders import handwritten

__all__ = ["command", "why_missing"]

PROGRAM = Path(__file__).parent / "contenders" / "better_sqlite3.js"

_STATEMENTS = (
    "DEVICE",
    "SEEN",
    "CREATE_DEVICE",
    "APPROVE",
    "CONSUME",
    "FIND_KEY",
    "INSERT_KEY",
    "CLAIM",
    "COMPLETE",
    "SESSIONS",
    "SESSION",
    "INDEX",
    "TOUCH",
    "AGENT",
    "CREATE_AGENT",
    "CREATE_SESSION",
    "SWEEP_NONCES",
    "SWEEP_KEYS",
)


def command() -> tuple[str, ...]:
    """Return what runs it, before target, durability and options."""
    given: dict[str, Any] = {
        "sql": {name: getattr(handwritten, name) for name in _STATEMENTS},
        "pragmas": handwritten.PRAGMAS,
        "constants": {
            "DAY": data.DAY,
            "METHOD": data.METHOD,
            "TRACE": str(data.TRACE),
            **{name: getattr(contender, name) for name in ("GRACE", "GRANULARITY", "LEASE", "BATCH", "FINGERPRINT")},
        },
    }
    return ("node", str(PROGRAM), json.dumps(given))


def why_missing() -> str | None:
    """Return why it can't take part here, None where it can."""
    if shutil.which("node") is None:
        return "there is no Node"
    program = "new (require('better-sqlite3'))(':memory:').close()"
    tried = subprocess.run(["node", "-e", program], cwd=PROGRAM.parent, capture_output=True, text=True)
    if tried.returncode:
        reasons = [line for line in tried.stderr.splitlines() if "Error" in line]
        return f"Node can't load it ({reasons[0].strip() if reasons else 'no reason given'}): see CONTRIBUTING.md"
    return None
