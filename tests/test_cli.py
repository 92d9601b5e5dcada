"""The command line: its output, its refusals, and the absence of secrets in both.

SQLite only, except for the tests that name a server: by way of `Database`, a command does the same on both engines.
"""

from __future__ import annotations

import json
import os
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import make_url

from homeagent import Database, DevicePair, Role
from homeagent.cli.visible_text import escape_words, identity
from homeagent.migrations import REVISION
from tests import fork_server
from tests.command_line import invoke, old_store


def _run(*arguments: str, environment: dict[str, str] | None = None) -> Any:
    inherited = {name: value for name, value in os.environ.items() if name != "HOMEAGENT_DATABASE"}
    return fork_server.run_command(*arguments, environment=inherited | (environment or {}))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Path of a database in a private directory that does not exist yet."""
    return tmp_path / "store" / "h.db"


@pytest.fixture
def ready(sqlite_path: Path) -> Path:
    """Create a database with an admin device that waits for approval."""
    add_device(sqlite_path)
    return sqlite_path


def add_device(path: Path) -> None:
    with Database.open(path) as database:
        database.pair(DevicePair.model_validate({"id": "desk", "role": "admin", "metadata": {"os": "[bold]x"}}))


def test_init_and_status_as_processes(path: Path) -> None:
    """Processes find a new file by the option and the variable. A second `init` keeps rows; `:memory:` is refused.

    The text of `status` has the file, the engine, the schema, each table, the settings and the file modes.
    """
    made = _run("--database", str(path), "init", "--json")
    assert (made.returncode, made.stderr) == (0, "")
    expected = {"location": str(path), "action": "made", "from_revision": None, "schema_revision": REVISION}
    assert json.loads(made.stdout) == {**expected, "backup": None}
    add_device(path)
    seen = _run("status", "--json", environment={"HOMEAGENT_DATABASE": str(path)})
    assert (seen.returncode, seen.stderr) == (0, "")
    status = json.loads(seen.stdout)
    assert (status["location"], status["schema_revision"]) == (str(path), REVISION)
    assert status["pragmas"]["foreign_keys"] == 1
    assert status["file_modes"][path.name] == "0600"
    again = invoke("init", "--database", path)
    assert (again.exit_code, again.stdout) == (0, f"{path} is at schema revision {REVISION} already: nothing to do.\n")
    assert json.loads(invoke("status", "--json", "--database", path).stdout)["rows"]["devices"] == 1
    shown = invoke("status", "--database", path).stdout
    for words in (str(path), "SQLite 3.", REVISION, "devices", "idempotency_keys", "journal_mode", "0600", "0700"):
        assert words in shown
    assert "name a file" in invoke("--database", ":memory:", "init").stderr


def test_migrate_says_from_and_to_and_names_the_copy(tmp_path: Path) -> None:
    """If a file is at an older revision, `status` refuses, and `migrate` upgrades and prints the backup's path."""
    path = old_store(tmp_path / "old")
    refused = invoke("status", "--database", path)
    assert refused.exit_code == 1
    assert "run 'homeagent migrate'" in refused.stderr
    done = invoke("--database", path, "migrate", "--json")
    assert done.exit_code == 0
    upgrade = json.loads(done.stdout)
    assert (upgrade["action"], upgrade["from_revision"], upgrade["schema_revision"]) == ("upgraded", "0002", REVISION)
    assert Path(upgrade["backup"]).is_file()
    assert invoke("status", "--database", path).exit_code == 0


def test_a_server_is_made_and_shown_without_its_password(empty_postgres_url: str) -> None:
    """On PostgreSQL, `init` creates the tables once, and neither `init` nor `status` prints a password of any kind."""
    url = make_url(empty_postgres_url).set(password="geheim").update_query_dict({"sslpassword": "geheim"})
    target = url.render_as_string(hide_password=False)
    actions = []
    for _ in range(2):
        done = invoke("init", "--json", "--database", target)
        assert "geheim" not in done.output
        actions.append(json.loads(done.stdout)["action"])
    assert actions == ["made", "unchanged"]
    status = invoke("status", "--json", "--database", target)
    assert "geheim" not in status.output
    found = json.loads(status.stdout)
    assert (found["engine"], found["schema_revision"], found["wal_bytes"]) == ("postgresql", REVISION, None)
    assert found["location"].startswith("postgresql+psycopg://")
    shown = invoke("status", "--database", target)
    assert shown.exit_code == 0
    assert "PostgreSQL 1" in shown.stdout
    assert "geheim" not in shown.output


