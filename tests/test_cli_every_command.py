"""Each command of the command line: its help, wrong usage, JSON, and outputs that can't be written."""

from __future__ import annotations

import ast
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from homeagent import AgentCreate, AgentSessionCreate, Database, DevicePair, IdempotencyScope, Role
from homeagent.cli import app
from homeagent.cli.operator_texts import PHRASES
from tests import fork_server
from tests.conftest import ROOT, START, FakeClock

runner = CliRunner()

STORE = "STORE"  # replaced by the path of the store; BACKUP and NEW are replaced by other paths in its directory
COMMANDS = {
    "init": [],
    "migrate": [],
    "migrations new": ["--migrations", "NEW", "-m", "Nothing", "--empty", "--package", "tests"],
    "status": [],
    "doctor": [],
    "sweep": [],
    "backup": ["NEW"],
    "restore": ["BACKUP"],
    "begin-epoch": [],
    "copy": [STORE, "NEW"],
    "config": [],
    "devices pair": ["new", "--role", "node"],
    "devices rotate": ["lamp", "--yes"],
    "devices list": [],
    "devices show": ["lamp"],
    "devices approve": ["lamp", "--yes", "--role", "node", "--paired-at", START.isoformat()],
    "devices revoke": ["lamp"],
    "devices delete": ["lamp", "--yes"],
    "agents create": ["new", "--name", "New", "--workspace", "/srv"],
    "agents list": [],
    "agents show": ["butler"],
    "agents update": ["butler", "--name", "Jeeves"],
    "agents delete": ["butler", "--with-sessions", "--yes"],
    "sessions list": [],
    "sessions show": ["talk"],
    "sessions move": ["talk", "--sender", "anna"],
    "sessions delete": ["talk", "--yes"],
    "keys abandoned": [],
    "keys resolve": ["lamp", "play", "k1", "null"],
    "keys forget": ["lamp", "play", "k1"],
    "nonces forget": ["lamp"],
}


