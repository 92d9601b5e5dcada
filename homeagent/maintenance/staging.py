"""Prepare the new database of a restore next to the old database."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Collection
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import update

from homeagent.engine.driver_errors import sqlite_error, translated
from homeagent.engine.files.database_file import OPEN_FLAGS, create_descriptor, open_to_read, secure_sidecars, sidecars
from homeagent.engine.files.owners import backup_owners
from homeagent.engine.files.sync import fsync_directory, sync
from homeagent.engine.files.system_errors import explained, quoted
from homeagent.engine.sqlite.backup import Contents, discard, find_damage, read_contents, require_room
from homeagent.engine.sqlite.engine import APPLICATION_ID, SQLiteEngine, lock_path
from homeagent.engine.sqlite.in_use import new_path
from homeagent.engine.sqlite.manifests import Manifest
from homeagent.errors import CorruptDatabaseError, DatabaseError, ForeignDatabaseError, HomeAgentError
from homeagent.migrations import revision_of
from homeagent.migrations.schema_drift import refuse_changed_schema
from homeagent.migrations.sqlite import open_sqlite
from homeagent.models import APPLICATION_VERSION_TABLE, DATA_TABLES, TABLES, store_table

# Bytes 18 and 19 are the format versions. Bytes 68 to 71 are the application id (https://sqlite.org/fileformat2.html,
# section 1.3).
_SQLITE_HEADER = b"SQLite format 3\0"
_WAL_FORMAT = b"\x02\x02"

_BOOKKEEPING = frozenset(TABLES).difference(DATA_TABLES) | {APPLICATION_VERSION_TABLE}
"""Tables that the report of a restore does not count."""

Devices = dict[str, tuple[str, str]]
"""Role and the secret's hash of each approved device, by id."""


def check_header(source: Path, database: Path, manifest: Manifest | None) -> None:
    """Refuse a backup with a wrong size or a wrong SQLite header."""
    header, size = _header_of(source, database), source.stat().st_size
    if manifest is not None and manifest.size != size:
        raise _damaged(source, f"it has {size:,} bytes, but its manifest says {manifest.size:,}")
    if not header.startswith(_SQLITE_HEADER):
        raise _damaged(source, "it is not a SQLite database")
    if int.from_bytes(header[68:72], "big") != APPLICATION_ID:
        raise ForeignDatabaseError(
            f"{quoted(source)} is another application's SQLite database: name a homeagent backup. No file was changed"
        )


def _header_of(path: Path, database: Path) -> bytes:
    """Return the first 100 bytes, the size of a SQLite header."""
    with explained("read", path), open_to_read(path, backup_owners(database)) as file:
        return file.read(100)


def _damaged(source: Path, how: str) -> CorruptDatabaseError:
    """Return the error for a damaged backup, with a description of the damage."""
    return CorruptDatabaseError(
        f"{quoted(source)} is damaged ({how}): restore another backup; the database was not changed"
    )


def stage(
    source: Path,
    manifest: Manifest | None,
    database: Path,
    stamp: str,
    acknowledged: Collection[str],
    *,
    restored_at: datetime,
    known_epoch: int,
) -> tuple[dict[str, Any], Devices]:
    """Prepare the new database as one complete file. Return values for the `RestoreReport`, and the new database's
    devices.
    """
    for stale in database.parent.glob(f"{glob.escape(database.name)}.*.restoring"):
        discard(stale)  # an interrupted restore has left the file behind
    new = new_path(database, stamp)
    try:
        _copy(source, new, manifest, database=database)
        secure_sidecars(new)  # SQLite must not replay another user's journal
        engine = SQLiteEngine(new, busy_timeout=timedelta(0), durability="full")
        try:
            with translated(engine.driver_errors, lambda error: _restore_error(error, source)):
                found = _verify(engine, source, manifest)
                with engine.reading() as connection:
                    refuse_changed_schema(connection, str(found.schema_revision), quoted(source), acknowledged)
                engine.prepare_header()
                open_sqlite(engine, clock=lambda: restored_at, timeout=timedelta(0), migrate=True, temporary=True)
                epoch = max(known_epoch, found.epoch or 1) + 1
                with engine.connect() as connection, connection.begin():
                    connection.execute(update(store_table).values(epoch=epoch, restored_at=restored_at))
                    revision = revision_of(connection)
                    devices = devices_of(connection.connection.driver_connection)
        finally:
            engine.close()
            lock_path(new).unlink(missing_ok=True)
        _require_single_file(new)
    except BaseException:
        discard(new)
        raise
    facts = {
        "epoch": epoch,
        "schema_revision": str(revision),
        "upgraded_from": None if revision == found.schema_revision else found.schema_revision,
        "rows": {name: count for name, count in found.rows.items() if name not in _BOOKKEEPING},
    }
    return facts, devices


