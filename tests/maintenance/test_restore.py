"""Restore: verified first, refused if the database is open, and at any time the old or the new database is in place.

SQLite only: PostgreSQL has its own tools, and a restore replaces files.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import stat
import subprocess
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from homeagent import Database, Role, diagnose, errors
from homeagent.engine.sqlite.in_use import hold_in_use_lock
from homeagent.engine.sqlite.manifests import manifest_path
from homeagent.maintenance import restore
from homeagent.migrations import REVISION, VERSION_TABLE
from tests import fork_server
from tests.conftest import (
    ROOT,
    START,
    STRANGER,
    Children,
    FakeClock,
    RecordProperty,
    add_agent,
    add_device,
    pair,
    write_past_checks,
)
from tests.migrations.old_databases import REVISIONS, change, sqlite
from tests.test_open import half_made


def listing(directory: Path) -> dict[str, tuple[int, int, str]]:
    """Return the names and bytes in a directory, without the lock files."""
    return {
        path.name: (path.lstat().st_ino, path.lstat().st_mode, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in directory.iterdir()
        if not path.name.endswith((".lock", ".open"))
    }


def agents(path: Path) -> list[str]:
    """Return the agents in a database, as `Database.open` shows them."""
    with Database.open(path) as database, database.unit_of_work(read_only=True) as unit:
        return [agent.id for agent in unit.agents.list(limit=1000)]


@pytest.fixture
def backup(sqlite_path: Path, tmp_path: Path, clock: FakeClock) -> Path:
    """A backup with the agent `old`; the closed database has `new` too."""
    with Database.open(sqlite_path, clock=clock) as database:
        add_agent(database, "old")
        backup = database.backup(tmp_path / "the.backup")
        add_agent(database, "new")
    return backup


def test_restore(sqlite_path: Path, backup: Path, clock: FakeClock) -> None:
    """A restore puts the backup's rows in place, keeps the old database, makes both private and begins an epoch."""
    clock.advance(hours=1)
    before = listing(sqlite_path.parent)
    report = Database.restore(backup, sqlite_path, clock=clock)
    assert agents(sqlite_path) == ["old"]
    assert report.kept_aside == sqlite_path.with_name("homeagent.db.20260102T040405678000Z.quarantine")
    assert listing(sqlite_path.parent)[report.kept_aside.name] == before["homeagent.db"]
    assert agents(report.kept_aside) == ["new", "old"]
    assert report.model_dump(exclude={"kept_aside", "rows", "readmitted_devices", "old_secret_devices"}) == {
        "database": sqlite_path,
        "backup": backup,
        "taken_at": START,
        "epoch": 2,
        "restored_at": clock.now,
        "upgraded_from": None,
        "schema_revision": REVISION,
    }
    assert report.rows["agents"] == 1
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in sqlite_path.parent.iterdir())
    with Database.open(sqlite_path) as database:
        status = database.status()
    assert (status.epoch, status.restored_at) == (2, clock.now)
    # The result is a normal database: in WAL mode, and remembered as initialised.
    assert status.pragmas["journal_mode"] == "wal"
    sqlite_path.unlink()
    with pytest.raises(errors.CorruptDatabaseError):
        Database.open(sqlite_path)


LOGGED = """
import os, sys
from homeagent import AgentCreate, Database, errors
database = Database.open(sys.argv[1])
database.agents.create(AgentCreate(id=sys.argv[2], name="L", workspace_path="/l"))
for act in (database.devices.revoke, database.devices.delete):
    try:
        act(act.__name__)
    except errors.NotFoundError:
        pass
os._exit(0)
"""
"""A process that leaves a WAL with commits."""


