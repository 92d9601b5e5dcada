"""What makes a write survive a power cut."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

from homeagent.engine.files.system_errors import explained

if sys.platform != "win32":
    import fcntl

__all__ = ["fsync_directory", "sync"]


def fsync_directory(directory: Path) -> None:
    """Make what was created, renamed or removed in this directory survive a power cut (not on Windows).

    Raises:
        DatabaseError: the directory can't be opened or synced.
    """
    if sys.platform == "win32":
        return  # a directory can't be opened there
    with explained("sync the directory", directory):
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            sync(descriptor)
        except OSError as error:
            # Some file systems have no such operation (fsync(2)); SQLite lets that pass as well.
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
        finally:
            os.close(descriptor)


def sync(descriptor: int) -> None:
    """Wait until what was written through this descriptor is on the disk, and not only in the drive's cache.

    Raises:
        OSError: it could not be written.
    """
    if sys.platform == "darwin":
        # There fsync leaves the data in the drive's cache (fsync(2) of macOS).
        try:
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOTTY):
                raise
    os.fsync(descriptor)
