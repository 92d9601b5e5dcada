"""The command line: what it prints, what it refuses and how, and that it shows no secret.

SQLite only, but for the tests that name a server: a command does the same on both, by way of `Database`.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import make_url
from typer.testing import CliRunner, Result

from alembic import command
from homeagent import Database, DevicePair, Role
from homeagent.cli import app
from homeagent.cli.visible_text import escape_words, identity
from homeagent.engine.files import database_file as files
from homeagent.engine.sqlite.engine import SQLiteEngine
from homeagent.migrations import REVISION, alembic_config

runner = CliRunner()


def _run(*arguments: str, environment: dict[str, str] | None = None) -> Any:
    inherited = {name: value for name, value in os.environ.items() if name != "HOMEAGENT_DATABASE"}
    return subprocess.run(
        [sys.executable, "-m", "homeagent", *arguments],
        env=inherited | {"PYTHONPATH": str(Path(__file__).parents[1])} | (environment or {}),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def _invoke(*arguments: str | Path, input: str | None = None) -> Result:
    return runner.invoke(app, [str(argument) for argument in arguments], input=input)


def _assert_refused(done: Any, *words: str) -> None:
    assert done.returncode == 1, done
    assert done.stdout == ""
    assert done.stderr.startswith("homeagent: ")
    assert done.stderr.count("\n") == 1
    assert done.stderr.endswith("\n")
    for word in words:
        assert word in done.stderr


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Name a database in a private directory that isn't made yet."""
    return tmp_path / "store" / "h.db"


@pytest.fixture
def ready(path: Path) -> Path:
    """Make a database with one admin who waits for approval."""
    with Database.open(path) as database:
        database.pair(DevicePair.model_validate({"id": "desk", "role": "admin", "metadata": {"os": "[bold]x"}}))
    return path


# Making and upgrading


def test_init_status_and_sweep_as_processes(path: Path) -> None:
    """One process makes the file, others see it, whether named by the option or by the environment."""
    made = _run("--database", str(path), "init", "--json")
    assert (made.returncode, made.stderr) == (0, "")
    assert json.loads(made.stdout) == {
        "location": str(path),
        "action": "made",
        "from_revision": None,
        "schema_revision": REVISION,
        "backup": None,
    }
    seen = _run("status", "--json", environment={"HOMEAGENT_DATABASE": str(path)})
    assert (seen.returncode, seen.stderr) == (0, "")
    status = json.loads(seen.stdout)
    assert status["location"] == str(path)
    assert status["schema_revision"] == REVISION
    assert status["pragmas"]["foreign_keys"] == 1
    assert status["file_modes"][path.name] == "0600"
    assert status["rows"]["devices"] == 0


def test_init_is_idempotent(ready: Path) -> None:
    """A second `init` says that there was nothing to do, and keeps what is stored."""
    again = _invoke("init", "--database", ready)
    assert again.exit_code == 0
    assert again.stdout == f"{ready} is at schema revision {REVISION} already: nothing to do.\n"
    assert json.loads(_invoke("status", "--json", "--database", ready).stdout)["rows"]["devices"] == 1


def test_migrate_says_from_and_to_and_names_the_copy(path: Path) -> None:
    """A file at an older revision is refused by `status`, and `migrate` upgrades it and says where its copy is."""
    _at_revision(path, "0001")
    refused = _invoke("status", "--database", path)
    assert refused.exit_code == 1
    assert "run 'homeagent migrate'" in refused.stderr
    done = _invoke("--database", path, "migrate", "--json")
    assert done.exit_code == 0
    upgrade = json.loads(done.stdout)
    assert (upgrade["action"], upgrade["from_revision"], upgrade["schema_revision"]) == ("upgraded", "0001", REVISION)
    assert Path(upgrade["backup"]).is_file()
    assert _invoke("status", "--database", path).exit_code == 0


