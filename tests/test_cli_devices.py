"""The commands `homeagent devices` for long lists, and for ids with slashes, long ids and ids of an earlier version."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

from homeagent import Database, DevicePair, IdempotencyScope, Role
from tests.command_line import invoke
from tests.conftest import START, FakeClock, write_past_checks


def _ids(path: Path, *options: str) -> list[str]:
    done = invoke("devices", "list", *options, "--json", "--database", path)
    assert done.exit_code == 0, done.stderr
    return [device["id"] for device in json.loads(done.stdout)]


def _pair(path: Path, *device_ids: str) -> None:
    """Pair devices, a minute after one another."""
    clock = FakeClock()
    with Database.open(path, clock=clock) as database:
        for device_id in device_ids:
            database.pair(DevicePair(id=device_id, role=Role.NODE))
            clock.advance(minutes=1)


def test_delete_old_pending_devices(sqlite_path: Path) -> None:
    """`delete` shows the old pending devices, asks, and deletes only these devices."""
    _pair(sqlite_path, "old/1", "approved", "old/2", "new")
    with Database.open(sqlite_path) as database:
        database.devices.approve("approved")
    before = (START + timedelta(minutes=3)).isoformat()
    delete = ["devices", "delete", "--pending", "--before", before, "--database", str(sqlite_path)]
    declined = invoke(*delete, input="n\n")
    assert declined.exit_code == 1
    assert "Delete 2 pending devices?" in declined.stderr
    assert "old/2" in declined.stderr
    assert "new" not in declined.stderr
    assert _ids(sqlite_path) == ["approved", "new", "old/1", "old/2"]
    assert json.loads(invoke(*delete, "--json", "--yes").stdout) == {"deleted": 2}
    assert _ids(sqlite_path) == ["approved", "new"]
    assert invoke(*delete, "--yes").stdout == "Deleted 0 pending devices.\n"


def test_many_devices_are_shown_in_part(sqlite_path: Path) -> None:
    """The question shows 20 devices and the number of the others."""
    _pair(sqlite_path, *(f"device-{number:02}" for number in range(23)))
    asked = invoke(
        "devices", "delete", "--pending", "--before", "2030-01-01T00:00:00Z", "--database", sqlite_path, input="y\n"
    )
    assert "device-22" in asked.stderr
    assert "device-02" not in asked.stderr
    assert "and 3 other devices" in asked.stderr
    assert asked.stdout == "Deleted 23 pending devices.\n"


def test_list_in_the_order_of_pairing(sqlite_path: Path) -> None:
    """The newest device comes first, pages continue after an id, and `--seen-before` leaves out other devices."""
    _pair(sqlite_path, "b", "c", "a")
    assert _ids(sqlite_path, "--order", "paired_at") == ["a", "c", "b"]
    assert _ids(sqlite_path, "--order", "paired_at", "--limit", "1", "--after", "a") == ["c"]
    for limit, note in (("2", "The list ends at its limit of 2 rows: raise --limit to see more rows.\n"), ("4", "")):
        assert invoke("devices", "list", "--limit", limit, "--database", sqlite_path).stderr == note
    with Database.open(sqlite_path) as database:
        database.devices.update_last_seen("a", START)
        database.devices.update_last_seen("b", START + timedelta(hours=1))
    assert _ids(sqlite_path, "--seen-before", (START + timedelta(hours=1)).isoformat()) == ["a"]


def test_commands_cope_with_ids_of_an_earlier_version(sqlite_path: Path) -> None:
    """If a row has an id that no new row can have, the commands list, approve, revoke and settle the row."""
    odd = "a/../b\u202e" + "x" * 600
    with Database.open(sqlite_path) as database:
        database.pair(DevicePair(id="lamp", role=Role.NODE))
        scope = IdempotencyScope("lamp", "m", "k")
        database.idempotency_keys.claim(scope, fingerprint="f", lease=timedelta(0), ttl=timedelta(hours=1))
    for table, column in (("devices", "id"), ("idempotency_keys", "device_id"), ("idempotency_keys", "key")):
        write_past_checks(sqlite_path, f"UPDATE {table} SET {column} = '{odd}'")
    assert _ids(sqlite_path) == [odd]
    assert odd.replace("\u202e", r"\u202e") in invoke("devices", "list", "--database", sqlite_path).stdout
    (seen,) = json.loads(invoke("devices", "list", "--json", "--database", sqlite_path).stdout)
    approve = ["--yes", "--role", "node", "--paired-at", seen["paired_at"], "--json"]
    done: Any = json.loads(invoke("devices", "approve", odd, *approve, "--database", sqlite_path).stdout)
    assert done["device"]["id"] == odd
    assert invoke("devices", "revoke", odd, "--database", sqlite_path).exit_code == 0
    settled = invoke("keys", "resolve", odd, "m", odd, "1", "--database", sqlite_path, input="y\n")
    assert "Resolved" in settled.stdout
    assert invoke("keys", "abandoned", "--json", "--database", sqlite_path).stdout == "[]\n"
    checked = invoke("doctor", "--database", sqlite_path)
    assert "can be read" in checked.stdout
    refused = invoke("devices", "revoke", "\udcff", "--database", sqlite_path)
    assert refused.exit_code == 1
    assert "no device" in refused.stderr
