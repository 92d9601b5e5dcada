"""Locks between threads and processes, and the marker text in a lock file."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest

from homeagent.engine.files import locks
from homeagent.engine.files.locks import FileLock
from homeagent.errors import DatabaseBusyError, DatabaseError, DiskFullError
from tests.engine.files.conftest import AT_ONCE, Waiting, make, mode_of
from tests.fork_server import Child


@pytest.fixture
def waiting(monkeypatch: pytest.MonkeyPatch) -> Waiting:
    return Waiting(monkeypatch, locks)


@pytest.fixture
def lock_file(database_file: Path) -> Path:
    return database_file.with_name("homeagent.lock")


def is_held(lock_file: Path, *, shared: bool = False) -> bool:
    """Return whether another holder excludes a new holder."""
    with suppress(DatabaseBusyError), FileLock(lock_file, timeout=AT_ONCE, shared=shared):
        return False
    return True


def test_lock_excludes_and_its_file_stays(lock_file: Path) -> None:
    """A lock has one holder at a time; its file is private, empty and never removed."""
    with FileLock(lock_file, timeout=AT_ONCE) as lock:
        assert lock.held
        assert is_held(lock_file)
        assert is_held(lock_file, shared=True)
    assert not lock.held
    assert (mode_of(lock_file), lock_file.stat().st_size) == (0o600, 0)
    inode = lock_file.stat().st_ino
    with FileLock(lock_file, timeout=AT_ONCE):
        assert lock_file.stat().st_ino == inode


def test_shared_holders_exclude_only_exclusive_holders(lock_file: Path) -> None:
    """Shared holders can hold a lock at the same time, and exclude an exclusive holder."""
    with FileLock(lock_file, shared=True, timeout=AT_ONCE), FileLock(lock_file, shared=True, timeout=AT_ONCE):
        assert is_held(lock_file)


FORKING_HOLDER = """
import os, sys
from pathlib import Path
from homeagent.engine.files.locks import FileLock
lock = FileLock(Path(sys.argv[1]))
lock.acquire()
if os.fork() == 0:
    held = lock.held
    lock.release()
    print(held, os.getpid(), flush=True)
    sys.stdin.read()
    os._exit(0)
sys.stdin.read()
"""


def test_forked_child_does_not_inherit_the_lock(lock_file: Path) -> None:
    """If a holder is killed while its forked child runs, the lock is released."""
    with Child(FORKING_HOLDER, lock_file) as holder:
        held, child = holder.stdout.readline().split()
        assert held == "False"
        assert is_held(lock_file)  # the child did not release it either
        holder.kill()
        holder.wait()
        os.kill(int(child), 0)  # the child still runs, with everything that it inherited
        assert not is_held(lock_file)


def test_waiting_ends_at_the_timeout(lock_file: Path, waiting: Waiting) -> None:
    """The pauses between attempts grow to a maximum, and the sum of the pauses is the timeout."""
    patient = FileLock(lock_file, timeout=timedelta(seconds=2))
    with FileLock(lock_file, timeout=AT_ONCE), pytest.raises(DatabaseBusyError, match=r"homeagent\.lock.*waited 2 s"):
        patient.acquire()
    assert sum(waiting.pauses) == pytest.approx(2)
    assert waiting.pauses[:3] == [0.001, 0.002, 0.004]
    assert max(waiting.pauses) == 0.05
    assert not patient.held


def test_interrupted_wait_holds_no_lock(lock_file: Path, waiting: Waiting) -> None:
    """Ctrl-C during a wait leaves no lock and no open file."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    waiting.on_pause = interrupt
    waiter = FileLock(lock_file)
    with FileLock(lock_file, timeout=AT_ONCE):
        descriptors = set(Path("/dev/fd").iterdir())
        with pytest.raises(KeyboardInterrupt):
            waiter.acquire()
        assert set(Path("/dev/fd").iterdir()) == descriptors
        assert not waiter.held
    assert not is_held(lock_file)


def test_release_does_not_wait_for_copies_of_the_descriptor(lock_file: Path) -> None:
    """A release frees the lock at once, even if a child between fork and exec has a copy of the descriptor."""
    lock = FileLock(lock_file)
    lock.acquire()
    copy = os.dup(lock._descriptor)
    try:
        lock.release()
        assert not is_held(lock_file)
    finally:
        os.close(copy)


def test_waiter_locks_the_replacement_file(lock_file: Path, waiting: Waiting) -> None:
    """If the lock file is removed during a wait, the waiter locks the new file, which other processes will open."""
    waiting.on_pause = lock_file.unlink
    with FileLock(lock_file, timeout=AT_ONCE), FileLock(lock_file) as lock:
        assert lock.held
        assert is_held(lock_file)


@pytest.mark.parametrize(
    "step", [f"{locks.__name__}.create_descriptor", f"{locks.__name__}.inspect_file", "fcntl.flock"]
)
def test_file_removed_during_acquire_is_created_again(
    lock_file: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """If another program removes the lock file after any step of an attempt, the lock is taken on a new file."""
    make(lock_file, b"")
    real = resolve_name(step)

    def remove(*arguments: Any, **options: Any) -> Any:
        monkeypatch.setattr(step, real)
        result = real(*arguments, **options)
        lock_file.unlink()
        return result

    monkeypatch.setattr(step, remove)
    with FileLock(lock_file):
        assert is_held(lock_file)


def test_file_system_without_locks_is_refused(lock_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the file system has no locks, the error says so, without a wait."""

    def fail(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", fail)
    lock = FileLock(lock_file)
    with pytest.raises(DatabaseError, match="can't lock") as refusal:
        lock.acquire()
    assert not isinstance(refusal.value, DatabaseBusyError)
    assert not lock.held


@pytest.mark.parametrize("mode", [0o666, 0o000])
def test_mode_of_the_lock_file_is_repaired(lock_file: Path, mode: int) -> None:
    """If the lock file's mode is too loose or too strict, it becomes 0600, so that only its owner can hold it."""
    make(lock_file, b"", mode)
    with FileLock(lock_file, timeout=AT_ONCE):
        assert mode_of(lock_file) == 0o600


def test_marker_is_found_by_the_next_holder(lock_file: Path) -> None:
    """A new lock file has no marker. A marker replaces a shorter or longer one, and each later holder reads it."""
    with FileLock(lock_file) as lock:
        assert lock.read_marker() is None
        for text in ("x", "a longer text", "initialised é"):
            lock.write_marker(text)
            assert lock.read_marker() == text
    assert lock_file.read_text() == "initialised é\n"
    with FileLock(lock_file, shared=True) as lock:
        assert lock.read_marker() == "initialised é"
    assert mode_of(lock_file) == 0o600


@pytest.mark.parametrize(
    ("content", "found"), [(b"new\nd of an older text\n", "new"), (b"\xff\xfe", "\N{REPLACEMENT CHARACTER}" * 2)]
)
def test_marker_of_a_power_cut(lock_file: Path, content: bytes, found: str) -> None:
    """A marker can be read before the rest of an older text is cut off; damaged bytes still count as a marker."""
    make(lock_file, content)
    with FileLock(lock_file) as lock:
        assert lock.read_marker() == found


def test_marker_on_a_full_disk(lock_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the disk stores only half of a marker, DiskFullError is raised."""
    write = os.write
    with FileLock(lock_file) as lock:
        monkeypatch.setattr(os, "write", lambda descriptor, content: write(descriptor, content[:2]))
        with pytest.raises(DiskFullError, match="free some space"):
            lock.write_marker("text")
