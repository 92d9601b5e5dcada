"""The directory of a database: creation, warnings about an existing directory, and syncs."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from homeagent.engine.files import sync
from homeagent.engine.files.directories import prepare_directory
from homeagent.engine.files.sync import fsync_directory
from homeagent.errors import DatabaseError, InsecureFileError, InvalidArgumentError
from tests.conftest import Children, in_threads
from tests.engine.files.conftest import NOBODY, make, mode_of, needs_root, snapshot

PREPARE = """
import logging, os, sys
from pathlib import Path
from homeagent.engine.files.directories import prepare_directory
logging.basicConfig(stream=sys.stdout, format="%(name)s %(levelname)s %(message)s")
directory = Path(sys.argv[1])
os.setuid(directory.stat().st_uid)
for _ in range(2):
    prepare_directory(directory)
"""


@pytest.mark.parametrize("mode", [0o775, 0o777, 0o702, 0o1777])
def test_directory_that_others_can_write_is_reported_once(
    public_directory: Path, children: Children, mode: int
) -> None:
    """An ordinary user gets one warning if other users can replace the database or can add files (sticky bit)."""
    public_directory.chmod(mode)
    if os.geteuid() == 0:
        os.chown(public_directory, NOBODY, NOBODY)
    output = children.run(PREPARE, public_directory)
    [problem] = output.splitlines()
    assert problem.startswith("homeagent WARNING ")
    assert f"{mode:04o}" in problem
    assert ("directory of your own" if mode & 0o1000 else "chmod go-w") in problem
    assert mode_of(public_directory) == mode


@needs_root
@pytest.mark.parametrize("beneath", ["", "sub/deeper"])
@pytest.mark.parametrize("mode", [0o775, 0o777, 0o702])
def test_root_refuses_a_directory_that_others_can_write(tmp_path: Path, mode: int, beneath: str) -> None:
    """If other users can write to the directory, root gets an error that names chmod, and no directory is made."""
    tmp_path.chmod(mode)
    with pytest.raises(InsecureFileError, match=f"mode {mode:04o}.*chmod go-w"):
        prepare_directory(tmp_path / beneath)
    assert (mode_of(tmp_path), list(tmp_path.iterdir())) == (mode, [])


@pytest.mark.parametrize(
    ("mode", "owner", "words"),
    [
        (0o755, None, None),
        (0o1777, None, "put files next to the database"),
        pytest.param(0o700, NOBODY, f"belongs to user {NOBODY}", marks=needs_root),
    ],
    ids=["readable", "sticky, such as /tmp", "of another user"],
)
def test_existing_directory_is_left_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: int, owner: int | None, words: str | None
) -> None:
    """The caller gets a warning if others can add files, or own the directory; its mode, owner and time stay."""
    directory = tmp_path / "directory"
    directory.mkdir()
    directory.chmod(mode)
    if owner is not None:
        os.chown(directory, owner, owner)
    before = snapshot(tmp_path)
    prepare_directory(directory)
    assert snapshot(tmp_path) == before
    assert [record.levelname for record in caplog.records] == ["WARNING"] * (words is not None)
    assert (words or "") in caplog.text


def test_only_missing_directories_are_made(tmp_path: Path) -> None:
    """New directories below an existing parent are private (0700), and the parent keeps its mode."""
    tmp_path.chmod(0o755)
    for _ in range(2):
        prepare_directory(tmp_path / "a" / "b")
        assert [mode_of(made) for made in (tmp_path / "a", tmp_path / "a" / "b")] == [0o700, 0o700]
        assert mode_of(tmp_path) == 0o755


@pytest.mark.parametrize(
    ("blocker", "beneath", "words"),
    [
        *[("file", beneath, "file.* a file") for beneath in ("", "sub", "sub/deeper")],
        *[("link", beneath, "leads nowhere") for beneath in ("", "sub")],
    ],
)
def test_path_that_can_not_be_a_directory_is_refused(tmp_path: Path, blocker: str, beneath: str, words: str) -> None:
    """If a part of the path is a file or a dangling link, the error names the part, and no directory is made."""
    make(tmp_path / "file")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    before = snapshot(tmp_path)
    with pytest.raises(InvalidArgumentError if blocker == "file" else DatabaseError, match=words):
        prepare_directory(tmp_path / blocker / beneath)
    assert snapshot(tmp_path) == before


def test_directory_made_by_another_thread_is_kept(tmp_path: Path) -> None:
    """If threads prepare one directory at the same time, all succeed."""
    directory = tmp_path / "a" / "b" / "c"
    barrier = threading.Barrier(6)
    done: list[int] = []

    def prepare() -> None:
        barrier.wait()
        prepare_directory(directory)
        done.append(mode_of(directory))

    in_threads(*[prepare] * 6)
    assert done == [0o700] * 6


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_directory_without_sync_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """If a file system cannot sync a directory, the sync is skipped; any other failure raises an error."""

    def fail(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(sync, "sync", fail)
    code = number
    fsync_directory(tmp_path)
    code = errno.EIO
    with pytest.raises(DatabaseError, match="sync the directory"):
        fsync_directory(tmp_path)
