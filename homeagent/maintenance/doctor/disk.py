"""What can be told of a SQLite file without opening it: names, owners, modes, leftovers, file system, free space.

Everything is told by `lstat`. To open the file would be the wrong thing to do where SQLite has it open, see
`homeagent.engine.disk.files`.
"""

from __future__ import annotations

import os
import shlex
import shutil
import stat
import sys
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from homeagent.engine.disk.files import sidecars
from homeagent.engine.disk.filesystems import filesystem_kind, is_network_filesystem
from homeagent.engine.disk.owners import backup_owners, is_replaceable, trusted_owners
from homeagent.engine.disk.privacy import unguarded
from homeagent.engine.sqlite.manifests import remembered_backup
from homeagent.maintenance.doctor.chart import Chart

__all__ = ["STALE", "check_disk", "check_wal_size", "loose_files", "our_files", "stale_partials"]

STALE = timedelta(days=1)
"""After this long nobody is still writing a .partial file."""

ROOM = 64 * 1024 * 1024
"""What must be free beside a second copy of the database: its log may grow to this."""

SCARCE = 16 * 1024 * 1024
"""With less free space than this, the next burst of writes may fail."""

WAL_LIMIT = 64 * 1024 * 1024
"""The log is cut to this size after each checkpoint: `journal_size_limit`."""

_FLEETING = frozenset({"ramfs", "tmpfs"})


def our_files(path: Path) -> list[Path]:
    """Return what there is of a database: the file, what SQLite keeps beside it, its lock, its copies, its notes."""
    own = {path, *sidecars(path)}
    try:
        beside = list(path.parent.iterdir())
    except OSError:
        return []  # told by the check of the directory
    return sorted(entry for entry in beside if entry in own or entry.name.removeprefix(".").startswith(f"{path.name}."))


def loose_files(path: Path) -> list[Path]:
    """Return our own regular files beside `path` that others may read or write."""
    if sys.platform == "win32":
        return []
    loose = []
    for file in our_files(path):
        status = _lstat(file)
        if status is not None and _is_plain(status) and status.st_uid == os.geteuid() and status.st_mode & 0o177:
            loose.append(file)
    return loose


def stale_partials(path: Path, now: datetime) -> list[Path]:
    """Return the files that were being written when their writer died, over a day ago."""
    return [
        file
        for file in our_files(path)
        if file.suffix == ".partial"
        and (status := _lstat(file)) is not None
        and stat.S_ISREG(status.st_mode)
        and status.st_mtime < (now - STALE).timestamp()
    ]


def check_disk(chart: Chart, path: Path) -> None:
    """Make all checks that need no look into the file."""
    _check_directory(chart, path.parent)
    files = {file: status for file in our_files(path) if (status := _lstat(file)) is not None}
    _check_names(chart, files)
    if sys.platform == "win32":
        chart.skip(str(unguarded()), "file_owners", "file_modes")
    else:
        with chart.attempt("file_owners"):
            _check_owners(chart, path, files)
        _check_modes(chart, files)
    _check_stale(chart, path)
    with chart.attempt("filesystem"):
        _check_filesystem(chart, path)
    _check_space(chart, path, files)


def _check_directory(chart: Chart, directory: Path) -> None:
    named = shlex.quote(str(directory))
    try:
        status = directory.stat()
    except FileNotFoundError:
        chart.skip("there is no such directory", "directory")
        return
    except OSError as error:
        chart.alarm(
            "directory",
            f"The directory {str(directory)!r} can't be looked into.",
            meaning=os.strerror(error.errno or 0),
            remedy="make it, or mend its owner and mode",
            command=f"ls -ld {named}",
        )
        return
    mode = stat.S_IMODE(status.st_mode)
    if sys.platform == "win32":
        chart.ok("directory", f"The directory is {str(directory)!r}.")
        return
    facts: dict[str, Any] = {"mode": f"{mode:04o}", "uid": status.st_uid}
    if status.st_uid not in (0, os.geteuid()) and os.geteuid() != 0:
        chart.alarm(
            "directory",
            f"The directory {str(directory)!r} belongs to user {status.st_uid}.",
            meaning="that user can replace the database",
            remedy="keep it in a directory of your own",
            **facts,
        )
    elif is_replaceable(status):
        chart.alarm(
            "directory",
            f"The directory {str(directory)!r} has mode {mode:04o}.",
            meaning="others can replace the database",
            remedy="take the right to write from them",
            command=f"chmod go-w {named}",
            **facts,
        )
    elif mode & 0o022:
        chart.warn(
            "directory",
            f"The directory {str(directory)!r} has mode {mode:04o}.",
            meaning="others can put files next to the database; the store refuses those that it finds there",
            remedy="keep the database in a directory of your own",
            command=f"ls -l {named}",
            **facts,
        )
    else:
        chart.ok("directory", f"Nobody else can write to the directory {str(directory)!r}.", **facts)


