"""Sync files and directories to the disk, so that a write survives a power cut."""

from __future__ import annotations

import errno
import fcntl
import os
import sys
from pathlib import Path

from homeagent.engine.files.system_errors import explained


def fsync_directory(directory: Path) -> None:
    """Sync a directory, so that a power cut does not undo the creation, renaming or removal of files in it."""
    with explained("sync the directory", directory):
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            sync(descriptor)
        except OSError as error:
            # Like SQLite, ignore the error of a file system that does not support fsync for a directory (fsync(2)).
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
        finally:
            os.close(descriptor)


def sync(descriptor: int) -> None:
    """Wait until all data of an open file is on the disk, and not only in the drive's cache, or raise OSError."""
    if sys.platform == "darwin":
        # On macOS fsync leaves the data in the drive's cache (fsync(2) of macOS).
        try:
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOTTY):
                raise
    os.fsync(descriptor)
