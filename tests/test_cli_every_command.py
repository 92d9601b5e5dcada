"""Each command of the command line: its help, wrong usage, JSON, bad outputs, Ctrl-C and unusable databases.

The tests make the arguments of a command from its parameters, so they also run a new command.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.engine.default import DefaultDialect

from homeagent import Database
from homeagent.cli.commands import command
from homeagent.cli.operator_texts import PHRASES
from homeagent.engine.sqlite.dialect import connect
from tests import fork_server
from tests.command_line import Result, create_rows, invoke
from tests.conftest import ROOT, START, FakeClock

# Values of parameters. A new parameter with another name needs a value only if its command requires the parameter.
# BACKUP is a path in the directory of the store, as are STORE and NEW.
VALUES = {
    "agent_id": "butler", "attempt": "1", "backup": "BACKUP", "created_at": START.isoformat(), "destination": "NEW",
    "device_id": "lamp", "epoch": "1", "key": "k1", "message": "Nothing", "method": "play", "name": "New",
    "paired_at": START.isoformat(), "result": "null", "role": "node", "session_id": "talk", "source": "STORE",
    "target": "NEW", "workspace": "/srv",
}  # fmt: skip
OTHERS = {"devices pair": {"device_id": "new"}, "agents create": {"agent_id": "new"}}
MORE = {
    "agents delete": ["--with-sessions"],
    "agents update": ["--name", "Jeeves"],
    "migrations new": ["--empty", "--migrations", "NEW", "--package", "tests"],
    "sessions move": ["--sender", "anna"],
}
OPENS_NOTHING = {"config", "migrations new"}
# Commands that create the database or replace it
SUCCEED = {("absent", "init"), ("absent", "migrate"), ("newer", "restore")}
# Commands that need no write lock if the schema is up to date, by the last word of their names
READING = {"abandoned", "backup", "config", "copy", "init", "list", "migrate", "new", "show", "status"}
EXPECTED = {"role", "paired_at", "created_at", "attempt", "epoch"}  # parameters that --yes can need


def _leaves(command: Any, *names: str) -> Iterator[tuple[str, Any]]:
    for name, inner in getattr(command, "commands", {}).items():
        yield from _leaves(inner, *names, name)
    if not hasattr(command, "commands"):
        yield " ".join(names), command


COMMANDS = dict(_leaves(command))
every_command = pytest.mark.parametrize("name", COMMANDS)


def _asks(name: str) -> bool:
    return any(parameter.name == "yes" for parameter in COMMANDS[name].params)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a closed store with a row in each table, and of a backup."""
    directory = tmp_path_factory.mktemp("prepared") / "private"
    path = directory / "h.db"
    create_rows(path)
    with Database.open(path, clock=FakeClock()) as database:
        database.backup(directory / "h.backup")
    return directory


