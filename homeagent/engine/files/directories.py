"""Create a private directory for a database. Log a warning about an unsafe existing directory."""

from __future__ import annotations

import logging
import os
import stat
import tempfile
from contextlib import ExitStack
from functools import cache
from pathlib import Path

from homeagent.engine.files.database_file import change_mode, modes_not_kept
from homeagent.engine.files.owners import give_to_owner, is_replaceable, refuse_replaceable
from homeagent.engine.files.sync import fsync_directory
from homeagent.engine.files.system_errors import explained, quoted
from homeagent.errors import DatabaseError, InvalidArgumentError

logger: logging.Logger = logging.getLogger("homeagent")


DIRECTORY_MODE = 0o700


def prepare_directory(directory: Path) -> None:
    """Create a missing directory with mode 0700, under any umask. Log a warning about an unsafe existing directory."""
    refuse_replaceable(directory)
    for step in (*reversed(directory.parents), directory):
        with explained("make the directory", step):
            try:
                if step.exists():
                    continue
                step.mkdir(DIRECTORY_MODE)
            except FileExistsError:
                continue  # for a broken link, `directory.stat()` fails after the loop
            if not _is_private_directory(step):
                change_mode(step, DIRECTORY_MODE)  # a umask can also remove the owner's permissions
                if not _is_private_directory(step):
                    raise modes_not_kept(step)
            _give_to_parents_owner(step)
        fsync_directory(step.parent)
    with explained("look into the directory", directory):
        status = directory.stat()
    if not stat.S_ISDIR(status.st_mode):
        raise InvalidArgumentError(f"{quoted(directory)} is a file: name a directory")
    if (problem := _directory_problem(directory, status)) is not None:
        _warn_once(directory, problem)


@cache
def _warn_once(directory: Path, problem: str) -> None:
    logger.warning("%s", problem, extra={"event": "directory_unsafe", "path": str(directory)})


def make_temporary_directory() -> Path:
    """Make a private directory for temporary files, or raise DatabaseError."""
    try:
        parent = Path(tempfile.gettempdir())
    except FileNotFoundError:
        raise DatabaseError(
            "':memory:' needs a directory for temporary files, and no usual directory can be written: set TMPDIR to a "
            "writable directory, or name a file"
        ) from None
    with explained("make a temporary directory in", parent):
        return Path(tempfile.mkdtemp(prefix="homeagent-", dir=parent))


def _give_to_parents_owner(made: Path) -> None:
    if os.geteuid() != 0:
        return
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    with ExitStack() as stack:
        # Use descriptors, because another user could replace a directory by a link. A replacement by another empty
        # directory does no harm.
        parent = os.open(made.parent, flags)
        stack.callback(os.close, parent)
        descriptor = os.open(made.name, flags | os.O_NOFOLLOW, dir_fd=parent)
        stack.callback(os.close, descriptor)
        if not os.listdir(descriptor):
            give_to_owner(descriptor, parent)


def _is_private_directory(directory: Path) -> bool:
    return os.lstat(directory).st_mode & 0o777 == DIRECTORY_MODE  # ignore an inherited set-group-id bit


def _directory_problem(directory: Path, status: os.stat_result) -> str | None:
    if status.st_uid not in (0, os.geteuid()):
        return (
            f"the directory {quoted(directory)} belongs to user {status.st_uid}, who can replace the database: "
            "keep it in a directory of your own"
        )
    mode = f"the directory {quoted(directory)} has mode {stat.S_IMODE(status.st_mode):04o}"
    if is_replaceable(status):
        return f"{mode}, so others can replace the database: chmod go-w {quoted(directory)}"
    if status.st_mode & 0o022:
        return f"{mode}, so other users can put files next to the database: keep it in a directory of your own"
    return None