def test_readmitted_devices_are_reported(sqlite_path: Path, tmp_path: Path, children: Children) -> None:
    """Devices that were revoked, deleted or rotated since the backup are reported, even if only the WAL shows it."""
    with Database.open(sqlite_path) as database:
        for name in ("stays", "revoke", "delete", "rotated"):
            add_device(database, name, approved=True)
        add_device(database, "waits")
        backup = database.backup(tmp_path / "the.backup")
        database.rotate_secret("rotated")
    children.run(LOGGED, sqlite_path, "logged")
    before = listing(sqlite_path.parent)
    assert before["homeagent.db-wal"]
    report = Database.restore(backup, sqlite_path)
    assert report.readmitted_devices == ["delete", "revoke"]
    assert report.old_secret_devices == ["rotated"]
    assert report.kept_aside is not None
    after = listing(sqlite_path.parent)
    for end in ("", "-wal"):
        assert after[report.kept_aside.name + end] == before["homeagent.db" + end]
    # A second restore reports no device; a restore over an unreadable database reports None.
    report = Database.restore(backup, sqlite_path)
    assert (report.readmitted_devices, report.old_secret_devices) == ([], [])
    os.truncate(sqlite_path, 5000)
    report = Database.restore(backup, sqlite_path)
    assert (report.readmitted_devices, report.old_secret_devices) == (None, None)


def test_changed_approval_or_role_is_reported(sqlite_path: Path, tmp_path: Path) -> None:
    """If an approval was text, or an admin paired again as a client, the restore reports the device."""
    with Database.open(sqlite_path) as database:
        for name in ("stays", "odd"):
            add_device(database, name, approved=True)
        secret = pair(database, "desk", role=Role.ADMIN)
        backup = database.backup(tmp_path / "the.backup")
        database.devices.delete("desk", force=True)
        pair(database, "desk", secret)
    write_past_checks(sqlite_path, "UPDATE devices SET approved = 'false' WHERE id = 'odd'")
    report = Database.restore(backup, sqlite_path)
    assert (report.readmitted_devices, report.old_secret_devices) == (["desk", "odd"], [])


