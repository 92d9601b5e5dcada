"""Sync files and directories, so that a write survives a power cut."""

from __future__ import annotations

import errno
import fcntl
import os
import sys
from pathlib import Path

from homeagent.engine.files.system_errors import explained


def fsync_directory(directory: Path) -> None:
    """Sync a directory, so that creations, renamings and removals survive a power cut."""
    with explained("sync the directory", directory):
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            sync(descriptor)
        except OSError as error:
            # Some file systems can't sync a directory (fsync(2)). Like SQLite, ignore the error.
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
        finally:
            os.close(descriptor)


def sync(descriptor: int) -> None:
    """Wait until the data of an open file is on the disk. On failure, raise OSError."""
    if sys.platform == "darwin":
        # On macOS fsync leaves the data in the drive's cache (fsync(2) of macOS).
        try:
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOTTY):
                raise
    os.fsync(descriptor)
