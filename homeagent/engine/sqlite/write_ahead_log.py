"""Find lost commits in a WAL. For SQLite, a WAL ends at the first frame with a wrong checksum
(https://sqlite.org/fileformat2.html#walformat, section 4.2). SQLite silently discards the later commits. No process of
homeagent may have the database open. Reading the WAL index would release the SQLite locks of this process.
"""

from __future__ import annotations

import os
import struct
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

import apsw

from homeagent.engine.driver_errors import sqlite_error, translated
from homeagent.engine.files.database_file import (
    OPEN_FLAGS,
    SMALLEST_DATABASE,
    look_at,
    refuse_orphaned_log,
    sidecars,
    size_of,
)
from homeagent.engine.files.system_errors import explained
from homeagent.engine.sqlite.dialect import DRIVER_ERRORS, Connection, open_existing

_HEADER = 32
_FRAME_HEADER = 24
_MAGIC = {0x377F0682: "little", 0x377F0683: "big"}  # Byte order for calculating the checksum.
_SMALLEST_LOG = _HEADER + _FRAME_HEADER + SMALLEST_DATABASE  # Size of a WAL with one frame of the smallest page.
_INDEX_HEADER = 48
_INDEX = 2 * _INDEX_HEADER + 40
_INDEX_VERSION = 3007000

# The kernel writes the WAL index to the disk within half a minute. In half a minute, the WAL restarts at most 65,536
# times. A new WAL has a random number (salt). Each restart increments the salt.
_MOST_RESTARTS = 2**16


class LostCommits(NamedTuple):
    """Lost commits in a WAL. If `by_power_cut` is True, a power cut can be the cause."""

    problem: str
    by_power_cut: bool


class _Index(NamedTuple):
    committed: int
    moved: int
    salt: bytes


def has_frames(path: Path) -> bool:
    """Return whether SQLite would read a frame of this database's WAL. The caller may have the database open. Without
    frames, a connection with `readonly_shm=1` fails after 10 seconds (SQLITE_PROTOCOL).
    """
    log = sidecars(path)[0]
    return size_of(log) >= _SMALLEST_LOG and _page_size(read_start(log, _HEADER)) is not None


def read_start(path: Path, size: int) -> bytes:
    """Return a file's first bytes. If the file does not exist, return no bytes. Do not read the database file or WAL
    index of an open connection. Closing the file would drop SQLite's locks.
    """
    with explained("read", path), suppress(FileNotFoundError), _opened(path) as file:
        return file.read(size)
    return b""


def _opened(path: Path) -> BinaryIO:
    """Open a file for reading. Raise OSError if the path is a symbolic link."""
    return os.fdopen(os.open(path, os.O_RDONLY | OPEN_FLAGS), "rb")


@contextmanager
def open_without_locks(path: Path) -> Iterator[Connection]:
    """Open a database for reading, without locks and without changing a file. In exclusive locking mode, SQLite ignores
    an old WAL index (https://sqlite.org/wal.html#noshm). If the database has no WAL, do not read from the connection.
    SQLite would create a WAL.
    """
    refuse_orphaned_log(path)
    with translated(DRIVER_ERRORS, sqlite_error), closing(open_existing(path, "mode=ro&vfs=unix-none")) as raw:
        raw.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
        raw.execute("PRAGMA locking_mode=EXCLUSIVE; PRAGMA trusted_schema=OFF")
        yield raw


def find_lost_commits(path: Path, raw: Connection) -> LostCommits | None:
    """Describe the commits that SQLite would silently discard, or return None. The argument `raw=` must be a connection
    from `open_without_locks()`. A power cut during COMMIT can damage the last commit. If the WAL index is missing, do
    not report a damaged last commit.
    """
    log, index = sidecars(path)[:2]
    known, found = _read_index(index), _Log()
    with explained("read", log), suppress(FileNotFoundError), _opened(log) as file:
        found = _read_log(file, raw)
    return _judged(known, found, "is missing" if look_at(log) is None else "can't be read as one")


class _Log(NamedTuple):
    salt: bytes | None = None  # None if the WAL has no valid header.
    committed: int = 0  # Number of frames up to the last intact commit.
    later_commits: int = 0  # Number of commits after the last intact commit.
    is_blank: bool = True  # True if the WAL is missing, too short, or full of zeros.


