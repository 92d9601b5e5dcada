"""Permission bits of the database's files and directory."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from homeagent.engine.files.system_errors import quoted
from homeagent.errors import InsecureFileError

FILE_MODE = 0o600
DIRECTORY_MODE = 0o700


def change_mode(path: Path, mode: int) -> None:
    """Change the mode of the caller's own file or directory without following a link, or raise InsecureFileError."""
    try:
        path.chmod(mode, follow_symlinks=False)
    except NotImplementedError:
        # Python raises NotImplementedError for a link, and on some systems for every file.
        if stat.S_ISLNK(os.lstat(path).st_mode):
            raise InsecureFileError(f"{quoted(path)} was replaced by a symbolic link: remove it") from None
        path.chmod(mode)
    except PermissionError as error:
        # The caller has checked that the file belongs to this user, so the file system refuses the mode.
        raise modes_not_kept(path) from error


def modes_not_kept(path: Path) -> InsecureFileError:
    """Return the error for a file system that does not keep the mode of a file or directory."""
    return InsecureFileError(
        f"{quoted(path)} can't be made private, its file system does not keep modes or does not let them change: "
        "move the database to another file system"
    )
