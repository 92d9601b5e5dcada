"""What an operator does with the command line: lists, decisions with a question, dry runs, and the doctor."""

from __future__ import annotations

import json
import re
import time
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from unittest import mock

import apsw
import pytest
from sqlalchemy import text

from homeagent import AgentSessionCreate, Database, DevicePair, DeviceUpdate, IdempotencyScope, Role
from homeagent.errors import DatabaseBusyError
from homeagent.maintenance import Diagnosis
from homeagent.maintenance.doctor import CHECKS
from tests.command_line import create_rows, invoke
from tests.conftest import ROOT, START, FakeClock, write_past_checks

LONG_ID = "kitchen-thermostat-on-the-left-side-of-the-door-to-the-garden"
AT_START = START.isoformat()


@pytest.fixture
def store(sqlite_path: Path) -> Path:
    """A closed store with a row in each table, all created at `START`."""
    create_rows(sqlite_path)
    return sqlite_path


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_a_table_fits_the_terminal(store: Path, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a terminal no line is wider than the terminal, and each word of an id is whole."""
    with Database.open(store) as database:
        database.pair(DevicePair(id=LONG_ID, role=Role.NODE))
        database.pair(DevicePair(id="x" * 250, role=Role.NODE))
    monkeypatch.setattr("homeagent.cli.output._terminal_width", lambda *, error: columns)
    for arguments in (["devices", "list"], ["devices", "show", LONG_ID], ["status"]):
        shown = invoke("--database", store, *arguments).stdout
        longest = max(shown.splitlines(), key=len)
        assert len(longest) <= columns or " " not in longest.strip(), longest
        assert not any(line.isspace() for line in shown.splitlines()), shown
        if "status" not in arguments:
            assert all(word in shown for word in LONG_ID.split("-"))
            assert LONG_ID in "".join(line.strip() for line in shown.splitlines())
            assert re.search(r"\d\d:\d\d:\d\d\.\d{3}[+-]\d\d:\d\d", shown)


def test_times_and_forms_of_a_list(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table has local times with the zone; tab-separated values and JSON have UTC; a pipe gets one line a row."""
    with Database.open(store, clock=FakeClock()) as database:
        database.pair(DevicePair(id=LONG_ID, role=Role.NODE))
    monkeypatch.setenv("TZ", "Asia/Kolkata")
    time.tzset()
    try:
        table = invoke("devices", "list", "--database", store).stdout.splitlines()
    finally:
        monkeypatch.undo()
        time.tzset()
    assert len(table) == 3
    assert LONG_ID in table[1]
    assert "2026-01-02 08:34:05.678+05:30" in table[2]
    rows = invoke("devices", "list", "--format", "tsv", "--database", store).stdout
    row = "\tnode\tpending\t2026-01-02T03:04:05.678Z\t\n"
    assert rows == f"device\trole\tstatus\tpaired_at\tlast_seen_at\n{LONG_ID}{row}lamp{row}"


def test_the_first_admin_in_one_command(sqlite_path: Path) -> None:
    """`pair --approve` prints the secret of an approved admin once; `rotate` replaces the secret after a question."""
    paired = json.loads(
        invoke("devices", "pair", "desk", "--role", "admin", "--approve", "--json", "--database", sqlite_path).stdout
    )
    assert paired["device"]["status"] == "approved"
    rotate = ["devices", "rotate", "desk", "--database", str(sqlite_path)]
    assert invoke(*rotate, input="n\n").exit_code == 1
    asked = invoke(*rotate, input="y\n")
    new = asked.stdout.split()[-1]
    assert "The old secret ends at once." in asked.stderr
    with Database.open(sqlite_path) as database:
        assert database.verify_secret("desk", paired["shared_secret"]) is None
        assert database.verify_secret("desk", new) is not None
    again = invoke("devices", "pair", "desk", "--role", "admin", "--database", sqlite_path)
    assert "'homeagent devices rotate'" in again.stderr
    delete = ["devices", "delete", "desk", "--database", sqlite_path]
    assert "or pass --force" in invoke(*delete, input="y\n").stderr
    assert invoke(*delete, "--force", input="y\n").exit_code == 0


DELETIONS = {
    "devices delete": ("lamp", "node", "--paired-at"),
    "agents delete": ("butler", "Butler", "--created-at"),
    "sessions delete": ("talk", "butler", "--created-at"),
}


@pytest.mark.parametrize("command", DELETIONS)
def test_a_deletion_shows_the_row_and_asks(store: Path, command: str) -> None:
    """A deletion shows the row and asks; a program passes `--yes` with the time that identifies the row."""
    name, shown, expected = DELETIONS[command]
    delete = [*command.split(), name, "--database", str(store), *(["--with-sessions"] if name == "butler" else [])]
    declined = invoke(*delete, input="n\n")
    assert declined.exit_code == 1
    assert shown in declined.stderr
    for options, missing in (([], "--yes"), (["--yes"], expected)):
        program = invoke(*delete, *options, "--json", input="y\n")
        assert program.exit_code == 2
        assert missing in json.loads(program.stderr)["message"]
    other = invoke(*delete, "--yes", expected, "2020-01-01T00:00:00Z")
    assert other.exit_code == 1
    assert "show it again" in other.stderr
    assert json.loads(invoke(*delete, "--yes", expected, AT_START, "--json").stdout) == {"deleted": 1}
    assert json.loads(invoke(*delete, "--yes", expected, AT_START, "--json").stderr)["error"].endswith("NotFoundError")


@pytest.mark.parametrize(
    ("arguments", "counts"),
    [
        (["devices", "delete", "lamp"], {"deleted": 1, "idempotency_keys": 1}),
        (["devices", "delete", "--pending", "--before", "2030-01-01T00:00:00Z"], {"deleted": 1}),
        (["agents", "delete", "butler", "--with-sessions"], {"deleted": 1, "sessions": 1}),
        (["sweep"], {"nonces": 1, "idempotency_keys": 1, "pending_devices": 1, "device_changes": 2}),
        (["sweep", "--pending-ttl", "36500", "--changes-kept", "36500"], {"pending_devices": 0, "device_changes": 0}),
    ],
    ids=str,
)
def test_a_dry_run_counts_and_changes_nothing(store: Path, arguments: list[str], counts: dict[str, int]) -> None:
    """With `--dry-run` a command prints what it would delete, asks nothing, and leaves every row."""
    with Database.open(store, clock=FakeClock()) as database:
        scope = IdempotencyScope("other", "play", "k2")
        database.idempotency_keys.insert(scope, None, ttl=timedelta(minutes=1))
        with database.unit_of_work() as unit:
            unit.session.connection().execute(text("UPDATE device_changes SET at = 0"))
            unit.devices.update("lamp", DeviceUpdate(metadata={"room": "hall"}))  # the newest change, which stays
        before = database.status().rows
    done = invoke(*arguments, "--dry-run", "--json", "--database", store, input=None)
    found = json.loads(done.stdout)
    assert found == found | {"dry_run": True, **counts}
    shown = invoke(*arguments, "--dry-run", "--database", store, input=None)
    assert shown.stdout.startswith("Would ")
    assert shown.stdout.endswith("Nothing was changed.\n")
    with Database.open(store) as database:
        assert database.status().rows == before


def test_cascades_are_named(target: str) -> None:
    """A deletion names the tables of the application that lose rows, in the question, the dry run and the result."""
    create_rows(target)
    with Database.open(target) as database, database.unit_of_work() as unit:
        for table, parent in (
            ("notes", "sessions (session_id) ON DELETE CASCADE"),
            ("marks", "notes (id) ON DELETE CASCADE"),
            ("logs", "sessions (session_id) ON DELETE SET NULL"),
        ):
            create = f"CREATE TABLE {table} (id TEXT PRIMARY KEY, parent TEXT REFERENCES {parent})"
            unit.session.connection().execute(text(create))
    delete = ["agents", "delete", "butler", "--with-sessions", "--database", target]
    assert "and 1 session, and their rows in marks, notes? [y/N]" in invoke(*delete, input="n\n").stderr
    assert "'butler' and 1 session, and their rows in marks, notes." in invoke(*delete, "--dry-run").stdout
    done = invoke(*delete, "--yes", "--created-at", AT_START, "--json")
    assert json.loads(done.stdout) == {"deleted": 1, "cascades": ["marks", "notes"]}
    assert "cascades" not in invoke("devices", "delete", "lamp", "--dry-run", "--json", "--database", target).stdout


def test_questions_and_progress_at_a_terminal(store: Path, tmp_path: Path) -> None:
    """At a terminal and in a pipe, a command shows what it will change and asks; long work shows a bar."""
    at = ["--database", store]
    made = invoke("backup", tmp_path / "h.backup", *at, env={"TERM": "xterm"}, terminal=True)
    assert made.exit_code == 0
    assert "copying and verifying" in made.stderr
    for command, shown in (
        (["begin-epoch"], ["Database", "Epoch", "Restored at", "never"]),
        (["restore", tmp_path / "h.backup"], ["Epoch", "Devices", "Taken at", "Schema revision", "0010"]),
        (["keys", "forget", "lamp", "play", "k1"], ["Attempt", "Abandoned at", "lamp"]),
    ):
        for terminal in (True, False):
            declined = invoke(*command, *at, input="n\n", terminal=terminal)
            assert (declined.exit_code, declined.stdout) == (1, "")
            assert all(text in declined.stderr for text in shown), declined.stderr
            line_break = "" if terminal else "\n"
            answered = f"? [y/N]: {line_break}homeagent: the answer was not y: nothing was changed\n"
            assert declined.stderr.endswith(answered), declined.stderr
    with Database.open(store) as database:
        assert database.status().epoch == 1
        assert len(database.run(lambda unit: unit.idempotency_keys.list_abandoned(), read_only=True)) == 1


def test_an_epoch_is_expected(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `--yes`, `begin-epoch` and `restore` need the epoch; 0 stands for a target that cannot be opened."""
    invoke("backup", tmp_path / "h.backup", "--database", store)
    for command, epoch in ((["begin-epoch"], 1), (["restore", tmp_path / "h.backup"], 2)):
        run = [*command, "--database", store, "--yes"]
        given: tuple[list[int], ...] = ([], [-1], [epoch + 1], [epoch], [epoch])
        for value, status in zip(given, (2, 2, 1, 0, 1), strict=True):
            options = ["--epoch", *value] if value else []
            done = invoke(*run, *options, input=None)
            assert done.exit_code == status, done.stderr
            assert status == 0 or "epoch" in done.stderr
    with closing(apsw.Connection(str(store))) as raw:
        page = raw.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'homeagent_schema_version'").get
    with store.open("r+b") as file:  # the epoch stays readable, but no command can open the database
        file.seek((page - 1) * 4096)
        file.write(b"\xff" * 4096)
    run = ["restore", tmp_path / "h.backup", "--database", store, "--yes", "--epoch"]
    assert "has epoch 3, but epoch 2 was expected" in invoke(*run, 2).stderr
    assert invoke(*run, 0).exit_code == 0
    assert "has epoch 4, but epoch 0 was expected" in invoke(*run, 0).stderr
    with monkeypatch.context() as patch:  # a busy database may be sound
        patch.setattr("homeagent.cli.backup.open_named", mock.Mock(side_effect=DatabaseBusyError("it is busy")))
        assert "it is busy" in invoke(*run, 0).stderr
    store.write_bytes(b"\xff" * 8192)
    absent = tmp_path / "other" / "absent.db"
    for path in (store, absent):
        run = ["restore", tmp_path / "h.backup", "--database", path, "--yes", "--epoch"]
        assert "has epoch 0, because no epoch could be read" in invoke(*run, "1").stderr
        assert not absent.parent.exists()
        assert invoke(*run, "0").exit_code == 0
        path.write_bytes(b"\xff" * 8192)
        asked = invoke("restore", tmp_path / "h.backup", "--database", path, input="y\n")
        assert asked.exit_code == 0
        assert "cannot be opened: " in asked.stderr


def test_agents_are_created_and_changed(store: Path) -> None:
    """`create` and `update` store the values; an invalid value and an agent with sessions are refused in a line."""
    at = ["--database", str(store)]
    create = ["--name", "M", "--workspace", "/srv", *at]
    made = invoke("agents", "create", "maid", "--config", '{"a": 1}', "--json", *create)
    assert json.loads(made.stdout)["config"] == {"a": 1}
    assert invoke("agents", "update", "maid", "--config", "null", *at).exit_code == 0
    changed = json.loads(invoke("agents", "show", "maid", "--json", *at).stdout)
    assert (changed["name"], changed["config"]) == ("M", None)
    assert invoke("agents", "create", "x\ny", *create).exit_code == 2
    for option in ([], ["--dry-run"]):
        in_use = invoke("agents", "delete", "butler", "--yes", "--created-at", AT_START, "--json", *option, *at)
        assert json.loads(in_use.stderr)["details"] == {"agent_id": "butler", "session_count": 1}
        assert "or pass --with-sessions" in json.loads(in_use.stderr)["message"]


def test_sessions_are_moved(store: Path) -> None:
    """`move` changes the given parts of the route; a route that another session holds is refused with its id."""
    at = ["--database", str(store)]
    move = ["sessions", "move", "talk"]
    moved = json.loads(invoke(*move, "--sender", "anna", "--channel", "sms", "--json", *at).stdout)
    assert (moved["agent_id"], moved["sender_id"], moved["channel_id"]) == ("butler", "anna", "sms")
    assert invoke(*move, "--no-channel", *at).stdout == "Moved 'talk'.\n"
    with Database.open(store) as database:
        database.sessions.create(AgentSessionCreate(session_id="other", agent_id="butler"))
    taken = invoke("sessions", "move", "other", "--sender", "anna", *at)
    assert taken.exit_code == 1
    assert "move or delete that session" in taken.stderr


def test_config_shows_the_source(store: Path) -> None:
    """`config` shows the target without a password, and the option or variable that names the target."""
    url = "postgresql://me:geheim@db.example/hub"
    shown = invoke(
        "config", "--json", env={"HOMEAGENT_DATABASE": url, "PGPASSWORD": "geheim", "HOMEAGENT_BUSY_TIMEOUT": "7"}
    )
    assert "geheim" not in shown.output
    found = {entry["setting"]: entry for entry in json.loads(shown.stdout)}
    assert found["database"]["value"].endswith("@db.example/hub")
    assert found["database"]["source"] == "$HOMEAGENT_DATABASE"
    assert found["busy timeout"] == {"setting": "busy timeout", "value": "7 s", "source": "$HOMEAGENT_BUSY_TIMEOUT"}
    assert found["PGPASSWORD"]["value"] == "set"
    named = json.loads(invoke("config", "--json", "--database", store).stdout)[0]
    assert (named["value"], named["source"]) == (str(store), "--database")


def test_nonces_forget_releases_the_limit(sqlite_path: Path) -> None:
    """`nonces forget` prints how many nonces were released. An id without nonces and without a device is refused."""
    soon = datetime.now(UTC) + timedelta(minutes=5)
    with Database.open(sqlite_path) as database:
        database.nonces.consume("lamp", "n1", expires_at=soon)
    assert invoke("nonces", "forget", "lamp", "--database", sqlite_path).stdout == "Released 1 nonce of 'lamp'.\n"
    absent = invoke("nonces", "forget", "lmap", "--database", sqlite_path)
    assert (absent.exit_code, "no device 'lmap'" in absent.stderr) == (1, True)


# Long lists, and ids of an earlier version


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
    planned = {"dry_run": True, "deleted": 2, "devices": ["old/2", "old/1"]}
    assert json.loads(invoke(*delete, "--dry-run", "--json").stdout) == planned
    assert _ids(sqlite_path) == ["approved", "new", "old/1", "old/2"]
    assert json.loads(invoke(*delete, "--json", "--yes").stdout) == {"deleted": 2}
    assert _ids(sqlite_path) == ["approved", "new"]
    assert invoke(*delete, "--yes").stdout == "Deleted 0 pending devices.\n"


def test_many_devices_are_shown_in_part(sqlite_path: Path) -> None:
    """The question shows 20 devices and the number of the others. A dry run shows all devices."""
    _pair(sqlite_path, *(f"device-{number:02}" for number in range(23)))
    delete = ["devices", "delete", "--pending", "--before", "2030-01-01T00:00:00Z", "--database", str(sqlite_path)]
    assert "device-02" in invoke(*delete, "--dry-run").stderr
    asked = invoke(*delete, input="y\n")
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
    # A change of the device's id would delete the keys of the id.
    for table, column in (("idempotency_keys", "device_id"), ("idempotency_keys", "key"), ("devices", "id")):
        write_past_checks(sqlite_path, f"UPDATE {table} SET {column} = '{odd}'")
    assert _ids(sqlite_path) == [odd]
    assert odd.replace("\u202e", r"\u202e") in invoke("devices", "list", "--database", sqlite_path).stdout
    (seen,) = json.loads(invoke("devices", "list", "--json", "--database", sqlite_path).stdout)
    approve = ["--yes", "--role", "node", "--paired-at", seen["paired_at"], "--json"]
    done = json.loads(invoke("devices", "approve", odd, *approve, "--database", sqlite_path).stdout)
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


# The doctor, on whose output and exit status monitoring can rely


@pytest.fixture
def on_disk(sqlite_path: Path, on_a_disk: None) -> Path:
    """A fresh, migrated file on a file system that the doctor treats as a disk."""
    return sqlite_path


def test_the_status_shows_the_worst_finding(on_disk: Path) -> None:
    """The status is 0 without findings, 1 for warnings and 2 for critical findings; the JSON is the model."""
    statuses = []
    for mode in (0o600, 0o640, 0o666):
        on_disk.chmod(mode)
        done = invoke("--database", on_disk, "doctor", "--json")
        found = Diagnosis.model_validate_json(done.stdout)
        assert (done.exit_code, done.stderr) == (found.exit_status, "")
        # If the temporary directory is in memory, the doctor gives a further warning.
        modes = found.finding("files")
        assert modes is not None
        statuses.append(modes.severity.exit_status)
    assert statuses == [0, 1, 2]


def test_the_text_names_remedies(on_disk: Path) -> None:
    """The text shows each bad finding with its meaning, remedy and command, and ends with their number."""
    with Database.open(on_disk) as database:
        database.pair(DevicePair(id="lamp", role=Role.NODE))
    done = invoke("doctor", "--database", on_disk, env={"COLUMNS": "200"})
    assert done.exit_code == 1
    assert "There are devices and no approved admin." in done.stdout
    assert "It means: devices can be approved or revoked only by a shell" in done.stdout
    assert "What to do: pair a device with the role admin" in done.stdout
    assert "homeagent devices list --role admin" in done.stdout
    assert f"{on_disk}: 1 of " in done.stdout
    assert "lamp" not in done.stdout


def test_fix_reports_repairs(on_disk: Path) -> None:
    """`--fix` repairs, reports each repair, and ends with the remaining findings."""
    on_disk.chmod(0o644)
    done = invoke("doctor", "--fix", "--database", on_disk, env={"COLUMNS": "200"})
    assert done.exit_code == 0
    assert "Repaired, files: gave 'homeagent.db' mode 0600; it had 0644." in done.stdout
    assert "All is well" in done.stdout


@pytest.mark.parametrize("target", [":memory:", "mysql://me:geheim@127.0.0.1/db", ""])
def test_an_invalid_target_ends_with_2(target: str) -> None:
    """If the doctor can't inspect a target, the status is 2 for wrong usage, and no password is shown."""
    done = invoke("--database", target, "doctor", env={"HOMEAGENT_DATABASE": ":memory:"})
    assert done.exit_code == 2
    assert done.stdout == ""
    assert "geheim" not in done.output


def test_every_check_is_documented() -> None:
    """The tables of the documentation list every check, in the order of the doctor's report."""
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    section = page.partition("## Doctor")[2].partition("\n## ")[0]
    assert tuple(re.findall(r"^\| `(\w+)` \|", section, flags=re.MULTILINE)) == CHECKS
