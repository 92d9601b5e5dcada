"""Every fenced block of the documentation runs, or is checked as far as a test can. A new kind of block fails."""

from __future__ import annotations

import doctest
import json
import os
import re
import shlex
import shutil
import sqlite3
import subprocess
import tomllib
from contextlib import closing
from datetime import UTC, datetime, timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from _pytest.mark import ParameterSet

from homeagent import AgentCreate, Database, DevicePair, IdempotencyScope, Role
from homeagent.engine.target import resolve_target
from tests import fork_server
from tests.command_line import invoke
from tests.conftest import ROOT, FakeClock, add_device

PAGES = {
    page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8")
    for page in (*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")))
}
HUB = ROOT / "docs" / "examples" / "hub"
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)

TESTS = {
    "chart": {"*": ".ci/site.py"},
    "mermaid": {"*": ".ci/site.py"},
    "py": {
        "docs/fastapi.md": "tests/test_fastapi_once.py",  # and tests/test_websocket.py
        "docs/how-to/migrate-own-tables.md": "tests/examples/test_applications.py",
        "docs/how-to/observability.md": "tests/test_opentelemetry.py",
        "docs/how-to/test.md": "tests/test_testing.py",
        "docs/tutorial/": "tests/examples/test_tutorial.py",
    },
    "sh": {"docs/command-line.md": ".ci/reference.py", "docs/tutorial/": "tests/examples/test_tutorial.py"},
    "sql": {"docs/postgresql.md": "tests/postgresql/test_failover.py"},
    "yaml": {
        "docs/operations.md": "tests/maintenance/test_litestream.py",
        "docs/postgresql.md": "tests/postgresql/patroni_cluster.py",
    },
    "text": {"docs/tutorial/": "tests/examples/test_tutorial.py"},
}
"""The programs that run the blocks of a kind: by the name of a page, of a folder, or * for every page."""

HERE = {"console", "json", "nginx", "python", "sh", "text", "toml"}
"""The kinds that this module checks, on each page that has no entry above."""

NOT_RUN = {
    ".ci/run": "The steps repeat this test. Another test here checks the names of the steps.",
    ".venv/bin/alembic": "`.ci/run lint` runs the check, and tests/migrations makes revisions.",
    ".venv/bin/pip": "A test needs no network. `.ci/run` installs both extras.",
    ".venv/bin/python": "The programs repeat the tests or take minutes. Another test here checks their names.",
    ".venv/bin/ruff": "`.ci/run lint` runs it.",
    "HOMEAGENT_FIGURES=docs/figures.json": "The slow tests take an hour.",
    "date": "The command only prints the time.",
    "litestream": "tests/maintenance/test_litestream.py follows the page.",
    "pg_basebackup": "tests/postgresql/server.py makes each standby by this program.",
    "pg_restore": "The PostgreSQL of the tests comes without this program.",
    "pip": "A test needs no network. Another test here checks the names of the extras.",
    "python3": "`.ci/run` and tests/examples/test_applications.py run the commands of the README.",
    "systemctl": "The tests have no service manager.",
    "umask": "The mode of the files of this test is private already.",
}
"""The programs in shell blocks that the tests do not run, with the reason."""


def of_kind(kind: str) -> list[ParameterSet]:
    """Return the blocks of a kind that this module checks, each with the name of its page."""
    elsewhere = tuple(TESTS.get(kind, {}))
    return [
        pytest.param(page, re.sub(f"^{fence[1]}", "", fence[3], flags=re.MULTILINE), id=f"{page}:{line}")
        for page, text in PAGES.items()
        for fence in FENCE.finditer(text)
        if fence[2] == kind and not page.startswith(elsewhere)
        for line in [text.count("\n", 0, fence.start()) + 1]
    ]


def texts(kind: str) -> str:
    """Return the text of all blocks of a kind that this module checks."""
    return "\n".join(str(block.values[1]) for block in of_kind(kind))


def test_each_kind_has_a_test() -> None:
    """A test or a program reads each block. Another language, or such a block on another page, needs an entry above."""
    for page, text in PAGES.items():
        assert text.count("```") == 2 * len(FENCE.findall(text)), f"{page} has a fence that is not closed"
        for _, language, block in FENCE.findall(text):
            named = [test for name, test in TESTS.get(language, {}).items() if name == "*" or page.startswith(name)]
            assert named or language in HERE, f"no test reads this block of {page}:\n{block}"
            for test in named:
                source = (ROOT / test).read_text(encoding="utf-8")
                assert Path(page).name in source or "*" in TESTS[language] or page.startswith("docs/tutorial/"), test


