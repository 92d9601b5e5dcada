"""Find committed transactions that are lost from a write-ahead log (WAL).

SQLite treats the first WAL frame with a wrong checksum as the end of the WAL. This rule discards a commit that a crash
interrupted. But if the WAL was damaged or truncated later, SQLite silently discards complete commits
(https://sqlite.org/fileformat2.html#walformat, section 4.2). Two traces of lost commits remain: later frames that end a
commit, and the WAL index (-shm), which a killed process leaves behind with the number of committed frames
(https://sqlite.org/walformat.html#the_wal_index_file_format, section 2.1).

No process, including this process, may have the database open: closing the index would drop this process's locks.
"""

from __future__ import annotations

import os
import shutil
import struct
import sys
import tempfile
from contextlib import closing
from pathlib import Path
from typing import BinaryIO, NamedTuple

import apsw

from homeagent.engine.driver_errors import sqlite_error, translated
from homeagent.engine.files.database_file import OPEN_FLAGS, SMALLEST_DATABASE, sidecars
from homeagent.engine.files.directories import find_temporary_directory
from homeagent.engine.files.system_errors import explained
from homeagent.engine.sqlite.dialect import DRIVER_ERRORS, connect

__all__ = ["LostCommits", "find_lost_commits", "has_frames"]

_HEADER = 32
_FRAME_HEADER = 24
_MAGIC = {0x377F0682: "little", 0x377F0683: "big"}  # which order the checksums read their words in
_SMALLEST_LOG = _HEADER + _FRAME_HEADER + SMALLEST_DATABASE  # with one frame of the smallest page
_INDEX_HEADER = 48
_INDEX = 2 * _INDEX_HEADER + 40
_INDEX_VERSION = 3007000

# Upper limit of WAL restarts before the kernel writes the index to the disk, which takes the kernel half a minute. The
# first salt is random: the WAL of another database passes for a restarted WAL with a chance of 1 in 65,536.
_MOST_RESTARTS = 2**16


class LostCommits(NamedTuple):
    """Damage of a WAL.

    Attributes:
        problem: description without a remedy.
        frames: number of frames that SQLite would still read.
        by_power_cut: whether a power cut at durability `normal` can be the cause.
    """

    problem: str
    frames: int
    by_power_cut: bool


class _Index(NamedTuple):
    committed: int
    moved: int
    salt: bytes


def has_frames(path: Path) -> bool:
    """Return whether SQLite would read a frame of this database's WAL. Other connections may be open.

    A process that is killed in its first commit leaves only a header; a full disk may leave a part of a header. SQLite
    ignores such a WAL, except in the only connection, with `readonly_shm=1`: if the WAL is at least as long as a header
    and has no sound header followed by more bytes, the connection fails with SQLITE_PROTOCOL after 10 seconds.
    """
    log = sidecars(path)[0]
    with explained("read", log):
        try:
            descriptor = os.open(log, os.O_RDONLY | OPEN_FLAGS)
        except FileNotFoundError:
            return False
        with os.fdopen(descriptor, "rb") as file:
            return os.fstat(descriptor).st_size >= _SMALLEST_LOG and _page_size(file.read(_HEADER)) is not None


def find_lost_commits(path: Path) -> LostCommits | None:
    """Find commits that SQLite would silently discard on opening this database. Return None if none is found.

    Without the WAL index, damage in the last commit is not found: the commit looks as if a power cut had interrupted
    COMMIT. No process may have the database open.

    Raises:
        DatabaseError: a file can't be read, or the WAL can't be copied.
        CorruptDatabaseError: the WAL is sound, but contains an invalid first page of the database.
    """
    log, index = sidecars(path)[:2]
    known = _read_index(index)
    with explained("read", log):
        try:
            descriptor = os.open(log, os.O_RDONLY | OPEN_FLAGS)
        except FileNotFoundError:
            return _judged(known, _Log(0, 0, None, exists=False))
        with os.fdopen(descriptor, "rb") as file:
            return _judged(known, _Log.read(file, log))


class _Log(NamedTuple):
    committed: int  # frames up to the last sound commit
    later_commits: int  # ends of commits further on that belong to this log all the same
    salt: bytes | None  # None where there is no sound header
    exists: bool = True
    is_blank: bool = False  # too short for a frame, or only zeros: a power cut leaves zeros instead of unwritten bytes

    @classmethod
    def read(cls, file: BinaryIO, path: Path) -> _Log:
        length = os.fstat(file.fileno()).st_size
        header = file.read(_HEADER)
        size = _page_size(header)
        if size is None:
            blank = not any(header)
            while blank and (rest := file.read(1 << 20)):
                blank = not any(rest)
            return cls(0, 0, None, is_blank=blank or length < _SMALLEST_LOG)
        salt = header[16:24]
        committed = _recovered(path, page_size=size)
        frame = _FRAME_HEADER + size
        later = 0
        for place in range(_HEADER + committed * frame, length - frame + 1, frame):
            file.seek(place)
            _, size_after, its_salt = struct.unpack(">II8s", file.read(16))
            later += its_salt == salt and size_after > 0
        return cls(committed, later, salt)


