"""What is known of a backup without opening it: a manifest beside each, and which of them is the newest.

An error about a damaged database names the newest good backup, and the database can't be asked for it any more. So a
small file beside the database remembers where the last one was put.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from secrets import token_hex
from typing import Annotated, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from homeagent.clock import system_clock
from homeagent.engine.files.database_file import create_descriptor, open_to_read, refuse_insecure
from homeagent.engine.files.owners import backup_owners
from homeagent.engine.files.sync import fsync_directory, sync
from homeagent.engine.files.system_errors import explained, quoted
from homeagent.errors import CorruptDatabaseError, DatabaseError, ForeignDatabaseError, HomeAgentError

__all__ = [
    "PARTIAL",
    "Manifest",
    "backups_in",
    "manifest_path",
    "newest_backup",
    "note_path",
    "read_manifest",
    "remember_backup",
    "remembered_backup",
    "write_manifest",
]

PARTIAL = ".partial"
"""How the name of a file ends that is not whole yet."""

_LARGEST = 64 * 1024  # bytes; a manifest has some hundred


class Manifest(BaseModel):
    """A backup as it was when it had been verified.

    Attributes:
        format: of this file; another one is not read.
        kind: `backup` for one that was asked for, `upgrade` for the copy that an upgrade of the schema makes first.
        database: the file that it is a backup of, absolute.
        taken_at: when, by the database's clock.
        schema_revision: the revision of the schema in it; None for a file without our tables.
        epoch: the epoch of the store in it; None where its schema knows none yet.
        rows: how many rows each table holds.
        size: of the backup, in bytes.
        sha256: of its bytes, in hexadecimal.
        package_version: the version of homeagent that made it.
    """

    model_config = ConfigDict(frozen=True)

    format: Literal[1] = 1
    kind: Literal["backup", "upgrade"] = "backup"
    database: str
    taken_at: AwareDatetime
    schema_revision: str | None
    epoch: int | None = None
    rows: dict[str, int]
    size: int
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    package_version: str


def manifest_path(backup: Path) -> Path:
    """Return where the manifest of a backup is, or belongs."""
    return backup.with_name(backup.name + ".json")


def read_manifest(backup: Path, database: Path | None = None) -> Manifest | None:
    """Return what is written of a backup, None where there is no manifest beside it.

    Args:
        backup: the file.
        database: the one that it is, or is to become; None to judge it by the backup's own directory.

    Raises:
        InsecureFileError: the manifest has a second name, or belongs to a user whose backups of `database` are not
            safe.
        CorruptDatabaseError: there is one that can't be read as such.
    """
    path = manifest_path(backup)
    try:
        return Manifest.model_validate_json(_read(path, backup_owners(database or backup)))
    except FileNotFoundError:
        return None
    except (OSError, ValidationError, ForeignDatabaseError):
        raise CorruptDatabaseError(
            f"{quoted(path)} is no manifest that can be read, so that nothing vouches for the backup beside it: "
            "use another backup, or move the manifest away to rely on SQLite's own checks alone"
        ) from None


def write_manifest(backup: Path, manifest: Manifest) -> None:
    """Put a manifest beside a backup, 0600, in the place of the one before.

    Raises:
        DatabaseError: it can't be written; `DiskFullError` and `ReadOnlyError` where that is why.
    """
    _write(manifest_path(backup), manifest.model_dump_json(indent=2) + "\n", database=Path(manifest.database))


def backups_in(directory: Path, database: Path) -> list[tuple[Path, Manifest]]:
    """Return the backups in a directory that have a manifest and still the size in it, oldest first.

    None of them is opened: what their bytes are worth, a restore finds out. A directory that can't be read has none. A
    backup that `restore` would refuse to put in the place of the database, for its owner or a second name, is left out.

    Args:
        directory: where to look.
        database: the file.
    """
    found: list[tuple[Path, Manifest]] = []
    with suppress(OSError, HomeAgentError):
        owners = backup_owners(database)
        for path in sorted(directory.glob("*.json")):
            if path.name.endswith(PARTIAL + ".json"):
                continue
            with suppress(OSError, ValidationError, HomeAgentError):
                manifest, backup = Manifest.model_validate_json(_read(path, owners)), path.with_suffix("")
                status = backup.lstat()
                refuse_insecure(backup, status, owners)
                if status.st_size == manifest.size:
                    found.append((backup, manifest))
    return sorted(found, key=lambda one: (one[1].taken_at, one[0].name))


def newest_backup(database: Path) -> Path | None:
    """Return the newest backup of a database that is known here, None where there is none.

    It is looked for beside the database and in the directory that the last backup went to. The database itself is
    not opened, and need not be there.

    Args:
        database: the file, as `locate_file` returns it.
    """
    # Beside it, one of the same name will do: the directory may have been moved.
    found = [one for one in backups_in(database.parent, database) if Path(one[1].database).name == database.name]
    last = remembered_backup(database)
    if last is not None and last.parent != database.parent:
        found += [one for one in backups_in(last.parent, database) if one[1].database == str(database)]
    now = system_clock()
    # One from the future was made while the clock was ahead, and may be older than all others.
    newest = max(found, key=lambda one: (one[1].taken_at <= now, one[1].taken_at, one[0]), default=None)
    return None if newest is None else newest[0]


def remember_backup(database: Path, backup: Path) -> None:
    """Note beside a database where its last backup is.

    Raises:
        DatabaseError: the note can't be written.
    """
    _write(note_path(database), f"{backup}\n")


def note_path(database: Path) -> Path:
    """Return where it is noted beside a database where its last backup is."""
    return database.with_name(database.name + ".last-backup")


def remembered_backup(database: Path) -> Path | None:
    """Return where the last backup of a database went, None if that is not noted next to it."""
    try:
        return Path(os.fsdecode(_read(note_path(database), backup_owners(database)).rstrip(b"\n")))
    except (OSError, ValueError, HomeAgentError):
        return None


def _read(path: Path, owners: frozenset[int]) -> bytes:
    with open_to_read(path, owners) as file:
        content = file.read(_LARGEST + 1)
    if len(content) > _LARGEST:
        raise OSError(f"{path} is too large")
    return content


def _write(path: Path, text: str, *, database: Path | None = None) -> None:
    """Replace a small file, so that after a power cut it is the old one or the whole new one."""
    partial = path.with_name(f".{path.name}.{token_hex(8)}{PARTIAL}")
    try:
        with explained("write", path):
            descriptor = create_descriptor(partial, database=database)
            if descriptor is None:
                raise DatabaseError(f"{quoted(partial)} is in the way: remove it")
            with os.fdopen(descriptor, "w", encoding="utf-8", errors="surrogateescape", newline="\n") as file:
                file.write(text)
                file.flush()
                sync(file.fileno())
            partial.replace(path)
        fsync_directory(path.parent)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