def _at_revision(path: Path, revision: str) -> None:
    path.parent.mkdir(mode=0o700)
    assert files.create_file(path)
    engine = SQLiteEngine(path, busy_timeout=timedelta(seconds=5), durability="full")
    engine.prepare_header()
    with engine.connect() as connection, connection.begin():
        command.upgrade(alembic_config(connection), revision)
    engine.close()


def test_a_temporary_database_is_not_made() -> None:
    """`init` refuses what would be gone when it ends."""
    assert "name a file" in _invoke("--database", ":memory:", "init").stderr


def test_a_server_is_made_and_shown_without_its_password(empty_postgres_url: str) -> None:
    """On PostgreSQL too `init` makes the tables once, and what it and `status` print holds no password of any kind."""
    url = make_url(empty_postgres_url).set(password="geheim").update_query_dict({"sslpassword": "geheim"})
    target = url.render_as_string(hide_password=False)
    actions = []
    for _ in range(2):
        done = _invoke("init", "--json", "--database", target)
        assert "geheim" not in done.output
        actions.append(json.loads(done.stdout)["action"])
    assert actions == ["made", "unchanged"]
    status = _invoke("status", "--json", "--database", target)
    assert "geheim" not in status.output
    found = json.loads(status.stdout)
    assert (found["engine"], found["schema_revision"], found["wal_bytes"]) == ("postgresql", REVISION, None)
    assert found["location"].startswith("postgresql+psycopg://")
    shown = _invoke("status", "--database", target)
    assert shown.exit_code == 0
    assert "PostgreSQL 1" in shown.stdout
    assert "geheim" not in shown.output


# Refusals


def test_what_is_absent_is_not_made(path: Path) -> None:
    """Only `init` and `migrate` make a file: the others refuse in one line with the remedy, and leave nothing."""
    _assert_refused(_run("status", "--database", str(path)), "homeagent init")
    for arguments in (["sweep"], ["devices", "list"], ["devices", "approve", "desk"]):
        assert _invoke(*arguments, "--database", path).exit_code == 1
    assert not path.parent.exists()


def test_a_foreign_file_a_directory_and_a_link_are_refused(tmp_path: Path) -> None:
    """What isn't ours is refused in one line and left as it is."""
    foreign = tmp_path / "notes.txt"
    foreign.write_text("not a database\n" * 100)
    foreign.chmod(0o600)
    link = tmp_path / "link.db"
    link.symlink_to(foreign)
    for target in (foreign, tmp_path, link):
        for act in ("init", "status"):
            done = _invoke(act, "--database", target)
            assert done.exit_code == 1
            assert done.stdout == ""
            assert done.stderr.count("\n") == 1
    assert foreign.read_text() == "not a database\n" * 100
    assert foreign.stat().st_mode & 0o777 == 0o600


def test_a_missing_permission_is_refused(tmp_path: Path) -> None:
    """In a directory where nothing may be made, `init` says so in one line."""
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    if os.geteuid() == 0:
        # Root may write everywhere: a file that somebody else owns and others can read is what it must not trust.
        target = locked / "h.db"
        target.touch(mode=0o644)
        target.chmod(0o644)
        os.chown(target, 65534, 65534)
    else:
        target = locked / "store" / "h.db"
    _assert_refused(_run("init", "--database", str(target)), str(target.parent))