def _recovered(log: Path, *, page_size: int) -> int:
    """Return the number of frames that SQLite recovers from a copy of the WAL, next to an empty database.

    Do not use a copy of the database: its header may be damaged, and SQLite would replay its rollback journal. If no
    directory for temporary files is writable, as in a container, the copy is made next to the WAL.
    """
    parent = find_temporary_directory() or log.parent
    with (
        explained(f"make a copy in {parent} of", log),
        tempfile.TemporaryDirectory(prefix="homeagent-", dir=parent) as folder,
        translated(DRIVER_ERRORS, sqlite_error),
    ):
        copy = Path(folder) / "copy"
        with closing(connect(str(copy))) as raw:
            raw.execute(f"PRAGMA page_size={page_size}; PRAGMA synchronous=OFF; PRAGMA journal_mode=WAL")
        shutil.copyfile(log, sidecars(copy)[0])
        with closing(connect(str(copy))) as raw:
            raw.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
            raw.execute("PRAGMA schema_version")  # the first read recovers
            return int(raw.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_NOOP)[0])


def _page_size(header: bytes) -> int | None:
    """Return the page size in a WAL header, or None if the header is not sound."""
    if len(header) < _HEADER:
        return None
    magic, version, page_size, _, *_, first, second = struct.unpack(">8I", header)
    order = _MAGIC.get(magic)
    size = 65536 if page_size == 1 else page_size
    if order is None or version != _INDEX_VERSION or not SMALLEST_DATABASE <= size <= 65536:
        return None
    return size if _checksum(header[:24], order) == (first, second) else None


def _judged(index: _Index | None, log: _Log) -> LostCommits | None:
    if index is not None and index.committed > index.moved:
        # Frames that were committed and not checkpointed exist only in the WAL.
        if log.salt is None:
            what = "is missing" if not log.exists else "can't be read as one"
            return LostCommits(
                f"the log of {index.committed} frames {what}", 0, by_power_cut=log.is_blank or not log.exists
            )
        if log.salt != index.salt and not _is_later(log.salt, than=index.salt):
            return LostCommits("the log and its index are not of one database and time", log.committed, False)
        if log.salt == index.salt and log.committed < index.committed:
            return LostCommits(
                f"the log is sound for {log.committed} frames only, and {index.committed} were committed",
                log.committed,
                by_power_cut=True,
            )
    if log.salt is None:
        # SQLite writes the header first. A power cut does not split the header, which is smaller than any sector.
        return None if log.is_blank or not log.exists else LostCommits("the log has no sound header", 0, False)
    # A power cut can leave one unfinished commit whose last frame reached the disk before its first frame.
    if log.later_commits > 1:
        return LostCommits(
            f"the log is damaged after {log.committed} frames, and {log.later_commits} commits follow",
            log.committed,
            by_power_cut=True,
        )
    return None


def _is_later(salt: bytes, *, than: bytes) -> bool:
    """Return whether the WAL was restarted after its index was last written to the disk.

    Only a power cut leaves an older index, because SQLite does not sync the index. A restart follows a complete, synced
    checkpoint and increments the first salt (https://sqlite.org/fileformat2.html#walformat).
    """
    return 0 < (int.from_bytes(salt[:4], "big") - int.from_bytes(than[:4], "big")) % 2**32 < _MOST_RESTARTS


def _read_index(index: Path) -> _Index | None:
    """Return the content of the WAL index; None if the index is missing or invalid."""
    with explained("read", index):
        try:
            descriptor = os.open(index, os.O_RDONLY | OPEN_FLAGS)
        except FileNotFoundError:
            return None
        with os.fdopen(descriptor, "rb") as file:
            content = file.read(_INDEX)
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


def _checksum(content: bytes, order: str) -> tuple[int, int]:
    """Return SQLite's checksum of a WAL or WAL index. The length must be a multiple of eight bytes."""
    first = second = 0
    words = iter(struct.unpack(f"{'<' if order == 'little' else '>'}{len(content) // 4}I", content))
    for one, other in zip(words, words, strict=True):
        first = (first + one + second) & 0xFFFFFFFF
        second = (second + other + first) & 0xFFFFFFFF
    return first, second
