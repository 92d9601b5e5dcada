"""Fixtures of the file tests: obstacles in a file's place, snapshots of a directory, and a clock for waits."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Callable
from contextlib import chdir, closing
from datetime import timedelta
from pathlib import Path
from types import ModuleType

import pytest

from homeagent.errors import ForeignDatabaseError, InsecureFileError

AT_ONCE = timedelta(0)
NOBODY = 65534
DATABASE = b"\0" * 512  # a check from outside takes this file for a database

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only the superuser can give a file away")

Snapshot = dict[str, tuple[int, int, int, int, int, bytes | str | None]]


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


class Waiting:
    """A monotonic clock for a module. The clock advances only while a caller of the module sleeps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> None:
        self.now = 0.0
        self.pauses: list[float] = []
        self.on_pause: Callable[[], object] = lambda: None
        monkeypatch.setattr(module, "monotonic", lambda: self.now)
        monkeypatch.setattr(module, "sleep", self.sleep)

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds
        self.on_pause()


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