def test_a_refusal_after_a_warning_is_one_line(ready: Path) -> None:
    """A repaired mode is told when the command succeeds, and makes no second line when it is refused."""
    ready.chmod(0o644)
    _assert_refused(_run("devices", "approve", "nobody", "--database", str(ready)), "no device 'nobody'")
    ready.chmod(0o644)
    repaired = _run("status", "--database", str(ready))
    assert repaired.returncode == 0
    assert "homeagent: warning: " in repaired.stderr
    assert "0600" in repaired.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["frobnicate"],
        ["status", "extra"],
        ["status", "--databse", "x"],
        ["sweep", "--batch-size", "0"],
        ["sweep", "--batch-size", "many"],
        ["sweep", "--time-budget", "0"],
        ["sweep", "--time-budget", "nan"],
        ["sweep", "--time-budget", "inf"],
        ["devices"],
        ["devices", "approve"],
        ["devices", "approve", "desk", "--yes"],
        ["devices", "approve", "desk", "--status", "gone"],
        ["devices", "approve", "desk", "--paired-at", "2030-01-01"],
        ["devices", "list", "--role", "king"],
    ],
)
def test_wrong_usage_ends_with_2(arguments: list[str], path: Path) -> None:
    """Wrong usage is told apart from a refusal, and nothing is made."""
    assert _invoke("--database", path, *arguments).exit_code == 2
    assert not path.parent.exists()


def test_wrong_usage_of_a_process_ends_with_2() -> None:
    """The status reaches the shell."""
    done = _run("frobnicate")
    assert (done.returncode, done.stdout) == (2, "")


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
    """A URL's password stays hidden wherever the URL is typed."""
    done = _invoke(*arguments)
    assert done.exit_code in (1, 2)
    assert done.stderr
    assert "heim" not in done.output


# Looking and cleaning


def test_status_reads_well(ready: Path) -> None:
    """The text names the file, the engine, the schema, each table, the settings and the modes."""
    shown = _run("status", "--database", str(ready), environment={"COLUMNS": "200"}).stdout
    for words in (str(ready), "SQLite 3.", REVISION, "devices", "idempotency_keys", "journal_mode", "0600", "0700"):
        assert words in shown


def test_sweep_removes_what_expired(ready: Path) -> None:
    """Dead nonces are counted by `status`, removed by `sweep` and then gone, however small the batches are."""
    long_ago = datetime(2020, 1, 1, tzinfo=UTC)
    with Database.open(ready, clock=lambda: long_ago) as database, database.unit_of_work() as unit:
        for number in range(5):
            unit.nonces.consume("desk", f"n{number}", expires_at=long_ago + timedelta(minutes=1))
    waiting = json.loads(_invoke("status", "--json", "--database", ready).stdout)
    assert waiting["expired"]["nonces"] == 5
    swept = _invoke("sweep", "--json", "--batch-size", "2", "--time-budget", "60", "--database", ready)
    assert json.loads(swept.stdout) == {
        "nonces": 5,
        "idempotency_keys": 0,
        "pending_devices": 0,
        "more": False,
        "skipped": 0,
        "constraints": [],
    }
    assert _invoke("sweep", "--database", ready).stdout == "Removed 0 nonces and 0 idempotency keys.\n"


# Devices


def _devices(path: Path) -> Any:
    return json.loads(_invoke("devices", "list", "--json", "--database", path).stdout)


def test_approve_asks_with_what_it_shows(ready: Path) -> None:
    """The device is shown as it is stored, markup and all; a no changes nothing, a yes lets it in."""
    declined = _invoke("devices", "approve", "desk", "--database", ready, input="n\n")
    assert declined.exit_code == 1
    assert "admin" in declined.stderr
    assert "[bold]x" in declined.stderr
    assert _devices(ready)[0]["status"] == "pending"
    assert _invoke("devices", "approve", "desk", "--database", ready, input="y\n").exit_code == 0
    assert _devices(ready)[0]["status"] == "approved"
    assert "nothing to do" in _invoke("devices", "approve", "desk", "--database", ready).stdout