def _check_names(chart: Chart, files: dict[Path, os.stat_result]) -> None:
    for file, status in files.items():
        named = shlex.quote(str(file))
        if stat.S_ISLNK(status.st_mode):
            chart.alarm(
                "file_names",
                f"{str(file)!r} is a symbolic link.",
                meaning="who can change the link decides which file is used; the store refuses it",
                remedy="name the file itself, or put it in the place of the link",
                command=f"readlink {named}",
            )
            return
        if not stat.S_ISREG(status.st_mode):
            chart.alarm(
                "file_names",
                f"{str(file)!r} is no regular file.",
                meaning="the store refuses it",
                remedy="name a regular file",
                command=f"ls -ld {named}",
            )
            return
        if status.st_nlink > 1:
            chart.alarm(
                "file_names",
                f"{str(file)!r} has {status.st_nlink} names (hard links).",
                meaning="under its other name it has other files beside it, and a log that is not replayed",
                remedy="remove the other names",
                command=f"find {shlex.quote(str(file.parent))} -xdev -inum {status.st_ino}",
                names=status.st_nlink,
            )
            return
    chart.ok("file_names", "Every file has one name and is no link.", files=len(files))


def _check_owners(chart: Chart, path: Path, files: dict[Path, os.stat_result]) -> None:
    main = files.get(path)
    if main is None:
        chart.skip("there is no database file", "file_owners")
        return
    if main.st_uid not in trusted_owners(path.parent):
        chart.alarm(
            "file_owners",
            f"The database belongs to user {main.st_uid}, and you are {os.geteuid()}.",
            meaning="the store refuses a file of another user",
            remedy="run as its owner",
            uid=main.st_uid,
        )
        return
    planted = _planted(path, files)
    if planted:
        chart.alarm(
            "file_owners",
            f"Files of a database that another user put there: {len(planted)}, such as {str(planted[0])!r}.",
            meaning="what is in them is that user's choice; the store refuses them, and does not count them as backups",
            remedy="find out where they are from; remove them, or chown those that you know to be sound",
            command=f"ls -l {' '.join(shlex.quote(str(file)) for file in planted)}",
            files=len(planted),
            uid=main.st_uid,
        )
        return
    others = [file for file, status in files.items() if status.st_uid != main.st_uid]
    if others:
        chart.alarm(
            "file_owners",
            f"Files beside the database that belong to another user: {len(others)}, such as {others[0].name!r}.",
            meaning="the gateway can't open them: a command was probably run as another user, such as root",
            remedy="give them to the owner of the database",
            command=f"chown {main.st_uid}:{main.st_gid} {' '.join(shlex.quote(str(file)) for file in others)}",
            files=len(others),
            uid=main.st_uid,
        )
        return
    chart.ok("file_owners", f"All files belong to user {main.st_uid}.", uid=main.st_uid)


def _planted(path: Path, files: dict[Path, os.stat_result]) -> list[Path]:
    """Return the files of a database, and those of its name where the last backup went, that another user put there."""
    owners = backup_owners(path)
    last = remembered_backup(path)
    if last is not None and last.parent != path.parent:
        elsewhere = our_files(last.parent / path.name)
        files = files | {file: status for file in elsewhere if (status := _lstat(file)) is not None}
    return [file for file, status in files.items() if status.st_uid not in owners]


