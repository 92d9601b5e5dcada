"""Check the files, backups and free space of a SQLite database.

Do not open the database file here: use `lstat`. Closing the file would release SQLite's locks (see
`homeagent.engine.files.database_file`).
"""

from __future__ import annotations

import os
import shlex
import shutil
import stat
from collections.abc import Iterable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

from homeagent.engine.files.database_file import look_at, refuse_insecure, sidecars
from homeagent.engine.files.filesystems import filesystem_kind, is_network_filesystem
from homeagent.engine.files.owners import backup_owners, is_replaceable, trusted_owners
from homeagent.engine.files.system_errors import explained
from homeagent.engine.sqlite.manifests import newest_backup, read_manifest, remembered_backup
from homeagent.errors import HomeAgentError
from homeagent.maintenance.doctor.report import Collector

OLD_BACKUP = timedelta(days=7)
WAL_RESERVE = 64 * 1024 * 1024  # The required free space is the database's size plus this reserve for the WAL.
SCARCE = 16 * 1024 * 1024  # With less free space, the next writes can fail.

Files = dict[Path, os.stat_result]


def database_files(path: Path) -> Files:
    """Return a database's existing files, including lock files, backups and manifests."""
    own = {path, *sidecars(path)}
    found = {}
    with suppress(OSError):  # the check `"database"` reports a file that cannot be read
        for entry in sorted(path.parent.iterdir()):
            if entry in own or entry.name.removeprefix(".").startswith(f"{path.name}."):
                with suppress(FileNotFoundError):
                    found[entry] = entry.lstat()
    return found


def is_public(status: os.stat_result) -> bool:
    """Return whether the mode of a regular file allows more than 0600."""
    return stat.S_ISREG(status.st_mode) and status.st_mode & 0o177 != 0


def check_files(collector: Collector, path: Path) -> bool:
    """Run all checks that do not open the database. Return True if the doctor is allowed to open the database."""
    files = database_files(path)
    may_open = False
    with collector.attempt("backup"):
        _check_backup(collector, path)
    with collector.attempt("files"):
        may_open = _check_owners(collector, path, files)
        _check_modes(collector, files)
    with collector.attempt("filesystem"):
        _check_filesystem(collector, path)
    with collector.attempt("directory"), explained("inspect", path.parent):
        if look_at(path.parent) is None:
            collector.skip("the directory does not exist", "directory", "disk_space")
            return may_open
        _check_directory(collector, path.parent)
    with collector.attempt("disk_space"), explained("measure the free space of", path.parent):
        _check_space(collector, path, files)
    return may_open


def _check_directory(collector: Collector, directory: Path) -> None:
    named = shlex.quote(str(directory))
    status = directory.stat()
    mode = f"{stat.S_IMODE(status.st_mode):04o}"
    summary = f"The directory {str(directory)!r} belongs to user {status.st_uid} and has mode {mode}."
    foreign = os.geteuid() != 0 and status.st_uid not in (0, os.geteuid())
    critical = foreign or is_replaceable(status)
    meaning = "other users can put files next to the database; homeagent refuses such files"
    if critical:
        meaning = "other users can replace the database"
    remedy = "keep the database in your own directory, in which no other user can write"
    # Do not suggest another mode for a sticky directory, such as /tmp.
    command = f"chmod go-w {named}" if is_replaceable(status) else f"ls -ld {named}"
    severity = {"critical": critical, "warning": status.st_mode & 0o022}
    collector.add("directory", summary, meaning, remedy, command, **severity, mode=mode, uid=status.st_uid)


def _check_owners(collector: Collector, path: Path, files: Files) -> bool:
    """Report files that homeagent refuses. Return True if the doctor is allowed to open the database."""
    own = {path, *sidecars(path)}
    last = remembered_backup(path)
    backups = {} if last is None else database_files(last.parent / path.name)
    refused: dict[Path, str] = {}
    for file, status in (backups | files).items():
        try:
            refuse_insecure(file, status, trusted_owners(path.parent) if file in own else backup_owners(path))
        except HomeAgentError as error:
            refused[file] = str(error)
    others = [file for file, status in files.items() if path in files and status.st_uid != files[path].st_uid]
    if refused:
        problem, _, remedy = next(iter(refused.values())).rpartition(": ")
        summary = f"Files that homeagent refuses: {len(refused)}. {problem}."
        meaning = "another user, or a program that uses another name of the file, can change the content"
        collector.critical("files", summary, meaning, remedy, f"ls -ld {_words(refused)}", refused=len(refused))
    elif others:
        owner, group = files[path].st_uid, files[path].st_gid
        summary = f"The database belongs to user {owner}, and {len(others)} of its {len(files)} files to another user."
        meaning = "the gateway can't open these files: a command was probably run as another user, such as root"
        remedy = "change the owner of these files to the owner of the database"
        collector.critical("files", summary, meaning, remedy, f"chown {owner}:{group} {_words(others)}", uid=owner)
    return own.isdisjoint(refused)