@pytest.mark.parametrize("page", sorted({str(block.values[0]) for block in of_kind("python")}))
def test_python_sessions(page: str, sqlite_database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python session of a page prints the documented output, with an open `database` and a pending `lamp`."""
    add_device(sqlite_database, "lamp")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("HOMEAGENT_DATABASE", raising=False)
    text = "".join(str(block.values[1]) for block in of_kind("python") if block.values[0] == page)
    session = doctest.DocTestParser().get_doctest(text, {"database": sqlite_database}, page, page, 0)
    assert len(session.examples) == text.count("\n>>> ") + text.startswith(">>> ") > 0
    said: list[str] = []
    result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(session, out=said.append)
    assert result.failed == 0, "".join(said)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the store, the backups, the databases and the package that the pages name."""
    folder = tmp_path_factory.mktemp("blocks")
    clock = FakeClock(datetime.now(UTC) - timedelta(hours=1))
    with Database.open(folder / "store" / "homeagent.db", clock=clock, durability="normal") as database:
        database.pair(DevicePair(id="hall-lamp", role=Role.NODE))
        database.devices.approve("hall-lamp")
        database.pair(DevicePair(id="phone", role=Role.CLIENT))
        database.agents.create(AgentCreate(id="butler", name="Butler", workspace_path="/srv/butler"))
        for key in ("0f3c", "51d0"):
            scope = IdempotencyScope("lamp", "orders.create", key)
            database.idempotency_keys.claim(scope, fingerprint="", lease=timedelta(0), ttl=timedelta(days=1))
        for name in ("from-replica.db", "srv/backups/homeagent.db.0006-20261124T030000000000Z.backup"):
            (folder / name).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            database.backup(folder / name)
    for name in ("srv/backups/homeagent.db.backup", "var/lib/gateway/homeagent.db", "old.db"):
        (folder / name).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        shutil.copy(folder / "from-replica.db", folder / name)
    with closing(sqlite3.connect(folder / "old.db")) as connection:
        connection.execute("CREATE TABLE notes (id INTEGER PRIMARY KEY)")
    # The page that writes the revision `add_preferences` has only the first revision.
    shutil.copytree(HUB / "hub", folder / "hub", ignore=shutil.ignore_patterns("*preferences.py", "__pycache__"))
    Database.open(folder / "hub.db", migrations=folder / "hub" / "migrations").close()
    return folder


class Shell:
    """A terminal in a copy of the folder: runs the commands of a block, and answers each question with yes."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.variables = {"URL": "store/homeagent.db"}
        monkeypatch.chdir(folder)
        monkeypatch.setenv("HOME", str(folder))
        monkeypatch.setenv("HOMEAGENT_DATABASE", str(folder / "store" / "homeagent.db"))

    def run(self, block: str) -> str:
        """Run the commands, and return what the commands printed."""
        return "".join(self._run(line) for line in block.replace("\\\n", "").splitlines())

    def _run(self, line: str) -> str:
        line = re.sub(r"^podman exec (--interactive --tty )?gateway |(?<![\w./])/(?=(?:srv|var)/)", "", line)
        if read := re.fullmatch(r"(\w+)=\$\((.*) \| jq \.(\w+)\)", line):
            self.variables[read[1]] = str(json.loads(self._run(read[2]))[read[3]])
            return ""
        line = re.sub(r"\$\{?(\w+)(?::-\w+)?\}?", lambda name: self.variables[name[1]], line)
        program, *arguments = shlex.split(line, comments=True) or [""]
        if program in NOT_RUN or not program:
            return ""
        assert program == "homeagent", f"NOT_RUN has no reason for: {line}"
        if "hub:migrations" in arguments:  # in a process that may import the tables of the example
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            done = fork_server.run(IN_FOLDER, self.folder, *arguments, input="y\n", environment=environment)
            status, output = done.returncode, done.stdout + done.stderr
        else:
            status, *streams = invoke(*arguments, input="y\n")
            output = "".join(streams)
        # The doctor warns of a store without an admin.
        assert status == 0 or arguments[0] == "doctor", f"{line}\n{output}"
        return output


IN_FOLDER = f"""
import os, sys
os.chdir(sys.argv[1])
sys.path.insert(0, sys.argv.pop(1))
{fork_server.COMMAND}
"""


@pytest.fixture
def shell(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shell:
    """A terminal in a copy of the folder of the pages."""
    return Shell(shutil.copytree(template, tmp_path / "terminal"), monkeypatch)


@pytest.mark.parametrize(("page", "block"), of_kind("sh"))
def test_shell_blocks(page: str, block: str, shell: Shell) -> None:
    """The commands of a block work one after the other."""
    if block.startswith("homeagent init "):
        shutil.rmtree(shell.folder / "store")
    shell.run(block)


@pytest.mark.parametrize(("page", "block"), of_kind("console"))
def test_console_blocks(page: str, block: str, shell: Shell, request: pytest.FixtureRequest) -> None:
    """The commands after `$` print the other lines, apart from counts and the names of databases."""
    if "postgresql://" in block:
        shell.variables["SERVER"] = request.getfixturevalue("empty_postgres_url")
        block = re.sub(r"(?<= )postgresql:\S+$", "$SERVER", block, flags=re.MULTILINE)
    output = ""
    for line in block.splitlines():
        if line.startswith("$ "):
            output = shell.run(line.removeprefix("$ "))
        else:
            expected = re.sub(r"\d[\d,]*", r"[\\d,]+", re.escape(line))
            assert re.search(re.sub(r"\S*/\S*(?=[ :])", r"\\S+", expected), output), output


def test_bash_reads_the_shell_blocks() -> None:
    """The syntax of all shell blocks is correct, also of the blocks that do not run."""
    subprocess.run(["bash", "-n"], input=texts("sh"), text=True, check=True)


def test_names_in_commands_that_do_not_run() -> None:
    """Extras, modules, files and steps exist that the commands name which the tests do not run."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    steps = re.findall(r"^known=\"(.*)\"$", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), re.MULTILINE)[0].split()
    text = texts("sh")
    named = [name for found in re.findall(r"pip install .*\[([\w,]+)\]", text) for name in found.split(",")]
    assert set(named) <= set(extras)
    assert {*re.findall(r"^\.ci/run +(\w+)", text, re.MULTILINE)} <= {*steps, "long"}
    assert all(find_spec(name) for name in re.findall(r"python -m ([\w.]+)", text))
    assert [name for name in re.findall(r"[\w.]+/[\w./]+\.py\b", text) if not (ROOT / name).exists()] == []


