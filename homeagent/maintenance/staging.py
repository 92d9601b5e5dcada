"""The new database of a restore, made beside the old one: checked, upgraded, in its new epoch, whole in one file."""

from __future__ import annotations

import glob
import hashlib
import os
import shutil
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import update

from homeagent.engine.driver_errors import sqlite_error, translated
from homeagent.engine.files.database_file import OPEN_FLAGS, create_descriptor, open_to_read, secure_sidecars, sidecars
from homeagent.engine.files.owners import backup_owners
from homeagent.engine.files.sync import fsync_directory, sync
from homeagent.engine.files.system_errors import explained, quoted
from homeagent.engine.sqlite.backup import Contents, discard, read_contents
from homeagent.engine.sqlite.dialect import connect
from homeagent.engine.sqlite.engine import APPLICATION_ID, SQLiteEngine
from homeagent.engine.sqlite.manifests import Manifest
from homeagent.engine.sqlite.replacement import new_path
from homeagent.errors import CorruptDatabaseError, DatabaseError, DiskFullError, HomeAgentError
from homeagent.migrations import VERSION_TABLE, revision_of
from homeagent.migrations.schema_drift import refuse_changed_schema
from homeagent.migrations.sqlite import upgrade_copy
from homeagent.models import DATA_TABLES, store_table

__all__ = [
    "SQLITE_HEADER",
    "Devices",
    "Staged",
    "copy_file",
    "damaged",
    "devices_of",
    "header_of",
    "is_homeagent_database",
    "stage",
]

SQLITE_HEADER = b"SQLite format 3\0"
_HEADER_SIZE = 100
_WAL_FORMAT = b"\x02\x02"  # the read and write versions in a header: https://sqlite.org/fileformat2.html, section 1.3
_APPLICATION_ID = slice(68, 72)

Devices = dict[str, tuple[str | None, str]]
"""By id: the role in which it may enter, None where it may not, and the hash of its secret."""


def header_of(path: Path, database: Path) -> bytes:
    """Return the first 100 bytes of a database or of a backup that this process does not have open through SQLite.

    Raises:
        InsecureFileError: `path` is a link, has a second name, or belongs to a user whose backups of `database` are not
            safe.
    """
    with explained("read", path), open_to_read(path, backup_owners(database)) as file:
        return file.read(_HEADER_SIZE)


def is_homeagent_database(header: bytes) -> bool:
    """Tell whether a header is that of a SQLite database of this application."""
    return header.startswith(SQLITE_HEADER) and int.from_bytes(header[_APPLICATION_ID], "big") == APPLICATION_ID


def damaged(source: Path, how: str) -> CorruptDatabaseError:
    """Return the error for a backup that can't be restored."""
    return CorruptDatabaseError(
        f"{quoted(source)} is damaged ({how}): restore another backup; the database was not changed"
    )


@dataclass(frozen=True, slots=True)
class Staged:
    """What the new database is: `devices` are those in it."""

    epoch: int
    revision: str
    upgraded_from: str | None
    rows: dict[str, int]
    devices: Devices


def stage(
    source: Path, manifest: Manifest | None, database: Path, stamp: str, *, restored_at: datetime, known_epoch: int
) -> Staged:
    """Make the new database beside the old one: checked, upgraded, in its new epoch, whole in one file and synced."""
    for stale in database.parent.glob(f"{glob.escape(database.name)}.*.restoring"):
        discard(stale)  # of a restore that was killed before it had decided anything
    new = new_path(database, stamp)
    try:
        _copy(source, new, manifest, database=database)
        secure_sidecars(new)  # before SQLite would replay a journal that another user put there
        engine = SQLiteEngine(new, busy_timeout=timedelta(0), durability="full")
        try:
            with translated(engine.driver_errors, lambda error: _fault(error, source)):
                found = _verify(engine, source, manifest)
                with engine.looking() as connection:
                    refuse_changed_schema(connection, str(found.revision), quoted(source))
                engine.prepare_header()
                upgrade_copy(engine, clock=lambda: restored_at)
                epoch = max(known_epoch, found.epoch or 1) + 1
                with engine.connect() as connection, connection.begin():
                    connection.execute(update(store_table).values(epoch=epoch, restored_at=restored_at))
                    revision = revision_of(connection)
                    devices = devices_of(connection.connection.driver_connection)
        finally:
            engine.close()
        _require_whole(new)
    except BaseException:
        discard(new)
        raise
    return Staged(
        epoch=epoch,
        revision=str(revision),
        upgraded_from=None if revision == found.revision else found.revision,
        rows={name: count for name, count in found.rows.items() if name in DATA_TABLES},
        devices=devices,
    )


