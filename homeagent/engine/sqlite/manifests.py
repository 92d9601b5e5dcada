"""Manifests are small files that describe backups. The error about a damaged database names the newest good backup."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path
from secrets import token_hex
from typing import Annotated, Literal

from pydantic import AwareDatetime, BaseModel, Field, ValidationError

from homeagent.clock import system_clock
from homeagent.engine.files.database_file import create_descriptor, open_to_read, refuse_insecure
from homeagent.engine.files.owners import backup_owners
from homeagent.engine.files.sync import fsync_directory, sync
from homeagent.engine.files.system_errors import explained, quoted
from homeagent.errors import CorruptDatabaseError, DatabaseError, ForeignDatabaseError, HomeAgentError

PARTIAL = ".partial"
"""Suffix of files that are not complete yet."""

_LARGEST = 64 * 1024  # maximum size in bytes; a manifest has a few hundred bytes


Kind = Literal["backup", "upgrade", "adoption"]


class Manifest(BaseModel, frozen=True):
    """Description of a backup at the time when homeagent verified the backup.

    Attributes:
        kind: "backup" for an ordinary backup. "upgrade" is a copy before a schema upgrade. "adoption" is a copy of an
            application's file before its adoption.
        schema_revision: schema revision; None for a file without homeagent's tables.
        schema_version: SQLite's counter of schema changes (https://sqlite.org/pragma.html#pragma_schema_version); None
            in an older manifest.
        epoch: epoch of the store; None for an old schema without epochs.
    """

    format: Literal[1] = 1
    kind: Kind = "backup"
    database: str
    taken_at: AwareDatetime
    schema_revision: str | None
    application_revision: str | None = None
    schema_version: int | None = None
    epoch: int | None = None
    rows: dict[str, int]
    size: int
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    package_version: str


def manifest_path(backup: Path) -> Path:
    """Return the path of a backup's manifest. The manifest does not need to exist."""
    return backup.with_name(backup.name + ".json")


def read_manifest(backup: Path, database: Path | None = None) -> Manifest | None:
    """Return a backup's manifest, or None if the manifest does not exist. With `database=None`, use the trusted owners
    of the backup's directory.
    """
    path = manifest_path(backup)
    try:
        with explained("read", path):
            try:
                return Manifest.model_validate_json(_read(path, backup_owners(database or backup)))
            except FileNotFoundError:
                return None
    except (ValidationError, ForeignDatabaseError):
        raise CorruptDatabaseError(
            f"{quoted(path)} can't be read as a manifest, so the backup next to it can't be verified: use another "
            "backup, or move the manifest away to rely on SQLite's checks alone"
        ) from None


def write_manifest(backup: Path, manifest: Manifest) -> None:
    """Write or replace a backup's manifest with mode 0600, or raise DatabaseError."""
    _write(manifest_path(backup), manifest.model_dump_json(indent=2) + "\n", database=Path(manifest.database))


def backups_in(directory: Path, database: Path) -> list[tuple[Path, Manifest]]:
    """Return the backups in a directory, oldest first. Leave out backups of the kind "adoption". Leave out backups
    whose size differs from the manifest. Leave out backups with an untrusted owner or a second hard link.
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
                if status.st_size == manifest.size and manifest.kind != "adoption":
                    found.append((backup, manifest))
    return sorted(found, key=lambda entry: (entry[1].taken_at, backup_number(entry[0]), entry[0].name))


def backup_number(backup: Path) -> int:
    """Return the number at the end of a backup's name. A name without a number counts as 1. Later backups of the same
    time have larger numbers.
    """
    found = re.search(r"Z-([0-9]{1,9})\.backup$", backup.name)
    return 1 if found is None else int(found[1])


def newest_backup(database: Path) -> Path | None:
    """Search the database's directory and the directory of the last backup. Return the newest backup, or None. The
    argument `database=` must be a path from `locate_file()`.
    """
    # Compare only file names, because the administrator can move the directory.
    found = [entry for entry in backups_in(database.parent, database) if Path(entry[1].database).name == database.name]
    last = remembered_backup(database)
    if last is not None and last.parent != database.parent:
        found += [entry for entry in backups_in(last.parent, database) if entry[1].database == str(database)]
    now = system_clock()
    # Prefer a backup with a time in the past. A time in the future comes from a wrong clock.
    newest = max(
        found,
        key=lambda entry: (entry[1].taken_at <= now, entry[1].taken_at, backup_number(entry[0]), entry[0]),
        default=None,
    )
    return None if newest is None else newest[0]


def remember_backup(database: Path, backup: Path) -> None:
    """Write the path of the last backup to the file `note_path()`, or raise DatabaseError."""
    _write(note_path(database), f"{backup}\n")


def note_path(database: Path) -> Path:
    """Return the path of the note that contains the last backup's path."""
    return database.with_name(database.name + ".last-backup")


def remembered_backup(database: Path) -> Path | None:
    """Return the path of the last backup of a database. If the note can't be read, return None."""
    try:
        return Path(os.fsdecode(_read(note_path(database), backup_owners(database)).rstrip(b"\n")))
    except (OSError, ValueError, HomeAgentError):
        return None


def _read(path: Path, owners: frozenset[int]) -> bytes:
    """Read a file. The argument `owners=` contains the allowed owners' user ids. Raise ForeignDatabaseError if the file
    is larger than 64 KiB.
    """
    with open_to_read(path, owners) as file:
        content = file.read(_LARGEST + 1)
    if len(content) > _LARGEST:
        raise ForeignDatabaseError(f"{path} is too large")
    return content


def _write(path: Path, text: str, *, database: Path | None = None) -> None:
    """Replace a small file atomically, even during a power cut."""
    partial = path.with_name(f".{path.name}.{token_hex(8)}{PARTIAL}")
    try:
        with explained("write", path):
            descriptor = create_descriptor(partial, database=database)
            if descriptor is None:
                raise DatabaseError(f"{quoted(partial)} exists already: remove it")
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
