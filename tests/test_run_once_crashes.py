"""If a process is killed anywhere in `run_once`, the key is free, answered, or known to have an unknown outcome."""

from __future__ import annotations

from collections import Counter
from datetime import timedelta
from pathlib import Path

import pytest

from homeagent import Attempt, Database, IdempotencyScope
from homeagent.errors import IdempotencyInProgressError, OutcomeUnknownError
from tests.conftest import START, Children, FakeClock, RecordProperty

# A separate process calls each key, and kills itself at the named step.
SCRIPT = """
import os, signal, sys
from datetime import datetime
from homeagent import Database, IdempotencyScope
from homeagent.stores import IdempotencyKeyStore

path, ledger, step, keys, now = sys.argv[1:]
now = datetime.fromisoformat(now)

def die_at(name):
    if name == step:
        os.kill(os.getpid(), signal.SIGKILL)

def around(name):
    method = getattr(IdempotencyKeyStore, name)
    def wrapped(*args, **options):
        die_at("before " + name)
        found = method(*args, **options)
        die_at("uncommitted " + name)
        return found
    setattr(IdempotencyKeyStore, name, wrapped)

around("claim")
around("complete")

for key in range(int(keys)):
    child = os.fork()
    if not child:
        def effect(attempt):
            die_at("before effect")
            descriptor = os.open(ledger, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            os.write(descriptor, f"{key}\\n".encode())
            die_at("after effect")
            return key
        database = Database.open(path, clock=lambda: now)
        database.run_once(IdempotencyScope("lamp", "m", str(key)), effect)
        die_at("after record")
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL, (step, status)
"""

# The state after the lease: whether the effect is in the ledger, and the outcome of the next call.
STEPS = {
    "before claim": (0, "absent"),
    "uncommitted claim": (0, "absent"),
    "before effect": (0, "unknown"),
    "after effect": (1, "unknown"),
    "before complete": (1, "unknown"),
    "uncommitted complete": (1, "unknown"),
    "after record": (1, "completed"),
}


@pytest.mark.parametrize("keys", [1, pytest.param(50, marks=pytest.mark.slow)])
@pytest.mark.parametrize("step", STEPS)
def test_killed(
    step: str, keys: int, target: str, tmp_path: Path, children: Children, record_property: RecordProperty
) -> None:
    """If a process is killed at any step, the effect does not happen twice, and after the lease no key is stuck."""
    placed, state = STEPS[step]
    ledger = tmp_path / "ledger"
    children.run(SCRIPT, target, ledger, step, keys, START.isoformat())

    def lines() -> Counter[str]:
        return Counter(ledger.read_text().split() if ledger.exists() else ())

    assert lines() == {str(key): placed for key in range(keys) if placed}
    clock = FakeClock()
    found: Counter[str] = Counter()
    with Database.open(target, clock=clock) as database:
        for key in range(keys):
            scope = IdempotencyScope("lamp", "m", str(key))

            def effect(attempt: Attempt, key: int = key) -> int:
                with ledger.open("a") as file:
                    file.write(f"{key}\n")
                return key

            clock.now = START + timedelta(minutes=1) - timedelta(milliseconds=1)
            if state == "unknown":
                with pytest.raises(IdempotencyInProgressError) as refusal:
                    database.run_once(scope, effect)
                assert refusal.value.retry_after == timedelta(milliseconds=1)
            clock.now = START + timedelta(minutes=1)
            try:
                outcome = database.run_once(scope, effect)
            except OutcomeUnknownError:
                found["unknown"] += 1
            else:
                assert outcome.value == key
                found["completed" if outcome.replayed else "absent"] += 1
        with database.unit_of_work(read_only=True) as unit:
            assert len(unit.idempotency_keys.list_abandoned()) == found["unknown"]
    assert found == {state: keys}
    assert max(lines().values(), default=0) <= 1
    record_property("processes killed at a step of run_once", keys)