def _copy(source: Path, new: Path, manifest: Manifest | None, *, database: Path) -> None:
    needed = source.stat().st_size
    with explained("look for room in", new.parent):
        free = shutil.disk_usage(new.parent).free
    if free < needed:
        raise DiskFullError(
            f"there is no room to restore in {quoted(new.parent)}: it takes {needed:,} bytes beside the old database, "
            f"and {free:,} are free; free some space"
        )
    digest = copy_file(source, new, database=database)
    if manifest is not None:
        if digest != manifest.sha256:
            raise damaged(source, "its SHA-256 is not the one in its manifest")
        return  # one of ours is whole by itself: what lies beside it belongs to something else
    log, _, journal = sidecars(source)
    new_log, _, new_journal = sidecars(new)
    is_logged = header_of(source, database)[18:20] == _WAL_FORMAT
    beside, kept = (log, new_log) if is_logged else (journal, new_journal)
    if os.path.lexists(beside):
        copy_file(beside, kept, database=database)


def copy_file(source: Path, new: Path, *, database: Path) -> str:
    """Copy a database or a backup to a new file that is private, and return the SHA-256 of its bytes.

    Raises:
        InsecureFileError: `source` is a link, has a second name, or belongs to a user whose backups of `database` are
            not safe.
    """
    digest = hashlib.sha256()
    with explained("copy the backup to", new):
        descriptor = create_descriptor(new)
        if descriptor is None:
            raise DatabaseError(f"{quoted(new)} is in the way: remove it")
        with os.fdopen(descriptor, "wb") as copy, open_to_read(source, backup_owners(database)) as original:
            while block := original.read(1 << 20):
                digest.update(block)
                copy.write(block)
    return digest.hexdigest()


def _verify(engine: SQLiteEngine, source: Path, manifest: Manifest | None) -> Contents:
    with closing(connect(str(engine.path))) as raw:
        raw.execute("PRAGMA trusted_schema=OFF")
        raw.execute("PRAGMA cell_size_check=ON")
        verdict = str(raw.execute("PRAGMA integrity_check(1)").get)
        if verdict != "ok":
            raise damaged(source, verdict.splitlines()[0])
        if raw.execute("PRAGMA foreign_key_check").fetchall():
            raise damaged(source, "a row refers to one that is not there")
        found = read_contents(raw, VERSION_TABLE)
    if found.revision is None:
        raise damaged(source, "it holds no store")
    if manifest is not None and (found.rows, found.revision) != (manifest.rows, manifest.schema_revision):
        raise damaged(source, "it does not hold what its manifest says")
    return found


def _fault(error: BaseException, source: Path) -> HomeAgentError:
    ours = sqlite_error(error)
    return damaged(source, "SQLite can't read it") if isinstance(ours, CorruptDatabaseError) else ours


def _require_whole(new: Path) -> None:
    """See to it that all of a closed database is in its one file, and that on the disk."""
    for beside in sidecars(new):
        with explained("remove", beside):
            if os.path.lexists(beside):
                if beside.stat().st_size:
                    raise DatabaseError(f"{quoted(beside)} was left over: something else has the new database open")
                beside.unlink()
    with explained("sync", new):
        descriptor = os.open(new, os.O_RDWR | OPEN_FLAGS)
        try:
            sync(descriptor)
        finally:
            os.close(descriptor)
    fsync_directory(new.parent)


def devices_of(raw: Any) -> Devices:
    """Return in which role each device may enter, and the hash of its secret."""
    rows = raw.execute("SELECT id, approved, role, shared_secret_hash FROM devices").fetchall()
    return {
        str(device_id): (str(role) if approved == 1 else None, str(hashed))
        for device_id, approved, role, hashed in rows
    }
