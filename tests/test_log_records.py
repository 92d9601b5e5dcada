"""Log records: each record has its event's name, is listed in the documentation, and holds no value of a row."""

from __future__ import annotations

import ast
import functools
import logging
import re
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

import homeagent
from homeagent import Database, DeviceCreate, DevicePair, IdempotencyScope, Role
from tests.conftest import FakeClock

PACKAGE = Path(homeagent.__file__).parent
REVISIONS = PACKAGE.parent / "alembic" / "versions"
PAGE = PACKAGE.parent / "docs" / "log-events.md"
LEVELS = {"debug", "info", "warning", "error", "exception", "critical", "log"}

# Names of variables and attributes that hold a value of a row, or lead to a value.
VALUES = {
    "agent_id", "channel_id", "detail", "device_id", "key", "method", "nonce", "params", "parameters", "proof",
    "result", "row", "rows", "scope", "secret", "secret_hash", "sender_id", "session_id", "shared_secret",
    "unit", "value",
}  # fmt: skip


@functools.cache
def calls() -> list[tuple[str, ast.Call]]:
    """Return each call in the package or a revision that logs a record, with its place."""
    found = []
    for path in sorted([*PACKAGE.rglob("*.py"), *REVISIONS.glob("*.py")]):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in LEVELS
                and isinstance(node.func.value, ast.Name)
                and node.func.value.id in {"logger", "logging", "log", "_logger"}
            ):
                found.append((f"{path.relative_to(PACKAGE.parent)}:{node.lineno}", node))
    return found


def fields_of(place: str, call: ast.Call) -> dict[str, ast.expr]:
    extra = next((keyword.value for keyword in call.keywords if keyword.arg == "extra"), None)
    assert isinstance(extra, ast.Dict), f"{place} has no extra={{...}} with its event"
    names = [key.value for key in extra.keys if isinstance(key, ast.Constant)]
    assert len(names) == len(extra.keys), f"{place} has a field whose name is not written out"
    return dict(zip(map(str, names), extra.values, strict=True))


def documented() -> dict[str, tuple[set[str], set[str]]]:
    """Return the documented table of records: by event, the levels and the fields."""
    text = PAGE.read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| ([\w, ]+) \| (.*?) \| .* \|$", text, flags=re.MULTILINE)
    return {event: (set(levels.split(", ")), set(re.findall(r"`(\w+)`", fields))) for event, levels, fields in rows}


def test_every_record_has_its_event_and_is_documented() -> None:
    """The code and the page name the same events, levels and fields, and no field hides an attribute of each record."""
    own = set(vars(logging.makeLogRecord({}))) | {"message", "asctime"}
    found: dict[str, tuple[set[str], set[str]]] = {}
    for place, call in calls():
        fields = fields_of(place, call)
        assert not set(fields) & own, place
        event = fields.pop("event", None)
        assert isinstance(event, ast.Constant), f"{place} has no event"
        assert isinstance(call.func, ast.Attribute)
        level = {"exception": "error"}.get(call.func.attr, call.func.attr)
        levels, names = found.setdefault(str(event.value), (set(), set()))
        levels.add(level)
        names |= set(fields)
    assert found == documented()


def test_no_record_is_given_a_value_of_a_row() -> None:
    """Neither the text nor the fields of a record come from the values of a row."""
    for place, call in calls():
        given = [*call.args[1:], *(keyword.value for keyword in call.keywords)]
        names = {node.id for value in given for node in ast.walk(value) if isinstance(node, ast.Name)}
        names |= {
            node.attr
            for value in given
            for node in ast.walk(value)
            # The figures of a report count rows.
            if isinstance(node, ast.Attribute) and not (isinstance(node.value, ast.Name) and node.value.id == "report")
        }
        assert not names & VALUES, f"{place} is given {names & VALUES}"


def test_the_package_configures_no_logging_and_never_prints() -> None:
    """The package has a single logger, and outside the command line no handler, level, basicConfig or print."""
    for path in PACKAGE.rglob("*.py"):
        if path.is_relative_to(PACKAGE / "cli"):
            continue
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"basicConfig|addHandler|setLevel|fileConfig|dictConfig|\bprint\(", text), path
        assert set(re.findall(r"getLogger\((.*?)\)", text)) <= {'"homeagent"'}, path


def test_records_as_a_host_gets_them(sqlite_path: Path, clock: FakeClock, caplog: pytest.LogCaptureFixture) -> None:
    """Real records carry their event and figures as attributes, and no value of a row."""
    caplog.set_level(logging.DEBUG, logger="homeagent")
    swept_up = threading.Event()

    def notice(record: logging.LogRecord) -> bool:
        if vars(record).get("event") == "swept":
            swept_up.set()
        return True

    caplog.handler.addFilter(notice)
    sqlite_path.chmod(0o644)
    with Database.open(sqlite_path, clock=clock, busy_timeout=timedelta(seconds=1)) as database:
        with database.unit_of_work() as unit:
            unit.devices.create(DeviceCreate(id="geheim-id", role=Role.NODE, shared_secret_hash="sha256$geheim"))
            unit.nonces.consume("geheim-id", "geheim-nonce", expires_at=clock.now + timedelta(minutes=1))
            unit.idempotency_keys.insert(IdempotencyScope("geheim-id", "geheim", "geheim"), "geheim", ttl=timedelta(1))
            unit.after_commit(lambda: 1 / 0)
        database.pair(DevicePair.model_validate({"id": "geheim-2", "role": "node", "shared_secret": "geheim-secret"}))
        clock.advance(days=2)
        with database.sweeper(every=timedelta(hours=1)):
            assert swept_up.wait(60)
    caplog.handler.removeFilter(notice)
    events = {str(vars(record).get("event")): record for record in caplog.records if record.name == "homeagent"}
    assert {"file_mode_repaired", "after_commit_failed", "swept"} <= events.keys()
    swept: Any = events["swept"]
    assert (swept.nonces, swept.idempotency_keys, swept.more) == (1, 1, False)
    repaired: Any = events["file_mode_repaired"]
    assert (repaired.path, repaired.mode_before, repaired.mode) == (str(sqlite_path), 0o644, 0o600)
    for record in events.values():
        assert "geheim" not in repr({**vars(record), "message": record.getMessage()})
