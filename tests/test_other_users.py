"""Files of other users: root refuses unsafe files, and files that root creates belong to the directory's owner.

SQLite only: on PostgreSQL the server owns the files.
"""

from __future__ import annotations

import os
import shutil
import struct
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from homeagent import Database, DevicePair, Role, diagnose
from homeagent.engine.sqlite.in_use import in_use_path, new_path
from homeagent.engine.sqlite.manifests import manifest_path, newest_backup
from homeagent.errors import CorruptDatabaseError, InsecureFileError
from homeagent.maintenance import BackupSchedule
from homeagent.maintenance.backups import back_up_if_due
from homeagent.maintenance.doctor import Severity
from homeagent.migrations import REVISION
from tests.conftest import ROOT, STRANGER, Children, FakeClock, add_agent, copy_template
from tests.engine.files.conftest import needs_root
from tests.maintenance.test_doctor import at


def give(*paths: Path) -> None:
    """Change the owner of files to another user."""
    for path in paths:
        os.chown(path, STRANGER, STRANGER)


def plant(path: Path, content: bytes = b"") -> Path:
    """Create a private file of the other user at the path."""
    path.write_bytes(content)
    path.chmod(0o600)
    give(path)
    return path


def owners(directory: Path) -> set[int]:
    return {path.lstat().st_uid for path in (directory, *directory.rglob("*"))}


def contents(directory: Path) -> dict[str, bytes]:
    """Return the bytes of each file in a directory, without the lock files."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.suffix not in (".lock", ".open")}


def devices(path: Path) -> list[str]:
    with Database.open(path) as database:
        return database.run(lambda unit: [device.id for device in unit.devices.list()], read_only=True)


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A directory such as /tmp, where each user can create files."""
    directory = tmp_path / "shared"
    directory.mkdir()
    directory.chmod(0o1777)
    return directory


@pytest.fixture
def path(shared: Path, sqlite_template: Path) -> Path:
    """Root's database in the shared directory, with the device `lamp`."""
    shutil.copy(sqlite_template, shared / "h.db")
    with Database.open(shared / "h.db") as database:
        database.pair(DevicePair(id="lamp", role=Role.NODE))
    return shared / "h.db"


@pytest.fixture
def intruders(tmp_path: Path, sqlite_template: Path) -> bytes:
    """The content of a database in which the other user's device is an approved admin."""
    made = copy_template(sqlite_template, tmp_path / "elsewhere")
    with Database.open(made) as database:
        database.pair(DevicePair(id="intruder", role=Role.ADMIN))
        database.run(lambda unit: unit.devices.approve("intruder") and None)
    return made.read_bytes()


def hot_journal(content: bytes) -> bytes:
    """Return a rollback journal from which SQLite writes this database content when it opens the file.

    The format: https://sqlite.org/fileformat2.html#the_rollback_journal
    """
    size = int.from_bytes(content[16:18], "big")
    pages = [content[at : at + size] for at in range(0, len(content), size)]
    journal = bytes.fromhex("d9d505f920a163d7") + struct.pack(">IIIII", len(pages), 7, len(pages), 512, size)
    journal += bytes(512 - len(journal))
    for number, page in enumerate(pages, 1):
        checksum = (7 + sum(page[at] for at in range(size - 200, 0, -200))) & 0xFFFFFFFF
        journal += struct.pack(">I", number) + page + struct.pack(">I", checksum)
    return journal


@needs_root
@pytest.mark.parametrize("migrate", [True, False])
@pytest.mark.parametrize("end", ["", "-wal", "-shm", "-journal", ".open", ".lock"])
def test_a_file_of_another_user(path: Path, shared: Path, intruders: bytes, end: str, migrate: bool) -> None:
    """If another user owns a file of the database, opening names the file, and the doctor reports the file."""
    with Database.open(path) as database:
        backup = database.backup(f"{shared.parent}/safe/")
    planted = Path(f"{path}{end}")
    content = planted.read_bytes() if planted.exists() else b"x"
    plant(planted, hot_journal(intruders) if end == "-journal" else content)
    before = contents(shared)
    with pytest.raises(InsecureFileError, match=f"h.db{end}' belongs to user 65534.*move the file away"):
        # An up-to-date database is opened without the lock that guards the creation of the schema.
        Database.restore(backup, path) if end == ".lock" else Database.open(path, migrate=migrate)
    diagnosis = diagnose(path)
    assert at(diagnosis, "files").severity is Severity.CRITICAL
    if end in ("", "-wal", "-journal"):
        assert at(diagnosis, "database").severity is Severity.CRITICAL
    assert contents(shared) == before
    if end:
        planted.unlink()
        assert devices(path) == ["lamp"]