def test_epochs_never_repeat(
    sqlite_path: Path, backup: Path, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    """Each restore begins an epoch that was never used, even from an old backup or over an unreadable file."""
    assert [Database.restore(backup, sqlite_path, clock=clock).epoch for _ in range(2)] == [2, 3]
    sqlite_path.write_bytes(b"\xff" * 8192)
    clock.advance(hours=1)
    assert Database.restore(backup, sqlite_path, clock=clock).epoch == 4
    # A copy of the file alone has no lock file with the epoch.
    alone = sqlite_path.parent / "alone.db"
    shutil.copyfile(sqlite_path, alone)
    alone.chmod(0o600)
    assert Database.restore(backup, alone, clock=clock).epoch == 5
    with Database.open(alone, clock=clock) as database:
        latest = database.backup(sqlite_path.parent / "latest.backup")
    assert Database.restore(latest, sqlite_path, clock=clock).epoch == 6
    # The lock file remembers the epoch of `begin_epoch()` too.
    assert Database.begin_epoch(sqlite_path, clock=clock).epoch == 7
    sqlite_path.write_bytes(b"\xff" * 8192)
    assert Database.restore(backup, sqlite_path, clock=clock).epoch == 8
    # The clock is behind the time of the backup.
    assert "before the backup was taken" not in caplog.text
    clock.advance(-timedelta(days=400))
    assert Database.restore(backup, sqlite_path, clock=clock).restored_at == clock.now
    assert "before the backup was taken" in caplog.text


def test_stale_wal_is_kept_with_its_database(sqlite_path: Path, backup: Path, children: Children) -> None:
    """If a killed process left a WAL with commits, the restore quarantines the WAL with the old database, unread."""
    children.run(LOGGED, sqlite_path, "logged")
    log = sqlite_path.with_name("homeagent.db-wal")
    assert log.stat().st_size > 0
    content = log.read_bytes()
    report = Database.restore(backup, sqlite_path)
    assert agents(sqlite_path) == ["old"]
    assert report.kept_aside is not None
    assert report.kept_aside.with_name(report.kept_aside.name + "-wal").read_bytes() == content
    assert agents(report.kept_aside) == ["logged", "new", "old"]
    # The quarantined database can be restored, its WAL included.
    children.run(LOGGED, report.kept_aside, "later")
    change(sqlite_path)
    Database.restore(report.kept_aside, sqlite_path)
    assert agents(sqlite_path) == ["later", "logged", "new", "old"]
    # If a WAL has no database, it is quarantined too and not applied.
    sqlite_path.unlink()
    for path in sqlite_path.parent.glob("*.quarantine*"):
        path.unlink()
    for end in ("-wal", "-shm", "-journal"):
        sqlite_path.with_name(f"homeagent.db{end}").write_bytes(b"stale" * 1000)
        sqlite_path.with_name(f"homeagent.db{end}").chmod(0o600)
    Database.restore(backup, sqlite_path)
    assert agents(sqlite_path) == ["old"]
    kept = {path.name.partition(".quarantine")[2] for path in sqlite_path.parent.glob("*.quarantine*")}
    assert kept == {"-wal", "-shm", "-journal"}


@pytest.mark.parametrize("how", ["cut", "page", b"\0" * 8192, b"dear diary", b"S", b""], ids=str)
def test_damaged_target(sqlite_path: Path, backup: Path, how: str | bytes) -> None:
    """A damaged database is replaced by the backup and kept unchanged."""
    content = sqlite_path.read_bytes()
    damaged = {"cut": content[:5000], "page": content[:4096] + b"\xff" * 4096 + content[8192:]}
    content = how if isinstance(how, bytes) else damaged[how]
    sqlite_path.write_bytes(content)
    report = Database.restore(backup, sqlite_path)
    assert agents(sqlite_path) == ["old"]
    assert report.kept_aside is not None
    assert report.kept_aside.read_bytes() == content


def test_half_made_target(tmp_path: Path, backup: Path) -> None:
    """If the first transaction of the target was cut off, a restore replaces the file, which SQLite would empty."""
    path = tmp_path / "half" / "homeagent.db"
    half_made(path, bytes(4096))
    report = Database.restore(backup, path)
    assert agents(path) == ["old"]
    assert report.kept_aside is not None
    assert report.kept_aside.read_bytes() == bytes(4096)


def replaced_by(*statements: str) -> Callable[[Path], None]:
    """Return a function that puts another SQLite file in place."""

    def replace(path: Path) -> None:
        path.unlink()
        change(path, *statements)

    return replace


def flipped(path: Path) -> None:
    """Flip a bit in the middle of an unused page, which SQLite itself does not notice."""
    content = bytearray(path.read_bytes())
    content[len(content) - 2048] ^= 1
    path.write_bytes(content)


FOREIGN = replaced_by("PRAGMA application_id = 7", "CREATE TABLE agents (id)")
NEWER = (f"UPDATE {VERSION_TABLE} SET version_num = '9999'", "UPDATE store SET oldest_revision = '9999'")
NO_REFERENCE = "INSERT INTO sessions (session_id, agent_id, created_at, last_active_at) VALUES ('s', 'no', 1, 1)"
NO_TABLES = replaced_by("PRAGMA application_id = 0x48414731", "PRAGMA user_version = 1")
INDEX = (
    "UPDATE sqlite_master SET rootpage = (SELECT rootpage FROM sqlite_master WHERE name = 'idx_nonces_expires')"
    " WHERE name = 'idx_sessions_agent'"
)
# What spoils the backup, the text of the error, and whether the backup keeps its manifest. The errors that are not in
# ERRORS are CorruptDatabaseError.
BACKUPS: dict[str, tuple[Callable[[Path], object], str, bool]] = {
    "newer": (lambda path: change(path, *NEWER), "upgrade homeagent", False),
    "foreign": (FOREIGN, "another application", False),
    "reference": (lambda path: change(path, NO_REFERENCE), "refers to a row", False),
    # An entry of an index is missing, which only an integrity check finds.
    "index": (lambda path: change(path, "PRAGMA writable_schema = ON", INDEX), "is damaged", False),
    "no store": (NO_TABLES, "no homeagent tables", False),
    # The row of the table `store` has the epoch, so the restore could not begin a new epoch.
    "no row": (lambda path: change(path, "DELETE FROM store"), "the table store has no row", False),
    "text": (lambda path: path.write_text("dear diary " * 100), "not a SQLite", False),
    "empty": (lambda path: path.write_bytes(b""), "not a SQLite", False),
    "cut": (lambda path: os.truncate(path, 40960), "is damaged", False),
    "cut, with manifest": (lambda path: os.truncate(path, 40960), "its manifest", True),
    "flipped": (flipped, "SHA-256", True),
    "another": (lambda path: change(path, "UPDATE agents SET name = 'eve'"), "SHA-256", True),
    "manifest": (lambda path: manifest_path(path).write_text("{}"), "as a manifest", True),
}
ERRORS = {"newer": errors.SchemaTooNewError, "foreign": errors.ForeignDatabaseError}


@pytest.mark.parametrize(("kind", "is_there"), [("newer", False), *((kind, True) for kind in BACKUPS)])
def test_refused_backup(sqlite_path: Path, backup: Path, tmp_path: Path, kind: str, is_there: bool) -> None:
    """If a backup is damaged, another application's or newer, the restore raises an error and changes no file."""
    spoil, says, keeps_manifest = BACKUPS[kind]
    if not keeps_manifest:
        manifest_path(backup).unlink()
    spoil(backup)
    target = sqlite_path if is_there else tmp_path / "empty" / "homeagent.db"
    target.parent.mkdir(mode=0o700, exist_ok=True)
    before, content = listing(target.parent), backup.read_bytes()
    with pytest.raises(errors.DatabaseError, match=says) as caught:
        Database.restore(backup, target)
    assert type(caught.value) is ERRORS.get(kind, errors.CorruptDatabaseError)
    assert listing(target.parent) == before
    assert backup.read_bytes() == content
    if is_there:
        assert agents(target) == ["new", "old"]


def test_refused_arguments(sqlite_path: Path, backup: Path) -> None:
    """If an argument is invalid, the call raises InvalidArgumentError, and the database stays as it is."""
    before = listing(sqlite_path.parent)
    clock: Any = 5
    for begin in (partial(Database.restore, backup), Database.begin_epoch, diagnose):
        with pytest.raises(errors.InvalidArgumentError, match="clock must be a function, not int"):
            begin(sqlite_path, clock=clock)
    text: Any = "audit"
    for call in (partial(Database.restore, backup), diagnose):
        with pytest.raises(errors.InvalidArgumentError, match="acknowledged must be a collection of names"):
            call(sqlite_path, acknowledged=text)
    epoch: Any = 1.0
    with pytest.raises(errors.InvalidArgumentError, match="expected_epoch must be a whole number"):
        Database.restore(backup, sqlite_path, expected_epoch=epoch)
    assert listing(sqlite_path.parent) == before


def test_refused_target(sqlite_path: Path, backup: Path, tmp_path: Path) -> None:
    """If the target is not homeagent's database and never was, the restore raises an error and keeps the file."""
    photo, link, directory, other = (tmp_path / name for name in ("photo.jpg", "link.db", "directory", "other.db"))
    photo.write_bytes(b"\xff\xd8" * 1000)
    loop = tmp_path / "loop.db"
    loop.symlink_to(loop)
    link.symlink_to(sqlite_path)
    directory.mkdir()
    other.touch()
    FOREIGN(other)
    for target, error in (
        *((target, errors.ForeignDatabaseError) for target in (photo, other, directory)),
        *((target, errors.InsecureFileError) for target in (link, loop)),
        *((target, errors.InvalidArgumentError) for target in (":memory:", "postgresql://host/db", backup)),
    ):
        with pytest.raises(error):
            Database.restore(backup, target)
    for source in (tmp_path / "nothing", tmp_path):
        with pytest.raises(errors.InvalidArgumentError):
            Database.restore(source, sqlite_path)
    assert photo.read_bytes() == b"\xff\xd8" * 1000
    assert agents(sqlite_path) == ["new", "old"]


HOLDS = """
import sys
import tempfile
from homeagent import Database
database = Database.open(sys.argv[1])
print("open", flush=True)
sys.stdin.readline()
with database.unit_of_work(read_only=True) as unit:
    print([agent.id for agent in unit.agents.list()])
"""


def test_open_database_is_not_replaced(sqlite_path: Path, backup: Path, children: Children) -> None:
    """If a process has the target or the source open, the restore raises an error; after a crash of it, it works."""
    now = timedelta(0)
    with Database.open(sqlite_path), pytest.raises(errors.DatabaseBusyError, match="is open in"):
        Database.restore(backup, sqlite_path, busy_timeout=now)
    with Database.open(sqlite_path) as database:
        with pytest.raises(errors.DatabaseBusyError, match="is open"):
            Database.restore(sqlite_path, sqlite_path.with_name("copy.db"))
        add_agent(database, "still-locked")
    Database.restore(sqlite_path, sqlite_path.with_name("copy.db"))
    assert agents(sqlite_path.with_name("copy.db")) == ["new", "old", "still-locked"]
    with Database.open(sqlite_path) as database:
        database.agents.delete("still-locked")
    before = listing(sqlite_path.parent)["homeagent.db"]
    holder = children.start(HOLDS, sqlite_path)
    assert holder.stdout.readline() == "open\n"
    with pytest.raises(errors.DatabaseBusyError, match=f"process {holder.pid}|another process"):
        Database.restore(backup, sqlite_path, busy_timeout=now)
    # The file is damaged meanwhile: the in-use lock does not depend on the file's content.
    content = sqlite_path.read_bytes()
    sqlite_path.write_bytes(b"\xff" * len(content))
    with pytest.raises(errors.DatabaseBusyError, match="is open in"):
        Database.restore(backup, sqlite_path, busy_timeout=now)
    sqlite_path.write_bytes(content)
    assert listing(sqlite_path.parent)["homeagent.db"] == before
    assert children.finish_with(holder, "\n") == "['new', 'old']"
    crasher = children.start(HOLDS, sqlite_path)
    assert crasher.stdout.readline() == "open\n"
    crasher.kill()
    crasher.wait()
    Database.restore(backup, sqlite_path, busy_timeout=now)
    assert agents(sqlite_path) == ["old"]


def test_other_programs_are_noticed(sqlite_path: Path, backup: Path, children: Children) -> None:
    """If another program such as the sqlite3 shell has the file open, the restore notices SQLite's locks and raises."""
    script = (
        "import sys\nfrom homeagent.engine.sqlite.dialect import connect\n"
        "raw = connect(sys.argv[1])\nraw.execute('SELECT * FROM agents').fetchall()\n"
        "print('open', flush=True)\nsys.stdin.readline()\n"
    )
    for path, target in ((sqlite_path, sqlite_path), (backup, sqlite_path.parent / "new.db")):
        change(path, "PRAGMA journal_mode=WAL")
        shell = children.start(script, path)
        assert shell.stdout.readline() == "open\n"
        with pytest.raises(errors.DatabaseBusyError, match="another program"):
            Database.restore(backup, target)
        children.finish_with(shell, "\n")


def test_open_waits_for_a_restore(sqlite_path: Path, backup: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a caller opens the database during a restore, it waits and sees the new one, or raises DatabaseBusyError."""
    seen: list[Any] = []
    started = threading.Event()
    stage = restore.stage

    def slowly(*arguments: Any, **named: Any) -> Any:
        with pytest.raises(errors.DatabaseBusyError):
            Database.open(sqlite_path, busy_timeout=timedelta(0))

        def wait() -> None:
            started.set()
            seen.append(agents(sqlite_path))

        waiter = threading.Thread(target=wait)
        waiter.start()
        started.wait(30)
        seen.append(waiter)
        return stage(*arguments, **named)

    monkeypatch.setattr(restore, "stage", slowly)
    Database.restore(backup, sqlite_path)
    seen[0].join(60)
    assert seen[1:] == [["old"]]


@pytest.mark.parametrize("revision", [REVISIONS[0], REVISION])
def test_restore_to_an_empty_place(tmp_path: Path, clock: FakeClock, revision: str) -> None:
    """If no database is in place, the restore creates a private directory, and upgrades a backup of an older schema."""
    path = tmp_path / "elsewhere" / "deep" / "homeagent.db"
    report = Database.restore(ROOT / "tests" / "fixtures" / "revisions" / f"{revision}.db", path, clock=clock)
    assert (report.upgraded_from, report.schema_revision) == (None if revision == REVISION else revision, REVISION)
    assert report.kept_aside is None
    with Database.open(path, migrate=False) as database:
        status = database.status()
    assert (status.epoch, status.restored_at, status.rows["agents"]) == (2, START, 2)
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert {entry.name for entry in path.parent.iterdir()} == {f"homeagent.db{end}" for end in ("", ".lock", ".open")}


def test_backup_on_a_read_only_medium(sqlite_path: Path, backup: Path, tmp_path: Path) -> None:
    """A backup on a read-only medium, in a directory without write permission, can be restored."""
    place = tmp_path / "medium"
    place.mkdir()
    shutil.copy(backup, place / "copy.db")
    shutil.copy(manifest_path(backup), place / "copy.db.json")
    (place / "copy.db").chmod(0o444)
    place.chmod(0o555)
    before = listing(place)
    assert Database.restore(place / "copy.db", sqlite_path).rows["agents"] == 1
    assert listing(place) == before


@pytest.mark.parametrize("in_use", [False, True], ids=["closed", "in use"])
def test_database_in_a_snapshot(sqlite_path: Path, tmp_path: Path, in_use: bool) -> None:
    """A database and its lock files in a read-only snapshot can be the source, unless a process has it open."""
    with Database.open(sqlite_path) as database:
        add_agent(database, "old")
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    if subprocess.run(
        ["mount", "--bind", sqlite_path.parent, snapshot], stderr=subprocess.DEVNULL, check=False
    ).returncode:
        pytest.skip("mounting needs the superuser")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", snapshot], check=True)
        if in_use:
            with Database.open(sqlite_path), pytest.raises(errors.DatabaseBusyError, match="is open"):
                Database.restore(snapshot / sqlite_path.name, tmp_path / "new" / "homeagent.db")
        else:
            report = Database.restore(snapshot / sqlite_path.name, tmp_path / "new" / "homeagent.db")
            assert report.rows["agents"] == 1
    finally:
        subprocess.run(["umount", snapshot], check=True)


def test_disk_without_room_or_with_errors(sqlite_path: Path, backup: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without room for both databases no byte is written; a target that cannot be read is replaced as damaged."""
    before = listing(sqlite_path.parent)
    with monkeypatch.context() as patch, pytest.raises(errors.DiskFullError, match="no room for a second database"):
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
        Database.restore(backup, sqlite_path)
    assert listing(sqlite_path.parent) == before

    def fail(path: Path, **_: Any) -> Any:
        raise errors.DatabaseIOError(f"{path} can't be read")

    monkeypatch.setattr(restore, "inspect_sqlite", fail)
    report = Database.restore(backup, sqlite_path)
    assert (report.readmitted_devices, report.old_secret_devices) == (None, None)
    assert report.kept_aside is not None
    assert agents(sqlite_path) == ["old"]
    assert agents(report.kept_aside) == ["new", "old"]


# kill -9

KILLED = """
import os, signal, sys
from datetime import datetime, timezone
from pathlib import Path

from homeagent import Database
from homeagent.engine.files import locks
from homeagent.engine.sqlite import in_use

backup, database, step = sys.argv[1], sys.argv[2], int(sys.argv[3])
left = step

def counted(function):
    def call(*arguments, **named):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **named)
    return call

# Whatever changes what is on the disk.
for name in ("open", "rename", "replace", "unlink", "fsync", "ftruncate", "write", "mkdir", "fchmod"):
    setattr(os, name, counted(getattr(os, name)))
Database.restore(backup, database, clock=lambda: datetime(2026, 2, 1, tzinfo=timezone.utc))
print("done")
"""


@pytest.mark.parametrize("every", [29, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_restore(
    sqlite_path: Path, backup: Path, tmp_path: Path, every: int, record_property: RecordProperty
) -> None:
    """If a restore over a database with a WAL is killed at any step, the old or the new database is in place."""
    found: Counter[str] = Counter()
    # The old database's last commit is only in its WAL.
    source = tmp_path / "source"
    shutil.copytree(sqlite_path.parent, source)
    with closing(sqlite(source / "homeagent.db")) as raw, closing(sqlite(source / "homeagent.db")) as other:
        other.execute("SELECT 1 FROM agents").fetchall()
        raw.execute("INSERT INTO agents (id, name, workspace_path, created_at) VALUES ('logged', 'L', '/l', 0)")
        shutil.copytree(source, tmp_path / "logged")
    for step in range(0, 1000, every):
        directory = tmp_path / str(step)
        shutil.copytree(tmp_path / "logged", directory)
        path = directory / "homeagent.db"
        child = fork_server.run(KILLED, backup, path, step)
        assert child.returncode in {0, -signal.SIGKILL}, child.stderr
        seen = agents(path)
        with Database.open(path) as database:
            status = database.status()
        kept = [entry for entry in directory.iterdir() if entry.name.endswith(".quarantine")]
        found[seen[0]] += 1
        if seen == ["old"]:
            assert status.epoch == 2
            assert (directory / "homeagent.db.lock").read_text().startswith("initialised, epoch 2")
            assert agents(kept[0]) == ["logged", "new", "old"]
        else:
            # With the commit that was only in its WAL.
            assert seen == ["logged", "new", "old"]
            assert (status.epoch, kept) == (1, [])
        # The next restore works, and leaves no file of the killed restore.
        assert Database.restore(backup, path).epoch == status.epoch + 1
        assert agents(path) == ["old"]
        assert not list(directory.glob("*.restoring*"))
        shutil.rmtree(directory)
        if child.returncode == 0:
            break
    else:
        raise AssertionError("it never came to its end")
    assert found.keys() == {"old", "logged"}
    record_property("restores killed at each step", found.total() - 1)  # the last restore was not killed


def test_intent_of_a_killed_restore(sqlite_path: Path) -> None:
    """An open ignores an incomplete intent, and refuses an intent of a later version."""
    intent, stamp = sqlite_path.with_name("homeagent.db.open"), "20260102T030405678000Z"
    for text in ("swap 2026", f"swap {stamp} 2", "\0\0\0\0"):
        intent.write_text(text)
        intent.chmod(0o600)
        lock = hold_in_use_lock(sqlite_path, timeout=timedelta(0))
        assert lock is not None
        assert intent.read_text() == ""
        lock.release()
    intent.write_text("exchange everything end\n")
    with pytest.raises(errors.CorruptDatabaseError, match="version that began it"):
        Database.open(sqlite_path)


# Owners and permissions

AS_OTHER = """
import os, sys
from homeagent import Database

# Whatever is imported on the way: another user may not enter the folder of the packages.
Database.open(":memory:").close()
os.setuid(int(sys.argv[2]))
with Database.open(sys.argv[1], migrate=False) as database:
    print([agent.id for agent in database.agents.list()])
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only the superuser can become another user")
def test_read_only_directory(backup: Path, others_home: Path, children: Children) -> None:
    """A database in a directory without write permission can be read, although no lock file can be created."""
    path = others_home / "homeagent.db"
    shutil.copy(backup, path)
    path.chmod(0o400)
    os.chown(path, STRANGER, STRANGER)
    others_home.chmod(0o500)
    assert children.run(AS_OTHER, path, STRANGER) == "['old']"
    assert [entry.name for entry in others_home.iterdir()] == ["homeagent.db"]
