"""Whether a write-ahead log that was left behind holds all that was committed to it.

SQLite has checksums in its log, and takes the first frame whose checksum is wrong for the log's end: that is how a
commit that a crash cut off is undone. It does the same where the log was damaged or cut later, and then whole commits
are gone without a word (https://sqlite.org/fileformat2.html#walformat, section 4.2). Two things still tell of them:
later frames that end a commit, and the log's index (-shm), which a killed process leaves behind with the number of
frames that were committed (https://sqlite.org/walformat.html#the_wal_index_file_format, section 2.1).

Nobody may have the database open, this process included: the index is locked by those who do, and a process that
closes it loses its locks.
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

# How often a log is begun anew at most before the kernel writes the index to the disk, which takes it half a minute.
# The first salt of a new log is random: another database's passes for a later one of this with a chance of 1 in 65,536.
_MOST_RESTARTS = 2**16


class LostCommits(NamedTuple):
    """What is wrong with a log.

    Attributes:
        problem: in words, without a remedy.
        frames: how many frames SQLite would still read.
        by_power_cut: whether a power cut may have done it to a database that was opened with durability `normal`.
    """

    problem: str
    frames: int
    by_power_cut: bool


class _Index(NamedTuple):
    committed: int
    moved: int
    salt: bytes


def has_frames(path: Path) -> bool:
    """Tell whether SQLite would read any frame of this database's write-ahead log.

    A process that is killed in its first commit leaves a header alone, and a full disk may leave a part of a header.
    SQLite ignores such a log. But a connection with `readonly_shm=1` fails with SQLITE_PROTOCOL after 10 seconds if the
    log is at least as long as a header, without a sound header followed by more bytes, and no other connection is open.

    Args:
        path: the database file. Other connections may be open.

    Raises:
        DatabaseError: the log can't be read.
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
    """Look for commits that SQLite would drop without a word when it opens this database.

    One commit at the end of the log whose last frames are damaged can't be told from one that a power cut interrupted
    before it was acknowledged, unless the log's index is there to tell.

    Args:
        path: the database file, which nobody has open.

    Returns:
        None where all that was committed is there, as far as can be known.

    Raises:
        DatabaseError: a file can't be read, or the log can't be copied.
        CorruptDatabaseError: the log is sound, and what it says is the database's first page is none.
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
    """Return how many frames of a log SQLite recovers: have it recover a copy, beside an empty database.

    The header of the real database may be damaged, and SQLite would undo what is in its rollback journal. The copy is
    in the directory for temporary files. A container may have none that can be written: then it is next to the log.
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
    """Return the page size that a log's header tells, or None if the header is not sound."""
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
        # What was committed and not yet moved into the database is in the log alone.
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
        # A header is written before anything else, and never torn: it is smaller than any sector.
        return None if log.is_blank or not log.exists else LostCommits("the log has no sound header", 0, False)
    # One commit may have been under way when the power failed, with its last frame on the disk before its first.
    if log.later_commits > 1:
        return LostCommits(
            f"the log is damaged after {log.committed} frames, and {log.later_commits} commits follow",
            log.committed,
            by_power_cut=True,
        )
    return None


def _is_later(salt: bytes, *, than: bytes) -> bool:
    """Tell whether a log was begun anew since its index was written to the disk.

    Only a power cut leaves the two so: nobody syncs the index. A log is begun anew once all of it was moved into the
    database and synced there, and its first salt is then one more (https://sqlite.org/fileformat2.html#walformat).
    """
    return 0 < (int.from_bytes(salt[:4], "big") - int.from_bytes(than[:4], "big")) % 2**32 < _MOST_RESTARTS


def _read_index(index: Path) -> _Index | None:
    """Return what the log's index says, None where there is none that can be believed."""
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
    """Return the checksum that SQLite has in a log and in its index, of a multiple of eight bytes."""
    first = second = 0
    words = iter(struct.unpack(f"{'<' if order == 'little' else '>'}{len(content) // 4}I", content))
    for one, other in zip(words, words, strict=True):
        first = (first + one + second) & 0xFFFFFFFF
        second = (second + other + first) & 0xFFFFFFFF
    return first, second