@pytest.mark.parametrize("status", ["pending", "approved"])
def test_approve_spares_what_was_revoked_meanwhile(ready: Path, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that another admin revokes between the look and the approval stays out."""
    from homeagent.cli.opening import Database as Opened

    with Database.open(ready) as other:
        if status == "approved":
            other.run(lambda unit: unit.devices.approve("desk"))

        class Late(Opened):
            def run(self, work: Any, *, read_only: bool = False, idempotent: bool = False) -> Any:
                found = super().run(work, read_only=read_only, idempotent=idempotent)
                if read_only:
                    other.run(lambda unit: unit.devices.revoke("desk", reason="stolen", force=True))
                return found

        monkeypatch.setattr("homeagent.cli.opening.Database", Late)
        done = _invoke("devices", "approve", "desk", "--database", ready, input="y\n")
        monkeypatch.undo()
    assert done.exit_code == 1
    assert "another status" in done.stderr
    assert _devices(ready)[0]["status"] == "revoked"


@pytest.mark.parametrize("act", ["revoke", "delete and pair again"])
def test_an_answer_to_what_was_shown_before_approves_nothing(ready: Path, act: str) -> None:
    """A process that asks is overtaken by another one that revokes or replaces the device: a yes is refused."""
    command = [sys.executable, "-m", "homeagent", "devices", "approve", "desk", "--database", str(ready)]
    asking = subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert asking.stderr is not None
        shown = ""
        while "Approve this device?" not in shown:
            read = asking.stderr.read(1)
            assert read, shown
            shown += read
        if act == "revoke":
            assert _run("devices", "revoke", "desk", "--reason", "stolen", "--database", str(ready)).returncode == 0
        else:
            with Database.open(ready) as other:
                other.run(lambda unit: unit.devices.delete("desk"))
                other.pair(DevicePair(id="desk", role=Role.ADMIN))
        out, err = asking.communicate("y\n", timeout=60)
    finally:
        asking.kill()
        asking.wait(60)
    assert (asking.returncode, out.strip()) == (1, "")
    assert ("another status" if act == "revoke" else "another secret") in err
    assert _devices(ready)[0]["approved"] is False


def test_a_revoked_device_is_approved_by_its_status_alone(ready: Path) -> None:
    """`--yes` refuses a revoked device with one line that names the remedy, and `--status revoked` lets it in."""
    seen = _devices(ready)[0]
    assert _run("devices", "revoke", "desk", "--reason", "stolen", "--database", str(ready)).returncode == 0
    approve = ["devices", "approve", "desk", "--yes", "--role", seen["role"], "--paired-at", seen["paired_at"]]
    approve += ["--database", str(ready)]
    for status in ([], ["--status", "pending"], ["--status", "approved"]):
        _assert_refused(_run(*approve, *status), "another status", "--status revoked")
        assert _devices(ready)[0]["status"] == "revoked"
    assert _run(*approve, "--status", "revoked").returncode == 0
    assert _devices(ready)[0]["status"] == "approved"


def test_the_status_that_was_seen_binds_with_a_question_too(ready: Path) -> None:
    """A yes to a revoked device lets it in as it was shown, and not if the command named another status."""
    with Database.open(ready) as database:
        database.run(lambda unit: unit.devices.revoke("desk"))
    approve = ["devices", "approve", "desk", "--database", str(ready)]
    assert _invoke(*approve, "--status", "pending", input="y\n").exit_code == 1
    assert _devices(ready)[0]["status"] == "revoked"
    assert _invoke(*approve, input="y\n").exit_code == 0
    assert _devices(ready)[0]["status"] == "approved"


def test_approve_refuses_another_than_was_seen(ready: Path) -> None:
    """A script that saw another role or another pairing is refused; with what the list prints it is let in."""
    seen = _devices(ready)[0]
    approve = ["devices", "approve", "desk", "--yes", "--json", "--database", str(ready)]
    wrong_role = _invoke(*approve, "--role", "client", "--paired-at", seen["paired_at"])
    assert wrong_role.exit_code == 1
    assert "another role" in wrong_role.stderr
    wrong_time = _invoke(*approve, "--role", "admin", "--paired-at", "2020-01-01T00:00:00Z")
    assert wrong_time.exit_code == 1
    assert "another time of pairing" in wrong_time.stderr
    assert _devices(ready)[0]["approved"] is False
    done = _invoke(*approve, "--role", "admin", "--paired-at", seen["paired_at"])
    assert done.exit_code == 0
    assert json.loads(done.stdout)["changed"] is True
    assert json.loads(done.stdout)["device"]["approved"] is True


@pytest.mark.parametrize(
    "lookalike", ["desk\u200b", "desk ", " desk", "desk\u00a0", "de\u00adsk", "de\u0301sk"], ids=ascii
)
def test_an_id_that_reads_as_another_is_told_apart(ready: Path, lookalike: str) -> None:
    """What can't be seen of an id is shown as an escape or in quotes, in the list and before the question."""
    with Database.open(ready) as database:
        database.pair(DevicePair(id=lookalike, role=Role.ADMIN))
    assert repr(lookalike) in _invoke("devices", "list", "--database", ready).stdout
    asked = _invoke("devices", "approve", lookalike, "--database", ready, input="n\n")
    assert repr(lookalike) in asked.stderr
    assert "'desk'" not in _invoke("devices", "approve", "desk", "--database", ready, input="n\n").stderr


@pytest.mark.parametrize(
    ("text", "shown"),
    {
        "lamp": "lamp",
        "café ☎": "café ☎",
        "Łódź-Đỗ": "Łódź-Đỗ",
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
def test_what_could_be_mistaken_is_an_escape(text: str, shown: str) -> None:
    """Each id is printed so that it can't be taken for another one; ordinary ids are printed as they are."""
    assert identity(text) == shown


def test_an_error_shows_what_could_be_mistaken(ready: Path) -> None:
    """The line of a refused operation has the same escapes, and the ellipsis of a message is none of them."""
    refused = _invoke("devices", "revoke", "d\u0435sk", "--database", ready)
    assert refused.exit_code == 1
    assert r"d\u0435sk" in refused.stderr
    assert escape_words("use run(…)") == "use run(…)"


def test_revoke_spares_the_last_admin(ready: Path) -> None:
    """The last approved admin goes only by force, and the reason is kept."""
    with Database.open(ready) as database, database.unit_of_work() as unit:
        unit.devices.approve("desk", expected_role=Role.ADMIN)
    assert _invoke("devices", "revoke", "desk", "--database", ready).exit_code == 1
    forced = _invoke("devices", "revoke", "desk", "--force", "--reason", "lost", "--json", "--database", ready)
    assert forced.exit_code == 0
    assert json.loads(forced.stdout)["device"]["revoked_reason"] == "lost"


def test_a_device_is_listed_without_its_secret(ready: Path) -> None:
    """Neither form of the list holds a hash, and both hold the id."""
    with Database.open(ready) as database, database.unit_of_work(read_only=True) as unit:
        secret_hash = unit.devices.get("desk").shared_secret_hash
    for form in ([], ["--json"]):
        shown = _invoke("devices", "list", *form, "--database", ready).stdout
        assert "desk" in shown
        assert secret_hash not in shown
        assert "secret" not in shown


# The command itself


@pytest.mark.parametrize(
    "arguments", [[], ["init"], ["migrate"], ["status"], ["sweep"], ["devices"], ["devices", "approve"]]
)
def test_help_names_the_database_option(arguments: list[str]) -> None:
    """Every command explains itself, and says where the database is looked for."""
    shown = _invoke(*arguments, "--help")
    assert shown.exit_code == 0
    # Where colours are forced, as CI does, they part the dashes from the name.
    plain = re.sub(r"\x1b\[[0-9;]*m", "", shown.stdout)
    assert "--database" in plain
    assert "HOMEAGENT_DATABASE" in plain


def test_the_package_imports_no_terminal_library() -> None:
    """An application that imports the package pays nothing for the command line."""
    script = "import sys, homeagent; print(sorted({'typer', 'rich', 'click'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout == "[]\n"