def _copy(source: Path, new: Path, manifest: Manifest | None, *, database: Path) -> None:
    require_room(source.stat().st_size, new.parent, "a second database")
    digest = _copy_file(source, new, database=database)
    if manifest is not None:
        if digest != manifest.sha256:
            raise _damaged(source, "its SHA-256 is not the one in its manifest")
        return  # a backup with a manifest needs no sidecar files
    log, _, journal = zip(sidecars(source), sidecars(new), strict=True)
    sidecar, new_sidecar = log if _header_of(source, database)[18:20] == _WAL_FORMAT else journal
    if os.path.lexists(sidecar):
        _copy_file(sidecar, new_sidecar, database=database)


def _copy_file(source: Path, new: Path, *, database: Path) -> str:
    """Copy a file to a new private file, and return the SHA-256."""
    digest = hashlib.sha256()
    with explained("copy the backup to", new):
        descriptor = create_descriptor(new)
        if descriptor is None:
            raise DatabaseError(f"{quoted(new)} exists already: remove it")
        with os.fdopen(descriptor, "wb") as copy, open_to_read(source, backup_owners(database)) as original:
            while block := original.read(1 << 20):
                digest.update(block)
                copy.write(block)
    return digest.hexdigest()


def _verify(engine: SQLiteEngine, source: Path, manifest: Manifest | None) -> Contents:
    with engine.driver_connection() as raw:
        problem = find_damage(raw)
        if problem is not None:
            raise _damaged(source, problem)
        found = read_contents(raw)
    if found.schema_revision is None:
        raise _damaged(source, "it contains no homeagent tables")
    if found.rows.get(store_table.name) == 0:
        raise _damaged(source, "the table store has no row")
    if manifest is not None and (found.rows, found.schema_revision) != (manifest.rows, manifest.schema_revision):
        raise _damaged(source, "its row counts or schema revision differ from its manifest")
    return found


def _restore_error(error: BaseException, source: Path) -> HomeAgentError:
    translation = sqlite_error(error)
    return _damaged(source, "SQLite can't read it") if isinstance(translation, CorruptDatabaseError) else translation


def _require_single_file(new: Path) -> None:
    """Remove the empty sidecar files, and sync the database file."""
    for sidecar in sidecars(new):
        with explained("remove", sidecar):
            if os.path.lexists(sidecar):
                if sidecar.stat().st_size:
                    raise DatabaseError(
                        f"{quoted(sidecar)} remains, so another program has the new database open: stop that program"
                    )
                sidecar.unlink()
    with explained("sync", new):
        descriptor = os.open(new, os.O_RDWR | OPEN_FLAGS)
        try:
            sync(descriptor)
        finally:
            os.close(descriptor)
    fsync_directory(new.parent)


def devices_of(raw: Any) -> Devices:
    """Return the role and the secret's hash of each approved device, by id."""
    # Also read devices without approval, to detect damage. If a text is not UTF-8, the read raises an error.
    rows = raw.execute("SELECT id, approved, role, shared_secret_hash FROM devices").fetchall()
    return {str(device_id): (str(role), str(hashed)) for device_id, approved, role, hashed in rows if approved == 1}