def form(value: Any) -> Any:
    """Return the names and the types of a JSON value. All items of a list have the form of the first item."""
    if isinstance(value, dict):
        return {name: form(each) for name, each in value.items()}
    return [form(value[0])] if isinstance(value, list) and value else type(value).__name__


@pytest.mark.parametrize(("page", "block"), of_kind("json"))
def test_json_blocks(page: str, block: str, shell: Shell) -> None:
    """A JSON object of a page has the fields and types of the real object."""
    documented = json.loads(block)
    if documented.get("kind") == "backup":
        shell.run("homeagent backup made.backup")
        real = json.loads(Path("made.backup.json").read_text(encoding="utf-8"))
        real["rows"] = {name: count for name, count in real["rows"].items() if name in documented["rows"]}
    else:
        Path("store/homeagent.db").chmod(0o644)
        real = json.loads(shell.run("homeagent doctor --json --fix"))
        (finding,) = documented["findings"]
        real["findings"] = [each for each in real["findings"] if each["check"] == finding["check"]]
        real["not_checked"] = documented["not_checked"]
    assert form(documented) == form(real)


@pytest.mark.parametrize(("page", "block"), of_kind("toml"))
def test_toml_blocks(page: str, block: str) -> None:
    """The settings of a page are settings of the example `hub`."""
    settings = tomllib.loads((HUB / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    assert tomllib.loads(block) == {"tool": {"alembic": settings["alembic"]}}


NGINX = shutil.which("nginx", path=f"{os.environ['PATH']}{os.pathsep}/usr/sbin")


@pytest.mark.skipif(NGINX is None, reason="nginx is not installed")
@pytest.mark.parametrize(("page", "block"), of_kind("nginx"))
def test_nginx_blocks(page: str, block: str, tmp_path: Path) -> None:
    """The program nginx accepts the settings of a page in a server."""
    assert NGINX is not None
    settings = tmp_path / "nginx.conf"
    settings.write_text(f"pid {tmp_path}/pid; events {{}} http {{ server {{ listen 8080; {block} }} }}")
    command = [NGINX, "-t", "-p", tmp_path, "-c", settings, "-e", "stderr"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "syntax is ok" in done.stderr, done.stderr


@pytest.mark.parametrize(("page", "block"), of_kind("text"))
def test_text_blocks(page: str, block: str) -> None:
    """The URLs of a page name servers, and the files in a drawing are files of the example `hub`."""
    if page == "docs/postgresql.md":
        assert all(resolve_target(line.split()[0]).url for line in block.splitlines())
    else:
        assert page == "docs/how-to/own-tables.md", "no test reads this block"
        assert all((HUB / "hub" / name).exists() for name in re.findall(r"\w+\.py|\w+/(?= )", block))
