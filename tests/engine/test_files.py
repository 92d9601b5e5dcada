"""The database's files: how they are made, judged, repaired, refused, locked and swapped."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import socket
import sqlite3
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path

import pytest

import homeagent
from homeagent.engine import files
from homeagent.engine.files import (
    FileLock,
    atomic_replace,
    create_file,
    filesystem_kind,
    fsync_directory,
    inspect_file,
    is_network_filesystem,
    locate_file,
    prepare_directory,
    refuse_network_filesystem,
    refuse_orphaned_log,
    secure_sidecars,
    sidecars,
    unguarded,
)
from homeagent.errors import (
    CorruptDatabaseError,
    DatabaseBusyError,
    DatabaseError,
    DiskFullError,
    ForeignDatabaseError,
    InsecureFileError,
    InvalidArgumentError,
    ReadOnlyError,
)

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="owners, modes and flock are POSIX")

AT_ONCE = timedelta(0)
NOBODY = 65534
CHECKOUT = Path(homeagent.__file__).parents[1]
DATABASE = b"\0" * 512  # a judge that only looks from outside takes this for a database

needs_root = pytest.mark.skipif(
    sys.platform == "win32" or os.geteuid() != 0, reason="only the superuser can give a file away"
)

# A program's start: nothing is imported after the privileges are gone, for the checkout may be closed to others.
UNPRIVILEGED = f"""
    import os
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid({NOBODY})
        os.setuid({NOBODY})
"""

Snapshot = dict[str, tuple[int, int, int, int, int, bytes | str | None]]


def program(*parts: str) -> list[str]:
    """Return the command that runs these parts, each indented as it may be, as one Python program."""
    return [sys.executable, "-c", "".join(textwrap.dedent(part) for part in parts)]


def environment() -> dict[str, str]:
    """Return an environment in which a child finds the package in this checkout."""
    return {**os.environ, "PYTHONPATH": str(CHECKOUT)}


def run(*parts: str, arguments: list[str] | None = None) -> str:
    """Run a program to its end and return what it printed; a failing one fails the test."""
    done = subprocess.run(
        [*program(*parts), *(arguments or [])],
        check=False,
        capture_output=True,
        text=True,
        env=environment(),
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def snapshot(root: Path) -> Snapshot:
    """Return all that a refusal must leave as it was: names, modes, owners, links, times and content."""
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
    """Return the permission bits of a file."""
    return stat.S_IMODE(path.lstat().st_mode)


def make(path: Path, content: bytes = DATABASE, mode: int = 0o600) -> Path:
    """Make a file with exactly this mode."""
    path.write_bytes(content)
    path.chmod(mode)
    return path


@pytest.fixture
def database(tmp_path: Path) -> Path:
    """Return where a database file may be made, in a directory that holds nothing else."""
    directory = tmp_path / "data"
    directory.mkdir(0o700)
    return directory / "homeagent.db"


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """Return a directory that an unprivileged child reaches and owns, which pytest's own are not."""
    directory = Path(tempfile.mkdtemp(prefix="homeagent-test-"))
    if os.geteuid() == 0:
        os.chown(directory, NOBODY, NOBODY)
    yield directory
    for path in (directory, *directory.rglob("*")):
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o700)
    shutil.rmtree(directory)