def test_a_refusal_after_a_warning_is_one_line(ready: Path) -> None:
    """A repaired file mode causes a warning if the command succeeds, and no second line if the command is refused."""
    ready.chmod(0o644)
    refused = _run("devices", "approve", "nobody", "--database", str(ready))
    assert (refused.returncode, refused.stdout) == (1, "")
    assert re.fullmatch(r"homeagent: no device 'nobody'.*\n", refused.stderr)
    ready.chmod(0o644)
    repaired = _run("status", "--database", str(ready))
    assert repaired.returncode == 0
    assert "homeagent: warning: " in repaired.stderr
    assert "0600" in repaired.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        "",
        "frobnicate",
        "status extra",
        "status --databse x",
        "sweep --batch-size 0",
        "sweep --batch-size many",
        "sweep --time-budget 0",
        "sweep --time-budget nan",
        "sweep --time-budget inf",
        "devices",
        "devices approve",
        "devices approve desk --yes",
        "devices approve desk --status gone",
        "devices approve desk --paired-at 2030-01-01",
        "devices list --role king",
        "devices delete --before 2030-01-01T00:00:00Z --yes",
        "devices delete --pending --yes",
        "devices delete --pending --before 2030-01-01 --yes",
        "devices delete --pending --before 9999-12-31T23:00:00-02:00 --yes",
        "sessions move talk",
        "sessions move talk --sender anna --no-sender",
        "sessions move talk --sender bad\x07name",
        "sessions move talk --channel bad\x07name",
        "devices revoke desk --reason bad\x07name",
        "agents update maid",
        "keys resolve lamp play k1 {order --yes --attempt 1",
    ],
)
def test_wrong_usage_ends_with_2(arguments: str, path: Path) -> None:
    """Wrong usage ends with status 2, unlike a refusal, and creates no file."""
    assert invoke("--database", path, *arguments.split()).exit_code == 2
    assert not path.parent.exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["postgresql://me:geheim@127.0.0.1:1/db"],
        ["status", "postgresql://me:ge@heim@127.0.0.1:1/db?password=geheim"],
        ["devices", "postgresql://me:geheim@127.0.0.1:1/db"],
        ["--database", "postgresql://me:geheim@127.0.0.1:1/db?password=geheim", "status"],
        ["--database", "postgresql://me:geheim@127.0.0.1:port/db", "status"],
        ["--database", "mysql://me:geheim@127.0.0.1/db", "init"],
    ],
)
def test_no_message_shows_a_password(arguments: list[str]) -> None:
    """If a URL contains a password, no message shows the password, in whichever argument the URL is."""
    done = invoke(*arguments)
    assert done.exit_code in (1, 2)
    assert done.stderr
    assert "heim" not in done.output


def test_sweep_removes_expired_rows(ready: Path) -> None:
    """`status` counts expired nonces, and `sweep` removes all of them, however small the batches are."""
    long_ago = datetime(2020, 1, 1, tzinfo=UTC)
    with Database.open(ready, clock=lambda: long_ago) as database, database.unit_of_work() as unit:
        for number in range(5):
            unit.nonces.consume("desk", f"n{number}", expires_at=long_ago + timedelta(minutes=1))
    waiting = json.loads(invoke("status", "--json", "--database", ready).stdout)
    assert waiting["expired"]["nonces"] == 5
    swept = invoke("sweep", "--json", "--batch-size", "2", "--time-budget", "60", "--database", ready)
    zeros = dict.fromkeys(("idempotency_keys", "pending_devices", "device_changes", "skipped"), 0)
    assert json.loads(swept.stdout) == {"nonces": 5, "more": False, "constraints": [], **zeros}
    assert invoke("sweep", "--database", ready).stdout == "Removed 0 nonces and 0 idempotency keys.\n"


