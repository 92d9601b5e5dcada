"""Manifests: the description of a backup without opening it, and the backup that an error names."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from homeagent.engine.sqlite.manifests import (
    Manifest,
    backups_in,
    manifest_path,
    newest_backup,
    read_manifest,
    remember_backup,
    write_manifest,
)
from homeagent.errors import CorruptDatabaseError

NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)


def put(backup: Path, database: Path, *, hours: int = 0) -> Path:
    """Create a file that looks like a backup, with its manifest."""
    backup.parent.mkdir(exist_ok=True)
    backup.write_bytes(b"content")
    manifest = Manifest(
        database=str(database),
        taken_at=NOON + timedelta(hours=hours),
        schema_revision="0005",
        epoch=1,
        rows={"agents": 3},
        size=7,
        sha256="0" * 64,
        package_version="1",
    )
    write_manifest(backup, manifest)
    assert read_manifest(backup) == manifest
    return backup


def test_backup_from_the_future_is_the_last_choice(tmp_path: Path) -> None:
    """A backup with a time in the future has an unknown age, so it is named only if there is no other backup."""
    database = tmp_path / "a" / "homeagent.db"
    future = put(tmp_path / "a" / "z.backup", database, hours=24 * 365 * 900)
    assert newest_backup(database) == future
    past = put(tmp_path / "a" / "y.backup", database)
    assert newest_backup(database) == past


def test_newest_backup(tmp_path: Path) -> None:
    """The newest backup of this database is found, next to it or in the last backup's directory, for any names."""
    database, elsewhere = tmp_path / "a" / "homeagent.db", tmp_path / "elsewhere"
    assert newest_backup(database) is None
    first = put(tmp_path / "a" / "z.backup", database)
    assert newest_backup(database) == first
    second = put(elsewhere / "y.backup", database, hours=2)
    third = put(elsewhere / "x.backup", database, hours=3)
    put(elsewhere / "w.backup", tmp_path / "b" / "homeagent.db", hours=4)
    assert newest_backup(database) == first
    remember_backup(database, second)
    assert newest_backup(database) == third
    assert oct((tmp_path / "a" / "homeagent.db.last-backup").stat().st_mode)[-3:] == "600"
    assert oct(manifest_path(third).stat().st_mode)[-3:] == "600"
    (tmp_path / "a").rename(tmp_path / "moved")
    assert newest_backup(tmp_path / "moved" / "homeagent.db") == tmp_path / "moved" / "z.backup"


@pytest.mark.parametrize("how", ["gone", "shorter", "no manifest", "cut", "deep", "no text", "another format", "pipe"])
def test_damaged_backup_is_skipped(tmp_path: Path, how: str) -> None:
    """If a backup is missing or cut short, or its manifest cannot be read, an error does not name it."""
    database = tmp_path / "a" / "homeagent.db"
    good = put(tmp_path / "a" / "1.backup", database)
    spoilt = put(tmp_path / "a" / "2.backup", database, hours=1)
    assert newest_backup(database) == spoilt
    manifest = manifest_path(spoilt)
    match how:
        case "gone":
            spoilt.unlink()
        case "shorter":
            spoilt.write_bytes(b"conten")
        case "no manifest":
            manifest.unlink()
        case "cut":
            manifest.write_text("{")
        case "deep":
            manifest.write_text("[" * 100_000)
        case "no text":
            manifest.write_bytes(b"\xff")
        case "another format":
            manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": 2}))
        case "pipe":
            manifest.unlink()
            os.mkfifo(manifest)
    assert [backup for backup, _ in backups_in(tmp_path / "a", tmp_path / "homeagent.db")] == [good]
    assert newest_backup(database) == good


def test_unreadable_manifest(tmp_path: Path) -> None:
    """If a manifest cannot be read, CorruptDatabaseError is raised; if it does not exist, the result is None."""
    backup = put(tmp_path / "a" / "1.backup", tmp_path / "homeagent.db")
    manifest_path(backup).write_text("{}")
    with pytest.raises(CorruptDatabaseError, match="be read as a manifest"):
        read_manifest(backup)
    manifest_path(backup).unlink()
    assert read_manifest(backup) is None


def test_unusable_note_is_ignored(tmp_path: Path) -> None:
    """If the note of the last backup's path is unusable, a backup next to the database is still found."""
    database = tmp_path / "a" / "homeagent.db"
    backup = put(tmp_path / "a" / "1.backup", database)
    note = tmp_path / "a" / "homeagent.db.last-backup"
    for content in (b"", b"\n", b"/nowhere/x.backup\n", b"\0", b"\xff\xfe\n", b"x" * 100_000):
        note.write_bytes(content)
        assert newest_backup(database) == backup