def _read_log(file: BinaryIO, raw: Connection) -> _Log:
    length = os.fstat(file.fileno()).st_size
    header = file.read(_HEADER)
    size = _page_size(header)
    if size is None:
        blank = not any(header)
        while blank and (rest := file.read(1 << 20)):
            blank = not any(rest)
        return _Log(is_blank=blank or length < _SMALLEST_LOG)
    salt = header[16:24]
    if length < _SMALLEST_LOG:
        return _Log(salt)
    raw.execute("PRAGMA schema_version")  # SQLite recovers the frames of the WAL at the first read
    committed = raw.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_NOOP)[0]
    frame = _FRAME_HEADER + size
    later = 0
    for place in range(_HEADER + committed * frame, length - frame + 1, frame):
        file.seek(place)
        _, size_after, its_salt = struct.unpack(">II8s", file.read(16))
        later += its_salt == salt and size_after > 0
    return _Log(salt, committed, later)


def _page_size(header: bytes) -> int | None:
    """Return a WAL's page size, or None for an invalid header."""
    if len(header) < _HEADER:
        return None
    magic, version, page_size, _, *_, first, second = struct.unpack(">8I", header)
    order = _MAGIC.get(magic)
    size = 65536 if page_size == 1 else page_size
    if order is None or version != _INDEX_VERSION or not SMALLEST_DATABASE <= size <= 65536:
        return None
    return size if _checksum(header[:24], order) == (first, second) else None


def _judged(index: _Index | None, log: _Log, state: str) -> LostCommits | None:
    if index is not None and index.committed > index.moved:
        # The committed frames after the last checkpoint exist only in the WAL.
        if log.salt is None:
            return LostCommits(f"the log of {index.committed} frames {state}", by_power_cut=log.is_blank)
        if log.salt != index.salt and not _is_later(log.salt, than=index.salt):
            return LostCommits("the log and its index are not of one database and time", by_power_cut=False)
        if log.salt == index.salt and log.committed < index.committed:
            problem = f"the log is sound for {log.committed} frames only, and {index.committed} were committed"
            return LostCommits(problem, by_power_cut=True)
    if log.salt is None:
        # SQLite writes the WAL's header before the frames. A power cut can't split the header, which fits in one
        # sector.
        return None if log.is_blank else LostCommits("the log has no sound header", by_power_cut=False)
    # If only one commit follows the damage, report no loss. After a power cut, an unfinished commit can lack its first
    # frame.
    if log.later_commits > 1:
        problem = f"the log is damaged after {log.committed} frames, and {log.later_commits} commits follow"
        return LostCommits(problem, by_power_cut=True)
    return None


def _is_later(salt: bytes, *, than: bytes) -> bool:
    """Return True if the WAL is newer than its index. A restart increments the first salt
    (https://sqlite.org/fileformat2.html#walformat).
    """
    return 0 < (int.from_bytes(salt[:4], "big") - int.from_bytes(than[:4], "big")) % 2**32 < _MOST_RESTARTS


def _read_index(index: Path) -> _Index | None:
    content = read_start(index, _INDEX)
    header = content[:_INDEX_HEADER]
    if len(content) < _INDEX or header != content[_INDEX_HEADER : 2 * _INDEX_HEADER]:
        return None
    version, _, _, initialised, _, _, frames = struct.unpack("=IIIBBHI", header[:20])
    if version != _INDEX_VERSION or not initialised:
        return None
    if _checksum(header[:40], sys.byteorder) != struct.unpack("=2I", header[40:48]):
        return None
    (moved,) = struct.unpack("=I", content[2 * _INDEX_HEADER : 2 * _INDEX_HEADER + 4])
    return _Index(committed=frames, moved=moved, salt=header[32:40])


def _checksum(content: bytes, order: str, first: int = 0, second: int = 0) -> tuple[int, int]:
    """Return SQLite's checksum of a WAL or WAL index. The length must be a multiple of eight bytes."""
    words = iter(struct.unpack(f"{'<' if order == 'little' else '>'}{len(content) // 4}I", content))
    for one, other in zip(words, words, strict=True):
        first = (first + one + second) & 0xFFFFFFFF
        second = (second + other + first) & 0xFFFFFFFF
    return first, second