@needs_root
def test_an_absent_database_next_to_files_of_another_user(shared: Path, intruders: bytes) -> None:
    """If a journal or WAL of another user exists, opening creates no database next to it."""
    path = shared / "h.db"
    for end in ("-journal", "-wal"):
        planted = plant(Path(f"{path}{end}"), hot_journal(intruders))
        with pytest.raises((InsecureFileError, CorruptDatabaseError)):
            Database.open(path)
        assert planted.read_bytes() == hot_journal(intruders)
        planted.unlink()
        path.unlink(missing_ok=True)
    assert devices(path) == []


@needs_root
def test_an_unfinished_restore_faked_by_another_user(path: Path, shared: Path, intruders: bytes) -> None:
    """If the lock file records an unfinished restore, a restored file of another user is refused."""
    in_use_path(path).write_text("swap 20260102T030405678000Z 2 end\n")
    planted = plant(new_path(path, "20260102T030405678000Z"), intruders)
    before = contents(shared)
    with pytest.raises(InsecureFileError, match="restoring' belongs to user 65534"):
        Database.open(path)
    assert contents(shared) == before
    planted.unlink()
    assert devices(path) == ["lamp"]


@needs_root
@pytest.mark.parametrize("mode", [0o770, 0o777])
def test_a_directory_in_which_others_can_replace_files(path: Path, shared: Path, mode: int) -> None:
    """If others can replace files in a directory, root refuses to open, back up and restore there."""
    safe = shared.parent / "safe"
    with Database.open(path) as database:
        backup = database.backup(f"{safe}/")
    shared.chmod(mode)
    for attempt in (
        lambda: Database.open(path),
        lambda: Database.open(path, migrate=False),
        lambda: Database.restore(backup, path),
        lambda: Database.restore(backup, safe / "h.db") and Database.open(safe / "h.db").backup(f"{shared}/"),
    ):
        with pytest.raises(InsecureFileError, match=f"mode {mode:04o}.*chmod go-w"):
            attempt()
    assert at(diagnose(path), "directory").severity is Severity.CRITICAL
    shared.chmod(0o1777)
    finding = at(diagnose(path), "directory")
    assert (finding.severity, "chmod" in str(finding.command)) == (Severity.WARNING, False)
    assert devices(path) == ["lamp"]


@pytest.fixture
def backups(shared: Path) -> Path:
    directory = shared / "backups"
    directory.mkdir()
    directory.chmod(0o1777)
    return directory


def link(backup: Path) -> None:
    backup.symlink_to(backup.rename(backup.with_name("real")))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        pytest.param(
            lambda backup: give(backup, manifest_path(backup)), "belongs to user 65534.*chown", marks=needs_root
        ),
        pytest.param(
            lambda backup: give(manifest_path(backup)), "json' belongs to user 65534.*chown", marks=needs_root
        ),
        (link, "symbolic link: name the file itself"),
        (lambda backup: backup.with_name("second").hardlink_to(backup), "2 names .*copy it"),
    ],
    ids=["owner", "owner of the manifest", "link", "second name"],
)
def test_an_unsafe_backup_does_not_count(
    sqlite_path: Path, tmp_path: Path, clock: FakeClock, spoil: Any, says: str
) -> None:
    """An unsafe backup is never the newest, does not count for `keep` or a schedule, and is not restored."""
    backups = tmp_path / "backups"
    with Database.open(sqlite_path, clock=clock) as database:
        good = database.backup(f"{backups}/")
        clock.advance(hours=1)
        spoiled = database.backup(f"{backups}/")
        assert newest_backup(sqlite_path) == spoiled
        spoil(spoiled)
        assert newest_backup(sqlite_path) == good
        clock.advance(hours=1)
        due = BackupSchedule(f"{backups}/", every=timedelta(minutes=90))
        newest = back_up_if_due(database._settings, due)
        assert newest is not None
        clock.advance(hours=1)
        database.backup(f"{backups}/", keep=2)
        assert not good.exists()
        assert newest.exists()
        assert spoiled.exists()
    before = sqlite_path.read_bytes()
    with pytest.raises(InsecureFileError, match=says):
        Database.restore(spoiled, sqlite_path)
    assert sqlite_path.read_bytes() == before
    if "belongs" in says:
        finding = at(diagnose(sqlite_path, clock=clock), "files")
        assert (finding.severity, str(backups) in str(finding.command)) == (Severity.CRITICAL, True)
        shutil.copy(spoiled, tmp_path / "copy.db")
        assert Database.restore(tmp_path / "copy.db", sqlite_path).database == sqlite_path