def _check_modes(chart: Chart, files: dict[Path, os.stat_result]) -> None:
    regular = {file: stat.S_IMODE(status.st_mode) for file, status in files.items() if stat.S_ISREG(status.st_mode)}
    loose = {file: mode for file, mode in regular.items() if mode & 0o177}
    if not loose:
        chart.ok("file_modes", "Only their owner can use the files.", files=len(regular))
        return
    file, mode = max(loose.items(), key=lambda item: (item[1] & 0o022 != 0, item[1]))
    summary = f"Files with a mode looser than 0600: {len(loose)}, such as {file.name!r} with {mode:04o}."
    command = f"chmod 600 {' '.join(shlex.quote(str(file)) for file in loose)}"
    if any(mode & 0o022 for mode in loose.values()):
        chart.alarm(
            "file_modes",
            summary,
            meaning="others can write there, and so let anybody in",
            remedy="take the rights from them; then see which devices are approved",
            command=command,
            files=len(loose),
        )
    else:
        chart.warn(
            "file_modes",
            summary,
            meaning="others can read every device, session and stored result",
            remedy="take the rights from them; 'homeagent doctor --fix' does it too",
            command=command,
            files=len(loose),
        )


def _check_stale(chart: Chart, path: Path) -> None:
    partial = stale_partials(path, chart.now)
    if not partial:
        chart.ok("stale_files", "Nothing was left behind.", files=0)
        return
    chart.warn(
        "stale_files",
        f"Files that were being written when their writer died: {len(partial)}, such as {partial[0].name!r}.",
        meaning="they hold half a copy each, which is of no use, and take up space",
        remedy="remove them",
        command="homeagent doctor --fix",
        files=len(partial),
        bytes=sum(status.st_size for file in partial if (status := _lstat(file)) is not None),
    )


def _check_filesystem(chart: Chart, path: Path) -> None:
    kind = filesystem_kind(path)
    if kind is None:
        chart.ok("filesystem", "The kind of the file system can't be told here.", kind=None)
    elif is_network_filesystem(kind):
        chart.alarm(
            "filesystem",
            f"The database is on a network file system or shared folder ({kind}).",
            meaning="SQLite's write-ahead log can corrupt it there (https://sqlite.org/wal.html)",
            remedy="move it to a local disk, in a container to a named volume, or use PostgreSQL",
            kind=kind,
        )
    elif kind in _FLEETING:
        chart.warn(
            "filesystem",
            f"The database is in memory ({kind}).",
            meaning="at the next restart every device, revocation and nonce is gone",
            remedy="move it to a disk",
            kind=kind,
        )
    else:
        chart.ok("filesystem", f"The file system is {kind}.", kind=kind)


def _check_space(chart: Chart, path: Path, files: dict[Path, os.stat_result]) -> None:
    try:
        free = shutil.disk_usage(path.parent).free
    except OSError as error:
        chart.skip(os.strerror(error.errno or 0), "disk_space")
        return
    size = sum(status.st_size for file, status in files.items() if file in (path, *sidecars(path)))
    needed = size + ROOM
    if free >= needed:
        chart.ok("disk_space", f"{megabytes(free)} are free.", free_bytes=free, database_bytes=size)
        return
    tell = chart.warn if free >= SCARCE else chart.alarm
    tell(
        "disk_space",
        f"Only {megabytes(free)} are free beside {megabytes(size)} of database.",
        meaning="there is no room for a backup, without which nothing is upgraded"
        if free >= SCARCE
        else "writes are about to fail, and with them every request that needs one",
        remedy=f"free {megabytes(needed - free)} or more",
        command=f"df -h {shlex.quote(str(path.parent))}",
        free_bytes=free,
        database_bytes=size,
    )


def check_wal_size(chart: Chart, path: Path) -> None:
    """Look at the size of the write-ahead log."""
    status = _lstat(sidecars(path)[0])
    size = 0 if status is None else status.st_size
    if size <= WAL_LIMIT:
        chart.ok("wal_size", f"The write-ahead log has {megabytes(size)}.", wal_bytes=size)
        return
    chart.warn(
        "wal_size",
        f"The write-ahead log has {megabytes(size)}.",
        meaning="a reader holds its snapshot open, or the log was never moved into the file: reads get slow",
        remedy="end long read-only units; then move the log into the file",
        command="homeagent doctor --fix",
        wal_bytes=size,
    )


def megabytes(size: int) -> str:
    """Return a size as one reads it."""
    return f"{size / 1024 / 1024:,.1f} MiB"


def _lstat(path: Path) -> os.stat_result | None:
    try:
        return os.lstat(path)
    except OSError:
        return None


def _is_plain(status: os.stat_result) -> bool:
    return stat.S_ISREG(status.st_mode) and status.st_nlink == 1