def _leaves(command: Any, *names: str) -> dict[str, Any]:
    if not hasattr(command, "commands"):
        return {" ".join(names): command}
    found: dict[str, Any] = {}
    for name, inner in command.commands.items():
        found |= _leaves(inner, *names, name)
    return found


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a closed store with a row in each table, and of a backup of the store."""
    directory = tmp_path_factory.mktemp("prepared") / "private"
    with Database.open(directory / "h.db", clock=FakeClock()) as database:
        database.pair(DevicePair(id="lamp", role=Role.NODE))
        database.agents.create(AgentCreate(id="butler", name="Butler", workspace_path="/srv"))
        database.sessions.create(AgentSessionCreate(session_id="talk", agent_id="butler"))
        database.nonces.consume("lamp", "n1", expires_at=START + timedelta(minutes=5))
        scope = IdempotencyScope("lamp", "play", "k1")
        database.idempotency_keys.claim(scope, fingerprint="f", lease=timedelta(0), ttl=timedelta(days=300))
        database.backup(directory / "h.backup")
    return directory


@pytest.fixture
def store(prepared: Path, tmp_path: Path) -> Path:
    """A fresh copy of the prepared store."""
    shutil.copytree(prepared, tmp_path / "private")
    (tmp_path / "private").chmod(0o700)
    return tmp_path / "private" / "h.db"


def _arguments(name: str, store: Path) -> list[str]:
    places = {STORE: store, "BACKUP": store.with_name("h.backup"), "NEW": store.with_name("new.db")}
    given = [str(places.get(argument, argument)) for argument in COMMANDS[name]]
    return [*([] if name == "copy" else ["--database", str(store)]), *name.split(), *given]


def _invoke(*arguments: object, **options: Any) -> Result:
    return runner.invoke(app, [str(argument) for argument in arguments], **options)


def test_every_command_is_tested() -> None:
    """The table of this file has each command, so a new command gets the tests of this file."""
    assert set(COMMANDS) == set(_leaves(typer.main.get_command(app)))


@pytest.mark.parametrize("name", COMMANDS)
def test_help_and_wrong_usage(name: str, store: Path) -> None:
    """Each command has a help under both names; an unknown option is wrong usage, and a JSON object under `--json`."""
    assert _invoke(*name.split(), "--help").stdout == _invoke(*name.split(), "-h").stdout
    for before, after in (([], ["--json"]), (["--json"], [])):
        wrong = _invoke(*before, *name.split(), "--no-such-option", *after)
        assert (wrong.exit_code, wrong.stdout) == (2, "")
        assert json.loads(wrong.stderr)["error"] == "UsageError"


@pytest.mark.parametrize("name", COMMANDS)
def test_json_and_text(name: str, store: Path) -> None:
    """Each command succeeds and prints JSON if `--json` comes first, and prints a text without `--json`."""
    done = _invoke("--json", *_arguments(name, store))
    # The doctor has warnings here, for example that no admin is approved.
    assert done.exit_code == 0 or name == "doctor", done.output
    assert json.loads(done.stdout) is not None
    shown = _invoke(*_arguments(name, store))
    assert shown.exception is None or isinstance(shown.exception, SystemExit), shown.output


@pytest.mark.parametrize("state", ["absent", "damaged"])
@pytest.mark.parametrize(
    "name", [name for name in COMMANDS if name not in {"config", "doctor", "migrations new", "restore"}]
)
def test_a_database_that_cannot_be_opened(name: str, state: str, tmp_path: Path) -> None:
    """If the database is absent or damaged, each command refuses with one JSON object and one line for people."""
    path = tmp_path / "private" / "h.db"
    if state == "damaged":
        path.parent.mkdir(mode=0o700)
        path.touch(mode=0o600)
        path.write_text("no database")
    elif name in {"init", "migrate"}:
        pytest.skip("the command creates the database")
    refused = _invoke("--json", *_arguments(name, path))
    assert (refused.exit_code, refused.stdout) == (1, "")
    message = json.loads(refused.stderr)["message"]
    assert _invoke(*_arguments(name, path)).stderr == f"homeagent: {message}\n"
    assert "migrate=" not in message


@pytest.mark.parametrize("lines", [0, 1], ids=["closed", "full"])
@pytest.mark.parametrize("name", [*COMMANDS, "--help"])
def test_an_output_that_is_full_or_closed(name: str, lines: int, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the output can't be written, the status is 1, with one line for a full disk and none for a closed pipe."""
    arguments = [name] if name == "--help" else _arguments(name, store)
    reader, writer = os.pipe()
    os.close(reader)
    errors = io.StringIO()
    file = os.open("/dev/full", os.O_WRONLY) if lines else writer
    with os.fdopen(file, "w") as output, monkeypatch.context() as patch:
        patch.setattr("sys.stdout", output)
        patch.setattr("sys.stderr", errors)
        with pytest.raises(SystemExit) as ended:
            app(arguments, prog_name="homeagent")
    assert ended.value.code == 1
    assert len(errors.getvalue().splitlines()) == lines, errors.getvalue()


@pytest.mark.parametrize(("output", "lines"), [("os.open('/dev/full', os.O_WRONLY)", 1), ("closed()", 0)])
def test_the_exit_of_a_process_with_a_bad_output(store: Path, output: str, lines: int) -> None:
    """The interpreter prints no second error at its exit, when it writes the rest of the output."""
    program = (
        "import os\ndef closed():\n    r, w = os.pipe()\n    os.close(r)\n    return w\n"
        f"os.dup2({output}, 1)\n{fork_server.COMMAND}"
    )
    done = fork_server.run(program, "devices", "list", "--database", store)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == lines, done.stderr


@pytest.mark.parametrize("module", ["sqlalchemy", "typer", "homeagent.cli.keys"])
def test_an_interrupt_during_imports_prints_no_traceback(module: str) -> None:
    """If Ctrl-C comes while Python imports a module, the process ends at once by the signal."""
    program = f"""
import os, runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)    # a run of the tests in the background ignores the signal
class Interrupt:
    def find_spec(name, *_):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupt)
sys.argv = ["homeagent", "--version"]
runpy.run_module("homeagent", run_name="__main__")
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_phrases_of_errors_exist() -> None:
    """Each phrase that is replaced for operators still occurs in a message of the package."""
    files = [file for file in (ROOT / "homeagent").rglob("*.py") if file.name != "operator_texts.py"]
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))]
    texts = "\n".join(str(node.value) for node in nodes if isinstance(node, ast.Constant))
    assert [phrase for phrase in PHRASES if phrase not in texts] == []


# Form of the output


LONG_ID = "kitchen-thermostat-on-the-left-side-of-the-door-to-the-garden"


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_a_table_fits_the_terminal(store: Path, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a terminal no line is wider than the terminal, and each word of an id is whole."""
    with Database.open(store) as database:
        database.pair(DevicePair(id=LONG_ID, role=Role.NODE))
    monkeypatch.setattr("homeagent.cli.output._terminal_width", lambda *, error: columns)
    for arguments in (["devices", "list"], ["devices", "show", LONG_ID], ["status"]):
        shown = _invoke("--database", store, *arguments).stdout
        longest = max(shown.splitlines(), key=len)
        assert len(longest) <= columns or " " not in longest.strip(), longest
        if "status" not in arguments:
            assert all(word in shown for word in LONG_ID.split("-"))
            assert LONG_ID in "".join(line.strip() for line in shown.splitlines())
            assert re.search(r"\d\d:\d\d:\d\d\.\d{3}[+-]\d\d:\d\d", shown)


