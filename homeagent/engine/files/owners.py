"""Decide whether homeagent trusts the owner of a file. If root creates a file, choose the owner of the new file.

| the process runs as | trusted owners of a database's files | trusted owners of its backups |
|---|---|---|
| an ordinary user | the user | the user and root |
| root | root and the owner of the database's directory | the same users |

As root, homeagent accepts the files of the directory's owner. The owner can replace every file in the directory anyway.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from homeagent.engine.files.system_errors import explained, quoted
from homeagent.errors import InsecureFileError


def trusted_owners(directory: Path) -> frozenset[int]:
    """Return the users whose files homeagent trusts in a database's directory. The directory can be missing."""
    caller = os.geteuid()
    return frozenset({0, _nearest(directory).st_uid} if caller == 0 else {caller})


def backup_owners(database: Path) -> frozenset[int]:
    """Return the users that may own a backup. The same users may own the file that names the last backup."""
    return trusted_owners(database.parent) | {0}


def give_to_owner(descriptor: int, directory: Path | int, *, database: Path | None = None) -> None:
    """As root, change the owner of a new file or directory. The new owner is the owner of the parent directory. Pass
    descriptors, because another user can replace the file at a path. For a copy in another directory, pass the
    database's path. A copy contains all devices, so `backup_owners()` limits the copy's owners.
    """
    if os.geteuid() != 0:
        return
    status = os.stat(directory)  # noqa: PTH116  os.stat also accepts a descriptor
    if status.st_uid != 0 and (database is None or status.st_uid in backup_owners(database)):
        os.fchown(descriptor, status.st_uid, status.st_gid)


def is_replaceable(status: os.stat_result) -> bool:
    """Return whether other users can rename and remove files in a directory."""
    return bool(status.st_mode & 0o022) and not status.st_mode & stat.S_ISVTX


def refuse_replaceable(directory: Path) -> None:
    """As root, raise InsecureFileError if other users can replace the directory's files."""
    if os.geteuid() != 0:
        return
    status = _nearest(directory)
    if is_replaceable(status):
        raise InsecureFileError(
            f"the directory {quoted(directory)} has mode {stat.S_IMODE(status.st_mode):04o}, so other users can "
            f"replace files that root uses in it: chmod go-w {quoted(directory)}, or run as another user than root"
        )


def _nearest(directory: Path) -> os.stat_result:
    """Return the status of a directory. If the directory is missing, use the nearest parent directory that exists."""
    with explained("look into the directory", directory):
        while True:
            try:
                return directory.stat()
            except FileNotFoundError:
                if directory == directory.parent:
                    raise
                directory = directory.parent