@pytest.fixture(scope="module")
def unusable(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("unusable")
    for state in ("damaged", "newer", "foreign"):
        (directory / state).mkdir(mode=0o700)
        shutil.copy(prepared / "h.db", directory / state)
        (directory / state / "h.db").chmod(0o600)
    (directory / "damaged" / "h.db").write_text("no database")
    for state, statement in (
        ("newer", "UPDATE homeagent_schema_version SET version_num = '9999'"),
        ("newer", "UPDATE store SET oldest_revision = '9999'"),
        ("foreign", "PRAGMA application_id = 7"),
    ):
        with closing(connect(str(directory / state / "h.db"))) as raw:
            raw.execute(statement)
    return directory


@pytest.fixture
def store(prepared: Path, tmp_path: Path) -> Path:
    shutil.copytree(prepared, tmp_path / "private")
    (tmp_path / "private").chmod(0o700)
    return tmp_path / "private" / "h.db"


def _arguments(name: str, store: Path) -> list[str]:
    """Return arguments for a command that changes, shows or copies a row of the prepared store."""
    parameters = COMMANDS[name].params
    asks = _asks(name)
    given = list(MORE.get(name, ()))
    for parameter in parameters:
        is_argument = parameter.param_type_name == "argument"
        is_needed = is_argument or parameter.required or (asks and parameter.name in EXPECTED)
        if is_needed and parameter.opts[0] not in given:
            value = OTHERS.get(name, VALUES).get(parameter.name, VALUES[parameter.name])
            given += [value] if is_argument else [parameter.opts[0], value]
    given += ["--yes"] if asks else []
    places = {"STORE": store, "BACKUP": store.with_name("h.backup"), "NEW": store.with_name(f"{name}.new")}
    database = [] if name == "copy" else ["--database", str(store)]
    return [*database, *name.split(), *(str(places.get(argument, argument)) for argument in given)]


def _error_of_refusal(done: Result) -> str:
    """Check a refusal under --json, and return the class of its error."""
    assert (done.exit_code, done.stdout) == (1, ""), done
    assert len(done.stderr.splitlines()) == 1, done.stderr
    message = json.loads(done.stderr)
    assert message["message"]
    assert "migrate=" not in message["message"]
    return str(message["error"])


@every_command
def test_help_and_wrong_usage(name: str) -> None:
    """Each command has a help under both names that fits 40 columns; wrong usage is one line, also as JSON."""
    narrow = {"COLUMNS": "40"}
    shown = invoke(*name.split(), "--help", env=narrow)
    assert (shown.exit_code, shown.stdout) == (0, invoke(*name.split(), "-h", env=narrow).stdout)
    assert max(map(len, shown.stdout.splitlines())) <= 40
    assert all(
        parameter.opts[0] in shown.stdout.split() for parameter in COMMANDS[name].params if parameter.opts[0][0] == "-"
    )
    first = " ".join(COMMANDS[name].help.partition("\n\n")[0].split())
    assert first in " ".join(invoke(*name.split()[:-1], "--help", env=narrow).stdout.split())
    line = f"homeagent: No such option: --no-such-option. Try 'homeagent {name} --help'.\n"
    assert invoke(*name.split(), "--no-such-option").stderr == line
    for before, after in (([], ["--json"]), (["--json"], [])):
        wrong = invoke(*before, *name.split(), "--no-such-option", *after)
        assert (wrong.exit_code, wrong.stdout) == (2, "")
        assert json.loads(wrong.stderr)["error"] == "UsageError"


def test_completion_for_bash() -> None:
    """The shell completes commands, options and values, also after --json and after an invalid value."""
    for words, expected in (
        ("--json devices rev", "revoke"),
        ("devices list --limit x --sta", "--status"),
        ("devices pair lamp --role n", "node"),
    ):
        env = {"_HOMEAGENT_COMPLETE": "complete_bash", "COMP_WORDS": f"homeagent {words}".replace(" ", "\n")}
        done = invoke(env=env | {"COMP_CWORD": str(len(words.split()))})
        assert (done.exit_code, done.stdout, done.stderr) == (0, f"{expected}\n", "")


@every_command
def test_odd_values(name: str, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the value of an option or argument is odd, a command that does not accept the value says so in one line."""
    monkeypatch.chdir(store.parent)
    for parameter in COMMANDS[name].params:
        if parameter.param_type_name == "argument":
            arguments = [
                "\udcff" if value == VALUES.get(parameter.name) else value for value in _arguments(name, store)
            ]
        elif parameter.is_flag or parameter.name == "database":
            continue
        else:
            arguments = [*_arguments(name, store), parameter.opts[0], "\udcff"]
        done = invoke("--json", *arguments)
        assert done.exit_code in {0, 1, 2}
        if done.exit_code and name != "doctor":
            assert json.loads(done.stderr)["message"]
            assert done.stdout == ""


@every_command
def test_json_and_text(name: str, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each command succeeds without a terminal and prints JSON; at a terminal with 40 columns its tables fit."""
    done = invoke("--json", *_arguments(name, store), input=None)
    # The doctor has warnings here, for example that no admin is approved.
    assert done.exit_code == 0 or name == "doctor", done.output
    assert json.loads(done.stdout) is not None
    monkeypatch.setattr("homeagent.cli.output._terminal_width", lambda *, error: 40)
    shown = invoke(*_arguments(name, store))
    assert shown.output
    if name.split()[-1] in {"list", "show", "status", "doctor", "config", "abandoned"}:
        # A command to copy and the last line of the doctor are not in a table.
        lines = [line.strip() for line in shown.stdout.splitlines() if not re.match(r" +homeagent |/", line)]
        assert all(len(line) <= 40 or " " not in line for line in lines), shown.stdout


@pytest.mark.parametrize("name", [name for name in COMMANDS if _asks(name)])
def test_a_question_without_an_answer(name: str, store: Path) -> None:
    """A command that asks changes nothing if the input has ended, or if there is no input."""
    arguments = _arguments(name, store)
    arguments.remove("--yes")
    for input in ("", None):
        refused = invoke(*arguments, input=input)
        assert refused.exit_code == 0 or "pass --yes" in refused.stderr.splitlines()[-1]
        assert (refused.exit_code == 0) == (refused.stdout != "")


@pytest.fixture(scope="module")
def locked(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A copy of the prepared store, in which another process is in a write unit."""
    directory = tmp_path_factory.mktemp("locked") / "private"
    shutil.copytree(prepared, directory)
    directory.chmod(0o700)
    program = """
import sys
from homeagent import Database
with Database.open(sys.argv[1]) as database, database.unit_of_work() as unit:
    unit.devices.revoke("lamp")
    print("ready", flush=True)
    sys.stdin.read()
    unit.rollback()
"""
    with fork_server.Child(program, directory / "h.db") as child:
        assert child.stdout.readline() == "ready\n"
        yield directory / "h.db"
        child.communicate()


@every_command
def test_a_locked_database(name: str, locked: Path) -> None:
    """While another process writes, a command that writes refuses in one line, and other commands work."""
    done = invoke("--json", *_arguments(name, locked), env={"HOMEAGENT_BUSY_TIMEOUT": "0.01"})
    if done.exit_code == 0:
        assert name.split()[-1] in READING
    elif name != "doctor":
        assert _error_of_refusal(done) in {"DatabaseBusyError", "TransientError"}


@every_command
def test_a_database_that_cannot_be_opened(name: str, store: Path, unusable: Path) -> None:
    """If a database is absent, damaged, newer or foreign, a command that opens the database refuses in one line."""
    for state in ("absent", "damaged", "newer", "foreign"):
        path = store.parent / state / "h.db"
        if state != "absent":
            shutil.copytree(unusable / state, path.parent)
        arguments = [str(path) if argument == str(store) else argument for argument in _arguments(name, store)]
        done = invoke("--json", *arguments)
        if name == "doctor":
            assert (done.exit_code, done.stderr) == (2, "")
        elif name in OPENS_NOTHING or (state, name) in SUCCEED:
            assert done.exit_code == 0
        else:
            assert _error_of_refusal(done)
            if state == "absent":
                assert invoke(*arguments).stderr == f"homeagent: {json.loads(done.stderr)['message']}\n"
                assert "homeagent init" in done.stderr or name in {"copy", "restore"}
                assert not path.parent.exists()


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
            command(arguments, prog_name="homeagent")
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


# Ctrl-C

# The child runs the command twice, and counts the calls of the package's functions in the second run, because the first
# run imports modules. Then the child runs the command several times on a fresh store, and sends itself the signal at
# another call each time.
INTERRUPTED = """
import contextlib, io, json, shutil, signal, sys, traceback
from homeagent.cli.commands import run

prepared, work, instants, *arguments = sys.argv[1:]
instants = int(instants)

def attempt(number, at):
    calls = 0
    def count(frame, event, _):
        nonlocal calls
        # Python itself prints and ignores an exception in a function that weakref.finalize calls.
        if "homeagent" in frame.f_code.co_filename and frame.f_back.f_globals["__name__"] != "weakref":
            calls += 1
            if calls == at:
                signal.raise_signal(signal.SIGINT)
    store = f"{work}/{number}"
    shutil.copytree(prepared, store)
    sys.argv[1:] = [argument.replace(prepared, store) for argument in arguments]
    errors = io.StringIO()
    status = None
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
        try:
            sys.settrace(count)
            run()
        except SystemExit as ended:
            status = ended.code
        except BaseException:
            traceback.print_exc()
        sys.settrace(None)
    return status, errors.getvalue(), calls

attempt("first", 0)
_, _, calls = attempt("second", 0)
print(json.dumps([attempt(number, 2 + calls * number // instants) for number in range(instants)]))
"""


# Commands of each kind for a run of all tests; the campaign interrupts every command.
SAMPLE = (
    "init", "migrate", "sweep", "backup", "restore", "copy", "doctor", "devices pair", "devices list", "keys resolve",
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "instants"),
    [*((name, 3) for name in SAMPLE), *(pytest.param(name, 8, marks=pytest.mark.slow) for name in COMMANDS)],
)
def test_ctrl_c(name: str, instants: int, prepared: Path, tmp_path: Path) -> None:
    """If Ctrl-C comes at any time, the command ends with a line and status 130, or its work was done."""
    done = fork_server.run(INTERRUPTED, prepared, tmp_path, instants, *_arguments(name, prepared / "h.db"))
    assert done.returncode == 0, done.stderr
    ends = json.loads(done.stdout)
    for status, errors, _ in ends:
        assert status in {0, 130} or (name == "doctor" and status == 1), errors
        assert len(errors.splitlines()) <= 1, errors
    assert ends[0][0] == 130


def test_ctrl_c_while_alembic_rebuilds_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If Ctrl-C interrupts a statement of Alembic's rebuild, the status is 130, and the upgrade is undone."""

    def interrupt(self: Any, cursor: Any, statement: str, *rest: Any) -> None:
        if statement.startswith("INSERT INTO _alembic_tmp"):
            raise KeyboardInterrupt
        execute(self, cursor, statement, *rest)

    execute: Any = DefaultDialect.do_execute
    with monkeypatch.context() as patch:
        patch.setattr(DefaultDialect, "do_execute", interrupt)
        ended = invoke("init", "--database", tmp_path / "h.db")
    assert (ended.exit_code, ended.stdout, ended.stderr.count("\n")) == (130, "", 1)
    assert "interrupted" in ended.stderr
    assert invoke("init", "--database", tmp_path / "h.db").exit_code == 0


@pytest.mark.parametrize("module", ["sqlalchemy", "homeagent.cli.keys"])
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
    python = [sys.executable, "-c", program]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(python, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_phrases_of_errors_exist() -> None:
    """Each phrase that is replaced for operators still occurs in a message of the package."""
    files = [file for file in (ROOT / "homeagent").rglob("*.py") if file.name != "operator_texts.py"]
    texts = "\n".join(file.read_text(encoding="utf-8") for file in files)
    joined = re.sub(r'"\s*\n\s*f?"', "", texts)
    assert [phrase for phrase in PHRASES if phrase not in joined] == []
