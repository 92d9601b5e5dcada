"""The examples as programs: the gateway over its trace, and the own tests of the applications `hub` and `lamps`."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest

from homeagent import Database, DevicePair, DeviceStatus, Role
from tests import fork_server
from tests.conftest import ROOT

GATEWAY = ROOT / "docs" / "examples" / "gateway.py"
TRACE = ROOT / "tests" / "fixtures" / "gateway.jsonl.gz"
HUB = ROOT / "docs" / "examples" / "hub"
LAMPS = ROOT / "docs" / "examples" / "lamps"


def run(*arguments: str | Path) -> dict[str, int]:
    """Run the example and return its summary, a count for each name."""
    program = f"import runpy; runpy.run_path({str(GATEWAY)!r}, run_name='__main__')"
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
    """A repeated nonce is refused for a day; a retry has a new nonce and the old key; without a file no row stays."""
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

    for options in (["--database", tmp_path / "gateway.db"], [], []):
        summary = run("--trace", trace, *options)

        assert summary["nonces on record at the start"] == 0
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


def test_hub(engine_name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """The tests of the hub and of docs/how-to/migrate-own-tables.md pass on each engine."""
    page = (ROOT / "docs" / "how-to" / "migrate-own-tables.md").read_text(encoding="utf-8")
    test, environment_of_alembic = re.findall(r"^```py\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "test_page.py").write_text(test)
    assert environment_of_alembic in (HUB / "hub" / "migrations" / "env.py").read_text(encoding="utf-8")
    arguments = ["-p", "homeagent.testing", "-c", "pyproject.toml", "tests", tmp_path / "test_page.py"]
    if engine_name == "postgresql":
        arguments += ["--homeagent-postgresql", request.getfixturevalue("postgres_url")]
    done = fork_server.run_pytest(HUB, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 passed" in done.stdout


def test_lamps() -> None:
    """The test of the lamps passes. The application and its tests have less than 200 lines, without the revisions."""
    done = fork_server.run_pytest(LAMPS, "-p", "homeagent.testing", "-c", "pyproject.toml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout
    written = [file for file in LAMPS.rglob("*.py") if file.parent.name != "versions"]
    assert sum(len(file.read_text(encoding="utf-8").splitlines()) for file in written) < 200
