"""The gateway of `docs/examples/gateway.py`, run as a program over its trace."""

import gzip
import json
import re
from pathlib import Path

import pytest

from homeagent import Database, DevicePair, DeviceStatus, Role
from tests import fork_server

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "docs" / "examples" / "gateway.py"
TRACE = ROOT / "tests" / "fixtures" / "gateway.jsonl.gz"


def run(*arguments: str | Path) -> dict[str, int]:
    """Run the example and return its summary, a count for each name."""
    program = f"import runpy; runpy.run_path({str(EXAMPLE)!r}, run_name='__main__')"
    done = fork_server.run(program, *arguments, timeout=240)
    assert done.returncode == 0, done.stderr
    return {name: int(count.replace(",", "")) for name, count in re.findall(r"│ (.+?) +│ +([\d,]+) │", done.stdout)}


def write_trace(path: Path, *events: dict[str, object]) -> Path:
    """Write a trace whose events differ only in the given fields."""
    common = {"device": "d1", "sender": "s1", "channel": "main", "agent": "a1", "session": "s1.main"}
    path.write_text("".join(json.dumps({**common, **event}) + "\n" for event in events), encoding="utf-8")
    return path


@pytest.mark.parametrize("last", [500, pytest.param(None, marks=pytest.mark.slow)])
def test_second_run_refuses_known_nonces(last: int | None, tmp_path: Path) -> None:
    """A first run accepts every message; a second run over the same file refuses each stored nonce."""
    with gzip.open(TRACE, "rt", encoding="utf-8") as lines:
        events = [json.loads(line) for line in lines]
    arguments: list[str | Path] = []
    if last is not None:
        events = events[-last:]
        arguments = ["--trace", write_trace(tmp_path / "trace.jsonl", *events)]
    file = tmp_path / "gateway.db"

    first = run("--database", file, *arguments)

    for name, field in {"devices": "device", "agents": "agent", "sessions": "session"}.items():
        assert first[name] == len({event[field] for event in events})
    assert first["events"] == len(events)
    assert first["devices paired"] == first["devices"]
    assert first["replays refused"] == 0
    # Expected from the trace: keys that are repeated within 24 hours of the first answered message.
    answered: dict[tuple[str, str], int] = {}
    retries = 0
    for event in events:
        key = (event["device"], event["key"])
        if key in answered and event["at"] < answered[key] + 24 * 3600 * 1000:
            retries += 1
        else:
            answered[key] = event["at"]
    assert first["retries answered from the store"] == retries > 0
    assert first["rows swept"] > first["events"]

    second = run("--database", file, *arguments)

    assert second["nonces on record at the start"] == first["nonces on record at the end"] > 0
    assert second["replays refused"] == second["nonces on record at the start"]
    assert second["devices paired"] == 0
    assert (second["devices"], second["sessions"]) == (first["devices"], first["sessions"])
    assert file.stat().st_mode & 0o777 == 0o600


def test_repeated_message(tmp_path: Path) -> None:
    """A repeated nonce is refused within a day and accepted afterwards; a retry has a new nonce and the old key."""
    hour = 3600 * 1000
    trace = write_trace(
        tmp_path / "trace.jsonl",
        {"at": 0, "nonce": "n1", "key": "k1"},
        {"at": 1, "nonce": "n1", "key": "k1"},  # a replay
        {"at": 2, "nonce": "n2", "key": "k1"},  # a retry
        {"at": 3, "nonce": "n1", "key": "k1", "device": "d2"},  # another device's nonce and key
        {"at": 24 * hour - 1, "nonce": "n1", "key": "k2"},  # the last moment of n1
        {"at": 24 * hour, "nonce": "n1", "key": "k1"},  # expired: n1 and k1 count as absent
    )

    summary = run("--trace", trace, "--database", tmp_path / "gateway.db")

    assert summary["replays refused"] == 2
    assert summary["retries answered from the store"] == 1
    assert summary["devices paired"] == 2


def test_revoked_device_stays_refused(tmp_path: Path) -> None:
    """The gateway approves new devices automatically, but refuses the messages of a revoked device."""
    file = tmp_path / "gateway.db"
    with Database.open(file) as database:
        database.pair(DevicePair(id="d1", role=Role.CLIENT))
        database.run(lambda unit: unit.devices.revoke("d1", reason="stolen"))
    trace = write_trace(
        tmp_path / "trace.jsonl",
        {"at": 0, "nonce": "n1", "key": "k1"},
        {"at": 1, "nonce": "n2", "key": "k2"},
        {"at": 2, "nonce": "n1", "key": "k1", "device": "d2"},
    )

    summary = run("--trace", trace, "--database", file)

    assert (summary["messages of unapproved devices refused"], summary["nonces on record at the end"]) == (2, 1)
    with Database.open(file) as database:
        device = database.run(lambda unit: unit.devices.get("d1"), read_only=True)
        assert device.status is DeviceStatus.REVOKED


def test_runs_without_a_file_are_independent(tmp_path: Path) -> None:
    """If no file is given, a second run has no rows of the first."""
    trace = write_trace(tmp_path / "trace.jsonl", {"at": 0, "nonce": "n1", "key": "k1"})

    for _ in range(2):
        summary = run("--trace", trace)
        assert (summary["nonces on record at the start"], summary["replays refused"]) == (0, 0)
