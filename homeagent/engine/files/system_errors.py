"""Translate errors of the operating system into errors of homeagent."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from homeagent.errors import (
    DatabaseError,
    DiskFullError,
    HomeAgentError,
    InsecureFileError,
    InvalidArgumentError,
    ReadOnlyError,
    TooManyFilesError,
)


@contextmanager
def explained(act: str, path: Path) -> Iterator[None]:
    """Translate an OSError that the block raises into an error of homeagent that names the path and the remedy."""
    try:
        yield
    except OSError as error:
        raise _explain(error, act, path) from error


def _explain(error: OSError, act: str, path: Path) -> HomeAgentError:
    name = quoted(path)
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return DiskFullError(f"the disk has no room to {act} {name}: free some space")
        case errno.EROFS:
            return ReadOnlyError(f"can't {act} {name} on a read-only file system: name a path that can be written")
        case errno.EACCES | errno.EPERM:
            return DatabaseError(
                f"no permission to {act} {name}: run as the owner of the file and its directory, or name another path"
            )
        case errno.ENOENT:
            return DatabaseError(
                f"can't {act} {name}: its directory is missing or is a link that leads nowhere, make it first"
            )
        case errno.ELOOP:
            return InsecureFileError(
                f"can't {act} {name}, a symbolic link is in its place or links lead in a circle: name the file itself"
            )
        case errno.ENOTDIR | errno.ENAMETOOLONG:
            return InvalidArgumentError(
                f"can't {act} {name}, it is too long or leads through a file: name another path"
            )
        case errno.EMFILE | errno.ENFILE:
            return TooManyFilesError(
                f"can't {act} {name}: this process, or the machine, may open no more files: close some, or raise the "
                "limit ('ulimit -n')"
            )
        case _:
            reason = os.strerror(error.errno) if error.errno is not None else type(error).__name__
            return DatabaseError(f"can't {act} {name} ({reason}): remove the cause, or name another path")


def quoted(path: Path) -> str:
    """Quote and escape a path for a message, because a file name can contain a line break."""
    return repr(str(path))
