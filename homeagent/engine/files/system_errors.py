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
    """If the block raises an OSError, raise homeagent's error instead. The new error names the path and the remedy."""
    try:
        yield
    except OSError as error:
        raise _explain(error, act, path) from error


def _explain(error: OSError, act: str, path: Path) -> HomeAgentError:
    name = quoted(path)
    kind: type[HomeAgentError] = DatabaseError
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            kind, text = DiskFullError, f"the disk has no room to {act} {name}: free some space"
        case errno.EROFS:
            kind = ReadOnlyError
            text = f"can't {act} {name} on a read-only file system: name a path that can be written"
        case errno.EACCES | errno.EPERM:
            text = (
                f"no permission to {act} {name}: run as the owner of the file and its directory, or name another path"
            )
        case errno.ENOENT:
            text = f"can't {act} {name}: its directory is missing or is a link that leads nowhere, make it first"
        case errno.ELOOP:
            kind = InsecureFileError
            text = (
                f"can't {act} {name}, a symbolic link is in its place or links lead in a circle: name the file itself"
            )
        case errno.ENOTDIR | errno.ENAMETOOLONG:
            kind = InvalidArgumentError
            text = f"can't {act} {name}, it is too long or leads through a file: name another path"
        case errno.EMFILE | errno.ENFILE:
            kind, problem = TooManyFilesError, "this process, or the machine, may open no more files"
            text = f"can't {act} {name}: {problem}: close some, or raise the limit ('ulimit -n')"
        case _:
            reason = os.strerror(error.errno) if error.errno is not None else type(error).__name__
            text = f"can't {act} {name} ({reason}): remove the cause, or name another path"
    return kind(text)


def quoted(path: Path) -> str:
    """Quote and escape a path, which can contain a line break."""
    return repr(str(path))
