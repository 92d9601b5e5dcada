"""Fixtures of the file tests: obstacles in a file's place, snapshots of a directory, and other users."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import tempfile
import textwrap
from collections.abc import Iterator
from contextlib import chdir, closing
from datetime import timedelta
from pathlib import Path

import pytest

from homeagent.errors import ForeignDatabaseError, InsecureFileError
from tests import fork_server

AT_ONCE = timedelta(0)
NOBODY = 65534
DATABASE = b"\0" * 512  # a check from outside takes this file for a database

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only the superuser can give a file away")

# Start of a child program. Import everything before the privileges are dropped, because the checkout may be closed to
# other users.
UNPRIVILEGED = f"""
    import os
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid({NOBODY})
        os.setuid({NOBODY})
"""

Snapshot = dict[str, tuple[int, int, int, int, int, bytes | str | None]]


def program(*parts: str) -> str:
    """Return one Python program of these parts, each with any indentation."""
    return "".join(textwrap.dedent(part) for part in parts)


def run(*parts: str, arguments: list[str] | None = None) -> str:
    """Run a program to its end and return its output; if the program fails, the test fails."""
    done = fork_server.run(program(*parts), *(arguments or []))
    assert done.returncode == 0, done.stderr
    return done.stdout


def snapshot(root: Path) -> Snapshot:
    """Return everything that a refusal must not change: names, modes, owners, links, times and content."""
    found: Snapshot = {}
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        content: bytes | str | None = None
        if stat.S_ISREG(status.st_mode):
            content = path.read_bytes()
        elif stat.S_ISLNK(status.st_mode):
            content = str(path.readlink())
        found[str(path.relative_to(root))] = (
            status.st_mode,
            status.st_uid,
            status.st_ino,
            status.st_nlink,
            status.st_mtime_ns,
            content,
        )
    return found


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def make(path: Path, content: bytes = DATABASE, mode: int = 0o600) -> Path:
    path.write_bytes(content)
    path.chmod(mode)
    return path


@pytest.fixture
def database_file(tmp_path: Path) -> Path:
    directory = tmp_path / "data"
    directory.mkdir(0o700)
    return directory / "homeagent.db"


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """Return a directory that an unprivileged child owns and can reach; pytest's own directories are private."""
    directory = Path(tempfile.mkdtemp(prefix="homeagent-test-"))
    if os.geteuid() == 0:
        os.chown(directory, NOBODY, NOBODY)
    yield directory
    for path in (directory, *directory.rglob("*")):
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o700)
    shutil.rmtree(directory)


def symlink(path: Path) -> None:
    """Put a symbolic link to a valid database in the path's place."""
    path.symlink_to(make(path.with_name("target.db")))


def dangling_symlink(path: Path) -> None:
    """Put a symbolic link to an absent file in the path's place."""
    path.symlink_to(path.with_name("nowhere.db"))


def hard_link(path: Path) -> None:
    """Give a valid database a second name."""
    make(path)
    path.with_name("other.db").hardlink_to(path)


def directory(path: Path) -> None:
    path.mkdir()


def fifo(path: Path) -> None:
    """Put a named pipe in the path's place, on which an open() would block."""
    os.mkfifo(path)


def unix_socket(path: Path) -> None:
    # A socket's address is short, so bind the socket from inside the directory with the long name.
    with chdir(path.parent), closing(socket.socket(socket.AF_UNIX)) as server:
        server.bind(path.name)


NOT_A_FILE_OF_OURS = [
    (symlink, InsecureFileError, "symbolic link"),
    (dangling_symlink, InsecureFileError, "symbolic link"),
    (hard_link, InsecureFileError, "2 names"),
    (directory, ForeignDatabaseError, "is a directory"),
    (fifo, ForeignDatabaseError, "pipe"),
    (unix_socket, ForeignDatabaseError, "socket"),
]