def _devices(path: Path) -> Any:
    return json.loads(invoke("devices", "list", "--json", "--database", path).stdout)


def test_approve_shows_the_device_and_asks(ready: Path) -> None:
    """`approve` prints the stored device with markup unchanged; a no changes no row, and a yes approves the device."""
    declined = invoke("devices", "approve", "desk", "--database", ready, input="n\n")
    assert declined.exit_code == 1
    assert "admin" in declined.stderr
    assert "[bold]x" in declined.stderr
    assert _devices(ready)[0]["status"] == "pending"
    assert invoke("devices", "approve", "desk", "--database", ready, input="y\n").exit_code == 0
    assert _devices(ready)[0]["status"] == "approved"
    assert "nothing to do" in invoke("devices", "approve", "desk", "--database", ready).stdout


def _revoke(other: Database) -> None:
    other.devices.revoke("desk", reason="stolen", force=True)


def _pair_again(other: Database) -> None:
    other.devices.delete("desk", force=True)
    other.pair(DevicePair(id="desk", role=Role.ADMIN))


@pytest.mark.parametrize(
    ("command", "approved", "change", "refusal", "status"),
    [
        ("approve", False, _revoke, "another status", "revoked"),
        ("approve", True, _revoke, "another status", "revoked"),
        ("approve", False, _pair_again, "another secret", "pending"),
        ("delete", False, lambda other: other.devices.approve("desk"), "changed after it was shown", "approved"),
    ],
)
def test_a_device_that_changes_during_the_question(
    ready: Path, command: str, approved: bool, change: Any, refusal: str, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If another admin revokes, approves or replaces the device before the command commits, the command refuses."""
    with Database.open(ready) as other:
        if approved:
            other.devices.approve("desk")
        module = {"approve": "devices", "delete": "rows"}[command]
        monkeypatch.setattr(f"homeagent.cli.{module}.confirm", lambda *_, **__: change(other))
        done = invoke("devices", command, "desk", "--database", ready)
    assert (done.exit_code, done.stdout) == (1, "")
    assert refusal in done.stderr
    assert _devices(ready)[0]["status"] == status


def test_a_revoked_device_is_approved_by_its_status_alone(ready: Path) -> None:
    """A revoked device is approved by `--status revoked`, or by a yes without another status; the refusal says so."""
    seen = _devices(ready)[0]
    assert invoke("devices", "revoke", "desk", "--reason", "stolen", "--database", ready).exit_code == 0
    approve = ["devices", "approve", "desk", "--yes", "--role", seen["role"], "--paired-at", seen["paired_at"]]
    approve += ["--database", str(ready)]
    for status in ([], ["--status", "pending"], ["--status", "approved"]):
        refused = invoke(*approve, *status)
        assert (refused.exit_code, refused.stderr.count("\n")) == (1, 1)
        assert "another status" in refused.stderr
        assert "--status revoked" in refused.stderr
        assert _devices(ready)[0]["status"] == "revoked"
    assert invoke(*approve, "--status", "revoked").exit_code == 0
    assert _devices(ready)[0]["status"] == "approved"
    invoke("devices", "revoke", "desk", "--force", "--database", ready)
    ask = ["devices", "approve", "desk", "--database", str(ready)]
    for status, exit_code, found in ((["--status", "pending"], 1, "revoked"), ([], 0, "approved")):
        assert invoke(*ask, *status, input="y\n").exit_code == exit_code
        assert _devices(ready)[0]["status"] == found


def test_approve_refuses_a_device_other_than_the_listed(ready: Path) -> None:
    """If the script passes another role or pairing time than the list prints, `approve` refuses."""
    paired_at = _devices(ready)[0]["paired_at"]
    approve = ["devices", "approve", "desk", "--yes", "--json", "--database", str(ready), "--role"]
    for values, refusal in (
        (["client", "--paired-at", paired_at], "another role"),
        (["admin", "--paired-at", "2020-01-01T00:00:00Z"], "another time of pairing"),
    ):
        refused = invoke(*approve, *values)
        assert refused.exit_code == 1
        assert refusal in refused.stderr
    assert _devices(ready)[0]["approved"] is False
    done = json.loads(invoke(*approve, "admin", "--paired-at", paired_at).stdout)
    assert (done["changed"], done["device"]["approved"]) == (True, True)


def test_an_id_that_resembles_another_is_escaped(ready: Path) -> None:
    """If an id has invisible characters, the list, the question and an error show escapes or quotes."""
    with Database.open(ready) as database:
        database.pair(DevicePair(id="de\u200dsk", role=Role.ADMIN))
    assert r"'de\u200dsk'" in invoke("devices", "list", "--database", ready).stdout
    asked = invoke("devices", "approve", "de\u200dsk", "--database", ready, input="n\n")
    assert r"'de\u200dsk'" in asked.stderr
    assert "'desk'" not in invoke("devices", "approve", "desk", "--database", ready, input="n\n").stderr
    assert r"d\u0435sk" in invoke("devices", "revoke", "d\u0435sk", "--database", ready).stderr
    assert escape_words("use run(…)") == "use run(…)"


@pytest.mark.parametrize(
    ("text", "shown"),
    {
        "lamp": "lamp",
        "café ☎": "café ☎",
        "Łódź-Đỗ": "Łódź-Đỗ",
        "de\u200dsk": r"'de\u200dsk'",
        "desk ": "'desk '",
        " desk": "' desk'",
        "desk\u00a0": r"'desk\xa0'",
        "de\u0301sk": "'de\u0301sk'",
        "desk\u034f": r"'desk\u034f'",
        "desk\ufe0f": r"'desk\ufe0f'",
        "desk\u3164": r"'desk\u3164'",
        "desk\u2800": r"'desk\u2800'",
        "desk\U000e0101": r"'desk\U000e0101'",
        "ph\u043ene": r"'ph\u043ene'",
        "desk\u0399": r"'desk\u0399'",
        "\uff4camp": r"'\uff4camp'",
        "tab\u2010let": r"'tab\u2010let'",
        "ta\u0261": r"'ta\u0261'",
        "\u0301x": r"'\u0301x'",
        "\u0441\u043e\u0441\u043e": "'\u0441\u043e\u0441\u043e' (CYRILLIC)",
        "\u0441\u043e\u03bf": "'\u0441\u043e\\u03bf' (CYRILLIC)",
        "台所ライト": "'台所ライト' (CJK)",
        "'\u0441' (CYRILLIC)": r"'\'\u0441\' (CYRILLIC)'",
        r"desk\u034f": r"'desk\\u034f'",
    }.items(),
    ids=ascii,
)
def test_ambiguous_ids_are_escaped(text: str, shown: str) -> None:
    """Each id that resembles another id is printed with escapes; ordinary ids are printed unchanged."""
    assert identity(text) == shown


def test_revoke_keeps_the_last_admin(ready: Path) -> None:
    """If the device is the last approved admin, `revoke` needs `--force`, and keeps the reason."""
    with Database.open(ready) as database, database.unit_of_work() as unit:
        unit.devices.approve("desk", expected_role=Role.ADMIN)
    assert invoke("devices", "revoke", "desk", "--database", ready).exit_code == 1
    forced = invoke("devices", "revoke", "desk", "--force", "--reason", "lost", "--json", "--database", ready)
    assert forced.exit_code == 0
    assert json.loads(forced.stdout)["device"]["revoked_reason"] == "lost"


def test_a_device_is_listed_without_its_secret(ready: Path) -> None:
    """The table and the JSON of the device list contain the id and no hash."""
    with Database.open(ready) as database, database.unit_of_work(read_only=True) as unit:
        secret_hash = unit.devices.get("desk").shared_secret_hash
    for form in ([], ["--json"]):
        shown = invoke("devices", "list", *form, "--database", ready).stdout
        assert "desk" in shown
        assert secret_hash not in shown
        assert "secret" not in shown
