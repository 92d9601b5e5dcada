"""Locks between threads and processes, and the text that one leaves for the next."""

from __future__ import annotations

import errno
import os
import subprocess
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from homeagent.engine.files import database_file as files
from homeagent.engine.files import locks
from homeagent.engine.files.locks import FileLock
from homeagent.errors import (
    DatabaseBusyError,
    DatabaseError,
    DiskFullError,
    InvalidArgumentError,
)
from tests.engine.files.conftest import (
    AT_ONCE,
    NOT_A_FILE_OF_OURS,
    environment,
    make,
    mode_of,
    program,
    snapshot,
)

HOLDER = """
    import sys
    from datetime import timedelta
    from pathlib import Path
    from homeagent.engine.files.locks import FileLock
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
def lock_file(database_file: Path) -> Path:
    """Return where a lock file may be made."""
    return database_file.with_name("homeagent.lock")


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
        with lock, pytest.raises(DatabaseError, match=r"holds the lock .* already"):
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
        create, judge = locks.create_descriptor, locks.judge_file

        def create_and_remove(path: Path) -> int | None:
            descriptor = create(path)
            if descriptor is None and moment == "before it is judged":
                path.unlink()
            return descriptor

        def judge_and_remove(path: Path, **options: Any) -> files.FileState | None:
            state = judge(path, **options)
            if state is not None and moment == "before it is opened":
                path.unlink()
            return state

        monkeypatch.setattr(locks, "create_descriptor", create_and_remove)
        monkeypatch.setattr(locks, "judge_file", judge_and_remove)
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
        with FileLock(lock_file, shared=True) as shared, pytest.raises(DatabaseError, match="use an exclusive lock"):
            shared.write_marker("text")
        assert lock_file.stat().st_size == 0

    def test_marker_that_does_not_fit_is_told(self, lock_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A disk that takes only half of it is full, and says so."""
        write = os.write
        with FileLock(lock_file) as lock:
            monkeypatch.setattr(os, "write", lambda descriptor, content: write(descriptor, content[:2]))
            with pytest.raises(DiskFullError, match="free some space"):
                lock.write_marker("text")
