"""The database's files: how they are found, checked, repaired, refused and created."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from homeagent import errors
from homeagent.engine.files import database_file as files
from homeagent.engine.files.database_file import create_file, inspect_file, locate_file, secure_sidecars, sidecars
from homeagent.engine.files.directories import prepare_directory
from homeagent.engine.files.locks import FileLock
from tests.engine.files.conftest import (
    AT_ONCE,
    DATABASE,
    NOBODY,
    NOT_A_FILE_OF_OURS,
    dangling_symlink,
    directory,
    fifo,
    make,
    mode_of,
    needs_root,
    snapshot,
    symlink,
)


def test_relative_path_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the working directory changes later, a relative path still names the same file."""
    monkeypatch.chdir(tmp_path)
    assert locate_file(Path("data/../homeagent.db")) == tmp_path.resolve() / "homeagent.db"


@pytest.mark.parametrize(
    "path",
    ["", "a\0b.db", "~nobody-of-this-name/a.db", "\ud800.db", os.fsdecode(b"\xff.db"), os.fsdecode(b"\xff/a.db")],
    ids=["empty", "nul", "user", "surrogate", "not UTF-8", "directory not UTF-8"],
)
def test_path_that_names_no_file_is_refused(path: str) -> None:
    """If a path cannot be a file name, the error reports a wrong argument."""
    with pytest.raises(errors.InvalidArgumentError):
        locate_file(path)


def test_links_of_directories(tmp_path: Path) -> None:
    """A link to a directory whose name is not UTF-8 is refused, as is a circle of links, on every Python version."""
    (tmp_path / "\udcff").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "\udcff")
    with pytest.raises(errors.InvalidArgumentError, match="its directory is not UTF-8"):
        locate_file(tmp_path / "linked" / "a.db")
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    path = locate_file(tmp_path / "a" / "homeagent.db")
    with pytest.raises(errors.InsecureFileError, match="circle"):
        inspect_file(path)
    with pytest.raises(errors.InsecureFileError, match="circle"):
        prepare_directory(path.parent)


@pytest.mark.parametrize(
    ("content", "mode", "repaired"),
    [
        (DATABASE, 0o644, 0o600),
        (DATABASE, 0o666, 0o600),
        (DATABASE, 0o700, 0o600),
        (DATABASE, 0o4600, 0o600),
        (DATABASE, 0o444, 0o400),
        (b"", 0o644, 0o600),
        (b"", 0o000, 0o600),  # the process that created it was killed under a umask of 0777
    ],
)
def test_loose_mode_is_repaired_with_a_warning(
    database_file: Path, content: bytes, mode: int, repaired: int, caplog: pytest.LogCaptureFixture
) -> None:
    """If other users can access the file, the mode becomes private, and the log names the file and both modes."""
    make(database_file, content, mode)
    before = database_file.lstat()
    state = inspect_file(database_file)
    assert state is not None
    assert state.st_mode & 0o7777 == mode_of(database_file) == repaired
    assert database_file.lstat().st_mtime_ns == before.st_mtime_ns
    [record] = caplog.records
    assert (record.name, record.levelno) == ("homeagent", logging.WARNING)
    for words in (str(database_file), f"{mode:04o}", f"{repaired:04o}"):
        assert words in record.getMessage()
    inspect_file(database_file)
    assert len(caplog.records) == 1


@needs_root
def test_superuser_does_not_repair_files_of_others(database_file: Path) -> None:
    """If the file of the directory's owner has a loose mode, the superuser gets an error too, and the mode stays."""
    for path in (make(database_file, mode=0o644), database_file.parent):
        os.chown(path, NOBODY, NOBODY)
    with pytest.raises(errors.InsecureFileError, match=f"belongs to user {NOBODY}"):
        inspect_file(database_file)
    assert mode_of(database_file) == 0o644


@pytest.mark.parametrize("refusal", [None, PermissionError(errno.EPERM, "not permitted")])
def test_file_system_without_modes_is_refused(
    database_file: Path, monkeypatch: pytest.MonkeyPatch, refusal: OSError | None
) -> None:
    """If a file system ignores or forbids modes, an error is raised, and no new file is left that others could read."""

    def chmod(*_: object, **__: object) -> None:
        if refusal is not None:
            raise refusal

    make(database_file, mode=0o644)
    before = snapshot(database_file.parent)
    monkeypatch.setattr(Path, "chmod", chmod)
    monkeypatch.setattr(os, "fchmod", chmod)
    umask = os.umask(0o777)  # a new file or directory has no permissions, until its mode is set
    try:
        for act, path in (
            (inspect_file, database_file),
            (create_file, database_file.with_name("new.db")),
            (prepare_directory, database_file.parent.with_name("new")),
        ):
            with pytest.raises(errors.InsecureFileError, match="can't be made private"):
                act(path)
    finally:
        os.umask(umask)
    assert snapshot(database_file.parent) == before


