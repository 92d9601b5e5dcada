"""The files and commands of the tutorial. A test runs the commands of each page, as a reader would."""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import signal
import socket
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path

import pytest

from tests import fork_server
from tests.conftest import ROOT

PAGES = sorted((ROOT / "docs" / "tutorial").glob("*.md"))
EXAMPLES = ROOT / "docs" / "examples" / "tutorial"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"\]\(\.\./examples/tutorial/([^)]+)\)")
VERSIONS = Path("gateway", "migrations", "versions")

PROGRAM = """
import os, runpy, sys
if "doctor" in sys.argv:
    from homeagent.maintenance.doctor import files
    files.filesystem_kind = lambda path: "ext4"  # otherwise the doctor warns of the file system in memory
os.chdir(sys.argv[1])
sys.path.insert(0, sys.argv[1])
del sys.argv[:2]
if sys.argv[0] == "-m":
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
else:
    runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Python with the arguments after the first one, in the folder of the first argument."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_page_shows_the_files(page: Path) -> None:
    """Each Python block of a page is a part of the file to which the page last linked, in the folder of the chapter."""
    text = page.read_text(encoding="utf-8")
    shown = 0
    for block in BLOCK.finditer(text):
        if block[1] == "py":
            name = FILE.findall(text, 0, block.start())[-1]
            assert name.startswith(f"chapter{page.name[0]}/")
            assert block[2] in (EXAMPLES / name).read_text(encoding="utf-8")
            shown += 1
    assert shown


def statements(revision: Path) -> list[str]:
    """Return the statements of a revision without its number. The linter removes unused imports of a stored file."""
    text = revision.read_text(encoding="utf-8").replace(revision.name.split("_")[0], "ID")
    return [ast.unparse(each) for each in ast.parse(text).body if not isinstance(each, ast.Import)]


class Reader:
    """A reader of the tutorial: a folder, the variables of a terminal, and a server in another terminal."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("HOMEAGENT_")},
            "GATEWAY_URL": f"ws://127.0.0.1:{self.port}/ws",
            "NO_PROXY": "127.0.0.1",
            # The fork server makes an error of each warning, also of the advice to install httpx2 instead of httpx.
            "PYTEST_ADDOPTS": "-p homeagent.testing -p no:cacheprovider -W default",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # the plugins of this environment would take a second of each run
            "UVICORN_PORT": str(self.port),
        }
        self.server: fork_server.Child | None = None

    def read(self, page: Path) -> None:
        """Take the files of a chapter, run all commands of its page, and compare the output."""
        chapter = EXAMPLES / f"chapter{page.name[0]}"
        stored = self.folder / VERSIONS
        before = {file.name for file in stored.glob("*.py")}
        shutil.copytree(chapter, self.folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        new = [file for file in stored.glob("*.py") if file.name not in before]
        for file in new:
            file.unlink()  # the reader lets the command write this revision
        output = ""
        for language, block in BLOCK.findall(page.read_text(encoding="utf-8")):
            if language == "sh":
                output = "".join(self.run(line) for line in block.splitlines())
                if "migrations new" in block:
                    self.keep_revision(chapter, new.pop())
            elif language == "text":
                assert block.strip() in output, block
        assert not new

    def keep_revision(self, chapter: Path, expected: Path) -> None:
        """Compare the revision that the command wrote with the stored revision, and keep the stored revision."""
        title = expected.name.split("_", 1)[1]
        (written,) = (self.folder / VERSIONS).glob(f"*_{title}")
        stored = chapter / VERSIONS / expected.name
        assert statements(written) == statements(stored)
        written.unlink()
        shutil.copy(stored, expected)

    def run(self, line: str) -> str:
        if match := re.fullmatch(r"export (\w+)=(?:\$\((.*)\)|(.*))", line):
            self.environment[match[1]] = self.run(match[2]).strip() if match[2] else match[3]
            return ""
        command, *arguments = shlex.split(line)
        if command in {".", "pip"} or arguments[:2] == ["-m", "venv"]:
            return ""  # the tests have an environment already
        if command == "curl":
            connection = HTTPConnection("127.0.0.1", self.port, timeout=30)
            with closing(connection):
                connection.request("GET", arguments[0].removeprefix("http://127.0.0.1:8000"))
                return connection.getresponse().read().decode()
        if command == "uvicorn":
            self.stop()
            self.server = self.start("-m", "uvicorn", *arguments)
            assert any("running on" in each for each in self.server.stderr), "the server did not start"
            return ""
        if command == "homeagent":
            arguments = ["-m", "homeagent", *arguments]
        else:
            assert command == "python", line
        with self.start(*arguments) as child:
            output, errors = child.communicate("y\n", 120)
        if child.returncode:
            assert re.search("AccessDeniedError|no approved admin", output + errors), f"{line}\n{output}{errors}"
        return output + errors

    def start(self, *arguments: str) -> fork_server.Child:
        return fork_server.Child(PROGRAM, self.folder, *arguments, environment=self.environment)

    def stop(self) -> None:
        if self.server is not None:
            server, self.server = self.server, None
            server.send_signal(signal.SIGINT)
            _, errors = server.communicate(timeout=60)
            assert "Finished server process" in errors, errors
            assert "Traceback" not in errors, errors


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    reader = Reader(tmp_path)
    yield reader
    reader.stop()


def test_a_reader_follows_the_tutorial(reader: Reader) -> None:
    """Each command of the pages runs, and its output has the lines that the page shows."""
    for page in PAGES:
        reader.read(page)
    assert (reader.folder / "data" / "gateway.db").stat().st_mode & 0o777 == 0o600