def _words(files: Iterable[Path]) -> str:
    """Quote each path for the shell, and join the paths with spaces."""
    return shlex.join(map(str, files))


def _check_modes(collector: Collector, files: Files) -> None:
    public = {file: stat.S_IMODE(status.st_mode) for file, status in files.items() if is_public(status)}
    if not public:
        collector.add("files", "Only the owner can read and write the files.", public=0)
        return
    file, mode = max(public.items(), key=lambda item: (item[1] & 0o022 != 0, item[1]))
    summary = f"Files with more rights than 0600: {len(public)}, such as {file.name!r} with {mode:04o}."
    meaning = "other users can read every device, session and stored result"
    if mode & 0o022:
        meaning = "other users can write to the database, and so approve a device"
    remedy = "remove these rights (or run 'homeagent doctor --fix'), then check which devices are approved"
    severity = {"critical": mode & 0o022, "warning": True}
    collector.add("files", summary, meaning, remedy, f"chmod 600 {_words(public)}", **severity, public=len(public))


def _check_backup(collector: Collector, path: Path) -> None:
    backup = newest_backup(path)
    manifest = None if backup is None else read_manifest(backup, path)
    if backup is None or manifest is None:
        # Do not warn: the administrator can use another backup tool.
        collector.add("backup", "No backup is known: 'homeagent backup' makes a backup.", age_seconds=None)
        return
    collector.restore_command = f"homeagent restore {shlex.quote(str(backup))}"
    age = collector.now - manifest.taken_at
    summary = f"The newest backup is {str(backup)!r}, of {manifest.taken_at:%Y-%m-%d %H:%M} UTC, {age.days} days ago."
    meaning = "if the file is lost, all changes since the backup are lost, including revocations and used nonces"
    remedy = "make a backup now, and let the gateway or a timer make regular backups"
    facts = {"age_seconds": round(age.total_seconds(), 3)}
    collector.add("backup", summary, meaning, remedy, "homeagent backup", warning=age > OLD_BACKUP, **facts)


def _check_filesystem(collector: Collector, path: Path) -> None:
    kind = filesystem_kind(path)
    summary = f"The file system is {kind or 'of an unknown kind'}."
    network = kind is not None and is_network_filesystem(kind)
    meaning = "SQLite's write-ahead log can corrupt a database on a network file system (https://sqlite.org/wal.html)"
    in_memory = kind in ("ramfs", "tmpfs")
    if in_memory:
        meaning = "the file system is in memory: at the next restart every device, revocation and nonce is lost"
    remedy = "move the database to a local disk, in a container to a named volume, or use PostgreSQL"
    collector.add("filesystem", summary, meaning, remedy, critical=network, warning=in_memory, kind=kind)


def _check_space(collector: Collector, path: Path, files: Files) -> None:
    free = shutil.disk_usage(path.parent).free
    size = sum(files[file].st_size for file in (path, *sidecars(path)) if file in files)
    lacking = max(0, size + WAL_RESERVE - free)
    summary = f"{megabytes(free)} are free, and the database has {megabytes(size)}."
    meaning = "the free space is too small for a backup, and without a backup homeagent does not upgrade the schema"
    if free < SCARCE:
        meaning = "writes will soon fail, and every request that writes fails too"
    remedy = f"free {megabytes(lacking)} or more"
    command = f"df -h {shlex.quote(str(path.parent))}"
    severity = {"critical": free < SCARCE, "warning": lacking}
    facts = {"free_bytes": free, "database_bytes": size}
    collector.add("disk_space", summary, meaning, remedy, command, **severity, **facts)


def megabytes(size: int) -> str:
    """Return a size in bytes as text in MiB."""
    return f"{size / 1024 / 1024:,.1f} MiB"