Swap = Callable[[Callable[[Path], object]], None]


@pytest.fixture
def before_repair(monkeypatch: pytest.MonkeyPatch) -> Swap:
    """A function that lets another program act between the check of a file and the repair of its mode."""
    change_mode = files.change_mode

    def install(act: Callable[[Path], object]) -> None:
        monkeypatch.setattr(files, "change_mode", lambda path, mode: (act(path), change_mode(path, mode)))

    return install


def test_link_put_in_place_during_the_repair_is_not_followed(database_file: Path, before_repair: Swap) -> None:
    """If the file is replaced by a link between check and repair, the mode of the link's target does not change."""
    victim = make(database_file.parent.parent / "victim", mode=0o644)
    make(database_file, mode=0o644)
    before_repair(lambda path: path.with_name("link").replace(path))
    database_file.with_name("link").symlink_to(victim)
    with pytest.raises(errors.InsecureFileError, match="symbolic link"):
        inspect_file(database_file)
    assert mode_of(victim) == 0o644


def test_file_replaced_during_the_repair_is_refused(database_file: Path, before_repair: Swap) -> None:
    """If a program replaces the file between check and repair, inspection raises an error."""
    make(database_file, mode=0o644)
    before_repair(lambda path: path.rename(path.with_name("old")) and make(path, mode=0o644))
    with pytest.raises(errors.DatabaseError, match="another program replaced"):
        inspect_file(database_file)


def test_sidecar_removed_during_the_repair_is_absent(database_file: Path, before_repair: Swap) -> None:
    """If another process's last connection removes the WAL during the repair, the WAL counts as absent."""
    make(database_file)
    make(sidecars(database_file)[0], mode=0o644)
    before_repair(Path.unlink)
    assert secure_sidecars(database_file) == []


def test_plain_chmod_without_the_nofollow_flag(database_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If fchmodat has no flag for links, as in an old C library, a loose mode is still repaired."""
    chmod = Path.chmod

    def plain(path: Path, mode: int, *, follow_symlinks: bool = True) -> None:
        if not follow_symlinks:
            raise NotImplementedError
        chmod(path, mode)

    make(database_file, mode=0o644)
    monkeypatch.setattr(Path, "chmod", plain)
    assert inspect_file(database_file) is not None
    assert mode_of(database_file) == 0o600


@pytest.mark.parametrize("suffix", ["-wal", "-shm", "-journal", ".lock"])
@pytest.mark.parametrize(("put", "error", "words"), NOT_A_FILE_OF_OURS)
def test_untrusted_file_next_to_the_database_is_refused(
    database_file: Path, suffix: str, put: Callable[[Path], None], error: type[errors.DatabaseError], words: str
) -> None:
    """SQLite would follow a link, so sidecar files and lock files must pass the same checks as the database."""
    make(database_file)
    put(beside := database_file.with_name(database_file.name + suffix))
    before = snapshot(database_file.parent)
    with pytest.raises(error, match=words):
        FileLock(beside, timeout=AT_ONCE).acquire() if suffix == ".lock" else secure_sidecars(database_file)
    assert snapshot(database_file.parent) == before


@pytest.mark.parametrize("put", [symlink, dangling_symlink, directory, fifo])
def test_name_that_is_taken_is_left_alone(database_file: Path, put: Callable[[Path], None]) -> None:
    """If the name is taken, the existing entry stays, and no file is created at the target of a link."""
    put(database_file)
    before = snapshot(database_file.parent)
    assert create_file(database_file) is False
    assert snapshot(database_file.parent) == before


@pytest.mark.parametrize(
    ("number", "kind", "words"),
    [
        (errno.ENOSPC, errors.DiskFullError, "free some space"),
        (errno.EDQUOT, errors.DiskFullError, "free some space"),
        (errno.EROFS, errors.ReadOnlyError, "read-only file system"),
        (errno.EACCES, errors.DatabaseError, "no permission to create"),
        (errno.EMFILE, errors.TooManyFilesError, "open no more files"),
        (errno.ENAMETOOLONG, errors.InvalidArgumentError, "too long"),
    ],
)
def test_system_errors_become_homeagent_errors(
    database_file: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[errors.HomeAgentError], words: str
) -> None:
    """A full disk, a read-only disk and a missing permission raise separate errors that name the path."""

    def fail(*arguments: object, **named: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(errors.HomeAgentError, match=words) as refusal:
        create_file(database_file)
    assert type(refusal.value) is kind
    assert str(database_file) in str(refusal.value)