@needs_root
def test_the_note_of_the_last_backup(path: Path, backups: Path) -> None:
    """If the note of the last backup belongs to another user, homeagent ignores the note."""
    with Database.open(path) as database:
        backup = database.backup(f"{backups}/")
    assert newest_backup(path) == backup
    give(Path(f"{path}.last-backup"))
    assert newest_backup(path) is None


@needs_root
def test_a_journal_put_next_to_a_file_that_is_being_made(
    path: Path, backups: Path, clock: FakeClock, intruders: bytes
) -> None:
    """If another user's journal waits at the temporary file of a backup or a restore, the operation is refused."""
    with Database.open(path, clock=clock) as database:
        backup = database.backup(f"{backups}/")
        clock.advance(hours=1)
        stamp = clock.now.strftime("%Y%m%dT%H%M%S%fZ")
        plant(backups / f".h.db.{REVISION}-{stamp}.backup.partial-journal", hot_journal(intruders))
        with pytest.raises(InsecureFileError, match="partial-journal' belongs to user 65534"):
            database.backup(f"{backups}/")
    plant(Path(f"{new_path(path, stamp)}-journal"), hot_journal(intruders))
    with pytest.raises(InsecureFileError, match="restoring-journal' belongs to user 65534"):
        Database.restore(backup, path, clock=clock)
    assert devices(path) == ["lamp"]


# Files that root creates


AS_STRANGER = """
import os, sys, tempfile
from homeagent import AgentCreate, Database

# Whatever is imported on the way: another user may not enter the folder of the packages.
with tempfile.TemporaryDirectory() as name, Database.open(":memory:") as database:
    Database.restore(database.backup(name + "/a"), name + "/b")
os.setgid(int(sys.argv[2]))
os.setuid(int(sys.argv[2]))
with Database.open(sys.argv[1]) as database:
    database.run(lambda unit: unit.agents.create(AgentCreate(id="theirs", name="A", workspace_path="/srv")) and None)
    database.backup(sys.argv[1] + ".copy")
"""


@needs_root
def test_root_locks_no_user_out(others_home: Path, children: Children) -> None:
    """If root works in a user's directory, the database, its files, backups and directories belong to the user."""
    path = others_home / ".homeagent" / "h.db"
    with Database.open(path) as database:
        add_agent(database, "roots")
        assert owners(others_home) == {STRANGER}  # with SQLite's own files, while the database is open
        backup = database.backup(f"{others_home}/backups/", keep=1)
        database.backup(path.with_name("copy.db"))
    children.run(AS_STRANGER, path, STRANGER)
    Database.restore(backup, path)
    assert owners(others_home) == {STRANGER}
    children.run(AS_STRANGER, path.with_name("other.db"), STRANGER)
    with Database.open(path) as database:
        # Files that the user created later are as good as root's files.
        assert database.backup(f"{others_home}/backups/", keep=1).exists()
    assert not backup.exists()


@needs_root
def test_root_upgrades_and_copies_for_a_user(others_home: Path) -> None:
    """If root upgrades or copies, the backup before the upgrade, the copy and its directories belong to the user."""
    path = others_home / "h.db"
    shutil.copyfile(ROOT / "tests" / "fixtures" / "revisions" / "0001.db", path)
    path.chmod(0o600)
    give(path)
    with Database.open(path) as database, Database.open(others_home / "a" / "b" / "copy.db") as copy:
        database.copy_to(copy)
    assert len(list(others_home.glob("*.backup"))) == 1
    assert owners(others_home) == {STRANGER}


@needs_root
def test_a_backup_of_roots_in_another_users_directory(path: Path, others_home: Path, clock: FakeClock) -> None:
    """Root's backup in another user's directory stays root's, as the user must neither read nor change all devices."""
    with Database.open(path, clock=clock) as database:
        first = database.backup(f"{others_home}/", keep=1)
        assert {first.stat().st_uid, manifest_path(first).stat().st_uid} == {0}
        clock.advance(hours=1)
        second = database.backup(f"{others_home}/", keep=1)
    assert not first.exists()
    assert newest_backup(path) == second
    assert Database.restore(second, path, clock=clock).backup == second


@needs_root
def test_an_ordinary_user_restores_a_backup_of_root(others_home: Path, shared: Path, children: Children) -> None:
    """If the user may read a backup of root, restoring the backup is as safe as restoring the user's own."""
    path = others_home / "h.db"
    with Database.open(path) as database:
        backup = database.backup(others_home.parent / "made-by-root.db")
    for file in (backup, manifest_path(backup)):
        file.chmod(0o644)
        assert file.stat().st_uid == 0
    script = AS_STRANGER + "\nDatabase.restore(sys.argv[3], sys.argv[1])\n"
    children.run(script, path, STRANGER, backup)
    assert owners(others_home) == {STRANGER}
