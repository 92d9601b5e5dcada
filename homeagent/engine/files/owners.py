"""Which users' files are safe to use, and which user gets a file that root creates.

| the process runs as | files of a database that are safe | its backups that are safe |
|---|---|---|
| an ordinary user | that user's | that user's and root's |
| root | root's, and those of the owner of the database's directory | the same |

The owner of a directory can replace every file in it, so root gains nothing by refusing that user's files. Each other
user could add a file to a directory that several users can write: a rollback journal that SQLite replays, a lock file
that tells of a restore, a backup. So root also refuses a directory in which other users can replace files.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from homeagent.engine.files.system_errors import explained, quoted
from homeagent.errors import InsecureFileError

__all__ = ["backup_owners", "give_to_owner", "is_replaceable", "refuse_replaceable", "trusted_owners"]


def trusted_owners(directory: Path) -> frozenset[int]:
    """Return the users whose files in a database's directory are safe.

    Args:
        directory: of the database. If it is missing, the nearest directory above counts, whose owner gets it.

    Raises:
        DatabaseError: the directory can't be looked into.
    """
    caller = os.geteuid()
    return frozenset({0, _nearest(directory).st_uid} if caller == 0 else {caller})


def backup_owners(database: Path) -> frozenset[int]:
    """Return the users whose backups of a database, and notes about them, are safe, wherever they are.

    Raises:
        DatabaseError: the database's directory can't be looked into.
    """
    return trusted_owners(database.parent) | {0}


def give_to_owner(descriptor: int, directory: Path | int, *, database: Path | None = None) -> None:
    """Give a file or directory that root created to the owner of its directory; for another user do nothing.

    Otherwise `sudo homeagent init` would lock out the user whose directory it is. SQLite does the same with the
    files that it keeps next to a database.

    Args:
        descriptor: of the new file. Another file could have its name by now.
        directory: where the file is, or a descriptor of that.
        database: of which the file is a copy, if not one in the same directory. Where the owner of `directory` may not
            provide backups of it, the file stays root's: that user could change it, and could read every device.

    Raises:
        OSError: the owner can't be changed.
    """
    if os.geteuid() != 0:
        return
    status = os.stat(directory)  # noqa: PTH116  by a descriptor too
    if status.st_uid != 0 and (database is None or status.st_uid in backup_owners(database)):
        os.fchown(descriptor, status.st_uid, status.st_gid)


def is_replaceable(status: os.stat_result) -> bool:
    """Tell whether users other than its owner can rename and remove files in a directory."""
    return bool(status.st_mode & 0o022) and not status.st_mode & stat.S_ISVTX


def refuse_replaceable(directory: Path) -> None:
    """Refuse a directory in which other users can replace files, if the process runs as root.

    An ordinary user is warned instead (`prepare_directory`).

    Raises:
        InsecureFileError: the process runs as root, and group or others can write the directory, without a sticky bit.
        DatabaseError: the directory can't be looked into.
    """
    if os.geteuid() != 0:
        return
    status = _nearest(directory)
    if is_replaceable(status):
        raise InsecureFileError(
            f"the directory {quoted(directory)} has mode {stat.S_IMODE(status.st_mode):04o}, so other users can "
            f"replace files that root uses in it: chmod go-w {quoted(directory)}, or run as another user than root"
        )


def _nearest(directory: Path) -> os.stat_result:
    with explained("look into the directory", directory):
        while True:
            try:
                return directory.stat()
            except FileNotFoundError:
                if directory == directory.parent:
                    raise
                directory = directory.parent
