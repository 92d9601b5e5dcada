"""Modes: what only its owner may read and write, and what says so where that can't be had."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

from homeagent.engine.files.system_errors import quoted
from homeagent.errors import InsecureFileError

__all__ = ["DIRECTORY_MODE", "FILE_MODE", "change_mode", "modes_not_kept", "unguarded"]

FILE_MODE = 0o600
DIRECTORY_MODE = 0o700


def unguarded() -> str | None:
    """Return what this platform leaves unguarded, for the log and for `doctor`; None where all is guarded (POSIX)."""
    if sys.platform == "win32":
        return (
            "on Windows the owners and modes of the database's files are not checked, they are as private as their "
            "folder's access list; lock files do not hold other processes off; a rename is not synced to the disk"
        )
    return None


def change_mode(path: Path, mode: int) -> None:
    """Give a file or directory of ours this mode, and not what a link in its place leads to.

    Raises:
        InsecureFileError: it is a link now, or the mode can't be changed.
        OSError: it is gone, or its file system failed.
    """
    try:
        path.chmod(mode, follow_symlinks=False)
    except NotImplementedError:
        # Raised for a link, and on a C library or container without the means to leave links alone.
        if stat.S_ISLNK(os.lstat(path).st_mode):
            raise InsecureFileError(f"{quoted(path)} was replaced by a symbolic link: remove it") from None
        path.chmod(mode)
    except PermissionError as error:
        # The file is ours, or it was refused before.
        raise modes_not_kept(path) from error


def modes_not_kept(path: Path) -> InsecureFileError:
    """Return the error for a file or directory that can't be made private."""
    return InsecureFileError(
        f"{quoted(path)} can't be made private, its file system does not keep modes or does not let them change: "
        "keep the database on another one"
    )