class TestPaths:
    def test_home_is_expanded(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """`~` is the caller's home."""
        monkeypatch.setenv("HOME", str(tmp_path))
        assert locate_file("~/.homeagent/homeagent.db") == tmp_path.resolve() / ".homeagent" / "homeagent.db"

    def test_relative_path_becomes_absolute(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A later change of the working directory does not lead to another file."""
        monkeypatch.chdir(tmp_path)
        assert locate_file(Path("data/../homeagent.db")) == tmp_path.resolve() / "homeagent.db"

    def test_linked_directory_is_followed_and_a_linked_file_is_not(self, tmp_path: Path) -> None:
        """Two ways to one file give one path, while a link in the file's own place stays visible."""
        (tmp_path / "real").mkdir()
        (tmp_path / "linked").symlink_to(tmp_path / "real")
        (tmp_path / "real" / "a.db").symlink_to(tmp_path / "elsewhere.db")
        assert locate_file(tmp_path / "linked" / "a.db") == tmp_path.resolve() / "real" / "a.db"

    @pytest.mark.parametrize(
        "path", ["", "a\0b.db", "~nobody-of-this-name/a.db", "\ud800.db"], ids=["empty", "nul", "user", "surrogate"]
    )
    def test_path_that_names_no_file_is_refused(self, path: str) -> None:
        """What can't be a file name is a bad argument, not an error from somewhere below."""
        with pytest.raises(InvalidArgumentError):
            locate_file(path)

    def test_circle_of_links_is_refused_when_it_is_used(self, tmp_path: Path) -> None:
        """Directories that link to each other end in an error that names them, on every Python."""
        (tmp_path / "a").symlink_to(tmp_path / "b")
        (tmp_path / "b").symlink_to(tmp_path / "a")
        path = locate_file(tmp_path / "a" / "homeagent.db")
        with pytest.raises(InsecureFileError, match="circle"):
            inspect_file(path)
        with pytest.raises(InsecureFileError, match="circle"):
            prepare_directory(path.parent)

    def test_sidecars_lie_beside_the_database(self) -> None:
        """SQLite puts its suffixes after the whole name, dots included."""
        assert sidecars(Path("/data/a.b.db")) == [
            Path("/data/a.b.db-wal"),
            Path("/data/a.b.db-shm"),
            Path("/data/a.b.db-journal"),
        ]

    def test_nothing_is_unguarded_here(self) -> None:
        """On POSIX all guards work, so there is nothing to tell."""
        assert unguarded() is None


class TestAnyUmask:
    def test_everything_is_private_under_any_umask(self, open_directory: Path) -> None:
        """Directories get 0700 and files 0600, SQLite's own included, and the umask is never touched."""
        output = run(
            """
            import json, os, sqlite3, stat, sys
            from datetime import timedelta
            from pathlib import Path
            from homeagent.engine.files import FileLock, create_file, prepare_directory, sidecars
            """,
            UNPRIVILEGED,
            """
            set_umask = os.umask
            def forbidden(mask):
                raise AssertionError("the umask belongs to the whole process")
            os.umask = forbidden
            found = {}
            for umask in (0o000, 0o022, 0o077, 0o777):
                set_umask(umask)
                top = Path(sys.argv[1]) / format(umask, "03o")
                report = prepare_directory(top / "one" / "two")
                assert report.made == (top, top / "one", top / "one" / "two"), report
                assert report.mode == 0o700 and report.problem is None and not report.listable, report
                path = report.path / "homeagent.db"
                assert create_file(path) is True
                with FileLock(report.path / "homeagent.lock", timeout=timedelta(0)) as lock:
                    lock.write_marker("initialised")
                connection = sqlite3.connect(path)
                assert connection.execute("PRAGMA journal_mode=WAL").fetchone() == ("wal",)
                connection.execute("CREATE TABLE t (a)")
                made = [top, top / "one", top / "one" / "two", *(top / "one" / "two").iterdir()]
                found[format(umask, "03o")] = {
                    str(each.relative_to(top)): stat.S_IMODE(each.lstat().st_mode) for each in made
                }
                connection.close()
                assert set_umask(umask) == umask
            print(json.dumps(found))
            """,
            arguments=[str(open_directory)],
        )
        expected = {
            ".": 0o700,
            "one": 0o700,
            "one/two": 0o700,
            "one/two/homeagent.db": 0o600,
            "one/two/homeagent.db-wal": 0o600,
            "one/two/homeagent.db-shm": 0o600,
            "one/two/homeagent.lock": 0o600,
        }
        assert json.loads(output) == dict.fromkeys(("000", "022", "077", "777"), expected)


class TestDirectories:
    def test_existing_directory_is_left_alone_and_reported(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A directory that others can read keeps its mode and its time, and that is no reason to warn."""
        directory = tmp_path / "shared"
        directory.mkdir()
        directory.chmod(0o755)
        before = snapshot(tmp_path)
        report = prepare_directory(directory)
        assert (report.made, report.mode, report.uid) == ((), 0o755, os.geteuid())
        assert report.listable
        assert report.problem is None
        assert snapshot(tmp_path) == before
        assert caplog.records == []

    @pytest.mark.parametrize("mode", [0o775, 0o777, 0o702])
    def test_directory_that_others_can_write_is_reported_once(
        self, tmp_path: Path, mode: int, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Whoever can write the directory can replace the database, so the report and one warning say so."""
        directory = tmp_path / "open"
        directory.mkdir()
        directory.chmod(mode)
        for _ in range(2):
            report = prepare_directory(directory)
            assert report.problem is not None
            assert f"{mode:04o}" in report.problem
            assert "chmod go-w" in report.problem
        [record] = caplog.records
        assert (record.name, record.levelno) == ("homeagent", logging.WARNING)
        assert record.getMessage() == report.problem
        assert mode_of(directory) == mode

    def test_sticky_directory_is_safe(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        """In a directory such as /tmp others can't rename or remove our files."""
        directory = tmp_path / "sticky"
        directory.mkdir()
        directory.chmod(0o1777)
        assert prepare_directory(directory).problem is None
        assert caplog.records == []

    @needs_root
    def test_directory_of_another_user_is_reported(self, tmp_path: Path) -> None:
        """The owner of a directory can replace what is in it, whatever its mode."""
        directory = tmp_path / "theirs"
        directory.mkdir(0o700)
        os.chown(directory, NOBODY, NOBODY)
        problem = prepare_directory(directory).problem
        assert problem is not None
        assert str(NOBODY) in problem

    def test_only_what_is_missing_is_made(self, tmp_path: Path) -> None:
        """Under an existing parent the new directories are ours and 0700, and the parent keeps its mode."""
        tmp_path.chmod(0o755)
        report = prepare_directory(tmp_path / "a" / "b")
        assert report.made == (tmp_path / "a", tmp_path / "a" / "b")
        assert [mode_of(made) for made in report.made] == [0o700, 0o700]
        assert mode_of(tmp_path) == 0o755
        assert prepare_directory(tmp_path / "a" / "b").made == ()

    def test_linked_directory_is_legitimate(self, tmp_path: Path) -> None:
        """A home on another volume is often behind a link: the directory itself is what counts."""
        (tmp_path / "real").mkdir(0o700)
        (tmp_path / "link").symlink_to(tmp_path / "real")
        assert prepare_directory(tmp_path / "link").mode == 0o700
        assert prepare_directory(tmp_path / "link" / "sub").made == (tmp_path / "link" / "sub",)
        assert mode_of(tmp_path / "real" / "sub") == 0o700

    @pytest.mark.parametrize("beneath", ["", "sub", "sub/deeper"])
    def test_file_in_the_way_is_named(self, tmp_path: Path, beneath: str) -> None:
        """A path that leads through a file is a bad argument, and the message names that file."""
        blocker = make(tmp_path / "blocker")
        before = snapshot(tmp_path)
        with pytest.raises(InvalidArgumentError, match="blocker' is a file"):
            prepare_directory(blocker / beneath)
        assert snapshot(tmp_path) == before

    @pytest.mark.parametrize("beneath", ["", "sub"])
    def test_link_that_leads_nowhere_is_refused(self, tmp_path: Path, beneath: str) -> None:
        """Nothing is made at the far end of a dangling link."""
        (tmp_path / "link").symlink_to(tmp_path / "nowhere")
        before = snapshot(tmp_path)
        with pytest.raises((InvalidArgumentError, DatabaseError), match="leads nowhere"):
            prepare_directory(tmp_path / "link" / beneath)
        assert snapshot(tmp_path) == before

    def test_directory_made_by_another_at_the_same_moment_is_kept(self, tmp_path: Path) -> None:
        """Threads that prepare one directory together all succeed, and only one reports that it made it."""
        directory = tmp_path / "a" / "b" / "c"
        barrier = threading.Barrier(6)
        made: list[Path] = []

        def prepare() -> None:
            barrier.wait()
            made.extend(prepare_directory(directory).made)

        threads = [threading.Thread(target=prepare) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(made) == [tmp_path / "a", tmp_path / "a" / "b", directory]

    def test_file_system_without_modes_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where a new directory can't be closed to others, the error says so."""
        monkeypatch.setattr(files, "_is_private_directory", lambda directory: False)
        with pytest.raises(InsecureFileError, match="does not keep modes"):
            prepare_directory(tmp_path / "new")


def symlink(path: Path) -> None:
    """Put a link to a sound database in the path's place."""
    path.symlink_to(make(path.with_name("target.db")))


def dangling_symlink(path: Path) -> None:
    """Put a link to nothing in the path's place."""
    path.symlink_to(path.with_name("nowhere.db"))


def hard_link(path: Path) -> None:
    """Give a sound database a second name."""
    make(path)
    path.with_name("other.db").hardlink_to(path)


def directory(path: Path) -> None:
    """Put a directory in the path's place."""
    path.mkdir()


def fifo(path: Path) -> None:
    """Put a pipe in the path's place, on which an open() would hang."""
    os.mkfifo(path)


def unix_socket(path: Path) -> None:
    """Put a socket in the path's place."""
    # A socket's address is short, so it is bound from inside the directory that a long name leads to.
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        with closing(socket.socket(socket.AF_UNIX)) as server:
            previous = Path.cwd()
            os.chdir(descriptor)
            try:
                server.bind(path.name)
            finally:
                os.chdir(previous)
    finally:
        os.close(descriptor)


NOT_A_FILE_OF_OURS = [
    (symlink, InsecureFileError, "symbolic link"),
    (dangling_symlink, InsecureFileError, "symbolic link"),
    (hard_link, InsecureFileError, "2 names"),
    (directory, ForeignDatabaseError, "is a directory"),
    (fifo, ForeignDatabaseError, "pipe"),
    (unix_socket, ForeignDatabaseError, "socket"),
]


class TestInspecting:
    def test_absent_file(self, database: Path) -> None:
        """No file is None, and looking for it makes none."""
        assert inspect_file(database) is None
        assert list(database.parent.iterdir()) == []

    def test_empty_file(self, database: Path) -> None:
        """A file without a byte is a database that was created and never initialised."""
        state = inspect_file(make(database, b""))
        assert state is not None
        assert state.is_empty
        assert state.size == 0

    def test_present_file(self, database: Path) -> None:
        """A private file of at least one page is told by its size, owner and identity, and not touched."""
        status = make(database).lstat()
        before = snapshot(database.parent)
        state = inspect_file(database)
        assert state is not None
        assert not state.is_empty
        assert (state.path, state.size, state.mode, state.uid) == (database, 512, 0o600, os.geteuid())
        assert (state.device, state.inode, state.repaired_from) == (status.st_dev, status.st_ino, None)
        assert snapshot(database.parent) == before

    @pytest.mark.parametrize(("put", "error", "words"), NOT_A_FILE_OF_OURS)
    def test_what_is_no_file_of_ours_is_refused(
        self, database: Path, put: Callable[[Path], None], error: type[DatabaseError], words: str
    ) -> None:
        """Links, second names and what is no regular file are refused by name, and nothing changes."""
        put(database)
        before = snapshot(database.parent)
        with pytest.raises(error, match=words) as refusal:
            inspect_file(database)
        assert str(database) in str(refusal.value)
        assert snapshot(database.parent) == before

    @pytest.mark.parametrize("size", [1, 100, 511])
    def test_too_short_file_is_corrupt(self, database: Path, size: int, caplog: pytest.LogCaptureFixture) -> None:
        """What SQLite would take for an empty file is refused, its loose mode left for whoever looks into it."""
        make(database, b"x" * size, mode=0o644)
        before = snapshot(database.parent)
        with pytest.raises(CorruptDatabaseError, match=f"{size} bytes.*restore a backup"):
            inspect_file(database)
        assert snapshot(database.parent) == before
        assert caplog.records == []

    @pytest.mark.parametrize(
        ("content", "mode", "repaired"),
        [
            (DATABASE, 0o644, 0o600),
            (DATABASE, 0o666, 0o600),
            (DATABASE, 0o640, 0o600),
            (DATABASE, 0o700, 0o600),
            (DATABASE, 0o4600, 0o600),
            (DATABASE, 0o444, 0o400),
            (b"", 0o644, 0o600),
            (b"", 0o000, 0o600),  # its maker was killed under a umask of 0777
        ],
    )
    def test_loose_mode_is_repaired_with_a_warning(
        self, database: Path, content: bytes, mode: int, repaired: int, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Others lose what they could do with our file; the log names the file and both modes."""
        make(database, content, mode)
        before = database.lstat()
        state = inspect_file(database)
        assert state is not None
        assert (state.mode, state.repaired_from) == (repaired, mode)
        assert mode_of(database) == repaired
        assert database.lstat().st_mtime_ns == before.st_mtime_ns
        [record] = caplog.records
        assert (record.name, record.levelno) == ("homeagent", logging.WARNING)
        for words in (str(database), f"{mode:04o}", f"{repaired:04o}"):
            assert words in record.getMessage()
        again = inspect_file(database)
        assert again is not None
        assert again.repaired_from is None
        assert len(caplog.records) == 1

    @pytest.mark.parametrize("mode", [0o600, 0o400])
    def test_tight_mode_is_kept(self, database: Path, mode: int, caplog: pytest.LogCaptureFixture) -> None:
        """A database that may only be read stays so."""
        make(database, mode=mode)
        state = inspect_file(database)
        assert state is not None
        assert (state.mode, state.repaired_from) == (mode, None)
        assert mode_of(database) == mode
        assert caplog.records == []

    def test_file_of_another_user_is_refused(self) -> None:
        """An unprivileged program refuses a file that it does not own, though it could read it."""
        output = run(
            """
            from pathlib import Path
            from homeagent.engine.files import inspect_file
            from homeagent.errors import InsecureFileError
            """,
            UNPRIVILEGED,
            """
            try:
                inspect_file(Path("/etc/passwd"))
            except InsecureFileError as error:
                print(error)
            """,
        )
        assert "'/etc/passwd' belongs to user 0" in output
        assert "chown" in output

    @needs_root
    @pytest.mark.parametrize("mode", [0o600, 0o400])
    def test_superuser_may_open_a_private_file_of_another(self, database: Path, mode: int) -> None:
        """An administrator can look at a user's database, which stays that user's."""
        os.chown(make(database, mode=mode), NOBODY, NOBODY)
        before = snapshot(database.parent)
        state = inspect_file(database)
        assert state is not None
        assert (state.uid, state.mode) == (NOBODY, mode)
        assert snapshot(database.parent) == before

    @needs_root
    def test_superuser_does_not_repair_files_of_others(self, database: Path) -> None:
        """A loose file of another user is refused and keeps its mode, also for the superuser."""
        os.chown(make(database, mode=0o644), NOBODY, NOBODY)
        before = snapshot(database.parent)
        with pytest.raises(InsecureFileError, match=f"belongs to user {NOBODY}"):
            inspect_file(database)
        assert snapshot(database.parent) == before

    @pytest.mark.parametrize("refusal", [None, PermissionError(errno.EPERM, "not permitted")])
    def test_mode_that_can_not_be_changed_is_refused(
        self, database: Path, monkeypatch: pytest.MonkeyPatch, refusal: OSError | None
    ) -> None:
        """A file system that ignores or forbids modes leaves the database open, so it is no place for it."""

        def chmod(path: Path, mode: int, *, follow_symlinks: bool = True) -> None:
            if refusal is not None:
                raise refusal

        make(database, mode=0o644)
        before = snapshot(database.parent)
        monkeypatch.setattr(Path, "chmod", chmod)
        with pytest.raises(InsecureFileError, match="can't be made private"):
            inspect_file(database)
        assert snapshot(database.parent) == before

    def test_link_put_in_place_during_the_repair_is_not_followed(
        self, database: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Who swaps the file for a link between the look and the repair can't change the mode of what it names."""
        victim = make(database.parent.parent / "victim", mode=0o644)
        make(database, mode=0o644)
        change_mode = files._change_mode

        def swap(path: Path, mode: int) -> None:
            path.unlink()
            path.symlink_to(victim)
            change_mode(path, mode)

        monkeypatch.setattr(files, "_change_mode", swap)
        with pytest.raises(InsecureFileError, match="symbolic link"):
            inspect_file(database)
        assert mode_of(victim) == 0o644

    def test_plain_chmod_serves_where_links_can_not_be_spared(
        self, database: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Without fchmodat's flag, as on an old C library, a loose file is repaired all the same."""
        chmod = Path.chmod

        def plain(path: Path, mode: int, *, follow_symlinks: bool = True) -> None:
            if not follow_symlinks:
                raise NotImplementedError
            chmod(path, mode)

        make(database, mode=0o644)
        monkeypatch.setattr(Path, "chmod", plain)
        assert inspect_file(database) is not None
        assert mode_of(database) == 0o600

    def test_file_that_keeps_changing_is_given_up(self, database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A program that replaces the file again and again ends in an error, not in an endless loop."""
        make(database, mode=0o644)
        kept: list[Path] = []

        def replace(path: Path, mode: int) -> None:
            # The old one is kept, or its inode would be used again for the new one.
            kept.append(path.rename(path.with_name(f"old-{len(kept)}")))
            make(path, mode=0o644)

        monkeypatch.setattr(files, "_change_mode", replace)
        with pytest.raises(DatabaseError, match="keeps being replaced"):
            inspect_file(database)
        assert 1 < len(kept) < 100


class TestSidecars:
    def test_none(self, database: Path) -> None:
        """A database that is closed has nothing beside it."""
        make(database)
        assert secure_sidecars(database) == []

    def test_loose_ones_are_repaired(self, database: Path) -> None:
        """Each file beside the database gets its privacy, however short it is."""
        made = [make(path, b"x", mode=0o644) for path in sidecars(database)]
        states = secure_sidecars(database)
        assert [state.path for state in states] == made
        assert [mode_of(path) for path in made] == [0o600] * 3

    @pytest.mark.parametrize("suffix", ["-wal", "-shm", "-journal"])
    @pytest.mark.parametrize(("put", "error", "words"), NOT_A_FILE_OF_OURS)
    def test_what_is_no_file_of_ours_is_refused(
        self, database: Path, suffix: str, put: Callable[[Path], None], error: type[DatabaseError], words: str
    ) -> None:
        """SQLite would follow a link there, so what holds for the database holds for each of its files."""
        make(database)
        put(database.with_name(database.name + suffix))
        before = snapshot(database.parent)
        with pytest.raises(error, match=words):
            secure_sidecars(database)
        assert snapshot(database.parent) == before

    def test_one_that_is_removed_meanwhile_is_absent(self, database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Another process's last connection may remove the log while it is being repaired."""
        make(database)
        make(sidecars(database)[0], mode=0o644)
        change_mode = files._change_mode

        def remove(path: Path, mode: int) -> None:
            path.unlink()
            change_mode(path, mode)

        monkeypatch.setattr(files, "_change_mode", remove)
        assert secure_sidecars(database) == []

    @pytest.mark.parametrize("journal_mode", ["delete", "wal"])
    def test_locks_of_a_live_connection_survive_every_look(self, database: Path, journal_mode: str) -> None:
        """No function opens and closes a file of SQLite's: the write lock of this process still keeps others off."""
        with closing(sqlite3.connect(database, isolation_level=None)) as connection:
            connection.execute(f"PRAGMA journal_mode={journal_mode}")
            connection.execute("CREATE TABLE t (a)")
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("INSERT INTO t VALUES (1)")
            for path in (database, *sidecars(database)):
                if path.exists():
                    path.chmod(0o644)
            prepare_directory(database.parent)
            assert inspect_file(database) is not None
            assert len(secure_sidecars(database)) == (2 if journal_mode == "wal" else 1)
            assert create_file(database) is False
            refuse_orphaned_log(database)
            refuse_network_filesystem(database)
            fsync_directory(database.parent)
            output = run(
                """
                import sqlite3, sys
                connection = sqlite3.connect(sys.argv[1], timeout=0, isolation_level=None)
                try:
                    connection.execute("BEGIN IMMEDIATE")
                except sqlite3.OperationalError as error:
                    print(error)
                """,
                arguments=[str(database)],
            )
            assert output.strip() == "database is locked"
            connection.execute("COMMIT")


class TestOrphanedLog:
    def make_log(self, database: Path) -> None:
        """Leave a log with committed content and no database."""
        with closing(sqlite3.connect(database, isolation_level=None)) as connection:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("CREATE TABLE t (a)")
            log = sidecars(database)[0].read_bytes()
        database.unlink()
        make(sidecars(database)[0], log)

    @pytest.mark.parametrize("leave", ["nothing", "an empty file"])
    def test_log_without_database_is_refused(self, database: Path, leave: str) -> None:
        """SQLite would delete the log and begin empty; here it is kept, and the remedy is named."""
        self.make_log(database)
        if leave == "an empty file":
            make(database, b"")
        before = snapshot(database.parent)
        with pytest.raises(CorruptDatabaseError, match="restore a backup"):
            refuse_orphaned_log(database)
        assert snapshot(database.parent) == before

    def test_new_and_live_databases_pass(self, database: Path) -> None:
        """Neither a first start, nor one that was cut short, nor a database in use is refused."""
        refuse_orphaned_log(database)
        create_file(database)
        refuse_orphaned_log(database)
        make(sidecars(database)[0], b"")
        refuse_orphaned_log(database)
        with closing(sqlite3.connect(database, isolation_level=None)) as connection:
            connection.execute("PRAGMA journal_mode=WAL")
            refuse_orphaned_log(database)
            connection.execute("CREATE TABLE t (a)")
            assert sidecars(database)[0].stat().st_size > 0
            refuse_orphaned_log(database)


class TestCreating:
    def test_file_is_created_once(self, database: Path) -> None:
        """The first call makes an empty private file, the second changes nothing and says so."""
        assert create_file(database) is True
        assert (mode_of(database), database.stat().st_size) == (0o600, 0)
        database.write_bytes(DATABASE)
        before = snapshot(database.parent)
        assert create_file(database) is False
        assert snapshot(database.parent) == before

    def test_one_of_many_creates_it(self, database: Path) -> None:
        """Of threads that create it at the same moment, exactly one did."""
        barrier = threading.Barrier(8)
        answers: list[bool] = []

        def create() -> None:
            barrier.wait()
            answers.append(create_file(database))

        threads = [threading.Thread(target=create) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(answers) == [False] * 7 + [True]

    @pytest.mark.parametrize("put", [symlink, dangling_symlink, directory, fifo])
    def test_name_that_is_taken_is_left_alone(self, database: Path, put: Callable[[Path], None]) -> None:
        """Whatever has the name keeps it, and nothing is made at the far end of a link."""
        put(database)
        before = snapshot(database.parent)
        assert create_file(database) is False
        assert snapshot(database.parent) == before

    def test_missing_directory_is_named(self, database: Path) -> None:
        """Without its directory the file can't be made, and the message says what to make."""
        with pytest.raises(DatabaseError, match="its directory is missing"):
            create_file(database.parent / "absent" / "homeagent.db")

    def test_too_long_name_is_refused(self, database: Path) -> None:
        """A name that the file system can't hold is a bad argument."""
        with pytest.raises(InvalidArgumentError, match="too long"):
            create_file(database.with_name("x" * 300))

    def test_path_through_a_file_is_refused(self, database: Path) -> None:
        """A component that is a file is a bad argument here too."""
        make(database)
        with pytest.raises(InvalidArgumentError, match="leads through a file"):
            create_file(database / "homeagent.db")

    @pytest.mark.parametrize(
        ("number", "kind", "words"),
        [
            (errno.ENOSPC, DiskFullError, "free some space"),
            (errno.EDQUOT, DiskFullError, "free some space"),
            (errno.EROFS, ReadOnlyError, "read-only file system"),
            (errno.EACCES, DatabaseError, "no permission to create"),
            (errno.EMFILE, DatabaseError, "open files"),
        ],
    )
    def test_errors_of_the_system_become_ours(
        self,
        database: Path,
        monkeypatch: pytest.MonkeyPatch,
        number: int,
        kind: type[DatabaseError],
        words: str,
    ) -> None:
        """A full disk, a read-only one and a missing permission have errors of their own, which name the path."""

        def fail(*arguments: object, **named: object) -> int:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "open", fail)
        with pytest.raises(DatabaseError, match=words) as refusal:
            create_file(database)
        assert type(refusal.value) is kind
        assert str(database) in str(refusal.value)

    @pytest.mark.parametrize("refusal", [None, PermissionError(errno.EPERM, "not permitted")])
    def test_file_system_without_modes_is_refused(
        self, database: Path, monkeypatch: pytest.MonkeyPatch, refusal: OSError | None
    ) -> None:
        """A new file that others could read is no database of ours."""

        def fchmod(descriptor: int, mode: int) -> None:
            if refusal is not None:
                raise refusal
            change(descriptor, 0o644)

        change = os.fchmod
        monkeypatch.setattr(os, "fchmod", fchmod)
        with pytest.raises(InsecureFileError, match="can't be made private"):
            create_file(database)

    def test_missing_permission_is_told(self, open_directory: Path) -> None:
        """Where this user may not write or look, every function names the path and what to do."""
        output = run(
            """
            import sys
            from datetime import timedelta
            from pathlib import Path
            from homeagent.engine.files import FileLock, create_file, inspect_file, prepare_directory
            from homeagent.errors import DatabaseError
            """,
            UNPRIVILEGED,
            """
            closed = Path(sys.argv[1]) / "closed"
            closed.mkdir()
            closed.chmod(0o500)
            hidden = Path(sys.argv[1]) / "hidden"
            hidden.mkdir()
            hidden.chmod(0o000)
            unreadable = Path(sys.argv[1]) / "unreadable.lock"
            unreadable.write_text("initialised")
            unreadable.chmod(0o000)
            for act in (
                lambda: create_file(closed / "a.db"),
                lambda: prepare_directory(closed / "sub"),
                lambda: FileLock(closed / "a.lock", timeout=timedelta(0)).acquire(),
                lambda: inspect_file(hidden / "a.db"),
                lambda: prepare_directory(hidden / "sub"),
                lambda: FileLock(unreadable, timeout=timedelta(0)).acquire(),
            ):
                try:
                    act()
                except DatabaseError as error:
                    print(type(error).__name__, error)
            """,
            arguments=[str(open_directory)],
        )
        lines = output.splitlines()
        assert len(lines) == 6, output
        for line, name in zip(lines, ["a.db", "sub", "a.lock", "a.db", "sub", "unreadable.lock"], strict=True):
            assert line.startswith("DatabaseError no permission to ")
            assert name in line
            assert "run as the owner" in line


class TestReplacing:
    def test_target_gets_the_new_content(self, database: Path) -> None:
        """The source takes the target's name, private, and nothing else is left over."""
        make(database, b"old")
        source = make(database.with_name("restored.db"), b"new", mode=0o644)
        inode = source.stat().st_ino
        atomic_replace(source, database)
        assert database.read_bytes() == b"new"
        assert (database.stat().st_ino, mode_of(database)) == (inode, 0o600)
        assert list(database.parent.iterdir()) == [database]

    def test_target_need_not_exist(self, database: Path) -> None:
        """A restore after a loss has nothing to replace."""
        atomic_replace(make(database.with_name("restored.db"), b"new"), database)
        assert database.read_bytes() == b"new"

    def test_link_in_the_target_s_place_is_replaced_itself(self, database: Path) -> None:
        """The content goes to the name, not through the link to another file."""
        symlink(database)
        atomic_replace(make(database.with_name("restored.db"), b"new"), database)
        assert not database.is_symlink()
        assert database.with_name("target.db").read_bytes() == DATABASE

    def test_content_is_on_the_disk_before_the_name_and_the_name_before_the_return(
        self, database: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A power cut at any moment leaves the old file or the whole new one: file, rename, both directories."""
        other = database.parent.parent / "other"
        other.mkdir()
        source = make(other / "restored.db", b"new")
        order: list[object] = []
        sync, replace = files._sync, Path.replace

        def recorded_sync(descriptor: int) -> None:
            order.append(os.fstat(descriptor).st_ino)
            sync(descriptor)

        def recorded_replace(path: Path, target: Path) -> Path:
            order.append("rename")
            return replace(path, target)

        inode = source.stat().st_ino
        monkeypatch.setattr(files, "_sync", recorded_sync)
        monkeypatch.setattr(Path, "replace", recorded_replace)
        atomic_replace(source, database)
        assert order == [inode, "rename", database.parent.stat().st_ino, other.stat().st_ino]

    @pytest.mark.parametrize("put", [None, symlink, hard_link, directory, fifo])
    def test_source_that_is_no_file_of_ours_is_refused(
        self, database: Path, put: Callable[[Path], None] | None
    ) -> None:
        """A missing or untrusted source leaves the target as it is."""
        make(database)
        source = database.with_name("restored.db")
        if put is not None:
            put(source)
        before = snapshot(database.parent)
        with pytest.raises(DatabaseError):
            atomic_replace(source, database)
        assert snapshot(database.parent) == before

    def test_other_file_system_is_refused(self, database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A move between file systems can't be atomic: the message says where to put the new file."""

        def fail(path: Path, target: Path) -> Path:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

        make(database)
        source = make(database.with_name("restored.db"))
        monkeypatch.setattr(Path, "replace", fail)
        with pytest.raises(DatabaseError, match="put the new file beside it"):
            atomic_replace(source, database)

    @pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
    def test_directory_that_can_not_be_synced_is_accepted(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
    ) -> None:
        """Some file systems have no sync of a directory, and SQLite works there too; a real failure is told."""

        def fail(descriptor: int) -> None:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(files, "_sync", fail)
        code = number
        fsync_directory(tmp_path)
        code = errno.EIO
        with pytest.raises(DatabaseError, match="sync the directory"):
            fsync_directory(tmp_path)


HOLDER = """
    import sys
    from datetime import timedelta
    from pathlib import Path
    from homeagent.engine.files import FileLock
    lock = FileLock(Path(sys.argv[1]), timeout=timedelta(0))
    lock.acquire()
"""


class Waiting:
    """A clock that only moves when somebody waits on it, and what it was asked to wait."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.pauses: list[float] = []
        self.on_pause: Callable[[], None] = lambda: None

    def monotonic(self) -> float:
        return self.now

    def pause(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds
        self.on_pause()


@pytest.fixture
def lock_file(database: Path) -> Path:
    """Return where a lock file may be made."""
    return database.with_name("homeagent.lock")


class TestLocking:
    def test_lock_excludes_and_its_file_stays(self, lock_file: Path) -> None:
        """One holder at a time; the file is private, empty and never removed."""
        with FileLock(lock_file, timeout=AT_ONCE) as lock:
            held_inside = lock.held
            with pytest.raises(DatabaseBusyError, match=r"homeagent\.lock"):
                FileLock(lock_file, timeout=AT_ONCE).acquire()
        assert (held_inside, lock.held) == (True, False)
        assert (mode_of(lock_file), lock_file.stat().st_size) == (0o600, 0)
        inode = lock_file.stat().st_ino
        with FileLock(lock_file, timeout=AT_ONCE):
            assert lock_file.stat().st_ino == inode

    def test_killed_process_gives_the_lock_back(self, lock_file: Path) -> None:
        """Another process keeps it as long as it lives, and a SIGKILL frees it."""
        holder = subprocess.Popen(
            [*program(HOLDER, "print('held', flush=True)\nsys.stdin.read()\n"), str(lock_file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        with holder:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(DatabaseBusyError):
                FileLock(lock_file, timeout=AT_ONCE).acquire()
            holder.kill()
            holder.wait()
        with FileLock(lock_file, timeout=AT_ONCE) as lock:
            assert lock.held

    def test_forked_child_does_not_inherit_the_lock(self, lock_file: Path) -> None:
        """When the holder is killed its forked child lives on, and the lock is free all the same."""
        holder = subprocess.Popen(
            [
                *program(
                    HOLDER,
                    """
                    import os
                    if os.fork() == 0:
                        held = lock.held
                        lock.release()
                        print(held, os.getpid(), flush=True)
                        sys.stdin.read()
                        os._exit(0)
                    sys.stdin.read()
                    """,
                ),
                str(lock_file),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        with holder:
            assert holder.stdout is not None
            held, child = holder.stdout.readline().split()
            assert held == "False"
            with pytest.raises(DatabaseBusyError):
                FileLock(lock_file, timeout=AT_ONCE).acquire()  # nor did the child release it
            holder.kill()
            holder.wait()
            os.kill(int(child), 0)  # it is there yet, and has all that it inherited
            with FileLock(lock_file, timeout=AT_ONCE) as lock:
                assert lock.held

    def test_threads_exclude_each_other(self, lock_file: Path) -> None:
        """In one process too, nobody is inside together with somebody else."""
        inside = 0
        seen: list[int] = []
        barrier = threading.Barrier(6)

        def work() -> None:
            nonlocal inside
            barrier.wait()
            for _ in range(10):
                with FileLock(lock_file):
                    inside += 1
                    seen.append(inside)
                    inside -= 1

        threads = [threading.Thread(target=work) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert seen == [1] * 60

    def test_shared_holders_keep_off_exclusive_ones_only(self, lock_file: Path) -> None:
        """Any number share it; none gets it alone meanwhile, and nobody shares it with one that has it alone."""
        with (
            FileLock(lock_file, shared=True, timeout=AT_ONCE),
            FileLock(lock_file, shared=True, timeout=AT_ONCE),
            pytest.raises(DatabaseBusyError),
        ):
            FileLock(lock_file, timeout=AT_ONCE).acquire()
        with FileLock(lock_file, timeout=AT_ONCE), pytest.raises(DatabaseBusyError):
            FileLock(lock_file, shared=True, timeout=AT_ONCE).acquire()

    def test_waiting_ends_at_the_timeout(self, lock_file: Path) -> None:
        """The pauses grow to a bound, and their sum is the timeout and not more."""
        waiting = Waiting()
        patient = FileLock(lock_file, timeout=timedelta(seconds=2), monotonic=waiting.monotonic, pause=waiting.pause)
        with FileLock(lock_file, timeout=AT_ONCE), pytest.raises(DatabaseBusyError, match="waited 2 s"):
            patient.acquire()
        assert sum(waiting.pauses) == pytest.approx(2)
        assert waiting.pauses[:3] == [0.001, 0.002, 0.004]
        assert max(waiting.pauses) == 0.05
        assert not patient.held

    def test_zero_timeout_tries_once(self, lock_file: Path) -> None:
        """Nobody waits for a lock that may not be waited for."""
        waiting = Waiting()
        hasty = FileLock(lock_file, timeout=AT_ONCE, monotonic=waiting.monotonic, pause=waiting.pause)
        with FileLock(lock_file, timeout=AT_ONCE), pytest.raises(DatabaseBusyError):
            hasty.acquire()
        assert waiting.pauses == []

    def test_waiter_gets_the_lock_once_it_is_free(self, lock_file: Path) -> None:
        """A holder that ends during the wait ends the wait."""
        waiting = Waiting()
        holder = FileLock(lock_file, timeout=AT_ONCE)
        holder.acquire()
        waiting.on_pause = holder.release
        with FileLock(lock_file, monotonic=waiting.monotonic, pause=waiting.pause) as lock:
            assert lock.held
        assert len(waiting.pauses) == 1

    def test_interrupted_wait_holds_nothing(self, lock_file: Path) -> None:
        """Ctrl-C while waiting leaves neither a lock nor an open file behind."""

        def interrupt(seconds: float) -> None:
            raise KeyboardInterrupt

        holder = FileLock(lock_file, timeout=AT_ONCE)
        holder.acquire()
        waiter = FileLock(lock_file, pause=interrupt)
        descriptor = os.dup(0)
        os.close(descriptor)
        with pytest.raises(KeyboardInterrupt):
            waiter.acquire()
        again = os.dup(0)
        os.close(again)
        assert again == descriptor  # the lowest free number is what it was
        assert not waiter.held
        holder.release()
        with FileLock(lock_file, timeout=AT_ONCE):
            pass

    def test_negative_timeout_is_refused(self, lock_file: Path) -> None:
        """A timeout before now is a mistake in the program."""
        with pytest.raises(InvalidArgumentError):
            FileLock(lock_file, timeout=timedelta(seconds=-1))

    def test_lock_that_is_held_is_not_taken_again(self, lock_file: Path) -> None:
        """Taking it twice would wait for itself, so it is told at once."""
        lock = FileLock(lock_file)
        with lock, pytest.raises(DatabaseError, match="held already"):
            lock.acquire()
        lock.release()  # a second time, which is fine
        with lock:
            assert lock.held

    def test_release_does_not_wait_for_copies_of_the_descriptor(self, lock_file: Path) -> None:
        """A child between fork and exec has a copy of every descriptor; the lock is given back all the same."""
        lock = FileLock(lock_file)
        lock.acquire()
        assert lock._descriptor is not None
        copy = os.dup(lock._descriptor)
        try:
            lock.release()
            with FileLock(lock_file, timeout=AT_ONCE):
                pass
        finally:
            os.close(copy)

    def test_exception_gives_the_lock_back(self, lock_file: Path) -> None:
        """Leaving the block by an exception frees the lock."""
        with pytest.raises(ZeroDivisionError), FileLock(lock_file, timeout=AT_ONCE):
            raise ZeroDivisionError
        with FileLock(lock_file, timeout=AT_ONCE):
            pass

    def test_replaced_file_is_locked_anew(self, lock_file: Path) -> None:
        """A waiter whose lock file was removed ends up with the file that others will find, not with the old one."""
        waiting = Waiting()
        holder = FileLock(lock_file, timeout=AT_ONCE)
        holder.acquire()
        waiting.on_pause = lock_file.unlink
        with FileLock(lock_file, monotonic=waiting.monotonic, pause=waiting.pause) as lock:
            assert lock.held
            with pytest.raises(DatabaseBusyError):
                FileLock(lock_file, timeout=AT_ONCE).acquire()
        holder.release()

    def test_lock_on_a_removed_file_is_no_lock(self, lock_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A file that is removed between its opening and its locking is given up for the one in its place."""
        locked: list[int] = []
        take = FileLock._lock

        def take_and_remove(lock: FileLock, descriptor: int) -> bool:
            taken = take(lock, descriptor)
            if not locked:
                lock_file.unlink()
            locked.append(descriptor)
            return taken

        monkeypatch.setattr(FileLock, "_lock", take_and_remove)
        waiting = Waiting()
        with FileLock(lock_file, monotonic=waiting.monotonic, pause=waiting.pause):
            assert len(locked) == 2
            assert os.fstat(locked[1]).st_ino == lock_file.stat().st_ino

    @pytest.mark.parametrize("moment", ["before it is judged", "before it is opened"])
    def test_file_removed_while_it_is_opened_is_made_anew(
        self, lock_file: Path, monkeypatch: pytest.MonkeyPatch, moment: str
    ) -> None:
        """Somebody tidies up the lock file at the worst moment: the next try makes another."""
        make(lock_file, b"")
        create, judge = files._create, files._judge

        def create_and_remove(path: Path) -> int | None:
            descriptor = create(path)
            if descriptor is None and moment == "before it is judged":
                path.unlink()
            return descriptor

        def judge_and_remove(path: Path, *, is_database: bool, complete_empty: bool = False) -> files.FileState | None:
            state = judge(path, is_database=is_database, complete_empty=complete_empty)
            if state is not None and moment == "before it is opened":
                path.unlink()
            return state

        monkeypatch.setattr(files, "_create", create_and_remove)
        monkeypatch.setattr(files, "_judge", judge_and_remove)
        waiting = Waiting()
        with FileLock(lock_file, monotonic=waiting.monotonic, pause=waiting.pause):
            assert lock_file.exists()
        assert len(waiting.pauses) == 1

    def test_file_system_without_locks_is_told(self, lock_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where the file can't be locked at all, waiting would be in vain."""

        def fail(descriptor: int, operation: int) -> None:
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

        monkeypatch.setattr("fcntl.flock", fail)
        lock = FileLock(lock_file)
        with pytest.raises(DatabaseError, match="can't lock") as refusal:
            lock.acquire()
        assert not isinstance(refusal.value, DatabaseBusyError)
        assert not lock.held

    @pytest.mark.parametrize(("put", "error", "words"), NOT_A_FILE_OF_OURS)
    def test_lock_file_is_judged_like_the_database(
        self, lock_file: Path, put: Callable[[Path], None], error: type[DatabaseError], words: str
    ) -> None:
        """A link, a second name or a pipe is refused, and nothing changes or hangs."""
        put(lock_file)
        before = snapshot(lock_file.parent)
        with pytest.raises(error, match=words):
            FileLock(lock_file, timeout=AT_ONCE).acquire()
        assert snapshot(lock_file.parent) == before

    @pytest.mark.parametrize("mode", [0o666, 0o000])
    def test_mode_of_the_lock_file_is_repaired(self, lock_file: Path, mode: int) -> None:
        """Nobody else can hold us off with our lock file, and one that a umask closed to us is opened again."""
        make(lock_file, b"", mode)
        with FileLock(lock_file, timeout=AT_ONCE):
            assert mode_of(lock_file) == 0o600

    def test_missing_directory_is_named(self, tmp_path: Path) -> None:
        """The lock file's directory is not made on the way."""
        with pytest.raises(DatabaseError, match="its directory is missing"):
            FileLock(tmp_path / "absent" / "homeagent.lock").acquire()
        assert list(tmp_path.iterdir()) == []


class TestMarker:
    def test_marker_is_found_by_the_next_holder(self, lock_file: Path) -> None:
        """None was left at first; what was left is there for every later holder, a shared one too."""
        with FileLock(lock_file) as lock:
            assert lock.read_marker() is None
            lock.write_marker("initialised é")
            assert lock.read_marker() == "initialised é"
        with FileLock(lock_file, shared=True) as lock:
            assert lock.read_marker() == "initialised é"
        assert mode_of(lock_file) == 0o600

    @pytest.mark.parametrize("text", ["x", "a longer text than before"])
    def test_marker_is_replaced(self, lock_file: Path, text: str) -> None:
        """A new text takes the place of the old one, shorter or longer."""
        with FileLock(lock_file) as lock:
            lock.write_marker("first text")
            lock.write_marker(text)
            assert lock.read_marker() == text
        assert lock_file.read_text() == f"{text}\n"

    def test_rest_of_an_older_marker_is_ignored(self, lock_file: Path) -> None:
        """A power cut between the write and the cut to length leaves the new text readable."""
        make(lock_file, b"new\nd of an older text\n")
        with FileLock(lock_file) as lock:
            assert lock.read_marker() == "new"

    def test_unreadable_marker_is_not_taken_for_none(self, lock_file: Path) -> None:
        """Whatever is in the file, the database was initialised: broken bytes are a text too."""
        make(lock_file, b"\xff\xfe")
        with FileLock(lock_file) as lock:
            assert lock.read_marker() is not None

    @pytest.mark.parametrize("text", ["", "two\nlines", "nul\0", "x" * 201, "é" * 101, "\ud800"])
    def test_text_that_is_no_marker_is_refused(self, lock_file: Path, text: str) -> None:
        """A marker is one short printable line; a refused one leaves the old one."""
        with FileLock(lock_file) as lock:
            lock.write_marker("old")
            with pytest.raises(InvalidArgumentError):
                lock.write_marker(text)
            assert lock.read_marker() == "old"

    def test_longest_marker(self, lock_file: Path) -> None:
        """The bound itself is allowed."""
        with FileLock(lock_file) as lock:
            lock.write_marker("x" * 200)
            assert lock.read_marker() == "x" * 200

    def test_marker_needs_the_lock(self, lock_file: Path) -> None:
        """It is read and written only while held, and written only while held alone."""
        lock = FileLock(lock_file)
        with pytest.raises(DatabaseError, match="not held"):
            lock.read_marker()
        with pytest.raises(DatabaseError, match="not held"):
            lock.write_marker("text")
        with FileLock(lock_file, shared=True) as shared, pytest.raises(DatabaseError, match="hold it alone"):
            shared.write_marker("text")
        assert lock_file.stat().st_size == 0

    def test_marker_that_does_not_fit_is_told(self, lock_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A disk that takes only half of it is full, and says so."""
        write = os.write
        with FileLock(lock_file) as lock:
            monkeypatch.setattr(os, "write", lambda descriptor, content: write(descriptor, content[:2]))
            with pytest.raises(DiskFullError, match="free some space"):
                lock.write_marker("text")


def mount(point: Path | str, kind: str, device: str = "0:99", optional: str = "shared:1") -> str:
    """Return a line of the kernel's mount table, with blanks written as the kernel writes them."""
    escaped = str(point).replace("\\", "\\134").replace(" ", "\\040")
    return f"30 1 {device} / {escaped} rw,relatime {optional} - {kind} source rw\n".replace("  ", " ")


class TestFileSystems:
    def table(self, tmp_path: Path, *lines: str) -> Path:
        """Write a mount table."""
        path = tmp_path / "mountinfo"
        path.write_text("".join(lines))
        return path

    def test_longest_mount_point_decides(self, tmp_path: Path) -> None:
        """A mount within a mount is the one that counts, for paths that are yet to be made too."""
        share = tmp_path / "my share"
        share.mkdir()
        (tmp_path / "my share 2").mkdir()
        table = self.table(tmp_path, mount("/", "ext4"), mount(share, "nfs4", optional=""), mount("/proc", "proc"))
        assert filesystem_kind(share, mount_table=table) == "nfs4"
        assert filesystem_kind(share / "missing" / "homeagent.db", mount_table=table) == "nfs4"
        assert filesystem_kind(tmp_path / "my share 2", mount_table=table) == "ext4"

    def test_link_is_followed_to_its_file_system(self, tmp_path: Path) -> None:
        """What counts is where the file really is."""
        share = tmp_path / "share"
        share.mkdir()
        (tmp_path / "link").symlink_to(share)
        table = self.table(tmp_path, mount("/", "ext4"), mount(share, "cifs"))
        assert filesystem_kind(tmp_path / "link" / "homeagent.db", mount_table=table) == "cifs"

    def test_later_mount_hides_the_earlier(self, tmp_path: Path) -> None:
        """An automounter's placeholder has the same mount point as the share that comes over it."""
        table = self.table(tmp_path, mount("/", "ext4"), mount(tmp_path, "autofs"), mount(tmp_path, "nfs"))
        assert filesystem_kind(tmp_path, mount_table=table) == "nfs"

    def test_device_tells_which_of_the_mounts_is_on_top(self, tmp_path: Path) -> None:
        """A mount that was hidden by one above it is still in the table, and is not where the path lies."""
        device = tmp_path.stat().st_dev
        hidden = tmp_path / "hidden"
        hidden.mkdir()
        table = self.table(
            tmp_path, mount(hidden, "nfs"), mount(tmp_path, "xfs", f"{os.major(device)}:{os.minor(device)}")
        )
        assert filesystem_kind(hidden, mount_table=table) == "xfs"

    def test_unknown_is_none_and_not_refused(self, tmp_path: Path) -> None:
        """Without a mount table, or without a line for the path, nothing is claimed."""
        assert filesystem_kind(tmp_path, mount_table=tmp_path / "absent") is None
        refuse_network_filesystem(tmp_path, mount_table=tmp_path / "absent")
        table = self.table(tmp_path, "not a line of a mount table\n", mount("/elsewhere", "nfs"))
        assert filesystem_kind(tmp_path, mount_table=table) is None

    def test_this_machine_s_own_table_is_understood(self, tmp_path: Path) -> None:
        """On Linux the kernel names the file system of any directory; elsewhere there is no such table."""
        kind = filesystem_kind(tmp_path)
        assert (kind is not None and kind.isprintable() and kind != "") is sys.platform.startswith("linux")

    @pytest.mark.parametrize(
        "kind", ["nfs", "nfs4", "cifs", "smb3", "9p", "virtiofs", "fuse.sshfs", "ceph", "glusterfs", "lustre", "afs"]
    )
    def test_network_file_system_is_refused(self, tmp_path: Path, kind: str) -> None:
        """Where connections can't share memory WAL corrupts, so the error names the path, the kind and the way out."""
        assert is_network_filesystem(kind)
        table = self.table(tmp_path, mount("/", "ext4"), mount(tmp_path, kind))
        with pytest.raises(DatabaseError, match=r"sqlite\.org/wal\.html.*local disk") as refusal:
            refuse_network_filesystem(tmp_path / "homeagent.db", mount_table=table)
        assert f"({kind})" in str(refusal.value)
        assert str(tmp_path / "homeagent.db") in str(refusal.value)

    @pytest.mark.parametrize(
        "kind", ["ext4", "xfs", "btrfs", "zfs", "f2fs", "tmpfs", "overlay", "apfs", "fuseblk", "fuse.mergerfs"]
    )
    def test_local_file_system_is_accepted(self, tmp_path: Path, kind: str) -> None:
        """A file system of this kernel is no reason to refuse."""
        assert not is_network_filesystem(kind)
        refuse_network_filesystem(tmp_path, mount_table=self.table(tmp_path, mount("/", kind)))