def test_times_and_forms_of_a_list(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table has local times with the zone; tab-separated values and JSON have UTC; a pipe gets one line a row."""
    import time

    with Database.open(store, clock=FakeClock()) as database:
        database.pair(DevicePair(id=LONG_ID, role=Role.NODE))
    monkeypatch.setenv("TZ", "Asia/Kolkata")
    time.tzset()
    try:
        table = _invoke("devices", "list", "--database", store).stdout.splitlines()
    finally:
        monkeypatch.undo()
        time.tzset()
    assert len(table) == 3
    assert LONG_ID in table[1]
    assert "2026-01-02 08:34:05.678+05:30" in table[2]
    rows = [
        line.split("\t")
        for line in _invoke("devices", "list", "--format", "tsv", "--database", store).stdout.splitlines()
    ]
    assert rows == [
        ["device", "role", "status", "paired_at", "last_seen_at"],
        [LONG_ID, "node", "pending", "2026-01-02T03:04:05.678Z", ""],
        ["lamp", "node", "pending", "2026-01-02T03:04:05.678Z", ""],
    ]


# The new commands


def test_the_first_admin_in_one_command(sqlite_path: Path) -> None:
    """`pair --approve` prints the secret of an approved admin once; `rotate` replaces the secret after a question."""
    paired = json.loads(
        _invoke("devices", "pair", "desk", "--role", "admin", "--approve", "--json", "--database", sqlite_path).stdout
    )
    assert paired["device"]["status"] == "approved"
    rotate = ["devices", "rotate", "desk", "--database", str(sqlite_path)]
    assert _invoke(*rotate, input="n\n").exit_code == 1
    asked = _invoke(*rotate, input="y\n")
    new = asked.stdout.split()[-1]
    assert "The old secret ends at once." in asked.stderr
    with Database.open(sqlite_path) as database:
        assert database.verify_secret("desk", paired["shared_secret"]) is None
        assert database.verify_secret("desk", new) is not None
    again = _invoke("devices", "pair", "desk", "--role", "admin", "--database", sqlite_path)
    assert "'homeagent devices rotate'" in again.stderr
    kept = _invoke("devices", "delete", "desk", "--yes", "--database", sqlite_path)
    assert "or pass --force" in kept.stderr
    assert _invoke("devices", "delete", "desk", "--yes", "--force", "--database", sqlite_path).exit_code == 0


@pytest.mark.parametrize(
    ("command", "shown"), [("devices delete", "node"), ("agents delete", "Butler"), ("sessions delete", "butler")]
)
def test_a_deletion_shows_the_row_and_asks(store: Path, command: str, shown: str) -> None:
    """Without `--yes` a deletion shows the row and asks; a no keeps the row, and a program must pass `--yes`."""
    delete = [argument for argument in _arguments(command, store) if argument != "--yes"]
    declined = _invoke(*delete, input="n\n")
    assert declined.exit_code == 1
    assert shown in declined.stderr
    program = _invoke(*delete, "--json", input="y\n")
    assert program.exit_code == 2
    assert "--yes" in json.loads(program.stderr)["message"]
    assert _invoke(*delete, input="y\n").exit_code == 0
    assert json.loads(_invoke(*delete, "--yes", "--json").stderr)["error"].endswith("NotFoundError")


def test_a_device_that_changed_after_the_question_stays(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the device is approved while `delete` asks, the answer yes does not delete the device."""

    def approve(*_: Any, **__: Any) -> None:
        with Database.open(store) as other:
            other.devices.approve("lamp")

    monkeypatch.setattr("homeagent.cli.devices.confirm", approve)
    refused = _invoke("devices", "delete", "lamp", "--database", store)
    assert refused.exit_code == 1
    assert "changed after it was shown" in refused.stderr
    assert _invoke("devices", "show", "lamp", "--database", store).exit_code == 0


def test_agents_are_created_and_changed(store: Path) -> None:
    """`create` and `update` store the values; an invalid value and an agent with sessions are refused in a line."""
    at = ["--database", str(store)]
    made = _invoke(
        "agents", "create", "maid", "--name", "M", "--workspace", "/srv", "--config", '{"a": 1}', "--json", *at
    )
    assert json.loads(made.stdout)["config"] == {"a": 1}
    assert _invoke("agents", "update", "maid", "--config", "null", *at).exit_code == 0
    changed = json.loads(_invoke("agents", "show", "maid", "--json", *at).stdout)
    assert (changed["name"], changed["config"]) == ("M", None)
    assert _invoke("agents", "update", "maid", *at).exit_code == 2
    assert _invoke("agents", "create", "x\ny", "--name", "M", "--workspace", "/srv", *at).exit_code == 2
    in_use = _invoke("agents", "delete", "butler", "--yes", "--json", *at)
    assert json.loads(in_use.stderr)["details"] == {"agent_id": "butler", "session_count": 1}
    assert "--with-sessions" in json.loads(in_use.stderr)["message"]


def test_sessions_are_moved(store: Path) -> None:
    """`move` changes the given parts of the route; a route that another session holds is refused with its id."""
    at = ["--database", str(store)]
    move = ["sessions", "move", "talk"]
    moved = json.loads(_invoke(*move, "--sender", "anna", "--channel", "sms", "--json", *at).stdout)
    assert (moved["agent_id"], moved["sender_id"], moved["channel_id"]) == ("butler", "anna", "sms")
    assert _invoke(*move, "--no-channel", *at).stdout == "Moved 'talk'.\n"
    with Database.open(store) as database:
        database.sessions.create(AgentSessionCreate(session_id="other", agent_id="butler"))
    taken = _invoke("sessions", "move", "other", "--sender", "anna", *at)
    assert taken.exit_code == 1
    assert "move or delete that session" in taken.stderr
    for options in ([], ["--sender", "anna", "--no-sender"]):
        assert _invoke(*move, *options, *at).exit_code == 2


def test_config_shows_the_source(store: Path) -> None:
    """`config` shows the target without a password, and the option or variable that names the target."""
    url = "postgresql://me:geheim@db.example/hub"
    shown = _invoke(
        "config", "--json", env={"HOMEAGENT_DATABASE": url, "PGPASSWORD": "geheim", "HOMEAGENT_BUSY_TIMEOUT": "7"}
    )
    assert "geheim" not in shown.output
    found = {entry["setting"]: entry for entry in json.loads(shown.stdout)}
    assert found["database"]["value"].endswith("@db.example/hub")
    assert found["database"]["source"] == "$HOMEAGENT_DATABASE"
    assert found["busy timeout"] == {"setting": "busy timeout", "value": "7 s", "source": "$HOMEAGENT_BUSY_TIMEOUT"}
    assert found["PGPASSWORD"]["value"] == "set"
    named = json.loads(_invoke("config", "--json", "--database", store).stdout)[0]
    assert (named["value"], named["source"]) == (str(store), "--database")


def test_nonces_forget_releases_the_limit(sqlite_path: Path) -> None:
    """`nonces forget` prints how many nonces were released."""
    soon = datetime.now(UTC) + timedelta(minutes=5)
    with Database.open(sqlite_path) as database:
        database.nonces.consume("lamp", "n1", expires_at=soon)
    assert _invoke("nonces", "forget", "lamp", "--database", sqlite_path).stdout == "Released 1 nonce of 'lamp'.\n"


def test_the_day_of_an_operator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands of the section in docs/operations.md work in their order, with yes as each answer."""
    text = (ROOT / "docs/operations.md").read_text(encoding="utf-8").partition("## A day of an operator")[2]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOMEAGENT_DATABASE", str(tmp_path / "store" / "h.db"))
    lines = text.partition("```sh\n")[2].partition("```")[0].splitlines()
    assert len(lines) > 8
    for line in lines:
        program, *arguments = shlex.split(line, comments=True)
        done = _invoke(*arguments, input="y\n")
        # The doctor warns here, because the backup is the first, or the directory is in memory.
        assert program == "homeagent"
        assert done.exit_code == 0 or arguments == ["doctor"], done.output
